"""`Problem` goes into the sampler, `Completion` comes out. Batches of them: `jaxrl.rollouts`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """One task instance.

    id: unique within its data set; in evaluation, part of the random key of every token sampled for it.
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
    finish: "eos" (an EOS token was sampled), "length" (the token limit was reached), "stop" (a stop sequence) or
        "partial" (to be continued).
    sampled: bool [n], False where a token was forced by somebody else than the policy (a tool's result, budget
        forcing): its log-prob is 0 and it takes no gradient. None: all were drawn.
    columns: what else the sampler records for each token, name -> [n, ...]; 0 means that nothing was recorded.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish: str
    sampled: np.ndarray | None = None
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def head(self, n: int) -> Completion:
        """The first n tokens, to be continued."""
        sampled = None if self.sampled is None else self.sampled[:n]
        begun = dict(tokens=self.tokens[:n], logprobs=self.logprobs[:n], sampled=sampled)
        begun["columns"] = {name: values[:n] for name, values in self.columns.items()}
        return dataclasses.replace(self, finish="partial", **begun)

    def joined(self, rest: Completion) -> Completion:
        """This completion with its continuation appended; `finish` is that of the continuation."""
        both, sampled = (self, rest), None
        if any(c.sampled is not None for c in both):
            sampled = np.concatenate([np.ones(c.length, bool) if c.sampled is None else c.sampled for c in both])
        tokens, logprobs = (np.concatenate([getattr(c, name) for c in both]) for name in ("tokens", "logprobs"))
        columns = concat_columns([(c.columns, c.length) for c in both])
        return dataclasses.replace(
            self, tokens=tokens, logprobs=logprobs, finish=rest.finish, sampled=sampled, columns=columns)

    def forced(self, tokens) -> Completion:
        """This completion with tokens appended that the policy did not draw; to be continued."""
        tokens = np.asarray(tokens, np.int32)
        zeros = np.zeros(len(tokens), np.float32)
        return self.joined(Completion(tokens, zeros, "partial", sampled=zeros > 0))


def concat_columns(parts: Sequence[tuple[dict, int]]) -> dict[str, np.ndarray]:
    """The columns of all parts, concatenated. A part is (name -> [n, ...], n); a column that it lacks is 0 there."""
    some = {name: values for columns, _ in parts for name, values in columns.items()}
    missing = lambda values, n: np.zeros((n, *values.shape[1:]), values.dtype)  # noqa: E731
    return {k: np.concatenate([c[k] if k in c else missing(v, n) for c, n in parts]) for k, v in some.items()}
