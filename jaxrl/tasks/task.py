"""A task as the training loop sees it: problems, how to write them as tokens, how to grade answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from jaxrl.types import Problem

LARGEST = 3.4028234e38  # reward that float32, in which they are kept, can hold


class Grade(NamedTuple):
    """correct: 0 or 1. reward: float. valid: False keeps the completion out of training. outcome: as in Rollouts.
    named: name -> float, where the reward is a sum of named ones."""

    correct: float
    reward: float
    valid: bool
    outcome: str
    named: Mapping[str, float] = MappingProxyType({})


def without_infinities(grade: Grade) -> Grade:
    """The grade, or one that is not valid, its outcome "nonfinite", if a reward is not finite in float32."""
    if all(abs(value) <= LARGEST for value in (grade.reward, *grade.named.values())):
        return grade
    return Grade(grade.correct, 0.0, False, "nonfinite")


class Task(NamedTuple):
    """train, held_out: problems. encode(problem) -> prompt tokens. grade(problems, texts) -> one Grade each."""

    train: Sequence[Problem]
    held_out: Sequence[Problem]
    encode: Callable[[Problem], list[int]]
    grade: Callable[[Sequence[Problem], Sequence[str]], list[Grade]]
