"""Rotary frequencies and the ways to stretch them over a longer context; to and from the keys of a config.json.

A scaling maps float64 frequencies [H/2] of base theta to others. Its fields are the keys that transformers reads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (2306.15595): all wavelengths are stretched by `factor`."""

    factor: float

    def __call__(self, freq, theta: float):
        return freq / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: wavelengths above original_max_position_embeddings / low_freq_factor are stretched by `factor`, those
    below original_max_position_embeddings / high_freq_factor are kept, and those between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"{self}: need factor >= 1 and 0 < low_freq_factor < high_freq_factor")

    def __call__(self, freq, theta: float):
        wavelength = 2 * math.pi / freq
        smooth = (self.original_max_position_embeddings / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)  # 0: long wavelength, slowed down; 1: short, left alone
        return (1 - smooth) * freq / self.factor + smooth * freq


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (2309.00071), section 3.2 and 3.4: frequencies that turn fewer than beta_slow times within the original
    context are divided by `factor`, those that turn more than beta_fast times are kept, with a ramp between, and sine
    and cosine are multiplied by attention_factor. truncate: the ramp begins and ends at whole dimensions."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __call__(self, freq, theta: float):
        half = len(freq)

        def dimension(turns):  # that turns so many times in the original context
            return half * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        high += 0.001 * (low == high)
        stretched = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
        return stretched * freq / self.factor + (1 - stretched) * freq


Scaling = LinearScaling | Llama3Scaling | YarnScaling
_TYPES = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
_YARN_ONLY = ("mscale", "mscale_all_dim")


def rope_frequencies(head_dim: int, theta: float, scaling: Scaling | None) -> tuple[np.ndarray, float]:
    """(float32 [H/2] radians per position, factor of sine and cosine). theta 0: no rotation at all (NoPE)."""
    half = head_dim // 2
    if theta == 0:
        return np.zeros(half, np.float32), 1.0
    freq = theta ** (-np.arange(half, dtype=np.float64) / half)
    freq = freq if scaling is None else scaling(freq, theta)
    return freq.astype(np.float32), getattr(scaling, "attention_factor", 1.0)


def read_rope(rope: Any, key: str, where: str, theta: Any, original: Any) -> tuple[float, Scaling | None]:
    """(theta, scaling) of an object with rotary keys, as transformers reads it.

    key, where: its name and file, for errors. theta: the default, if it names none. original: (the context before
    stretching as the top level has it, which has priority, or None; max_position_embeddings, which is the default).
    Raises ValueError for a type that is not implemented, and for keys that it does not have.
    """
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: key '{key}' must be an object or null, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *_TYPES):
        raise ValueError(f"{where}: key '{key}' has rope_type {kind!r}: supported are default, {', '.join(_TYPES)}")
    fields = {f.name: f for f in dataclasses.fields(_TYPES[kind])} if kind != "default" else {}
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *fields}
    known |= set(_YARN_ONLY) if kind == "yarn" else {"original_max_position_embeddings", "factor"}
    if unknown := sorted(set(rope) - known):
        raise ValueError(f"{where}: key '{key}' has '{unknown[0]}', not implemented for rope_type {kind}")
    values = {name: rope[name] for name in fields if rope.get(name) is not None}
    if "original_max_position_embeddings" in fields:
        top, longest = original
        stated = rope.get("original_max_position_embeddings", longest)
        values["original_max_position_embeddings"] = stated if top is None else top
    extra = {name: rope[name] for name in _YARN_ONLY if kind == "yarn" and rope.get(name) is not None}
    values["rope_theta"] = rope.get("rope_theta", theta)
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n != "attention_factor"]
    for name in {*values, *extra, *required}:
        value = (values | extra).get(name)
        if name == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"{where}: key 'truncate' ({key}) is {value!r}: need true or false")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{where}: key '{name}' ({key}) is {value!r}: need a positive number")
    theta = float(values.pop("rope_theta"))
    if kind == "default":
        return theta, None
    if kind == "yarn":
        values.setdefault("attention_factor", _attention_factor(values["factor"], **extra))
    types = {"truncate": bool, "original_max_position_embeddings": int}
    try:
        return theta, _TYPES[kind](**{name: types.get(name, float)(value) for name, value in values.items()})
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def _attention_factor(factor: float, mscale: float = 0, mscale_all_dim: float = 0) -> float:
    """What YaRN multiplies sine and cosine by where the config does not say; section 3.4 of the paper."""

    def of(mscale):
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)


def write_rope(scaling: Scaling | None) -> dict[str, Any] | None:
    """The object that `read_rope` reads back; None for plain frequencies."""
    if scaling is None:
        return None
    kind = next(name for name, of in _TYPES.items() if isinstance(scaling, of))
    return {"rope_type": kind, **dataclasses.asdict(scaling)}
