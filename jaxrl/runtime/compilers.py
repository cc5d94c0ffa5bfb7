"""Compiles for chips that this machine lacks: devices to build a mesh from, and what a compiled program needs.

`target` makes devices of a TPU slice (libtpu compiles on any CPU machine) or of GPU hosts (so does XLA's CUDA plugin,
given a description of the card), `compile_program` compiles for either. Both compilers dump their buffer assignment,
which names buffers even if a program does not fit.
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
from jaxrl.runtime import gpu_targets, hardware, hlo

EXAMPLES = "v5e:4x4, v5p:2x2x2 or v6e:4x4, 2xv5e:4x4 for two slices, h100:8, 2xh100:8 for two hosts"
# What the GPU compiler alone needs of the jax[cuda12] wheels: no libraries of CUDA, no driver. 160 MB to download.
GPU_WHEELS = "pip install --no-deps jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0}"


@dataclasses.dataclass(frozen=True)
class Target:
    """A slice, several slices, or GPU hosts. devices: can be lowered and compiled for, not run on. chip: the table
    entry of one device; a GPU's memory is what a run takes of it. hosts: number of machines. slices: number of groups
    of devices that reach each other faster than the network (slices of TPU, hosts with GPUs)."""

    name: str
    devices: list
    chip: hardware.Chip
    hosts: int
    slices: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program on one device. needed: bytes of memory, arguments and results included. arguments: those of the
    arguments. fits: whether the compiler accepted it (a GPU's accepts everything). buffers: (bytes, what it is), the
    largest first. counts: see jaxrl.runtime.hlo. text: the HLO they were counted in."""

    needed: int
    arguments: int
    fits: bool
    buffers: list[tuple[int, str]]
    counts: hlo.Counts
    text: str


def target(topology: str) -> Target:
    """The target that a name such as "v5e:4x4" or "2xh100:8" means.

    Several slices or hosts are a factor before the name; GPUs of a host come after the colon (default 1).
    Raises UserError, one line, if the compiler is missing or the name means nothing.
    """
    if match := re.fullmatch(r"(?:([1-9]\d*)x)?(v5e|v5p|v6e|tpu7x):(\d+(?:x\d+){1,2})", topology):
        return _tpu(topology, int(match[1] or 1), match[2], match[3])
    if match := re.fullmatch(rf"(?:([1-9]\d*)x)?({'|'.join(gpu_targets.GPUS)})(?::([1-9]\d*))?", topology):
        return _gpu(topology, int(match[1] or 1), match[2], int(match[3] or 1))
    raise UserError(
        f"topology {topology!r}: expected a TPU slice as generation:shape or GPUs as card:number, such as {EXAMPLES}; "
        f"cards are {', '.join(gpu_targets.GPUS)}"
    )


def _tpu(topology: str, slices: int, generation: str, shape: str) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("preflight needs the TPU compiler, libtpu: pip install 'jaxrl[tpu]' (no TPU needed)")
    from jax.experimental import topologies

    # libtpu looks for the TPU machine it runs on, and for others that use its chips: there are none here.
    machine = dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_MIN_LOG_LEVEL="3")
    machine |= dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", TPU_ACCELERATOR_TYPE="v5litepod-1")
    for key, value in machine.items():
        os.environ.setdefault(key, value)
    options = {"num_slices": slices} if slices > 1 else {}
    if generation in ("v5e", "v6e") and shape in ("2x4", "4x2"):  # as v5litepod-8 and v6e-8: one machine, not two
        options["chips_per_host_bounds"] = [*map(int, shape.split("x")), 1]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{shape}", **options)
    except Exception as e:  # its type differs between versions
        reason = " ".join(str(e).split("\n")[0].split())
        raise UserError(f"topology {topology!r} is none that libtpu knows ({reason}); try {EXAMPLES}") from e
    devices = list(described.devices)
    expected = slices * math.prod(int(n) for n in shape.split("x")) * (2 if generation == "tpu7x" else 1)
    if len(devices) != expected:
        raise UserError(f"topology {topology!r}: {expected} devices, but libtpu sees {len(devices)}")
    hosts = len({d.process_index for d in devices})
    return Target(topology, devices, hardware.chip(devices[0].device_kind), hosts, slices)


def _gpu(topology: str, hosts: int, card: str, gpus: int) -> Target:
    versions = [v for v in (12, 13) if importlib.util.find_spec(f"jax_cuda{v}_plugin")]
    if not versions or importlib.util.find_spec(f"jax_plugins.xla_cuda{versions[0]}") is None:
        wheels = GPU_WHEELS.format(importlib.import_module("jaxlib").__version__)
        raise UserError(f"preflight for {card} needs the GPU compiler: {wheels} (no GPU, driver or CUDA needed)")
    from jax._src.cudnn import fused_attention_stablehlo as attention
    from jax.experimental import topologies

    # While it traces cuDNN's attention, jax asks for the capability of this machine's card: answer with the target's.
    capability = gpu_targets.GPUS[card].capability
    attention.check_cudnn_version = lambda: gpu_targets.CUDNN[0] * 10000 + gpu_targets.CUDNN[1] * 100
    attention.check_compute_capability = lambda least: capability >= tuple(map(int, least.split(".")))
    attention.is_cuda_compute_capability_equal = lambda other: capability == tuple(map(int, other.split(".")))
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=card, target_config=gpu_targets.target_config(card),
            topology=f"1x{hosts}x{gpus}",  # partitions x hosts x cards of a host
        )
    except Exception as e:
        reason = " ".join(str(e).split("\n")[0].split())
        raise UserError(f"topology {topology!r}: the GPU compiler refuses it ({reason})") from e
    chip = hardware.chip(gpu_targets.GPUS[card].kind)
    chip = dataclasses.replace(chip, hbm=chip.hbm * hardware.GPU_MEMORY)
    return Target(topology, list(described.devices), chip, hosts, hosts)


def compile_program(lowered, loop_trips: float = 1, slices: tuple[int, ...] = ()) -> Compiled:
    """Compile a `jax.jit(f).lower(...)` for its devices and read what came out.

    loop_trips: iterations to assume for loops whose end depends on data. slices: see hlo.count.
    Raises what the compiler raises, except for running out of memory.
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
        # TPU: the later text has the cycle estimates; read from the dump, because as_text() cannot print all of them
        text = _dumped(folder, "after_codegen.txt") or _dumped(folder, "after_optimizations.txt")
        assignment = _dumped(folder, "after_optimizations-buffer-assignment.txt")
    names = {op.name: _origin(op) for body in hlo.parse(text)[0].values() for op in body.values()}
    needed, arguments, buffers = _allocations(assignment, names)
    return Compiled(needed, arguments, fits, buffers, hlo.count(text, loop_trips, slices), text)


def _dumped(folder: str, ending: str) -> str:
    # helper modules compiled on the side are dumped too; the program itself is the largest
    paths = sorted(pathlib.Path(folder).glob(f"*{ending}"), key=lambda p: p.stat().st_size)
    return paths[-1].read_text() if paths else ""


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
