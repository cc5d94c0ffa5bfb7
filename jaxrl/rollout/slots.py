"""What the host passes to the decode program: settings, and the state of the rows. The host keeps its own copy of that
state, so that it never reads it from the device."""

from __future__ import annotations

import numpy as np

from jaxrl.rollout.kernels import Rows, SamplingArrays
from jaxrl.rollout.requests import SamplingParams


class Slots:
    """One row per slot. ticket: int32, -1 if free. sample: int32, which one of the ticket. born: int64, larger for
    responses that started later. Others as in Rows."""

    def __init__(self, size: int):
        self.ticket = np.full(size, -1, np.int32)
        self.sample, self.born = np.zeros(size, np.int32), np.zeros(size, np.int64)
        self.token, self.used, self.count, self.limit, self.min_count = np.zeros((5, size), np.int32)
        self.keys = np.zeros((size, 2), np.uint32)

    def __len__(self) -> int:
        return len(self.ticket)

    @property
    def active(self) -> np.ndarray:
        """bool [slots]: where a response runs."""
        return self.ticket >= 0

    def fill(self, slot: int, ticket: int, sample: int, request, tokens: np.ndarray, *, keys: np.ndarray, born: int):
        """Start sample `sample` of a request in a free slot. tokens: its prompt, and what it drew before if it was
        interrupted. keys: uint32 [2]."""
        self.ticket[slot], self.sample[slot], self.keys[slot], self.born[slot] = ticket, sample, keys, born
        # the first decode step processes the last prompt token, so that prefill needs no head
        self.token[slot], self.used[slot] = tokens[-1], len(tokens) - 1
        self.count[slot] = request.done + len(tokens) - len(request.prompt)
        self.limit[slot] = request.done + request.limits[sample]
        self.min_count[slot] = min(request.min_tokens, self.limit[slot])

    def free(self, rows) -> None:
        """Make rows free."""
        self.ticket[rows], self.used[rows] = -1, 0

    def advance(self, rows: np.ndarray, tokens: np.ndarray, emitted: np.ndarray) -> None:
        """Count what a decode call drew in these rows. tokens: int32 [steps, slots]; emitted: int32 [slots]."""
        self.count[rows] += emitted[rows]
        self.used[rows] += emitted[rows]
        self.token[rows] = tokens[emitted[rows] - 1, rows]

    def take(self, rows: np.ndarray) -> None:
        """Keep these rows, in this order."""
        for name, value in vars(self).items():
            setattr(self, name, value[rows])

    def arguments(self) -> Rows:
        """The rows as the decode program takes them."""
        values = (self.token, self.used, self.count, self.limit, self.active, self.keys, self.min_count)
        # copies: the device may still read them while the host moves on
        return Rows(*(v.copy() for v in values))

    def longest(self) -> int:
        """Cached tokens of the longest running response."""
        return int(self.used[self.active].max(initial=0))

    def steps_left(self, most: int) -> int:
        """Steps to leave room for: at most `most`, but no more than the longest response still allowed; at least 1."""
        left = (self.limit - self.count)[self.active]
        return min(most, max(int(left.max(initial=1)), 1))


def sampling_arrays(
    sampling: SamplingParams, eos: np.ndarray, vocab_size: int, allowed: np.ndarray | None = None
) -> tuple[SamplingArrays, tuple[str, ...]]:
    """The settings as arrays, and which decode program they need: () or some of "truncated", "biased".

    Raises ValueError for a bias of another size than the vocabulary, or one that leaves no token.
    """
    bias = None
    if sampling.bias is not None:
        bias = np.asarray(sampling.bias, np.float32)
        if bias.shape != (vocab_size,):
            raise ValueError(f"bias has shape {bias.shape}, the vocabulary ({vocab_size},)")
        left = bias > -np.inf if allowed is None else (bias > -np.inf) & allowed
        if not np.any(left) or np.any(np.isnan(bias)) or np.any(bias == np.inf):
            raise ValueError("bias must be finite or -inf, and leave at least one token")
    truncated = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    values = dict(
        top_k=np.int32(sampling.top_k), top_p=np.float32(sampling.top_p), min_p=np.float32(sampling.min_p)
    )
    arrays = SamplingArrays(
        np.float32(sampling.temperature), eos, bias=bias, allowed=allowed, **(values if truncated else {})
    )
    return arrays, ("truncated",) * truncated + ("biased",) * (bias is not None)
