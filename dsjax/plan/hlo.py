"""What a compiled program moves and computes, from its optimised HLO text: every number is of one device and one run.

Loops count as often as they turn: XLA's own cost analysis counts a loop's body once, and our layers are a loop.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {"pred": 1, "bf16": 2, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_EXPERTS_KERNELS = "grouped_matmul", "grouped_swiglu", "scaled_matmul", "ragged-dot"  # how their names begin
_APPLIED = ("all-reduce", "all-reduce-start", "reduce-scatter", "reduce", "scatter", "sort", "reduce-window", "map")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its result's type, what it does, to what, and the rest of the line as it stands."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program: `bytes` is what one device sends in one run, `times` how often it runs."""

    kind: str
    axes: tuple[str, ...]  # mesh axes that its groups span
    size: int  # devices in a group
    times: int
    bytes: int  # of all times together
    largest: int  # bytes of the largest array it makes, in one run
    where: str  # the compiler's op_name


class Program:
    """A module's computations by name, and how often each runs."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        here: dict[str, Instruction] | None = None
        for line in _lines(text):
            if here is None:
                opened = _COMPUTATION.match(line)
                if opened:
                    here = self.computations.setdefault(opened[2], {})
                    self.entry = opened[2] if opened[1] else self.entry
            elif line == "}" or line.startswith("}, execution_thread="):  # the latter: of a SparseCore
                here = None
            elif instruction := _parse(line):
                here[instruction.name] = instruction
        self.times = self._count()

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) of all that run."""
        for name, times in self.times.items():
            for instruction in self.computations[name].values():
                yield name, instruction, times

    def operand_types(self, computation: str, instruction: Instruction) -> list[str]:
        """Types of its operands, which the text names and does not repeat."""
        known = self.computations[computation]
        return [known[name].type for name in instruction.operands if name in known]

    def loops(self) -> list[tuple[str, int]]:
        """(op_name, turns) of every loop that runs."""
        return [(_op_name(i), self.turns(c, i)) for c, i, _ in self.instructions() if i.opcode == "while"]

    def turns(self, computation: str, loop: Instruction) -> int:
        """How often a loop turns: as XLA notes it, or from `i < n` in its condition; 1 where neither is there."""
        noted = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.rest)
        if noted:
            return int(noted[1])
        condition = self.computations.get(_called(loop, "condition"), {})
        compare = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.rest]
        limits = [
            int(constant[1])
            for i in compare
            for name in i.operands[1:]
            if name in condition and (constant := re.match(r"constant\((\d+)\)", condition[name].rest))
        ]
        return limits[0] - self._start(computation, loop) if len(limits) == 1 else 1

    def _start(self, computation: str, loop: Instruction) -> int:
        """What a loop's counter, the first of what it carries, is at the start: 0 unless the text says otherwise."""
        known = self.computations[computation]
        carried = known.get(loop.operands[0]) if loop.operands else None
        first = known.get(carried.operands[0]) if carried is not None and carried.operands else None
        while first is not None and first.opcode in ("copy", "bitcast") and first.operands:
            first = known.get(first.operands[0])
        constant = first and re.match(r"constant\((\d+)\)", first.rest)
        return int(constant[1]) if constant else 0

    def _count(self) -> dict[str, int]:
        times: dict[str, int] = {}

        def visit(name: str, n: int) -> None:
            if name not in self.computations:
                return
            times[name] = times.get(name, 0) + n
            for instruction in self.computations[name].values():
                turns = self.turns(name, instruction) if instruction.opcode == "while" else 1
                for callee in _callees(instruction):
                    visit(callee, n * turns)

        visit(self.entry, 1)
        return times


def collectives(program: Program, axes: tuple[str, ...], sizes: tuple[int, ...]) -> list[Collective]:
    """Every collective of a program on a mesh of these axes, whose devices are numbered in the order of the mesh.

    XLA:TPU cuts a collective into pieces under other work, which share a chain_id: they count once. An all-reduce in
    a fusion named all-reduce-scatter ends as a reduce-scatter.
    """
    found, chains = [], set()
    for computation, instruction, times in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        chain = re.search(r'chain_id="(\d+)"', instruction.rest)
        if chain:
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        members = groups(instruction.rest, math.prod(sizes))
        size, spanned = len(members[0]), _spanned(members, axes, sizes)
        if size == 1:
            continue
        operands = program.operand_types(computation, instruction)
        operands = operands[:1] if kind == "ragged-all-to-all" else operands
        given = sum(map(type_bytes, operands))
        sent = _sent(kind, given, size)
        largest = max(map(type_bytes, operands), default=0) * (size if kind == "all-gather" else 1)
        found.append(Collective(kind, spanned, size, times, round(sent * times), round(largest), _op_name(instruction)))
    return found


def groups(text: str, n_devices: int) -> np.ndarray | list[list[int]]:
    """The groups of devices of a collective, in any of the ways that HLO writes them."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])] or [[0]]
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        written = [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return written or [list(range(n_devices))]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(found[2], found[3]).reshape(_numbers(found[1]))
    if found := re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}", text):
        return _mesh_groups(found[1], found[2], found[3])
    return [list(range(n_devices))]


def flops(program: Program) -> float:
    """Floating point operations of all matrix products, those of kernels at all their rows."""
    total = 0.0
    for computation, instruction, times in program.instructions():
        types = program.operand_types(computation, instruction)
        if instruction.opcode in ("dot", "convolution") and len(types) >= 2:
            total += times * _product_flops(instruction, types)
        elif instruction.opcode == "custom-call" and instruction.name.startswith(_EXPERTS_KERNELS):
            total += times * _ragged_flops(instruction, types)
    return total


def estimated_cycles(program: Program) -> int:
    """The compiler's estimate of all that has one; kernels and waits for the network have none."""
    return sum(
        times * int(found[1])
        for _, instruction, times in program.instructions()
        if (found := re.search(r'"estimated_cycles":"?(\d{1,18})\b', instruction.rest))  # 2**63 - 1: it knows none
    )


def by_axis(found: list[Collective]) -> dict[str, int]:
    """Bytes a device sends a step, by the mesh axes crossed: {"fsdp": ..., "data+fsdp": ...}, largest first."""
    total: dict[str, int] = {}
    for c in found:
        name = "+".join(c.axes)
        total[name] = total.get(name, 0) + c.bytes
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def type_bytes(text: str) -> float:
    """Bytes of a type, of all parts of a tuple, without padding."""
    return sum(math.prod(dims) * _element_bytes(kind) for kind, dims in arrays(text))


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array in a type."""
    return [(kind, _numbers(dims)) for kind, dims in _ARRAY.findall(text)]


def _lines(text: str) -> Iterator[str]:
    """Lines as meant: some kernels' attributes are JSON with line breaks, which stand at the left edge."""
    whole = ""
    for line in text.splitlines():
        if (
            whole.startswith(" ")
            and line[:1] not in ("", " ", "%")
            and not re.match(r"\}(?:$|, execution_thread=)", line)
        ):
            whole += line
            continue
        if whole:
            yield whole
        whole = line
    yield whole


def _parse(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    end = _type_end(line, found.end())
    opcode, opened, rest = line[end + 1 :].partition("(")
    if not opened:
        return None
    # Only the operands' own parentheses close here: layouts such as {1,0:T(8,128)} may stand between.
    depth, stop = 1, 0
    for stop, letter in enumerate(rest):  # noqa: B007
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            break
    operands = tuple(re.findall(r"%([\w.-]+)", rest[:stop]))
    keep = f"{opcode}({rest[: stop + 1]}" if opcode == "constant" else rest[stop + 1 :]
    return Instruction(found[1], line[found.end() : end], opcode, operands, keep)


def _type_end(line: str, start: int) -> int:
    """Where the type that starts there ends: at the space after it, or after a tuple's last parenthesis."""
    if line[start] != "(":
        return line.find(" ", start)
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i + 1
    return len(line)


def _called(instruction: Instruction, role: str) -> str:
    return next((name for found, name in _CALLED.findall(instruction.rest) if found == role), "")


def _callees(instruction: Instruction) -> list[str]:
    if instruction.opcode in _APPLIED or instruction.opcode.endswith(("-update", "-done")):
        return []  # what is applied to elements is counted with the whole; an asynchronous call, where it starts
    names = [name for _, name in _CALLED.findall(instruction.rest)]
    for several in _CALLED_LISTS.findall(instruction.rest):
        names += [name.strip().lstrip("%") for name in several.split(",")]
    return names


def _op_name(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1] if found else ""


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n) if text else ()


def _element_bytes(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    return int(re.match(r"[a-z](\d+)", kind)[1]) / 8


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _mesh_groups(mesh: str, device_ids: str | None, over: str) -> np.ndarray:
    """mesh['a'=2,'b'=4] {'b'}: groups along the axes named, of which 'b':(1)2 takes the part of 2 after the first 1."""
    names = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)]
    sizes = [size for _, size in names]
    ids = np.arange(math.prod(sizes))
    if device_ids:
        found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
        ids = _iota(found[1], found[2]) if found else np.array(_numbers(device_ids))
    cut, taken = [], []  # every axis as (before, part, after)
    parts = {name: (int(pre or 1), int(size) if size else None) for name, pre, size in
             re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)}  # fmt: skip
    for name, size in names:
        before, part = parts.get(name, (1, 1))
        part = size // before if part is None else part
        cut += [before, part, size // (before * part)]
        taken.append(len(cut) - 2)
    kept = [i for i in range(len(cut)) if i not in taken]
    return ids.reshape(cut).transpose(kept + taken).reshape(-1, math.prod(cut[i] for i in taken))


def _spanned(members, axes: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[str, ...]:
    """Axes along which the members of a group differ."""
    differ = set()
    for group in members:
        places = np.array(np.unravel_index(np.asarray(group), sizes))
        differ |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(axes[i] for i in sorted(differ))


def _sent(kind: str, given: float, size: int) -> float:
    """Bytes that a device sends, of `given` bytes of operands, by the ring (or all pairs) that is optimal."""
    if kind == "all-gather":
        return given * (size - 1)
    if kind == "all-reduce":
        return 2 * given * (size - 1) / size
    if kind in ("collective-permute", "collective-broadcast"):
        return given
    return given * (size - 1) / size


def _product_flops(instruction: Instruction, types: list[str]) -> float:
    (_, out), (_, left), (_, right) = arrays(instruction.type)[0], arrays(types[0])[0], arrays(types[1])[0]
    if instruction.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        contracted = math.prod(left[i] for i in _numbers(dims[1])) if dims else 1
        return 2.0 * math.prod(out) * contracted
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if not labels:
        return 0.0
    # Every element of the kernel meets each output, except along the kernel's own output features and where it meets
    # padding: XLA:TPU writes batches of products and products by head as windows that touch one real element each.
    met = math.prod(out) * right[labels[2].index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    for nth, letter in enumerate(sorted(letter for letter in labels[2] if letter.isdigit())):
        from_, to = left[labels[1].index(letter)], out[labels[3].index(letter)]
        met *= _real_taps(from_, to, {name: text.split("x")[nth] for name, text in fields.items()}) / to
    return 2.0 * met


def _real_taps(n: int, n_out: int, window: dict[str, str]) -> int:
    """How often, along one dimension, a window over n elements meets one of them and not padding, over all outputs."""
    size, stride, left_gap, right_gap = (
        int(window.get(name, 1)) for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window.get("pad", "0_0").split("_")[0])
    place = np.arange(n_out)[:, None] * stride + np.arange(size) * right_gap - before
    return int(np.sum((place >= 0) & (place % left_gap == 0) & (place // left_gap < n)))


def _ragged_flops(instruction: Instruction, types: list[str]) -> float:
    """Of XLA:TPU's kernels and ours: [M, K] x [E, K, N] -> [M, N], or [M, K] x [M, N] -> [E, K, N]; twice the former
    where it is gate and up. Other operands, as scales, stand behind the first."""
    shapes = [dims for text in types for _, dims in arrays(text) if len(dims) > 1]
    out = arrays(instruction.type)[0][1]
    if len(shapes) < 2 or len(out) < 2:
        return 0.0
    rows, k = shapes[0]
    return 2.0 * rows * k * out[-1] * (2 if instruction.name.startswith("grouped_swiglu") else 1)
