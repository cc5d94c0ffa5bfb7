"""The key-value cache in pages: rows hold as many as their own context needs, samples share those of their prompt.

Each replica of the weights has its own pool, and its rows only use pages of it. When a pool runs out, its youngest
responses give their pages back and wait; the engine prefills them again later. The drawn tokens stay the same.

Where a model mixes sliding-window and full attention, its sliding-window layers have their own pages: a ring per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxrl.errors import UserError
from jaxrl.rollout.cache import Prefill, bucket, idle_rows, prefill_sizes, row_sizes
from jaxrl.rollout.kernels import Rows, SamplingArrays
from jaxrl.rollout.programs import Runner
from models.pages import Pages

WRITES = 64  # pages that one call fills, on each replica
# Maximum tokens that one call prefills on each replica: enough for efficient matrix products. Larger calls would need
# more working memory, which pages could use.
PREFILL = 8192


@dataclasses.dataclass
class Prompt:
    """A prefilled prompt of `length` tokens: row `row` of what `call` has cached.

    shared: replica -> (the prompt's full pages there, the time at which the first was taken); valid as long as a sample
    holds them.
    """

    call: Prefill
    row: int
    length: int
    shared: dict[int, tuple[list[int], int]] = dataclasses.field(default_factory=dict)


class Pool:
    """Pages of one replica, with the number of holders of each. Page 0 is never given out."""

    def __init__(self, count: int):
        self.holders = np.zeros(count, np.int32)
        self.taken_at = np.zeros(count, np.int64)
        self.free = list(range(count - 1, 0, -1))
        self._clock = 0

    def take(self, count: int) -> list[int]:
        """Take so many free pages; each then has one holder."""
        pages = [self.free.pop() for _ in range(count)]
        self._clock += 1
        self.holders[pages], self.taken_at[pages] = 1, self._clock
        return pages

    def give(self, pages: np.ndarray) -> None:
        """Remove one holder from each of these; pages without a holder are free."""
        self.holders[pages] -= 1
        self.free += [int(page) for page in pages if self.holders[page] == 0]


class Rings:
    """The pages of the layers that see the last `window` tokens. Each row has a ring of `width` pages: page i of its
    response is the (i mod width)-th of them, so that pages which no window reaches are overwritten. A row always has
    its ring; prompts are copied into it, not shared. Page 0 of each replica belongs to no row."""

    def __init__(self, window: int, *, page: int, chunk: int, most: int, slots: int, replicas: int):
        self.window, self.page, self.slots, self.replicas = window, page, slots, replicas
        self.width = min((window + chunk - 2) // page + 2, most)  # pages that a window and a decode call touch, at most
        self.pages = self.width * (slots // replicas) + 1

    def begin(self, rows: int) -> None:
        self.ring = np.arange(rows) % (self.slots // self.replicas)  # of each row, in its replica

    def take(self, rows: np.ndarray, again: np.ndarray) -> None:
        """As KVCache.take, with a single replica. again: bool, rows that are new and get an unused ring."""
        self.ring = self.ring[rows]
        self.ring[again] = np.setdiff1d(np.arange(self.slots), self.ring[~again])[: again.sum()]

    def first(self, used):
        """Index of the first page that the next token attends to, after `used` tokens."""
        return np.maximum(used - self.window + 1, 0) // self.page

    def targets(self, row: int, length: int) -> list[tuple[int, int]]:
        """(page of the prompt, page of the pool) for each page of such a prompt that its window still reaches."""
        indices = range(int(self.first(length)), -(-length // self.page))
        return [(i, int(1 + self.ring[row] * self.width + i % self.width)) for i in indices]

    def table(self, used: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(page table int32 [rows, width], position of its first token int32 [rows]); zeros for rows without pages."""
        first = self.first(used)
        pages = 1 + self.ring[:, None] * self.width + (first[:, None] + np.arange(self.width)) % self.width
        return np.where(held[:, None], pages, 0).astype(np.int32), (first * self.page).astype(np.int32)


class PagedCache:
    """A KVCache of pages.

    Args:
      as for DenseCache, and page: tokens per page. tokens: capacity of all replicas together; 0: enough for `slots`
        rows of full length. implementation: of models.pages. "xla" gathers as many pages per row as the longest row
        holds; the others read only each row's own pages, so that one width of the table is enough. local: the window
        where sliding-window and full attention are mixed (models.pages.local_window), else 0.

    Raises UserError for a capacity that does not hold one response of full length on each replica.
    """

    def __init__(self, run: Runner, *, slots: int, multiple: int, max_prompt: int, max_tokens: int, chunk: int,
                 window: int, page: int, tokens: int = 0, implementation: str = "xla", prefill_chunk: int = 0,
                 local: int = 0):
        self.run, self.chunk, self.page, self.replicas = run, chunk, page, multiple
        self.prefill_chunk = prefill_chunk
        self.implementation = implementation
        most = -(-(max_prompt + max_tokens) // page)  # pages of a row
        count = tokens // page // multiple if tokens else most * (slots // multiple)
        if count < most:
            raise UserError(f"config.sampling.cache_tokens={tokens} is {count} pages of {page} tokens on each of "
                            f"{multiple} replicas; one response of full length takes {most}: set at least "
                            f"{most * page * multiple}")
        self.pages = count + 1
        self.rings = Rings(local, page=page, chunk=chunk, most=most, slots=slots, replicas=multiple) if local else None
        self.longest = max_prompt + max_tokens if count < most * (slots // multiple) else 0
        # rows cannot move to another replica's pool
        self.row_sizes = row_sizes(slots, multiple) if multiple == 1 else [slots]
        least, *others = prefill_sizes(slots, multiple)
        self.prefill_sizes = [least, *(n for n in others if n * max_prompt <= PREFILL * multiple)]
        self.widths = [most]
        if implementation == "xla":
            self.widths = sorted({min(bucket(n, max(1, window // page)), most) for n in range(1, most + 1)})
        self.clear()

    def clear(self) -> None:
        self.arrays, self.rows, self.steps, self._writes, self._local = None, 0, 0, [], []
        self.pools = [Pool(self.pages) for _ in range(self.replicas)]
        self.table, self.held = np.zeros((0, self.widths[-1]), np.int32), np.zeros(0, np.int32)

    def begin(self, rows: int) -> None:
        self.rows = rows
        self.table, self.held = np.zeros((rows, self.widths[-1]), np.int32), np.zeros(rows, np.int32)
        if self.rings:
            self.rings.begin(rows)
        self.arrays = self.run.call("new_pages", self.counts, *self.counts)

    @property
    def counts(self) -> tuple[int, int]:
        """Pages of all replicas together, and those of the layers with rings."""
        return self.pages * self.replicas, self.rings.pages * self.replicas if self.rings else 0

    # ---- prompts

    def prefill_shape(self, lengths: Sequence[int]) -> tuple[int, int]:
        n = next((size for size in self.prefill_sizes if size >= len(lengths)), self.prefill_sizes[-1])
        return n, bucket(max(lengths), 32)

    def prefill(self, prompts: Sequence[np.ndarray]) -> list[Prompt]:
        n, columns = self.prefill_shape([len(p) for p in prompts])
        call = Prefill(self.run, prompts, n, columns, self.prefill_chunk)
        return [Prompt(call, row, len(prompt)) for row, prompt in enumerate(prompts)]

    def _replica(self, row: int) -> int:
        return row * self.replicas // self.rows

    def _spare(self, replica: int) -> int:
        """Free pages of a replica, less one for each of its running rows. Those are needed soon: a response admitted
        on them would have to give them back."""
        rows = self.held.reshape(self.replicas, -1)[replica]
        return len(self.pools[replica].free) - int(np.sum(rows > 0))

    def fits(self, lengths: Sequence[int]) -> bool:
        needed, spare = [n // self.page + 1 for n in lengths], [self._spare(r) for r in range(self.replicas)]
        return max(needed) <= max(spare) and sum(needed) <= sum(max(s, 0) for s in spare)

    def reserve(self, row: int, prompt: Prompt) -> bool:
        replica = self._replica(row)
        pool, full = self.pools[replica], prompt.length // self.page
        shared, since = prompt.shared.get(replica, ([], -1))
        alive = bool(shared) and pool.holders[shared[0]] > 0 and pool.taken_at[shared[0]] == since
        if self._spare(replica) < 1 + (0 if alive else full):
            return False
        if alive:
            pool.holders[shared] += 1
        else:
            shared = pool.take(full)
            self._writes += [(prompt, i, replica, page) for i, page in enumerate(shared)]
            if shared:
                prompt.shared[replica] = (shared, int(pool.taken_at[shared[0]]))
        (own,) = pool.take(1)  # the last, partial page is copied: the row writes there next
        if prompt.length % self.page:
            self._writes.append((prompt, full, replica, own))
        if self.rings:
            self._local += [(prompt, i, replica, to) for i, to in self.rings.targets(row, prompt.length)]
        self.table[row, : full + 1] = [*shared, own]
        self.held[row] = full + 1
        return True

    def admit(self, longest: int, ahead: int, placed: Sequence[tuple[int, Prompt]]) -> None:
        batches: dict[Prefill, tuple[list, list]] = {}  # one write for the prompts of one prefill
        for kind, writes in enumerate((self._writes, self._local)):
            for write in writes:
                batches.setdefault(write[0].call, ([], []))[kind].append(write)
        self._writes, self._local = [], []
        for call, both in batches.items():
            parts = [[[w for w in batch if w[2] == r] for r in range(self.replicas)] for batch in both]
            for at in range(0, max(len(own) for part in parts for own in part), WRITES):
                now = ([own[at : at + WRITES] for own in part] for part in parts)
                self.arrays = self._write(self.arrays, call, *now)

    def _write(self, arrays, call: Prefill, parts: Sequence[list], local: Sequence[list]):
        """The pool with pages of a prefill written into it; parts, local: a list of writes for each replica."""

        def indices(parts):
            source, first, target = np.zeros((3, self.replicas, WRITES), np.int32)
            for replica, writes in enumerate(parts):
                for i, (of, index, _, page) in enumerate(writes):
                    source[replica, i], target[replica, i] = of.row, page
                    first[replica, i] = call.columns - of.length + index * self.page
            return source.ravel(), first.ravel(), target.ravel()

        sizes = call.arrays[1][0].shape[0], call.columns
        args = (indices(parts), indices(local) if self.rings else None)
        return self.run.call("write_pages", sizes, arrays, call.arrays, *args)

    # ---- rows

    def take(self, rows: np.ndarray, longest: int, ahead: int) -> None:
        again = np.ones(len(rows), bool)
        again[np.unique(rows, return_index=True)[1]] = False  # repeated: new rows, which are empty
        self.table, self.held = self.table[rows], self.held[rows]
        self.table[again], self.held[again] = 0, 0
        self.rows = len(rows)
        if self.rings:
            self.rings.take(rows, again)

    def release(self, rows: np.ndarray) -> None:
        for row in np.atleast_1d(rows):
            self.pools[self._replica(row)].give(self.table[row, : self.held[row]])
            self.table[row], self.held[row] = 0, 0

    def room(self, used: np.ndarray, left: np.ndarray, born: np.ndarray) -> list[int]:
        least, waiting = min(self.page, self.chunk), []
        self.steps = self.chunk

        def missing(rows, steps: int) -> np.ndarray:
            return np.maximum(-(-(used[rows] + np.minimum(left[rows], steps)) // self.page) - self.held[rows], 0)

        replica = self._replica(np.arange(self.rows))
        for number, pool in enumerate(self.pools):
            rows = np.flatnonzero((replica == number) & (self.held > 0))
            rows = rows[np.argsort(born[rows])]
            while missing(rows, self.steps).sum() > len(pool.free):
                if self.steps > least:
                    self.steps = max(self.steps // 2, least)
                else:
                    waiting.append(int(rows[-1]))
                    self.release(rows[-1])
                    rows = rows[:-1]
        for row in np.flatnonzero(self.held):
            (count,) = missing([row], self.steps)
            pages, at = self.pools[replica[row]].take(int(count)), self.held[row]
            self.table[row, at : at + len(pages)] = pages
            self.held[row] += len(pages)
        return waiting

    # ---- decoding

    def decode(self, params, rows: Rows, settings: SamplingArrays, kind: tuple, refill_at: int) -> tuple:
        width = next(w for w in self.widths if w >= self.held.max())
        local = self.rings.table(rows.used, self.held > 0) if self.rings else None
        cache = self.view(self.arrays, self.table[:, :width].copy(), local)
        args = (params, cache, rows, settings, np.int32(self.steps), np.int32(refill_at))
        cache, *out = self.run.call("decode", (self.rows, width, *kind), *args)
        self.arrays = cache.arrays
        return jax.device_get(tuple(out))

    def view(self, arrays, table, local: tuple | None) -> Pages:
        """The cache as the decode program takes it."""
        return Pages(arrays[0], arrays[1] if len(arrays) > 1 else None, table, local, self.implementation)

    # ---- compiling ahead

    def warmup(self, params, settings: dict[tuple, SamplingArrays], longest: int) -> None:
        columns = sorted({bucket(n, 32) for n in range(max(longest, self.longest))})
        self.begin(self.row_sizes[-1])
        nothing = [[] for _ in range(self.replicas)]
        for P in columns:
            for n in self.prefill_sizes:
                call = Prefill(self.run, (), n, P, self.prefill_chunk).complete(params)
                self.arrays = self._write(self.arrays, call, nothing, nothing)
        for rows in self.row_sizes:
            for width in self.widths:
                for kind, values in settings.items():
                    nobody = np.zeros(rows, np.int32)
                    local = self.rings.table(nobody, nobody > 0) if self.rings else None
                    cache = self.view(self.arrays, np.zeros((rows, width), np.int32), local)
                    args = (params, cache, idle_rows(rows), values, np.int32(0), np.int32(1))
                    self.arrays = self.run.call("decode", (rows, width, *kind), *args)[0].arrays
        self.clear()
