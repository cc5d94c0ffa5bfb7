"""Operations on the pool's device state, each one call of a program: settings, rows, prompts in, windows moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxrl.rollout.programs import Rows, SamplingArrays
from jaxrl.rollout.requests import SamplingParams

if TYPE_CHECKING:
    from jaxrl.rollout.engine import Engine

KINDS = ("keys", "values", "scales", "scales")  # of a cache's arrays, as far as programs differ
KEY_BLOCK = 256  # random keys are made this many at a time, so that their program has one shape


def bucket(n: int, base: int, per_octave: int = 4) -> int:
    """Round n up to one of a few sizes: multiples of `base`, then `per_octave` sizes per power of two."""
    n = max(int(n), 1)
    step = max(base, 1 << max((n - 1).bit_length() - 1, 0) >> (per_octave.bit_length() - 1))
    return -(-n // step) * step


def make_knobs(sampler: Engine, sampling: SamplingParams) -> tuple[SamplingArrays, tuple[str, ...]]:
    """The traced settings, and which decode program they need: () or some of "truncated", "biased"."""
    V, bias = sampler.config.vocab_size, None
    if sampling.bias is not None:
        bias = np.asarray(sampling.bias, np.float32)
        if bias.shape != (V,):
            raise ValueError(f"bias has shape {bias.shape}, the vocabulary ({V},)")
        if not np.any(bias > -np.inf) or np.any(np.isnan(bias)) or np.any(bias == np.inf):
            raise ValueError("bias must be finite or -inf, and leave at least one token")
    truncated = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    values = dict(
        top_k=np.int32(sampling.top_k), top_p=np.float32(sampling.top_p), min_p=np.float32(sampling.min_p)
    )
    knobs = SamplingArrays(np.float32(sampling.temperature), sampler.eos, bias=bias, **(values if truncated else {}))
    return knobs, ("truncated",) * truncated + ("biased",) * (bias is not None)


def idle_rows(size: int) -> Rows:
    """Rows of a pool in which nothing runs."""
    zero = np.zeros(size, np.int32)
    return Rows(zero, zero, zero, zero, zero > 0, np.zeros((size, 2), np.uint32), zero)


def insert(sampler: Engine, cache, prompt, source, chosen, end: int):
    """Copy prompt rows `source` into the `chosen` rows of the cache, ending at column `end`."""
    n, _, P, _ = prompt[1][0].shape
    window, arrays = cache.v[0].shape[2], []
    for i, (pool, new) in enumerate(zip(cache.arrays, prompt, strict=True)):
        sizes = (n, P, len(chosen), window, KINDS[i])
        args = (source, chosen, np.int32(end))
        arrays.append(
            tuple(
                sampler.call("insert", sizes, a, b, *args) for a, b in zip(pool, new, strict=True)
            )
        )
    return cache.with_arrays(arrays)


def rebase(sampler: Engine, cache, rows, shift: int, window: int, keep: bool = False):
    """The cache with other rows (None: the same) and another window, its columns moved left by `shift`.

    The old cache is freed layer by layer, whoever still refers to it, unless `keep`: two caches would not fit.
    """
    count, old = cache.v[0].shape[0], cache.v[0].shape[2]
    sizes = (count, old, None if rows is None else len(rows), window)
    moved = []
    for i, arrays in enumerate(cache.arrays):
        out = []
        for array in arrays:
            args = (array, rows, np.int32(shift))
            out.append(sampler.call("rebase", (*sizes, KINDS[i]), *args, window=window))
            if not keep:
                array.delete()
        moved.append(tuple(out))
    start = cache.start if rows is None else cache.start[: len(rows)]
    return cache.with_arrays(moved, start=start)
