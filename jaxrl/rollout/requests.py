"""What goes into the sampler and what it counts: requests, settings, statistics. Host data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Request:
    """`samples` completions of one prompt, or the rest of one that was begun before.

    prompt: int32 [p], p >= 1. max_tokens: response tokens allowed, at least 1; one number, or one a sample.
    key: uint32, identifies the problem in the random keys. expected: guessed response length; longer requests
    start first. first_sample: index of the first sample in the random keys. min_tokens: end tokens are not
    drawn before. stop: token sequences that end a completion (finish "stop", the sequence included).
    done: so many tokens at the end of `prompt` are response tokens drawn earlier; limits count what is still to come,
    positions in the random keys go on from there. step: the training step in the random keys, if not `generate`'s.
    """

    prompt: np.ndarray
    samples: int
    max_tokens: int | Sequence[int]
    key: int
    expected: float = 0.0
    first_sample: int = 0
    min_tokens: int = 0
    stop: tuple[tuple[int, ...], ...] = ()
    done: int = 0
    step: int | None = None

    @property
    def limits(self) -> np.ndarray:
        """int32 [samples]: response tokens allowed. Raises ValueError if max_tokens has another length."""
        limits = np.asarray(self.max_tokens, np.int32)
        if limits.ndim and limits.shape != (self.samples,):
            raise ValueError(f"max_tokens: {limits.shape} limits for {self.samples} samples")
        return np.broadcast_to(limits, (self.samples,))


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off. bias: float32 [V], added to the logits.

    -inf in `bias` bans a token. Raises ValueError naming the field that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    bias: np.ndarray | None = None

    def __post_init__(self):
        valid = {
            "temperature": (self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0 is off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1 is off)"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1] (0 is off)"),
        }
        for name, (ok, range_) in valid.items():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: must be {range_}")


@dataclasses.dataclass
class Stats:
    """Counts of one `generate` call. steps: decode steps run; slot_steps: rows x steps, the denominator of utilisation.

    seconds_decode: in or waiting for decode calls; seconds_prefill: launching prefills only, which run while the
    host goes on (benchmarks/sampler.py measures them whole); what is left of seconds_total is the host's own work.
    """

    tokens: int = 0
    steps: int = 0
    slot_steps: int = 0
    decode_calls: int = 0
    prefill_calls: int = 0
    prefill_tokens: int = 0
    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    seconds_total: float = 0.0

    @property
    def utilisation(self) -> float:
        """Share of the slot-steps that produced a token of a completion."""
        return self.tokens / max(self.slot_steps, 1)
