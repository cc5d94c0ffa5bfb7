"""Groups that are sampled over several calls: cut, kept, continued.

Nothing here drops a completion for its length: what is unfinished goes on where it was left, and the random key of a
token does not know of the cut, so under unchanged parameters the tokens are those of an uncut sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxrl.rollout.requests import Request
from jaxrl.types import Completion, Problem


@dataclasses.dataclass(frozen=True)
class Partial:
    """A group that has begun. position, step: where and when the problem was drawn, part of its random keys.

    prompt: int32 [p]. completions: one a sample; those to be continued have finish "partial".
    """

    position: int
    step: int
    problem: Problem
    prompt: np.ndarray
    completions: list[Completion]

    @property
    def running(self) -> int:
        """Completions to be continued."""
        return sum(c.finish == "partial" for c in self.completions)

    @property
    def drawn(self) -> int:
        """Tokens so far."""
        return sum(c.length for c in self.completions)


def begin(position: int, step: int, problem: Problem, prompt: np.ndarray, samples: int) -> Partial:
    """A group of `samples` completions without any token."""
    empty = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), "partial")
    return Partial(position, step, problem, prompt, [empty] * samples)


def aged(completions: list[Completion]) -> list[Completion]:
    """The completions when new parameters arrive: every token so far is stale."""
    return [dataclasses.replace(c, stale=c.length) for c in completions]


def requests(group: Partial, limit: int, budget: int, expected: float) -> list[Request]:
    """What is left to sample of a group.

    limit: response tokens allowed in all. budget: at most so many now, 0 = no bound. expected: guessed length.
    One request for a group without tokens; otherwise one for each running completion, its tokens prefilled again.
    """
    budget = budget or limit
    common = dict(key=group.position % 2**32, step=group.step)
    if group.drawn == 0:
        samples = len(group.completions)
        return [Request(group.prompt, samples, min(limit, budget), expected=expected, **common)]
    return [
        Request(
            prompt=np.concatenate([group.prompt, c.tokens]),
            samples=1,
            max_tokens=min(limit - c.length, budget),
            expected=max(expected, limit / 2),  # it has outlived others: start it early
            first_sample=i,
            done=c.length,
            **common,
        )
        for i, c in enumerate(group.completions)
        if c.finish == "partial"
    ]


def extend(group: Partial, sampled: Iterator[Completion], limit: int) -> Partial:
    """The group with the completions of its `requests` appended, taken from `sampled` in order."""
    out = []
    for c in group.completions:
        if c.finish == "partial":
            new = next(sampled)
            tokens, logprobs = np.concatenate([c.tokens, new.tokens]), np.concatenate([c.logprobs, new.logprobs])
            cut = new.finish == "length" and len(tokens) < limit
            c = Completion(tokens, logprobs, "partial" if cut else new.finish, c.stale)
        out.append(c)
    return dataclasses.replace(group, completions=out)


def completion_to_json(c: Completion) -> list:
    """JSON-able; floats keep their exact value."""
    return [c.tokens.tolist(), c.logprobs.tolist(), c.finish, c.stale]


def completion_from_json(data: list) -> Completion:
    """Inverse of completion_to_json."""
    tokens, logprobs, *rest = data
    return Completion(np.array(tokens, np.int32), np.array(logprobs, np.float32), *rest)


def to_json(group: Partial) -> dict:
    """JSON-able form of a group."""
    return {
        "position": group.position,
        "step": group.step,
        "problem": dataclasses.asdict(group.problem),
        "prompt": group.prompt.tolist(),
        "completions": [completion_to_json(c) for c in group.completions],
    }


def from_json(data: dict) -> Partial:
    """Inverse of to_json."""
    fields = {
        "problem": Problem(**data["problem"]),
        "prompt": np.array(data["prompt"], np.int32),
        "completions": [completion_from_json(c) for c in data["completions"]],
    }
    return Partial(**(data | fields))
