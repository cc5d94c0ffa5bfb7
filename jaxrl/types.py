"""What goes into the sampler and what comes out: a problem, a completion. Batches of them: `jaxrl.rollouts`."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """One task instance.

    id: unique within its data set; part of the random key of every token sampled for it.
    prompt: the question, before any template. answer: the reference answer, raw.
    budget: requested response length in tokens, or None. mode: "none", "exact" or "max" (LCPO).
    info: whatever else the data row held; passed on to user reward functions.
    """

    id: str
    prompt: str
    answer: str
    task: str = ""
    budget: int | None = None
    mode: str = "none"
    info: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response.

    tokens: int32 [n], the end-of-sequence token included when there was one.
    logprobs: float32 [n], log-probability of each token under the tempered sampling distribution
        before top-k/top-p/min-p truncation.
    finish: "eos" (an end token was sampled), "length" (the token limit was reached), "stop" (a stop sequence) or
        "partial" (to be continued).
    sampled: bool [n], False where a token was forced instead of drawn; None = all were drawn.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish: str
    sampled: np.ndarray | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)
