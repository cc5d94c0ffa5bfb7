"""Runs a user's reward function away from the training process: `python -m jaxrl.tasks.reward_worker MODULE:NAME`."""

from __future__ import annotations

import importlib
import math
import numbers
import re
import sys
from typing import Any

from jaxrl.tasks import workers
from jaxrl.tasks.task import LARGEST

_function = None


def load(spec: str):
    """The function "module:name". Raises ValueError with what is wrong, ImportError if there is no such module."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ValueError(f"{spec!r} is not module:function")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"module {module!r} has no function {name!r}")
    return function


def _begin() -> None:
    global _function  # imported after the fork: a user's module may start threads
    _function = load(sys.argv[1])


def _handle(job: list[Any]) -> float | dict[str, float]:
    prompt, text, answer, info = job
    value = _function(prompt, text, answer, **info)
    if not isinstance(value, dict):
        return _number(value)
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name == "length":
            raise ValueError(f"returned a reward named {name!r}: a name is a word, and not 'length'")
    if not value:
        raise ValueError("returned an empty dict")
    named = {name: _number(part) for name, part in value.items()}
    _number(sum(named.values()))
    return named


def _number(value: Any) -> float:
    if callable(getattr(value, "item", None)):  # a number of numpy, jax or torch, or an array of one
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"returned {'None' if value is None else type(value).__name__}, not a number")
    value = float(value)
    if not abs(value) <= LARGEST:
        raise ValueError(f"returned {value}" + (", infinite in float32" if math.isfinite(value) else ""))
    return value


if __name__ == "__main__":
    workers.serve(_handle, memory_mb=0, begin=_begin)
