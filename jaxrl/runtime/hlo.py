"""What a compiled program does, from its HLO text: matrix FLOPs, collectives, the compiler's cycle estimates.

`compiled.cost_analysis()` counts the body of a loop once, however often it runs, and its `optimal_seconds`
can even be negative on TPU. Here every computation is counted as often as it is called: the trip count of a
`while` is taken from the compiler's annotation, else from its condition (`i < constant`) and its body
(`i + step`), else from the caller (`loop_trips`: a decode loop ends when its rows do).
"""

from __future__ import annotations

import collections
import dataclasses
import re

import numpy as np

_BYTES = {"pred": 1, "token": 0, "c64": 8, "c128": 16}  # of all others the name says the bits
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|body|branch_computations|called_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_PLACED = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*\[[0-9,]*\])(\{[^}]*\})?")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota")
_SLICES = ("slice", "dynamic-slice", "gather")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str  # the text between the opcode's parentheses
    attributes: str
    root: bool


@dataclasses.dataclass
class Counts:
    """Totals of one run of a program on one chip.

    flops: of matrix products (an elementwise operation is never what limits these programs). cycles: the
    compiler's own estimates where it gives one (TPU). collectives: kind -> [times run, payload bytes]; the
    payload is the larger side, so the bytes after an all-gather and before a reduce-scatter.
    blocking_bytes: payload of the collectives that the compiler did not make asynchronous.
    bytes: read from and written to main memory, tile padding aside. A slice counts as what it takes, an update in
    place as what it writes, and what lies in a TPU's vector memory not at all.
    kernels: name of a hand-written kernel -> times run. kernel_flops: theirs, as far as known here; the
    compiler has no cycle estimate for them. Not part of `flops`.
    unknown_loops: names of loops whose count came from `loop_trips`.
    """

    flops: float = 0.0
    cycles: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    blocking_bytes: float = 0.0
    kernel_flops: float = 0.0
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    channels: set[str] = dataclasses.field(default_factory=set)  # collectives seen inside fusions

    @property
    def collective_count(self) -> float:
        return sum(n for n, _ in self.collectives.values())

    @property
    def collective_bytes(self) -> float:
        return sum(b for _, b in self.collectives.values())


def count(text: str, loop_trips: float = 1) -> Counts:
    """Counts of `compiled.as_text()`. loop_trips: iterations to assume where the text does not tell them."""
    computations, entry = parse(text)
    totals = Counts()
    _walk(computations, entry, 1.0, loop_trips, totals, fused=False)
    return totals


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """(computation name -> instruction name -> Instruction, name of the entry computation)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, lines = "", None, []
    for line in text.splitlines():
        if current is None:
            match = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            if match:
                current, lines = computations.setdefault(match[2], {}), []
                entry = match[2] if match[1] else entry
        elif line.startswith("  "):
            lines.append(line)
        elif re.fullmatch(r"\}(, execution_thread=.*)?", line):
            found = filter(None, map(_instruction, lines))
            current.update((instruction.name, instruction) for instruction in found)
            current = None
        elif lines:  # attributes with a line break in them (kernel metadata)
            lines[-1] += line
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end():]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match[2], shape, rest[:opening], operands, inside, rest[closing + 1 :], bool(match[1]))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _dims(shape: str) -> list[int]:
    """Dimensions of the first array in a shape."""
    return [int(d) for d in _ARRAY.search(shape)[2].split(",") if d]


def shape_bytes(shape: str) -> float:
    """Bytes of an array shape, or of all arrays of a tuple shape, without the padding of tiled layouts."""
    total = 0.0
    for kind, dims in _ARRAY.findall(shape):
        bits = re.search(r"\d+", kind)
        size = _BYTES[kind] if kind in _BYTES else int(bits[0]) / 8
        total += size * np.prod([int(d) for d in dims.split(",") if d], dtype=np.float64)
    return total


def _walk(computations, name, times, loop_trips, totals: Counts, fused: bool):
    body = computations[name]
    for op in body.values():
        kind = op.opcode.removesuffix("-start")
        if op.opcode in ("dot", "convolution"):
            flops = _dot_flops(op, body) if op.opcode == "dot" else _convolution_flops(op, body)
            totals.flops += times * flops
        elif kind in COLLECTIVES and not (fused and _seen(op, totals.channels)):
            sides = [shape_bytes(body[o].shape) for o in op.operands if o in body]
            arrays = [shape_bytes(f"{k}[{d}]") for k, d in _ARRAY.findall(op.shape)]
            payload = max(sum(sides), sum(arrays) - (sum(sides) if op.opcode.endswith("-start") else 0))
            entry = totals.collectives.setdefault(kind, [0.0, 0.0])
            entry[0] += times
            entry[1] += times * payload
            totals.blocking_bytes += 0 if op.opcode.endswith("-start") or fused else times * payload
        elif op.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
            if target and target[1] == "tpu_custom_call":
                totals.kernels[op.name.split(".")[0]] += times
                totals.kernel_flops += times * _kernel_flops(op, body)
        if not fused:
            totals.bytes += times * _memory_bytes(computations, body, op)
        if not fused and (cycles := re.search(r'"estimated_cycles":"(\d+)"', op.attributes)):
            totals.cycles += times * int(cycles[1])
        trips = 1.0
        if op.opcode == "while":
            trips = _trip_count(computations, body, op)
            if trips is None:
                trips = loop_trips
                totals.unknown_loops.append(op.name)
        groups = _CALLED.findall(op.attributes)
        called = [name.strip(" %") for group in groups for name in group.strip("{}").split(",")]
        if op.opcode == "conditional":
            called = [max(called, key=lambda c: _weight(computations, c, loop_trips))]
        for c in called:
            _walk(computations, c, times * trips, loop_trips, totals, fused or op.opcode == "fusion")


def _main_bytes(shape: str) -> float:
    """Bytes of the arrays of a shape that are in main memory; S(n) in a layout is another memory of the chip."""
    return sum(shape_bytes(array) for array, layout in _PLACED.findall(shape) if "S(" not in layout)


def _memory_bytes(computations, body, op: Instruction) -> float:
    """Main-memory traffic of one run of an instruction that is not inside a fusion."""
    if op.opcode in _FREE or op.opcode.endswith("-done") or op.opcode == "async-start":
        return 0.0  # an asynchronous computation is counted where it is written down
    if op.opcode == "custom-call" and re.search(r'"(ConcatBitcast|ZeroCrop|AllocateBuffer)"', op.attributes):
        return 0.0
    operands = [body[o].shape if o in body else "" for o in op.operands]
    if op.opcode == "fusion":
        return _fusion_bytes(computations[_CALLED.search(op.attributes)[1].strip("%")], operands, op.shape)
    if op.opcode in _SLICES:
        return (shape_bytes(op.shape) if _main_bytes(operands[0]) else 0.0) + _main_bytes(op.shape)
    if op.opcode == "dynamic-update-slice":
        return _main_bytes(operands[1]) + (shape_bytes(operands[1]) if _main_bytes(op.shape) else 0.0)
    if op.opcode.endswith("-start") and op.shape.startswith("("):  # both sides in one tuple
        return _main_bytes(op.shape)
    return sum(map(_main_bytes, operands)) + _main_bytes(op.shape)


def _fusion_bytes(inside, operands: list[str], shape: str) -> float:
    """Traffic of a fusion: an operand that is only sliced counts as the slices, one updated in place not at all."""
    total, users = 0.0, collections.defaultdict(list)
    for op in inside.values():
        for at, name in enumerate(op.operands):
            users[name].append((at, op))

    def source(op):
        while op.opcode == "bitcast" and op.operands:
            op = inside[op.operands[0]]
        return op

    def uses(name):
        for at, op in users[name]:
            yield from uses(op.name) if op.opcode == "bitcast" else [(at, op)]

    for op in inside.values():
        if op.opcode == "parameter" and _main_bytes(operands[int(op.inside)]):
            read = 0.0
            for at, user in uses(op.name):
                if user.opcode in _SLICES and at == 0:
                    read += shape_bytes(user.shape)
                elif user.opcode != "dynamic-update-slice" or at:
                    read = float("inf")
            total += min(read, _main_bytes(operands[int(op.inside)]))
    root = source(next(op for op in inside.values() if op.root))
    parts = [source(inside[o]) for o in root.operands] if root.opcode == "tuple" else [root]
    for part, (array, layout) in zip(parts, _PLACED.findall(shape), strict=False):
        update = part.opcode == "dynamic-update-slice"
        total += 0.0 if "S(" in layout else shape_bytes(inside[part.operands[1]].shape if update else array)
    return total


def _kernel_flops(op: Instruction, body) -> float:
    """Splash attention by its name and its operands q [..., T, H], k [..., S, H]: causal: half of T x S."""
    match = re.match(r"splash\w*?_(fwd|dkv|dq)", op.name)
    if not match:
        return 0.0
    products = {"fwd": 2, "dkv": 4, "dq": 3}[match[1]]
    floats = [_dims(body[o].shape) for o in op.operands if o in body and body[o].shape[0] in "bf"]
    return products * np.prod(floats[0], dtype=np.float64) * floats[1][-2]


def _seen(op: Instruction, channels: set[str]) -> bool:
    """TPU spreads one asynchronous collective over several fusions with its channel: count it once."""
    channel = re.search(r"channel_id=(\d+)", op.attributes)
    known = channel is not None and channel[1] in channels
    channels |= {channel[1]} if channel else set()
    return known


def _weight(computations, name, loop_trips) -> float:
    totals = Counts()
    _walk(computations, name, 1.0, loop_trips, totals, fused=False)
    return totals.flops + totals.cycles + totals.collective_bytes


def _constant(body, name) -> int | None:
    """Integer value of an instruction, through copies and conversions; None if it is not a constant."""
    op = body.get(name)
    while op is not None and op.opcode in ("copy", "convert", "bitcast") and op.operands:
        op = body.get(op.operands[0])
    if op is None or op.opcode != "constant" or not re.fullmatch(r"-?\d+", op.inside):
        return None
    return int(op.inside)


def _trip_count(computations, caller, loop: Instruction) -> float | None:
    if known := re.search(r'known_trip_count\D*?(\d+)', loop.attributes):
        return float(known[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
    body = computations[re.search(r"body=%?([\w.\-]+)", loop.attributes)[1]]
    test = next(op for op in condition.values() if op.root)
    if test.opcode == "fusion":  # read the compare inside, with the fusion's operands for its parameters
        fused = computations[_CALLED.search(test.attributes)[1].strip("%")]
        outer = {op.name: test.operands[int(op.inside)] for op in fused.values() if op.opcode == "parameter"}
        test = next(op for op in fused.values() if op.root)
        test = dataclasses.replace(test, operands=tuple(outer.get(o, o) for o in test.operands))
        condition = {**fused, **condition}
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = condition.get(test.operands[0]), _constant(condition, test.operands[1])
    if limit is None or counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])
    result = next(op for op in body.values() if op.root)
    step, op = 0, body.get(result.operands[index]) if result.opcode == "tuple" else None
    while op is not None and op.opcode in ("add", "copy"):
        constants = [c for o in op.operands if (c := _constant(body, o)) is not None]
        step += sum(constants)
        op = next((body[o] for o in op.operands if o in body and _constant(body, o) is None), None)
    init = caller.get(loop.operands[0]) if loop.operands else None
    start = _constant(caller, init.operands[index]) if init is not None and init.opcode == "tuple" else None
    return float(max(0, -(-(limit - (start or 0)) // (step or 1))))


def _dot_flops(op: Instruction, body) -> float:
    lhs = _dims(body[op.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", op.attributes)[1]
    size = np.prod([lhs[int(d)] for d in contracted.split(",") if d], dtype=np.float64)
    return 2.0 * size * np.prod(_dims(op.shape), dtype=np.float64)


def _convolution_flops(op: Instruction, body) -> float:
    """TPU writes every matrix product as a convolution, batch dimensions included, as dilated windows."""
    lhs, rhs = (_dims(body[o].shape) for o in op.operands[:2])
    out = _dims(op.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def numbers(key, default):
        values = fields[key].split("x") if key in fields else [default] * len(sizes)
        return [int(str(v).split("_")[0]) for v in values]

    sizes = [int(v) for v in fields["size"].split("x")] if "size" in fields else []
    stride, pad = numbers("stride", 1), numbers("pad", 0)
    lhs_dilate, rhs_dilate = numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)
    # rhs "i" is already the size per feature group
    flops = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * rhs[labels[2].index("i")]
    for d, size in enumerate(sizes):  # pairs of window and output positions that meet an input element
        at = np.arange(out[labels[3].index(str(d))])[:, None] * stride[d]
        at = at + np.arange(size)[None] * rhs_dilate[d] - pad[d]
        last = (lhs[labels[1].index(str(d))] - 1) * lhs_dilate[d]
        flops *= np.count_nonzero((at >= 0) & (at <= last) & (at % lhs_dilate[d] == 0))
    return flops
