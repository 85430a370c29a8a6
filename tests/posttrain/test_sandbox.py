"""Programs that want out, or more than they may have: each is contained, for root and for an ordinary user."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsjax.posttrain.rewards import sandbox
from dsjax.posttrain.rewards.sandbox import Bounds, SandboxError, run_python

HERE = Path(__file__).parent / "hostile"
PROGRAMS = sorted(HERE.glob("*.py"))
BOUNDS = Bounds(seconds=2, memory_mib=300, processes=16, files_mib=16, output_bytes=10_000)
TIME = {"endless_loop", "sleeps", "ignores_signals", "stops_itself", "closes_its_output", "fork_bomb"}
OTHER = {"output_flood": "output"}

if shutil.which("bwrap") is None:
    pytest.skip("bubblewrap is not installed", allow_module_level=True)

# What runs the corpus as an ordinary user, if the tests run as root: it takes what it needs, and then drops all rights.
AS_NOBODY = """
import json, os, sys
from dataclasses import asdict
from dsjax.posttrain.rewards.sandbox import Bounds, run_python
programs, given, bounds = json.load(sys.stdin)
os.setgroups([]), os.setgid(65534), os.setuid(65534)
print(json.dumps([asdict(run_python(p, given, Bounds(**bounds))) for p in programs]))
"""


@pytest.fixture(scope="module")
def port():
    """Where somebody listens on this machine."""
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as other:
        server.bind(("127.0.0.1", 0))
        server.listen()
        number = server.getsockname()[1]
        other.bind(f"\0dsjax-test-{number}")
        other.listen()
        yield number


def run_as_nobody(programs: list[str], given: str) -> list[sandbox.Outcome]:
    asked = json.dumps([programs, given, vars(BOUNDS)])
    done = subprocess.run([sys.executable, "-c", AS_NOBODY], input=asked, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [sandbox.Outcome(**outcome) for outcome in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def outcomes(port):
    """Of every program, by who ran it."""
    given, texts = f"{port}\n", [path.read_text() for path in PROGRAMS]
    by_user = {"us": [run_python(text, given, BOUNDS) for text in texts]}
    if os.geteuid() == 0:
        by_user["nobody"] = run_as_nobody(texts, given)
    return {user: dict(zip([path.stem for path in PROGRAMS], of_user)) for user, of_user in by_user.items()}


@pytest.mark.slow
@pytest.mark.parametrize("user", ["us", "nobody"])
@pytest.mark.parametrize("name", [path.stem for path in PROGRAMS])
def test_a_hostile_program_is_contained(outcomes, name, user):
    if user not in outcomes:
        pytest.skip("these tests are run by an ordinary user")
    outcome = outcomes[user][name]
    assert outcome.seconds < BOUNDS.seconds + sandbox._STARTING_S + 2
    assert len(outcome.output) <= BOUNDS.output_bytes and "escaped" not in outcome.output
    if name in TIME:
        assert outcome.reason == "time"
    elif name in OTHER:
        assert outcome.reason == OTHER[name]
    elif name not in ("kills_others", "survives"):
        assert outcome.output.startswith("refused"), outcome


@pytest.mark.slow
def test_nothing_is_left_behind(outcomes):
    def survivors():
        lines = (p / "cmdline" for p in Path("/proc").iterdir() if p.name.isdigit())
        return [line for line in lines if line.exists() and b"dsjax-survivor" in line.read_bytes()]

    end = time.monotonic() + 5
    while survivors() and time.monotonic() < end:
        time.sleep(0.05)
    assert not survivors()
    assert not Path("/tmp/dsjax-escaped").exists() and not list(Path("/usr").glob("escaped*"))


def test_a_program_gets_its_input_and_its_output_is_read():
    many = " ".join(map(str, range(50_000)))
    outcome = run_python("print(sum(map(int, input().split())))", many + "\n")
    assert (outcome.reason, outcome.code, outcome.output) == ("exit", 0, f"{sum(range(50_000))}\n")
    assert run_python("raise SystemExit(3)").code == 3
    assert run_python("1/0").code == 1 and run_python("1 +").code == 1
    ignored = run_python("print('é')", "x" * (1 << 22))
    assert (ignored.reason, ignored.output) == ("exit", "é\n")
    assert run_python("import sys; sys.stdout.buffer.write(b'\\xff')").output == "\ufffd"
    assert run_python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").reason == "signal"


def test_without_a_sandbox_nothing_runs(monkeypatch):
    sandbox.check.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SandboxError, match="install bubblewrap"):
        run_python("print(1)")
    monkeypatch.undo()
    broken = ["/bin/sh", "-c", "echo no namespaces here >&2; exit 1"]
    monkeypatch.setattr(sandbox, "_command", lambda bounds: broken)
    with pytest.raises(SandboxError, match="bwrap makes none here"):
        run_python("print(1)")
    sandbox.check.cache_clear()
