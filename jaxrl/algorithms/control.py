"""Adaptive control: a factor on the weight of the length term, or on budgets, is adapted until a measured quantity
reaches its target. Pure functions of one small dict that JSON can hold; settings: config.length.control.

The factor f follows integral control of its logarithm, log f += rate x error, and is kept within [low, high], with

    accuracy      error = accuracy - (baseline - value)       high accuracy leaves room for shorter answers
    length        error = mean length / value - 1             too long
    violations    error = share above the budget - value      too often above it

A positive error raises the weight. If the factor is on budgets, a positive error shrinks them for accuracy and length,
and widens them for violations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

HELD = ("accuracy", "length", "violations")


def control_factor(state: Mapping) -> float:
    """The factor on the weight or on the budgets: 1 before the first update."""
    return state.get("factor", 1.0)


def control_update(state: Mapping, measured: float, settings: Mapping) -> dict[str, float]:
    """The state after a step that measured the value `measured` of settings["target"], a name in HELD.

    settings: target, value, baseline (of accuracy; 0 for the first one measured, which the state keeps), rate, low,
    high, steers ("weight" or "budget").
    """
    target, value = settings["target"], settings["value"]
    following = {}
    if target == "accuracy":
        following["baseline"] = settings["baseline"] or state.get("baseline", measured)
        error = measured - (following["baseline"] - value)
    else:
        error = measured / value - 1 if target == "length" else measured - value
    if settings["steers"] == "budget" and target != "violations":
        error = -error
    moved = math.log(control_factor(state)) + settings["rate"] * error
    return following | {"factor": min(max(math.exp(min(moved, 700.0)), settings["low"]), settings["high"])}
