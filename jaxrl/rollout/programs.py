"""The compiled programs of the sampler, and the one place that calls them."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rollout import kernels
from jaxrl.rollout.kernels import ProgramSpec
from jaxrl.rollout.placement import Placement
from jaxrl.rollout.sampling import sample_keys
from jaxrl.runtime import compiles
from models.config import DecoderConfig

KEY_BLOCK = 256  # random keys are made this many at a time, so that their program has one shape

log = logging.getLogger(__name__)

# Without this option the TPU compiler moves whole layers of the cache to vector memory, and back, for the one column
# that a step writes: a third more bytes per step. With it, arrays that are moved more often than used are not moved.
TPU_OPTIONS = {"xla_tpu_msa_inefficient_use_to_copy_ratio": "0.75"}


class SamplerPrograms(NamedTuple):
    """Jitted functions of jaxrl.rollout.kernels with the spec filled in.

    prefill(params, tokens, lengths, arrays, first, size); donates the arrays.
    decode(params, cache, rows, settings, steps, refill_at); donates the cache.
    score(params, tokens). keys(seed, step, problem [B], sample [B]) -> uint32 [B, 2].
    new_cache(rows, window). write_prompts(array, prompts, source, chosen, end); donates the array.
    resize(array, rows, shift, window). Of pages: new_pages(count, local). write_pages(arrays, prompts, writes, local);
    donates the arrays.
    """

    prefill: Any
    decode: Any
    score: Any
    keys: Any
    new_cache: Any
    write_prompts: Any
    resize: Any
    new_pages: Any
    write_pages: Any


def program_spec(config: DecoderConfig, dtype, chunk: int, placement: Placement | None, *, int8_cache: bool,
                 pages: int, record: tuple[str, ...] = ()) -> ProgramSpec:
    """The ProgramSpec for a placement; without one, for the default device."""
    if placement is None:
        return ProgramSpec(config, dtype, chunk, jax.default_backend(), None, int8_cache, pages, record)
    return ProgramSpec(config, dtype, chunk, placement.platform, placement.cache(pages > 0), int8_cache, pages, record)


@functools.lru_cache(maxsize=8)  # samplers after each other in one process share what is traced and compiled
def sampler_programs(spec: ProgramSpec) -> SamplerPrograms:
    """The programs for parameters in `models.layout.sampling_layout`."""
    options = None
    if spec.platform == "tpu":
        devices = jax.local_devices() if spec.sharding is None else spec.sharding.device_set
        options = known_options(tuple(TPU_OPTIONS.items()), next(iter(devices)))

    def jitted(function, **keywords):
        return jax.jit(functools.partial(function, spec), **keywords)

    return SamplerPrograms(
        prefill=jitted(kernels.prefill, donate_argnums=3, static_argnames=("first", "size")),
        decode=jitted(kernels.decode, donate_argnums=1, compiler_options=options),
        score=jitted(kernels.score),
        keys=jax.jit(sample_keys),
        new_cache=jitted(kernels.new_cache, static_argnums=(0, 1)),
        write_prompts=jitted(kernels.write_prompts, donate_argnums=0),
        resize=jitted(kernels.resize, static_argnames="window"),
        new_pages=jitted(kernels.new_pages, static_argnums=(0, 1)),
        write_pages=jitted(kernels.write_pages, donate_argnums=0),
    )


class Runner:
    """Calls programs on a placement's mesh. shapes: (program, sizes) -> seconds of its first call, which compiles.

    warm: all shapes should be compiled by now; each further one is logged as a warning.
    """

    def __init__(self, programs: SamplerPrograms, placement: Placement | None = None):
        self.programs, self.warm = programs, False
        self.shapes: dict[tuple, float] = {}
        self._context = placement.use if placement else contextlib.nullcontext

    def call(self, name: str, sizes: tuple, *args, **kwargs):
        """The result of the program `name`; `sizes` identify the shapes of this call."""
        key, program = (name, *sizes), getattr(self.programs, name)
        with self._context():
            if key in self.shapes:
                return program(*args, **kwargs)
            begin = time.perf_counter()
            with compiles.program(name, *sizes):
                out = jax.block_until_ready(program(*args, **kwargs))
        self.shapes[key] = time.perf_counter() - begin
        if self.warm:
            log.warning("sampler: compiled %s %s in %.1f s", name, sizes, self.shapes[key])
        return out

    def keys(self, seed, step, problem, sample) -> np.ndarray:
        """uint32 [n, 2]: the random key of each sample. All arguments: integers of 32 bits [n]."""
        out = np.zeros((len(problem), 2), np.uint32)
        drawn_in = np.stack([seed, step], axis=1)
        for where in np.unique(drawn_in, axis=0):
            rows = np.flatnonzero((drawn_in == where).all(axis=1))
            for block in np.split(rows, range(KEY_BLOCK, len(rows), KEY_BLOCK)):
                padded = (np.pad(a[block], (0, KEY_BLOCK - len(block))) for a in (problem, sample))
                keys = self.call("keys", (), *where.astype(np.uint32), *padded)
                out[block] = np.asarray(keys)[: len(block)]
        return out


@functools.cache
def known_options(options: tuple[tuple[str, str], ...], device) -> dict[str, str]:
    """Those `options` that the compiler of `device` knows; versions of libtpu differ in them.

    Each unknown option is logged as a warning. Raises JaxRuntimeError for a value that an option cannot have.
    """
    known = {}
    for name, value in options:
        x = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
        try:
            jax.jit(lambda x: x + 1).lower(x).compile(compiler_options={name: value})
            known[name] = value
        except jax.errors.JaxRuntimeError as e:
            if "No such compile option" not in str(e):
                raise
            log.warning("sampler: this compiler has no option %s; decoding will read the cache more often", name)
    return known
