"""What a compiled program does, from its HLO text: matrix FLOPs, memory traffic, collectives, cycle estimates.

`compiled.cost_analysis()` counts the body of a loop once, however often it runs, its `optimal_seconds` can even be
negative on TPU, and without a card it is empty on GPU. Here every computation is counted as often as it is called: the
trip count of a `while` is taken from the compiler's annotation, else from its condition (`i < constant`) and its body
(`i + step`), else from the caller (`loop_trips`: a decode loop ends when its rows do).
"""

from __future__ import annotations

import collections
import dataclasses
import re

import numpy as np

_BYTES = {"pred": 1, "token": 0, "c64": 8, "c128": 16}  # names of all other types contain their bits
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|body|branch_computations|called_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_PLACED = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*\[[0-9,]*\])(\{[^}]*\})?")
_CONTROL = ("while", "conditional", "call")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", *_CONTROL)
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place -> which operand is written
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
    blocking: how often and with how many payload bytes the compiler did not make a collective asynchronous.
    far, far_blocking: of the payload, the bytes that a chip sends to other slices (see `count`); they are in
    `collectives`, but not in `blocking`.
    bytes: read from and written to main memory, tile padding aside. A slice counts as what it takes, an update in
    place as what it writes. Data in a TPU's vector memory does not count.
    kernels: name of a hand-written kernel -> times run. kernel_flops: theirs, as far as known here; the
    compiler has no cycle estimate for them. Not part of `flops`. kernel_bytes: of `bytes`, those of a TPU's kernels
    whose FLOPs are not known.
    work: the operations that run one after another, without collectives: (times run, FLOPs in all, of them in
    hand-written kernels, bytes in all).
    unknown_loops: names of loops whose count came from `loop_trips`.
    """

    flops: float = 0.0
    cycles: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    blocking: tuple[float, float] = (0.0, 0.0)
    far: float = 0.0
    far_blocking: float = 0.0
    kernel_flops: float = 0.0
    kernel_bytes: float = 0.0
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    work: list[tuple[float, float, float, float]] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    @property
    def collective_count(self) -> float:
        return sum(n for n, _ in self.collectives.values())

    @property
    def collective_bytes(self) -> float:
        return sum(b for _, b in self.collectives.values())


def count(text: str, loop_trips: float = 1, slices: tuple[int, ...] = ()) -> Counts:
    """Counts of `compiled.as_text()`.

    loop_trips: iterations to assume where the text does not tell them. slices: the slice (or host of GPUs) of each
    device in the mesh's order; a collective between several of them crosses the network. () is one slice.
    """
    computations, entry = parse(text)
    reader = _Reader(computations, loop_trips, slices)
    reader.walk(entry, 1.0)
    return reader.totals


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


class _Reader:
    """Walks the computations from the entry on and adds up what they do."""

    def __init__(self, computations, loop_trips: float, slices: tuple[int, ...]):
        self.computations, self.loop_trips, self.slices = computations, loop_trips, slices
        self.totals = Counts()
        self.channels: set[str] = set()  # collectives seen inside fusions

    def walk(self, name: str, times: float, fused: bool = False, started: bool = False) -> None:
        """Add `times` runs of a computation. fused: inside a fusion, whose traffic and cycles are counted outside.
        started: run asynchronously."""
        totals, body = self.totals, self.computations[name]
        for op in body.values():
            flops, kernel_flops = totals.flops, totals.kernel_flops
            kind = op.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                self.collective(op, body, kind, times, fused=fused, started=started)
            elif op.opcode == "send" and "_xla_megascale_transfer_type" in op.attributes:
                self.between_slices(body[op.operands[0]].shape, times)
            elif op.opcode == "dot":
                totals.flops += times * _dot_flops(op, body)
            elif op.opcode == "convolution":
                totals.flops += times * _convolution_flops(op, body)
            elif op.opcode == "custom-call":
                self.custom_call(op, body, times)
            for called in self.called(op):
                trips = self.trips(op, body) if op.opcode == "while" else 1.0
                alone = op.opcode == "async-start" and '"is_sync":true' not in op.attributes
                self.walk(called, times * trips, fused or op.opcode == "fusion", started or alone)
            if fused:
                continue
            traffic = times * _memory_bytes(self.computations, body, op)
            totals.bytes += traffic
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', op.attributes):
                totals.cycles += times * int(cycles[1])
            elif '"tpu_custom_call"' in op.attributes and kernel_flops == totals.kernel_flops:
                totals.kernel_bytes += traffic
            if traffic and kind not in COLLECTIVES:
                kernel_flops = totals.kernel_flops - kernel_flops
                totals.work.append((times, totals.flops - flops + kernel_flops, kernel_flops, traffic))

    def called(self, op: Instruction) -> list[str]:
        """The computations that an instruction runs: of a conditional, the heaviest."""
        groups = _CALLED.findall(op.attributes)
        called = [name.strip(" %") for group in groups for name in group.strip("{}").split(",")]
        return [max(called, key=self.weight)] if op.opcode == "conditional" else called

    def weight(self, name: str) -> float:
        other = _Reader(self.computations, self.loop_trips, ())
        other.walk(name, 1.0)
        return other.totals.flops + other.totals.cycles + other.totals.collective_bytes

    def collective(self, op: Instruction, body, kind: str, times: float, *, fused: bool, started: bool) -> None:
        channel = re.search(r"channel_id=(\d+)", op.attributes)
        if fused and channel:  # TPU spreads one asynchronous collective over several fusions: count it once
            if channel[1] in self.channels:
                return
            self.channels.add(channel[1])
        both = op.opcode.endswith("-start")
        sides = sum(shape_bytes(body[o].shape) for o in op.operands if o in body)
        payload = max(sides, shape_bytes(op.shape) - (sides if both else 0))
        entry = self.totals.collectives.setdefault(kind, [0.0, 0.0])
        entry[0] += times
        entry[1] += times * payload
        far = times * payload * _far_share(op, self.slices)
        self.totals.far += far
        if not (both or started or fused) or '"is_sync":true' in op.attributes:
            self.totals.far_blocking += far
            number, blocking = self.totals.blocking
            self.totals.blocking = number + times, blocking + (0 if far else times * payload)

    def between_slices(self, shape: str, times: float) -> None:
        """A TPU sends data for another slice through its host, asynchronously."""
        entry = self.totals.collectives.setdefault("send", [0.0, 0.0])
        entry[0] += times
        entry[1] += times * shape_bytes(shape)
        self.totals.far += times * shape_bytes(shape)

    def custom_call(self, op: Instruction, body, times: float) -> None:
        target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
        if target and re.match(r"tpu_custom_call|__cudnn\$fmha|__gpu\$xla.gpu.triton|mosaic_gpu", target[1]):
            self.totals.kernels[op.name.split(".")[0]] += times
            self.totals.kernel_flops += times * _kernel_flops(op, body, target[1])

    def trips(self, op: Instruction, body) -> float:
        if (trips := _trip_count(self.computations, body, op)) is None:
            self.totals.unknown_loops.append(op.name)
            return self.loop_trips
        return trips


def _far_share(op: Instruction, slices: tuple[int, ...]) -> float:
    """Part of a collective's payload that one chip sends to other slices: 0 if each group lies inside one slice; else
    the members of a group on one slice share the sending."""
    if len(set(slices)) < 2:
        return 0.0
    members = [collections.Counter(slices[i] for i in group) for group in _groups(op.attributes, len(slices))]
    return max((1 / max(m.values()) for m in members if len(m) > 1), default=0.0)


def _groups(attributes: str, devices: int) -> list:
    """The groups of devices that exchange data, from any of the three notations of HLO; without any, one group."""
    numbers = lambda text: [int(i) for i in re.findall(r"\d+", text)] if text else None  # noqa: E731
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))  # axes of a mesh, and those along which they exchange
        along = re.findall(r"'(\w+)'", match[3])
        order, axes = match[2] or f"[{devices}]", sorted(sizes, key=lambda name: name in along)
        ids = _iota(order).reshape([int(n) for n in sizes.values()]).transpose([[*sizes].index(a) for a in axes])
        return ids.reshape(-1, int(np.prod([int(sizes[a]) for a in along]))).tolist()
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(match[2]).reshape(numbers(match[1])).tolist()
    match = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes)
    return [numbers(group) for group in re.findall(r"\{([\d, ]+)\}", match[1])] if match else [range(devices)]


def _iota(text: str):
    """The array that `[4,2]T(1,0)` means: the numbers from 0 on in that shape, then transposed."""
    dims, _, order = text.partition("T")
    shape, order = ([int(i) for i in re.findall(r"\d+", part)] for part in (dims, order))
    return np.arange(np.prod(shape)).reshape(shape).transpose(order or None)


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
    if op.opcode in _UPDATES:
        new = operands[_UPDATES[op.opcode]]
        return _main_bytes(new) + (shape_bytes(new) if _main_bytes(op.shape) else 0.0)
    if op.opcode.endswith("-start") and op.shape.startswith("("):  # both sides in one tuple
        return _main_bytes(op.shape)
    return sum(map(_main_bytes, operands)) + _main_bytes(op.shape)


def _fusion_bytes(inside, operands: list[str], shape: str) -> float:
    """Traffic of a fusion: an operand that is only sliced counts as the slices, one updated in place not at all."""
    users = collections.defaultdict(list)
    for op in inside.values():
        for at, name in enumerate(op.operands):
            users[name].append((at, op))

    def read(name: str) -> float:
        """Bytes taken of a value, infinite where any use takes it whole."""
        total = 0.0
        for at, user in users[name]:
            if user.opcode == "bitcast":
                total += read(user.name)
            elif user.opcode in _SLICES and at == 0:
                total += shape_bytes(user.shape)
            elif user.opcode not in _UPDATES or at:
                return float("inf")
        return total

    def written(name: str, array: str) -> float:
        op = inside[name]
        while op.opcode == "bitcast" and op.operands:
            op = inside[op.operands[0]]
        return shape_bytes(inside[op.operands[_UPDATES[op.opcode]]].shape if op.opcode in _UPDATES else array)

    parameters = [op for op in inside.values() if op.opcode == "parameter"]
    reads = sum(min(read(op.name), _main_bytes(operands[int(op.inside)])) for op in parameters)
    root = next(op for op in inside.values() if op.root)
    results = zip(root.operands if root.opcode == "tuple" else [root.name], _PLACED.findall(shape), strict=False)
    return reads + sum(written(name, array) for name, (array, layout) in results if "S(" not in layout)


def _kernel_flops(op: Instruction, body, target: str) -> float:
    """FLOPs of an attention kernel, from its operands q and k; a causal one does half of the products. Of a grouped
    product (models/moe.py), those of the rows that are here if all experts have as many. Others: 0."""
    floats = [_dims(body[o].shape) for o in op.operands if o in body and body[o].shape[0] in "bf"]
    if match := re.match(r"splash\w*?_(fwd|dkv|dq)", op.name):  # q [..., T, H], k [..., S, H]
        products = {"fwd": 2, "dkv": 4, "dq": 3}[match[1]]
        return products * np.prod(floats[0], dtype=np.float64) * floats[1][-2]
    if match := re.search(r"experts_of_(\d+)", op.attributes):  # x [P, D] and w [E, D, F], or x and dy [P, F]
        matrix = floats[1][1:] if len(floats[1]) == 3 else [floats[0][1], floats[1][1]]
        experts = floats[1][0] if len(floats[1]) == 3 else _dims(op.shape)[0]
        return 2.0 * floats[0][0] * np.prod(matrix, dtype=np.float64) * experts / int(match[1])
    if match := re.search(r"/mha_(forward|backward)/", op.attributes):  # models.attention._triton: q, k [B, T, N, H]
        products = {"forward": 2, "backward": 7}[match[1]]
        return products * np.prod(floats[0], dtype=np.float64) * floats[1][1]
    if target.startswith("__cudnn$fmha"):  # q [B, T, N, H], k [B, S, K, H]
        causal = re.search(r'"mask_type":\s*"\w*CAUSAL', op.attributes)
        products = (5 if target.endswith("Backward") else 2) * (1 if causal else 2)
        return products * np.prod(floats[0], dtype=np.float64) * floats[1][1]
    return 0.0


def _constant(body, name) -> int | None:
    """Integer value of an instruction, through copies and conversions; None if it is not a constant."""
    op = body.get(name)
    while op is not None and op.opcode in ("copy", "convert", "bitcast") and op.operands:
        op = body.get(op.operands[0])
    if op is None or op.opcode != "constant" or not re.fullmatch(r"-?\d+", op.inside):
        return None
    return int(op.inside)


def _trip_count(computations, caller, loop: Instruction) -> float | None:
    """Iterations of a loop that the text tells: its annotation, or from start, step and limit of its counter."""
    if known := re.search(r'known_trip_count\D*?(\d+)', loop.attributes):
        return float(known[1])
    condition, body = (computations[re.search(rf"{part}=%?([\w.\-]+)", loop.attributes)[1]]
                       for part in ("condition", "body"))
    found = _counter(computations, condition)
    if found is None:
        return None
    index, limit = found
    init = caller.get(loop.operands[0]) if loop.operands else None
    start = _constant(caller, init.operands[index]) if init is not None and init.opcode == "tuple" else None
    return float(max(0, -(-(limit - (start or 0)) // (_step(body, index) or 1))))


def _counter(computations, condition) -> tuple[int, int] | None:
    """(place of the counter in the loop's state, limit) of a condition `counter < limit`, else None."""
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
    return int(re.search(r"index=(\d+)", counter.attributes)[1]), limit


def _step(body, index: int) -> int:
    """What one iteration adds to the counter: the constants along its chain of additions."""
    result = next(op for op in body.values() if op.root)
    op, step = body.get(result.operands[index]) if result.opcode == "tuple" else None, 0
    while op is not None and op.opcode in ("add", "copy"):
        step += sum(_constant(body, o) or 0 for o in op.operands)
        op = next((body[o] for o in op.operands if o in body and _constant(body, o) is None), None)
    return step


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
