"""Does this run fit those chips, and how fast can it be? Answered by their compiler, without such a chip.

    python -m jaxrl.preflight --config=configs/pods/lspo_qwen25_math_7b.py [--topology=v5p:2x2x2] [--config.KEY=VALUE]
    python -m jaxrl.preflight --config=configs/gpus/lspo_qwen25_math_7b.py --topology=2xh100:8     # two hosts of eight

Compiles the programs that training runs, from shapes alone (no weights, no data), for a TPU slice, several slices,
or GPU hosts (default: config.topology). Memory is the compiler's own buffer assignment plus what else is on the chip
in that phase: the learner's state during rollouts, its optimizer moments during scoring. On a GPU, a run allocates a
share of the memory at its start; cuDNN's workspace is not known to the compiler and not counted.

For TPU, the table's time is the compiler's cycle estimate of every operation times how often it runs. Hand-written
kernels have no estimate and count at half of the peak. Collectives count at link speed, between slices at the network's
speed; those that the compiler made asynchronous overlap with other operations, the others do not. Compared with
measured single operations, the compiler's estimate is within 15 % for large matrix products and about twice too slow
for pure copies. A GPU's compiler estimates nothing: jaxrl/runtime/roofline.py says what is assumed of its kernels. The
roofline is the best time the chip could reach: FLOPs at peak, or reading all arguments once (once per token in
decoding), whichever takes longer.

Exit code 0 if everything fits, 1 if not (with the largest buffers and settings that would make it fit), 2 for
an error in the input.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl import build, memory
from jaxrl.batch import most_rows, row_length
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner, needs_reference
from jaxrl.learner.update import abstract_batch
from jaxrl.rollout import replay
from jaxrl.rollout.cache import bucket
from jaxrl.rollout.kernels import Rows, SamplingArrays, expert_dtype
from jaxrl.rollout.paged import WRITES, PagedCache
from jaxrl.runtime import cli, compilers, hardware, roofline
from jaxrl.runtime import mesh as meshes
from jaxrl.runtime.config import get, parse_config, validate
from models.decoder import empty_cache
from models.lora import join

GIB = hardware.GIB
SAMPLING = ("layout", "prefill", "move layer", "write pages", "decode")
MEDIAN, SIGMA = 0.43, 0.75  # of log-normal answer lengths, as a part of the limit; their mean is half of it


class Program(NamedTuple):
    """One compiled program of a run. lower: makes the lowering. resident: bytes on each chip that others hold.
    trips: iterations of its data-dependent loop. tokens: positions or tokens that one call works on, all chips.
    calls: calls per training step. passes: how often a call has to read its arguments. cache: bytes of the arguments
    that are keys and values."""

    name: str
    lower: Callable
    resident: float
    trips: float
    tokens: float
    calls: float
    passes: float = 1
    cache: float = 0


class Row(NamedTuple):
    """A program's line of the table. seconds: None where it does not fit, so that there is no estimate."""

    program: Program
    compiled: compilers.Compiled
    needed: float
    fits: bool
    seconds: float | None
    roofline: float


# ------------------------------------------------------------------------------------------------ the programs


def programs(config, decoder, mesh) -> list[Program]:
    """The programs of a run on `mesh`, as training would build them."""
    learner = Learner(config, decoder, mesh)
    state, base = learner.abstract_state(), learner.abstract_base()
    return [
        *_sampler_programs(config, decoder, mesh, join(base, state.params), memory.of_learner(config, learner)),
        *_learner_programs(config, learner, mesh, state, base, reference=memory.of_reference(config, learner)),
    ]


def _learner_programs(config, learner: Learner, mesh, state, base, *, reference: float) -> Iterator[Program]:
    b, shards = config.batch, meshes.num_batch_shards(mesh)
    row = row_length(config)
    rows = max(1, b.micro_tokens // (row * shards)) * shards
    sequences = b.prompts * b.group_size / b.updates
    micro = max(1.0, sequences * mean_tokens(config) / (rows * row))
    most = -(-most_rows(config, math.ceil(sequences)) // rows)
    replayed = None
    if config.sampling.router_replay:
        d = learner.decoder
        replayed = jax.ShapeDtypeStruct((d.num_layers, d.experts_per_token), expert_dtype(d))
    batch = abstract_batch(mesh, (most, rows, row), rows // shards * row, share_prompts=b.share_prompts,
                           replay=config.sampling.replay, experts=replayed)
    updates, work = b.updates * b.epochs, micro * rows * row
    scores = updates * ((not learner.objective.on_policy) + needs_reference(config))
    if scores:
        lower = lambda: learner.programs.score.lower(join(base, state.params), batch)  # noqa: E731
        resident = memory.bytes_of(state) - memory.bytes_of(state.params) + reference
        yield Program("score", lower, resident, micro, work, scores)
    yield Program("update", lambda: learner.programs.update.lower(state, batch, base), reference, micro, work, updates)


def _sampler_programs(config, decoder, mesh, params, lives: float) -> Iterator[Program]:
    tokenizer = types.SimpleNamespace(eos_ids=(0, 1), vocab_size=decoder.vocab_size, unused_ids=())
    sampler = build.sampler(config, decoder, tokenizer, mesh)
    placement, run = sampler.placement, sampler.programs
    slots, chunk = sampler.slots, sampler.chunk
    on_host = NamedSharding(placement.mesh, P())
    array = lambda d, *shape: jax.ShapeDtypeStruct(shape, d, sharding=on_host)  # noqa: E731

    def lower(program, *args, **kwargs):
        with placement.use():
            return program.lower(*args, **kwargs)

    weights = memory.placed(jax.eval_shape(sampler._layout, params), placement.params(decoder))
    group, longest, sizes = config.batch.group_size, bucket(sampler.max_prompt - 1, 32), sampler.cache.prefill_sizes
    prompts = next((n for n in sizes if n >= -(-slots // group)), sizes[-1])  # those that fill the slots
    cache, prefilled, moved, move = _cache(sampler, decoder, prompts, longest, array)
    waiting, i32 = memory.bytes_of(prefilled), jnp.int32
    rows = Rows(*(array(i32, slots) for _ in range(4)), array(bool, slots), array(jnp.uint32, slots, 2),
                array(i32, slots))
    settings = SamplingArrays(array(jnp.float32), array(i32, 2))

    hosts = mesh.size // placement.mesh.size
    total = (config.batch.generation_prompts or config.batch.prompts) / hosts  # prompts of one host
    calls = total * group * config.sampling.max_tokens / 2 / slots / chunk
    paged = isinstance(sampler.cache, PagedCache)
    yield Program(
        "layout", lambda: sampler._layout.lower(params),
        lives - memory.bytes_of(params) + memory.bytes_of(weights), 1, 0, 1,
    )
    part = min(sampler.cache.prefill_chunk or longest, longest)  # the last part attends to all before it
    seen = (prefilled,) if part < longest else ()
    yield Program(
        "prefill", lambda: lower(run.prefill, weights, array(i32, prompts, longest), array(i32, prompts), *seen,
                                 first=longest - part, size=part),
        lives + memory.bytes_of(cache), 1, prompts * part * hosts, total / prompts * longest / part,
    )
    yield Program(
        "write pages" if paged else "move layer", lambda: lower(*move[0], **move[1]),
        lives + memory.bytes_of(weights) + (0 if paged else waiting) + memory.bytes_of(cache) - memory.bytes_of(moved),
        1, 0, total / prompts if paged else calls * 2 * decoder.num_layers,
    )
    yield Program(
        "decode", lambda: lower(run.decode, weights, cache, rows, settings, array(i32), array(i32)),
        lives + waiting, chunk, chunk * slots * hosts, calls, passes=chunk, cache=memory.bytes_of(cache),
    )


def _cache(sampler, decoder, prompts: int, longest: int, array) -> tuple:
    """(cache, prefilled prompts, moved, program with its arguments), all as shapes. The program moves parts of the
    cache: it takes `moved` and gives it back. array: makes a small shape."""
    placement, run, spec, i32 = sampler.placement, sampler.programs, sampler.spec, jnp.int32

    def dense(rows, window):
        blocks = spec.platform == "cpu"
        cache = jax.eval_shape(lambda: empty_cache(decoder, rows, window, spec.cache_dtype, key_blocks=blocks))
        return cache.with_arrays(memory.placed(cache.arrays, placement.cache()), start=array(i32, rows), end=array(i32))

    prefilled = dense(prompts, longest).arrays
    if isinstance(paged := sampler.cache, PagedCache):
        arrays = jax.eval_shape(lambda: run.new_pages(*paged.counts))
        arrays = memory.placed(arrays, placement.cache(True))
        writes = array(i32, paged.replicas * WRITES)
        local = (array(i32, sampler.slots, r.width), array(i32, sampler.slots)) if (r := paged.rings) else None
        cache = paged.view(arrays, array(i32, sampler.slots, paged.widths[-1]), local)
        args = ((writes,) * 3, (writes,) * 3 if local else None)
        return cache, prefilled, arrays, ((run.write_pages, arrays, prefilled, *args), {})
    cache = dense(sampler.slots, width := sampler.cache.windows[-1])
    return cache, prefilled, cache.v[0], ((run.resize, cache.v[0], None, array(i32)), dict(window=width))


def sampling_refused(mesh, chip: hardware.Chip) -> str:
    """Why a host cannot sample on its own chips of this slice; "" if it can.

    libtpu compiles for a part of a slice if every chip reaches every other (v5p), or if the slice is small. On a larger
    slice it stops the whole process, so it must not be tried.
    """
    hosts = {d.process_index for d in mesh.devices.flat}
    if len(hosts) == 1 or mesh.size <= 8 or chip.name not in ("v5e", "v6e"):
        return ""
    return (
        f"sampling is not possible on this slice: on {chip.name} beyond 2x4 chips the TPU compiler refuses programs "
        "for one host's share (limited ICI routing); use at most 2x4, or v5p"
    )


def mean_tokens(config) -> float:
    """Assumed mean tokens of a sequence: a prompt of a quarter of its limit, an answer of half of its limit."""
    return config.sampling.max_prompt / 4 + config.sampling.max_tokens / 2


# ---------------------------------------------------------------------------------------------------- the answer


def check(program: Program, chip: hardware.Chip, slices: tuple[int, ...] = ()) -> Row:
    """Compile one program and compare it with the chip. slices: see `slices_of`."""
    inside = program.name in SAMPLING[1:]  # each host on its own
    compiled = compilers.compile_program(program.lower(), program.trips, () if inside else slices)
    needed = compiled.needed + program.resident
    seconds = roofline.seconds(compiled.counts, chip) if compiled.fits else None
    best = roofline.best(compiled.counts, chip, compiled.arguments * program.passes)
    return Row(program, compiled, needed, compiled.fits and needed <= chip.hbm, seconds, best)


def line(row: Row, chip: hardware.Chip) -> str:
    """One line of the table."""
    counts = row.compiled.counts
    time = "-" if row.seconds is None else f"{row.seconds:.3g}"
    share = "-" if not row.seconds else f"{row.roofline / row.seconds:.0%}"
    speed = f"{row.program.tokens / row.seconds:,.0f}" if row.seconds and row.program.tokens else "-"
    return (
        f"{row.program.name:<11}{row.needed / GIB:>8.2f} of {chip.hbm / GIB:<6.2f}{'' if row.fits else 'NO':<3}"
        f"{(counts.flops + counts.kernel_flops) / 1e12:>9.3g}{time:>9}{row.roofline:>9.3g}{share:>6}"
        f"{counts.collective_count:>9,.0f}{counts.collective_bytes / 1e9:>9.3g}{speed:>12}"
    )


def traffic(row: Row, chip: hardware.Chip) -> str:
    """The collectives of one program by kind."""
    found = sorted(row.compiled.counts.collectives.items())
    kinds = [f"{kind} {times:,.0f} ({payload / 1e9:.3g} GB)" for kind, (times, payload) in found]
    far = row.compiled.counts.far
    network = f"; {far / 1e9:.3g} GB of them to other {'hosts' if not chip.clock else 'slices'}" if far else ""
    return f"  {row.program.name:<11}{', '.join(kinds) or 'none'}{network}"


HEADER = (
    f"{'program':<11}{'GiB per chip':>18}{'':<3}{'TFLOP':>9}{'time s':>9}{'roof s':>9}{'share':>6}"
    f"{'collect.':>9}{'GB':>9}{'tokens/s':>12}"
)

ASSUMED = (
    f"memory: {hardware.GPU_MEMORY:.0%} of the card's, as a run takes it; cuDNN's workspace is not counted. "
    f"times: assumed, no compiler's estimate; matrix products at {roofline.PRODUCT_SHARE:.0%} of the peak, attention "
    f"kernels at {roofline.KERNEL_SHARE:.0%}, memory at {roofline.MEMORY_SHARE:.0%}"
)


def rollout_seconds(rows: list[Row], config, layers: int, mesh, *, pages: int = 0,
                    tokens: int = 0) -> tuple[float, list[replay.Rollout]]:
    """(seconds until every host has its answers, the replayed schedules of up to four hosts). Answer lengths differ.

    The time of the compiled decode step is scaled by what a step reads: weights, and the cache of its slots and window.
    The times of other programs are scaled by their tokens. pages, tokens: of the cache as the engine has it.
    """
    s, b, by = config.sampling, config.batch, {r.program.name: r for r in rows}
    hosts = len({d.process_index for d in mesh.devices.flat})
    problems = math.ceil((b.generation_prompts or b.prompts) / hosts)
    sizes = {key: s[key] for key in ("slots", "chunk", "window", "max_prompt")}
    sizes |= dict(max_tokens=max(s.max_tokens, config.eval.max_tokens), multiple=mesh.size // hosts // s.tensor,
                  page=pages, tokens=tokens)
    prompts, shape = [s.max_prompt // 4] * problems, (problems, b.group_size)
    lengths = [replay.log_normal(shape, s.max_tokens, MEDIAN, SIGMA, seed) for seed in range(min(hosts, 4))]
    found = [replay.replay(drawn, prompts, **sizes) for drawn in lengths]
    cache = by["decode"].program.cache
    rest = by["decode"].compiled.arguments - cache

    def seconds(rollout: replay.Rollout) -> float:
        total = 0.0
        for call in rollout.calls:
            if call.program == "decode":
                share = call.read / call.steps / rollout.largest
                total += call.steps * by["decode"].seconds / s.chunk * (rest + share * cache) / (rest + cache)
            elif call.program == "prefill":
                total += by["prefill"].seconds * call.rows * call.columns / (by["prefill"].program.tokens / hosts)
            elif call.program == "resize":
                total += by["move layer"].seconds * layers * call.rows * call.columns / rollout.largest
            elif call.program == "write_pages":
                total += by["write pages"].seconds
        return total

    return by["layout"].seconds + max(map(seconds, found)), found


def summary(rows: list[Row], config, decoder, mesh) -> str:
    """One line about a whole training step, with answers of different lengths."""
    cache = build.cache_sizes(config, decoder, mesh)
    sizes = dict(pages=cache["pages"], tokens=cache["cache_tokens"])
    rollout, found = rollout_seconds(rows, config, decoder.num_layers, mesh, **sizes)
    spent = {name: sum(r.seconds * r.program.calls for r in rows if r.program.name == name)
             for name in ("score", "update")}
    total = rollout + sum(spent.values())
    prompts = config.batch.generation_prompts or config.batch.prompts
    answers = prompts * config.batch.group_size * config.sampling.max_tokens / 2
    split = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in ({"rollout": rollout} | spent).items() if seconds)
    drawn, steps = (sum(getattr(f.stats, name) for f in found) for name in ("tokens", "slot_steps"))
    times = sum(f.read for f in found) / sum(f.contexts for f in found)
    held = f"pages for {cache['cache_tokens']:,} tokens" if cache["pages"] else "a dense cache"
    return (
        f"one step, one generation batch, answers log-normal and of half the limit on average: {split}; "
        f"{answers:,.0f} response tokens in {total:.0f} s, {answers / total:,.0f} tokens/s, "
        f"{answers / total / mesh.size:,.0f} per chip; on each host {held}, {drawn / steps:.0%} of the slots' steps "
        f"draw a token, decoding reads {times:.1f} times the contexts. Not counted: grading, weights moving between "
        "hosts, saves, evaluation, further generation batches"
    )


def suggest(name: str, config, target: compilers.Target, decoder) -> str:
    """Settings, tried one after another until the program fits."""
    changed, flags = copy.deepcopy(config), []
    for key, value in _remedies(name, config):
        flags = [f for f in flags if not f.startswith(f"--config.{key}=")] + [f"--config.{key}={value}"]
        parent, _, leaf = key.rpartition(".")
        get(changed, parent)[leaf] = value
        try:
            program = next(p for p in programs(changed, decoder, build.mesh(changed, target.devices)) if p.name == name)
        except UserError:
            continue  # this value does not divide
        if program.resident <= target.chip.hbm and (row := check(program, target.chip)).fits:
            return f"{name} fits ({row.needed / GIB:.2f} GiB) with {' '.join(flags)}"
    return f"no setting makes {name} fit; take more chips, or chips with more memory"


def _remedies(name: str, config) -> Iterator[tuple[str, Any]]:
    """(key, value) to try, the cheapest first; each is kept when the next is tried."""
    if name in ("update", "score"):
        if config.model.remat != "full":
            yield "model.remat", "full"
        micro, least = config.batch.micro_tokens, row_length(config)
        while micro > least:
            micro = max(micro // 2, least)
            yield "batch.micro_tokens", micro
    else:
        if config.sampling.cache_tokens:
            yield "sampling.cache_tokens", 0  # what the memory has room for
        slots = config.sampling.slots
        for _ in range(2):
            slots //= 2
            yield "sampling.slots", slots
        for tensor in (2, 4):
            if tensor > config.sampling.tensor:
                yield "sampling.tensor", tensor
    if config.mesh.data != 1:
        yield "mesh.data", 1
        yield "mesh.fsdp", -1
    if config.optimizer.state_dtype != "bfloat16":
        yield "optimizer.state_dtype", "bfloat16"
    if not config.optimizer.offload:
        yield "optimizer.offload", True


def slices_of(mesh) -> tuple[int, ...]:
    """The TPU slice, or the GPU host, of each device in the mesh's order. Between two of them is the network."""
    return tuple(getattr(d, "slice_index", None) or 0 if d.platform == "tpu" else d.process_index
                 for d in mesh.devices.flat)


def find_target(config, topology: str) -> compilers.Target:
    """The target of `topology`. Raises UserError if config.sampling.slots, which counts per host, was chosen for a
    topology with another number of hosts."""
    target = compilers.target(topology)
    if target.hosts > 1 and config.topology and config.topology != topology:
        hosts = compilers.target(config.topology).hosts
        if hosts != target.hosts:
            raise UserError(
                f"config.sampling.slots={config.sampling.slots} is what each of {hosts} host(s) of "
                f"config.topology={config.topology} samples at once, but {topology} has {target.hosts} hosts: set "
                f"--config.sampling.slots for one of them, and --config.topology={topology}"
            )
    return target


def print_line(text: str) -> None:
    """Prints at once, also into a file or a pipe: a program may take minutes to compile."""
    print(text, flush=True)


def preflight(config, topology: str, out=print_line) -> bool:
    """Compile, print the table, and say what to change; True if everything fits.

    Raises UserError for a configuration that cannot run, a missing compiler, an unknown topology or a mesh that
    does not match its chips.
    """
    if config.model.shape.hidden_size:  # the weights are on the workers, not here
        config.model.path = ""
    validate(config)
    if not topology:
        raise UserError("no slice: pass --topology=v5e:4x4 or --topology=h100:8, or set config.topology")
    target = find_target(config, topology)
    chip, mesh = target.chip, build.mesh(config, target.devices)
    decoder = build.decoder_config(config, build.tokenizer(config) if config.model.tokenizer else None)
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    out(f"{build.describe(config, decoder, mesh)}")
    out(f"{topology}: {mesh.size} x {chip.name} on {target.hosts} host(s), mesh {sizes}; FLOPs, times and bytes are "
        "per chip and call")
    out(HEADER)
    rows, refused = [], sampling_refused(mesh, chip)
    for program in programs(config, decoder, mesh):
        if refused and program.name in SAMPLING:
            continue
        rows.append(check(program, chip, slices_of(mesh)))
        out(line(rows[-1], chip))
    out("collectives of one call, a chip:")
    for row in rows:
        out(traffic(row, chip))
    if not chip.clock:
        out(ASSUMED)
    failed = [r for r in rows if not r.fits]
    if refused:
        out(refused)
    elif not failed:
        out(summary(rows, config, decoder, mesh))
    for row in failed:
        name = row.program.name
        out(f"{name} does not fit: {row.needed / GIB:.2f} GiB of {chip.hbm / GIB:.2f}; {row.program.resident / GIB:.2f}"
            " of them hold what it does not use itself. Its largest buffers:")
        for size, what in row.compiled.buffers[:6]:
            out(f"  {size / GIB:8.2f} GiB  {what}")
        out(suggest(name, config, target, decoder))
    return not failed and not refused


def main(argv: list[str]) -> int:
    """The command line above; returns 0 if every program fits, else 1. Raises UserError for bad input."""
    topology, rest = "", []
    arguments = iter(argv)
    for argument in arguments:
        if argument.startswith("--topology"):
            topology = argument.partition("=")[2] or next(arguments, "")
        else:
            rest.append(argument)
    jax.config.update("jax_platforms", "cpu")  # compiles for the slice's chips; needs none of this machine's
    config = parse_config(rest)
    return 0 if preflight(config, topology or config.topology) else 1


if __name__ == "__main__":
    cli.run(main)
