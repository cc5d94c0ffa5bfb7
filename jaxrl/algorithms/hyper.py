"""A method and its constants, as every table of methods holds them, and the lookup of a method by name.

A constant has a default and says which values it accepts, so that a wrong value is refused by name when it is set, not
in a training step:

    Number(0.2, 0, 1)                a finite number, here in [0, 1]
    Number(1e-6, 0, above=True)      greater than 0
    Number(3.0, 1, off=0.0)          at least 1, or 0, which switches it off
    Integer(16, 1)                   at least 1
    Choice("linear", ("linear", "inf"))
    Flag(False)

`Text` and `Words` are for settings of the configuration (`jaxrl.runtime.config`), which uses all of these classes. Each
has `default` and `accepts(value)`; its str() says what it accepts.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number in [low, high]; above, below: that end is excluded. off: one more value, outside the range."""

    default: float
    low: float = 0.0
    high: float = math.inf
    _: dataclasses.KW_ONLY
    above: bool = False
    below: bool = False
    off: float | None = None

    def accepts(self, value: Any) -> bool:
        """Whether the value is such a number. NumPy scalars are accepted, booleans are not."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            return False
        if self.off is not None and value == self.off:
            return True
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        parts = [low] * math.isfinite(self.low) + [high] * math.isfinite(self.high)
        text = f"a number {' and '.join(parts)}" if parts else "a finite number"
        return text if self.off is None else f"{text}, or {self.off:g}"


@dataclasses.dataclass(frozen=True)
class Integer:
    """An integer in [low, high]. off: one more value, outside the range."""

    default: int
    low: int = 0
    high: int | None = None
    _: dataclasses.KW_ONLY
    off: int | None = None

    def accepts(self, value: Any) -> bool:
        """Whether the value is such an integer. NumPy integers are accepted, booleans are not."""
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            return False
        return value == self.off or (value >= self.low and (self.high is None or value <= self.high))

    def __str__(self) -> str:
        text = f"an integer of at least {self.low}" + ("" if self.high is None else f" and at most {self.high}")
        return text if self.off is None else f"{text}, or {self.off}"


class Names(Collection):
    """The names of a table as it is when they are asked for, sorted: a config file may add methods."""

    def __init__(self, table: Mapping):
        self._table = table

    def __contains__(self, name):
        return name in self._table

    def __iter__(self):
        return iter(sorted(self._table))

    def __len__(self):
        return len(self._table)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some words."""

    default: str
    options: Collection[str]

    def accepts(self, value: Any) -> bool:
        """Whether the value is one of the options."""
        return isinstance(value, str) and value in self.options

    def __str__(self) -> str:
        return "one of " + ", ".join(option or '""' for option in self.options)


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False."""

    default: bool

    def accepts(self, value: Any) -> bool:
        """Whether the value is a boolean."""
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "True or False"


@dataclasses.dataclass(frozen=True)
class Text:
    """A string that matches a pattern; `meaning` says in words which those are."""

    default: str
    meaning: str = "text"
    pattern: str = r"(?s).*"

    def accepts(self, value: Any) -> bool:
        """Whether the value is such a string."""
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.meaning


@dataclasses.dataclass(frozen=True)
class Words:
    """A tuple of words of `options`, each at most once."""

    default: tuple[str, ...]
    options: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        """Whether the value is such a tuple (or list)."""
        words = isinstance(value, tuple | list) and all(isinstance(word, str) for word in value)
        return words and len(set(value)) == len(value) and set(value) <= set(self.options)

    def __str__(self) -> str:
        return f"a tuple of words of {', '.join(self.options)}, as in \"{self.options}\""


Constant = Number | Integer | Choice | Flag | Text | Words


@dataclasses.dataclass(frozen=True)
class Method:
    """An entry of a table of methods: a function, and its constants by name.

    ordered: names of constants whose values must not decrease, as ("low", "high"); several such tuples.
    """

    fn: Callable
    constants: Mapping[str, Constant] = dataclasses.field(default_factory=dict)
    ordered: Sequence[tuple[str, ...]] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self):
        names = list(inspect.signature(self.fn).parameters)
        if len(names) != 2:  # the first edition passed arrays one by one
            raise ValueError(
                f"a method is fn(inputs, hyper) or fn(rollouts, hyper), not {self.fn.__name__}({', '.join(names)}); "
                "docs/extending.md shows the form of each table"
            )
        for name, constant in self.constants.items():
            if not isinstance(constant, Constant):
                raise ValueError(
                    f"{self.fn.__name__}: constant {name!r} is {constant!r}; write Number({constant!r}) or another "
                    "type of jaxrl.algorithms.hyper"
                )

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each constant."""
        return {name: constant.default for name, constant in self.constants.items()}

    def problem(self, values: Mapping[str, Any]) -> str:
        """What is wrong with these constants (a value for each), or "": "NAME=VALUE must be ..." of the first."""
        for name, constant in self.constants.items():
            if not constant.accepts(values[name]):
                return f"{name}={values[name]!r} must be {constant}"
        for names in self.ordered:
            for a, b in zip(names, names[1:], strict=False):
                if values[a] > values[b]:
                    return f"{a}={values[a]!r} must not be above {b}={values[b]!r}"
        return ""


def resolve(table: Mapping[str, Any], kind: str, name: str, overrides: Mapping[str, Any] | None = None):
    """(table[name], its defaults updated by overrides).

    kind: what the table holds, for the message ("loss", "advantage", ...). Raises ValueError, naming what
    would be valid, for an unknown method, an unknown constant, or a value that the constant does not take.
    """
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; valid: {', '.join(sorted(table))}")
    entry = table[name]
    values = {**entry.defaults, **dict(overrides or {})}
    unknown = sorted(set(values) - set(entry.constants))
    if unknown:
        valid = ", ".join(sorted(entry.constants)) or "none"
        raise ValueError(f"unknown constant {unknown[0]!r} of {kind} {name!r}; valid: {valid}")
    if problem := entry.problem(values):
        raise ValueError(f"{kind} {name!r}: {problem}")
    return entry, values
