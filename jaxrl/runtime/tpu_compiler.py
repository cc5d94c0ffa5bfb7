"""The real TPU compiler without a TPU: devices of a slice to build a mesh from, and what a compiled program needs.

libtpu compiles on any CPU machine for a named topology. It is asked to dump its buffer assignment, which exists
also for a program that does not fit: the error message itself names no buffer.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import tempfile

import jax

from jaxrl.errors import UserError
from jaxrl.runtime import hardware, hlo

EXAMPLES = "v5e:4x4, v5p:2x2x2 or v6e:4x4"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program on one chip. needed: bytes of memory, arguments and results included. arguments: those of the
    arguments. fits: whether the compiler accepted it. buffers: (bytes, what it is), the largest first.
    counts: see jaxrl.runtime.hlo. text: the HLO they were counted in."""

    needed: int
    arguments: int
    fits: bool
    buffers: list[tuple[int, str]]
    counts: hlo.Counts
    text: str


def slice_devices(topology: str) -> tuple[list, hardware.Chip]:
    """The devices of a slice such as "v5e:4x4", and the table entry of its chip.

    They can be lowered and compiled for, not run on. Raises UserError, one line, if libtpu is missing or the
    topology is unknown.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("preflight needs the TPU compiler, libtpu: pip install 'jaxrl[tpu]' (no TPU needed)")
    from jax.experimental import topologies

    match = re.fullmatch(r"(v5e|v5p|v6e):(\d+(?:x\d+){1,2})", topology)
    if match is None:
        raise UserError(f"topology {topology!r}: expected generation:shape, such as {EXAMPLES}")
    # libtpu looks for the TPU machine it runs on, and for others that use its chips: there are none here.
    machine = dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_MIN_LOG_LEVEL="3")
    machine |= dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", TPU_ACCELERATOR_TYPE="v5litepod-1")
    for key, value in machine.items():
        os.environ.setdefault(key, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as e:  # its type differs between versions
        reason = " ".join(str(e).split("\n")[0].split())
        raise UserError(f"topology {topology!r} is none that libtpu knows ({reason}); try {EXAMPLES}") from e
    chips = math.prod(int(n) for n in match[2].split("x"))
    if len(devices) != chips:
        raise UserError(f"topology {topology!r}: {chips} chips, but libtpu sees {len(devices)} devices")
    return list(devices), hardware.chip(devices[0].device_kind)


def compile_program(lowered, loop_trips: float = 1) -> Compiled:
    """Compile a `jax.jit(f).lower(...)` for its TPU devices and read what came out.

    loop_trips: iterations of loops that end by data. Raises what the compiler raises, except for running out of
    memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        fits = True
        try:
            lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            fits = False
        # the later text has the cycle estimates; read from the dump, because as_text() cannot print all of them
        text = _dumped(folder, "after_codegen.txt" if fits else "after_optimizations.txt")
        assignment = _dumped(folder, "after_optimizations-buffer-assignment.txt")
    names = {op.name: _origin(op) for body in hlo.parse(text)[0].values() for op in body.values()}
    needed, arguments, buffers = _allocations(assignment, names)
    return Compiled(needed, arguments, fits, buffers, hlo.count(text, loop_trips), text)


def _dumped(folder: str, ending: str) -> str:
    # helper modules compiled on the side are dumped too; the program itself is the largest
    paths = pathlib.Path(folder).glob(f"*.{ending}")
    return max(paths, key=lambda p: p.stat().st_size).read_text()


def _origin(op: hlo.Instruction) -> str:
    """Where in the model an instruction comes from: the tail of its op_name, without the compiler's wrappers."""
    match = re.search(r'op_name="([^"]*)"', op.attributes)
    if not match:
        return op.opcode
    if op.opcode == "parameter":
        return re.sub(r"\[\\?'(\w+)\\?'\]", r"/\1", match[1])
    parts = [p for p in match[1].split("/") if not re.match(r"(jit|while|body|closed_call|cond|vmap)\b", p)]
    return "/".join(parts[-4:]) or op.opcode


def _allocations(text: str, names: dict[str, str]) -> tuple[int, int, list[tuple[int, str]]]:
    """(bytes of all allocations in main memory, of the parameters, the largest values) of a buffer assignment."""
    needed = arguments = 0
    largest: dict[tuple, tuple[int, str]] = {}
    kind = ""
    for line in text.splitlines():
        if match := re.match(r"allocation (\d+): size (\d+), (color [1-9]\d*, )?(.*)", line):
            number, size, other_space, kind = match[1], int(match[2]), match[3], match[4]
            if other_space or "thread-local" in kind:
                kind = ""
                continue
            needed += size
            arguments += size if "parameter" in kind else 0
        elif kind and (match := re.match(
            r" value: <\d+ ([\w.\-]+)(\{[0-9,]*\})? @0> \(size=(\d+),offset=(\d+)\): (\S+)", line
        )):
            size, shape = int(match[3]), match[5].split("{")[0]
            what = f"{shape} {names.get(match[1], match[1])}"
            largest.setdefault((number, match[4], size), (size, what))
    return needed, arguments, sorted(largest.values(), reverse=True)
