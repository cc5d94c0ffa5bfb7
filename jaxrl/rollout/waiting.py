"""Samples that wait for a slot: a queue of those that are not prefilled yet, and a list of those that are."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from jaxrl.rollout.cache import KVCache


@dataclasses.dataclass
class Start:
    """Samples of a ticket that start from the same `tokens`: the prompt, and what a sample drew before it had to give
    up its slot. prefix: the handle of the prefilled tokens, from a KVCache."""

    ticket: int
    tokens: np.ndarray
    samples: list[int]
    prefix: Any = None

    @property
    def cached(self) -> int:
        """Tokens that a prefill caches: all but the last, which the first decode step processes."""
        return len(self.tokens) - 1


class Waiting:
    """prefilled: those whose tokens are cached. prefilling: those whose tokens are partly cached. The others wait in a
    queue, ordered by the rank given to `add`."""

    def __init__(self):
        self.prefilled: list[Start] = []
        self.prefilling: list[Start] = []
        self._queue: list[tuple] = []
        self._added = 0

    def __bool__(self) -> bool:
        return bool(self._queue or self.prefilling or self.prefilled)

    @property
    def samples(self) -> int:
        """How many wait."""
        return sum(len(start.samples) for start in self._all())

    def _all(self) -> list[Start]:
        return [*self.prefilled, *self.prefilling, *(entry[-1] for entry in self._queue)]

    @property
    def next(self) -> Start | None:
        """The first that is not prefilled."""
        return self._queue[0][-1] if self._queue else None

    def add(self, start: Start, rank: tuple) -> None:
        """Queue a start: lower ranks come first, then longer ones, then those added earlier."""
        self._added += 1
        bisect.insort(self._queue, (*rank, -len(start.tokens), self._added, start))

    def choose(self, samples: int, cache: KVCache) -> list[Start]:
        """Move the next ones to `prefilling`: enough for `samples` slots, as far as the cache has room."""
        chosen: list[Start] = []
        brought, most = 0, cache.prefill_sizes[-1]

        def lengths() -> list[int]:
            return [start.cached for start in chosen]

        def takes(most: int) -> bool:
            if self.next is None or len(chosen) == most:
                return False
            return not chosen or cache.fits([*lengths(), self.next.cached])

        while brought < samples and takes(most):
            chosen.append(self._queue.pop(0)[-1])
            brought += len(chosen[-1].samples)
        rows, columns = cache.prefill_shape(lengths())
        while takes(rows) and self.next.cached <= columns:  # these rows would be padding otherwise
            chosen.append(self._queue.pop(0)[-1])
        self.prefilling = chosen
        return chosen

    def remove(self, ticket: int, samples: Collection[int]) -> None:
        """Remove these samples of a ticket."""
        for start in self._all():
            if start.ticket == ticket:
                start.samples = [s for s in start.samples if s not in samples]
        self._queue = [entry for entry in self._queue if entry[-1].samples]
        self.prefilled = [start for start in self.prefilled if start.samples]
        self.prefilling = [start for start in self.prefilling if start.samples]
