"""The house's rules: modules are values, no import runs upward, and importing costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("dsjax", "sharding", "pallas_kernels", "configs")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

# What a room may import besides itself. `dsjax.X` stands for all inside it.
FLOORS = {
    "pallas_kernels": (),
    "sharding": ("pallas_kernels",),
    "dsjax": (),
    "dsjax.files": (),
    "dsjax.config": ("dsjax.files",),
    "dsjax.state": (),
    "configs": ("dsjax.config",),
    "dsjax.precision": ("dsjax.config", "pallas_kernels"),
    "dsjax.nn": ("dsjax.config", "dsjax.precision", "sharding", "pallas_kernels"),
}
FLOORS["dsjax.model"] = (*FLOORS["dsjax.nn"], "dsjax.nn", "dsjax.state")
MODEL = (*FLOORS["dsjax.model"], "dsjax.model", "dsjax.files")
FLOORS |= {f"dsjax.{room}": MODEL for room in ("train", "infer", "data", "plan", "hub")}
FLOORS["dsjax.claims"] = ("dsjax.config", "dsjax.files", "dsjax.data", "dsjax.hub", "dsjax.infer", "dsjax.train")
FLOORS["dsjax.claims"] += ("dsjax.posttrain", "dsjax.plan")
FLOORS["dsjax.posttrain"] = (*MODEL, "dsjax.infer", "dsjax.train")
# What rooms that stand beside each other have opened to one another.
DOORS = {
    "dsjax.train": ("dsjax.data", "dsjax.infer", "dsjax.plan"),
    "dsjax.infer": ("dsjax.data", "dsjax.hub", "dsjax.train"),
    "dsjax.hub": ("dsjax.data", "dsjax.train"),
    "dsjax.plan": ("dsjax.train",),
    "dsjax.posttrain": ("dsjax.data", "dsjax.hub", "dsjax.plan"),
    "dsjax": ("dsjax.hub",),  # dsjax.load, on first use
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {module_name(path) for path in FILES}
    ours = {name if name in modules else name.rpartition(".")[0] for name in found}
    return ours & modules


def room_of(module: str) -> str:
    return ".".join(module.split(".")[: 2 if module.startswith("dsjax.") else 1])


def test_modules_are_values():
    """No module assigns to itself outside __init__."""
    for path in [*(ROOT / "dsjax/model").glob("*.py"), ROOT / "dsjax/nn.py"]:
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            if function.name == "__init__":
                continue
            for node in ast.walk(function):
                targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [getattr(node, "target", None)]
                for target in (part for t in targets if t is not None for part in ast.walk(t)):
                    written = isinstance(target, ast.Attribute) and not isinstance(target.ctx, ast.Load)
                    assert not written, f"{path}:{node.lineno} assigns to an attribute"
                if isinstance(node, ast.Call):
                    assert getattr(node.func, "id", "") != "setattr", f"{path}:{node.lineno} calls setattr"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_import_runs_upward(path):
    room = room_of(module_name(path))
    if room == "dsjax.cli":  # the roof
        return
    allowed = {room, *FLOORS[room], *DOORS.get(room, ())}
    upward = {name for name in imports(path) if room_of(name) not in allowed}
    assert not upward, f"{module_name(path)} imports {sorted(upward)}"


def test_no_two_files_import_each_other():
    graph = {module_name(path): imports(path) - {module_name(path)} for path in FILES}
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, f"a circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_importing_dsjax_costs_at_most_half_a_second_more_than_jax_and_brings_no_flax():
    script = """
import sys, time
import jax
start = time.perf_counter()
import dsjax
print(time.perf_counter() - start, "flax" in sys.modules)
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert min(float(seconds) for seconds, _ in runs) <= 0.5
    assert {flax for _, flax in runs} == {"False"}
