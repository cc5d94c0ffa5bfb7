"""The interface of the key-value cache, and its dense implementation; jaxrl.rollout.paged is the other one.

Windows, the clock (column `end`) and resizing are handled in this file only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rollout.kernels import Rows, SamplingArrays
from jaxrl.rollout.programs import Runner

KINDS = ("keys", "values", "scales", "scales")  # of a cache's arrays; arrays of one kind share programs


def bucket(n: int, base: int, per_octave: int = 4) -> int:
    """Round n up to one of a few sizes: multiples of `base`, then `per_octave` sizes per power of two."""
    n = max(int(n), 1)
    step = max(base, 1 << max((n - 1).bit_length() - 1, 0) >> (per_octave.bit_length() - 1))
    return -(-n // step) * step


class KVCache(Protocol):
    """What the engine asks of a cache. Rows are decode slots; an idle engine has none.

    rows: their current number. row_sizes: the possible numbers of rows, ascending. prefill_sizes: the possible numbers
    of prompts in one prefill.
    """

    rows: int
    row_sizes: list[int]
    prefill_sizes: list[int]

    def prefill_shape(self, lengths: Sequence[int]) -> tuple[int, int]:
        """(prompts, tokens of each) that a prefill of prompts of these lengths is padded to."""

    def prefill(self, prompts: Sequence[np.ndarray]) -> list[Any]:
        """Prepare a prefill of prompts outside the rows: one handle per prompt, with a common `call` (Prefill)."""

    def begin(self, rows: int) -> None:
        """Start with so many rows; there were none."""

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether there is room for prompts of these lengths, and for the first tokens that they draw."""

    def reserve(self, row: int, prompt: Any) -> bool:
        """Reserve room for a prompt in this row; False if there is none."""

    def admit(self, longest: int, ahead: int, placed: Sequence[tuple[int, Any]]) -> None:
        """Copy prefilled prompts, (row, handle) pairs, into the rows reserved for them.

        longest: cached tokens of the longest running row. ahead: steps that the next decode call may want, at least 1.
        """

    def room(self, used: np.ndarray, left: np.ndarray, born: np.ndarray) -> list[int]:
        """Make room for the next decode call; returns the rows whose cache was given up for it, the youngest first.

        used, left, born: int [rows]: cached tokens, steps still allowed, and when the row's response started.
        """

    def decode(self, params, rows: Rows, settings: SamplingArrays, kind: tuple, refill_at: int) -> tuple:
        """Decode at least one step in every active row. Returns NumPy (tokens [steps, B], log-probs [steps, B],
        emitted [B], columns name -> [steps, B, ...])."""

    def take(self, rows: np.ndarray, longest: int, ahead: int) -> None:
        """Keep these rows, int32 [B'], in this order."""

    def release(self, rows: np.ndarray) -> None:
        """Free the cache of rows that have finished."""

    def clear(self) -> None:
        """Give up all rows and their memory."""

    def warmup(self, params, settings: dict[tuple, SamplingArrays], longest: int) -> None:
        """Run every shape that prompts below `longest` tokens and these settings (by program kind) can need."""


def row_sizes(slots: int, multiple: int) -> list[int]:
    """The possible numbers of rows: multiples of `multiple` up to `slots`."""
    rows = (max(1, slots // d) for d in (8, 4, 2, 1))  # a few rows are no faster than eight
    return sorted({-(-b // multiple) * multiple for b in rows if b >= min(slots, 8)})


def prefill_sizes(slots: int, multiple: int) -> list[int]:
    """The possible numbers of prompts in one prefill."""
    least = max(4, multiple)
    return [least << i for i in range(4) if i == 0 or least << i <= slots]


class Prefill:
    """One prefill of several prompts outside the rows. They are right-aligned in `arrays` of `columns` columns, and
    each `advance` caches `chunk` columns (0: all at once)."""

    def __init__(self, run: Runner, prompts: Sequence[np.ndarray], rows: int, columns: int, chunk: int = 0):
        self.run, self.columns, self.chunk, self.cached, self.arrays = run, columns, chunk or columns, 0, None
        self.tokens, self.lengths = np.zeros((rows, columns), np.int32), np.zeros(rows, np.int32)
        for row, prompt in enumerate(prompts):
            self.lengths[row] = len(prompt)
            self.tokens[row, columns - len(prompt) :] = prompt

    def advance(self, params) -> bool:
        """Launch the prefill of the next chunk, without waiting for it; True if it was the last one."""
        rows, first = len(self.lengths), self.cached
        size = min(self.chunk, self.columns - first)
        part = (self.columns, first) if size < self.columns else ()
        args = (params, self.tokens, self.lengths, self.arrays)
        self.arrays = self.run.call("prefill", (rows, size, *part), *args, first=first, size=size)
        self.cached += size
        return self.cached == self.columns

    def complete(self, params) -> Prefill:
        """Cache all columns that are left; returns itself."""
        while not self.advance(params):
            pass
        return self


class Prompt(NamedTuple):
    """A prefilled prompt of a dense cache: row `row` of what `call` has cached."""

    call: Prefill
    row: int


class DenseCache:
    """A KVCache whose rows share one window of columns, long enough for the longest row (models.decoder.Cache).

    Every row writes next to column `end`. Windows, numbers of rows and prefill shapes take few different sizes, since
    each size is compiled.

    Args:
      slots: maximum number of rows. multiple: rows and prefilled prompts come in multiples of this. chunk: maximum
        steps of a decode call. window: granularity of the windows. prefill_chunk: `chunk` of Prefill.
    """

    def __init__(self, run: Runner, *, slots: int, multiple: int, max_prompt: int, max_tokens: int, chunk: int,
                 window: int, prefill_chunk: int = 0):
        self.run, self.chunk, self.prefill_chunk = run, chunk, prefill_chunk
        self.least_room = min(chunk, max_tokens)
        self.row_sizes, self.prefill_sizes = row_sizes(slots, multiple), prefill_sizes(slots, multiple)
        self.windows = [bucket(1, window)]
        while self.windows[-1] < bucket(max_prompt, 32) + max_tokens + self.least_room:
            self.windows.append(bucket(self.windows[-1] + 1, window))
        self.clear()

    def clear(self) -> None:
        self.arrays, self.rows, self.end, self.width = None, 0, 0, 0

    def begin(self, rows: int) -> None:
        self.rows = rows

    def fits(self, lengths: Sequence[int]) -> bool:
        return True

    def reserve(self, row: int, prompt: Prompt) -> bool:
        return True

    def release(self, rows) -> None:
        """Columns of a finished row stay until its window moves on."""

    def room(self, used, left, born) -> list[int]:
        return []  # admit has made room

    # ---- prompts

    def prompt_columns(self, length: int) -> int:
        """Columns a prompt of `length` cached tokens is padded to; always leaves room to decode."""
        return min(bucket(length, 32), self.windows[-1] - self.least_room)

    def prefill_shape(self, lengths: Sequence[int]) -> tuple[int, int]:
        n = next((size for size in self.prefill_sizes if size >= len(lengths)), self.prefill_sizes[-1])
        return n, self.prompt_columns(max(lengths))

    def prefill(self, prompts: Sequence[np.ndarray]) -> list[Prompt]:
        n, columns = self.prefill_shape([len(p) for p in prompts])
        call = Prefill(self.run, prompts, n, columns, self.prefill_chunk)
        return [Prompt(call, row) for row in range(len(prompts))]

    def admit(self, longest: int, ahead: int, placed: Sequence[tuple[int, Prompt]]) -> None:
        self._make_room(longest, ahead, max((prompt.call.columns for _, prompt in placed), default=0))
        batches: dict[Prefill, list] = {}  # one write for the prompts of one prefill
        for slot, prompt in placed:
            batches.setdefault(prompt.call, []).append((slot, prompt.row))
        for call, batch in batches.items():
            source, chosen = np.zeros(self.rows, np.int32), np.zeros(self.rows, bool)
            for slot, row in batch:
                source[slot], chosen[slot] = row, True
            self.arrays = self._write(self.arrays, call.arrays, source, chosen, self.end)

    def _write(self, cache, prompts: tuple, source, chosen, end: int):
        """The cache with rows `source` of the prompt arrays copied into its `chosen` rows, before column `end`."""
        n, _, columns, _ = prompts[1][0].shape
        out = []
        for kind, old, new in zip(KINDS, cache.arrays, prompts, strict=False):
            sizes = (n, columns, len(chosen), cache.v[0].shape[2], kind)
            args = (source, chosen, np.int32(end))
            layers = zip(old, new, strict=True)
            out.append(tuple(self.run.call("write_prompts", sizes, a, b, *args) for a, b in layers))
        return cache.with_arrays(out)

    # ---- the window

    def _fit(self, columns: int) -> int:
        return next(w for w in self.windows if w >= columns)

    def _make_room(self, longest: int, ahead: int, prompt: int) -> None:
        """Get a window that fits the longest running row, prompts of `prompt` columns, and the next steps."""
        if self.arrays is None:
            self.end, self.width = prompt, self._fit(prompt + ahead)
            self.arrays = self.run.call("new_cache", (self.rows, self.width), self.rows, self.width)
        elif self.width - self.end < min(16, ahead) or prompt > self.end:
            self._set_clock(max(longest, prompt), ahead)

    def _set_clock(self, end: int, ahead: int) -> None:
        """Shift all columns so that the next write goes to `end`, in a window with room for `ahead` more columns.

        Windows change one size at a time, so that few pairs of sizes are ever compiled. Columns are dropped before
        the window shrinks, and added only once it has grown.
        """
        shift, sizes = self.end - end, self.windows
        now, goal = sizes.index(self.width), sizes.index(self._fit(end + ahead))
        way = 1 if goal > now else -1
        path = [sizes[i + way] for i in range(now, goal, way)] or [self.width]
        shifts = [0] * len(path)
        shifts[0 if shift > 0 else -1] = shift
        for window, by in zip(path, shifts, strict=True):
            self.arrays = self._resize(self.arrays, None, by, window)
        self.end, self.width = end, path[-1]

    def take(self, rows: np.ndarray, longest: int, ahead: int) -> None:
        self.arrays = self._resize(self.arrays, rows, 0, self.width)
        self.rows = len(rows)
        if self._fit(longest + ahead) < self.width:
            self._set_clock(longest, ahead)

    def _resize(self, cache, rows: np.ndarray | None, shift: int, window: int, keep: bool = False):
        """The cache with other rows (None: the same) and another window, its columns moved left by `shift`.

        Unless `keep`, the old cache is freed layer by layer, even where something still refers to it: there is no
        memory for two caches.
        """
        sizes = (cache.v[0].shape[0], cache.v[0].shape[2], None if rows is None else len(rows), window)
        moved = []
        for kind, arrays in zip(KINDS, cache.arrays, strict=False):
            out = []
            for array in arrays:
                args = (array, rows, np.int32(shift))
                out.append(self.run.call("resize", (*sizes, kind), *args, window=window))
                if not keep:
                    array.delete()
            moved.append(tuple(out))
        start = cache.start  # decode sets it from the rows' own counts: here it only needs the right length
        if rows is not None:
            start = start[: len(rows)] if len(rows) <= len(start) else jnp.resize(start, len(rows))
        return cache.with_arrays(moved, start=start)

    # ---- decoding

    def decode(self, params, rows: Rows, settings: SamplingArrays, kind: tuple, refill_at: int) -> tuple:
        steps = min(self.chunk, self.width - self.end)
        cache = self.arrays.replace(end=jnp.int32(self.end))
        args = (params, cache, rows, settings, np.int32(steps), np.int32(refill_at))
        self.arrays, *out = self.run.call("decode", (self.rows, self.width, *kind), *args)
        out = jax.device_get(out)
        self.end += int(out[2].max(initial=0))
        return tuple(out)

    # ---- compiling ahead

    def warmup(self, params, settings: dict[tuple, SamplingArrays], longest: int) -> None:
        columns = sorted({self.prompt_columns(n) for n in range(longest)})
        prompts = [
            Prefill(self.run, (), n, P, self.prefill_chunk).complete(params).arrays
            for P in columns
            for n in self.prefill_sizes
        ]
        for rows in self.row_sizes:
            for at, window in enumerate(self.windows):
                cache = self.run.call("new_cache", (rows, window), rows, window)
                if rows == self.row_sizes[-1]:
                    cache = self._warm_writes(cache, prompts)
                for other in self.windows[max(at - 1, 0) : at + 2]:
                    self._resize(cache, None, 0, other, keep=True)
                for fewer in (size for size in self.row_sizes if size < rows):
                    self._resize(cache, np.arange(fewer, dtype=np.int32), 0, window, keep=True)
                for kind, values in settings.items():
                    args = (params, cache, idle_rows(rows), values, np.int32(0), np.int32(1))
                    cache, *_ = self.run.call("decode", (rows, window, *kind), *args)

    def _warm_writes(self, cache, prompts: list[tuple]):
        """Run the write of each prompt shape that fits the window, with no row chosen."""
        none = np.zeros(cache.v[0].shape[0], np.int32)
        for prompt in prompts:
            columns = prompt[1][0].shape[2]
            if columns <= cache.v[0].shape[2]:
                cache = self._write(cache, prompt, none, none > 0, columns)
        return cache


def idle_rows(size: int) -> Rows:
    """Rows in which nothing runs."""
    zero = np.zeros(size, np.int32)
    return Rows(zero, zero, zero, zero, zero > 0, np.zeros((size, 2), np.uint32), zero)
