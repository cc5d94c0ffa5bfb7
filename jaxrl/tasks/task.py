"""A task as the training loop sees it: problems, how to write them as tokens, how to grade answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from jaxrl.types import Problem


class Grade(NamedTuple):
    """correct: 0 or 1. reward: float. valid: False keeps the completion out of training. outcome: as in Rollouts.
    named: name -> float, where the reward is a sum of named ones."""

    correct: float
    reward: float
    valid: bool
    outcome: str
    named: Mapping[str, float] = MappingProxyType({})


class Task(NamedTuple):
    """train, held_out: problems. encode(problem) -> prompt tokens. grade(problems, texts) -> one Grade each."""

    train: Sequence[Problem]
    held_out: Sequence[Problem]
    encode: Callable[[Problem], list[int]]
    grade: Callable[[Sequence[Problem], Sequence[str]], list[Grade]]
