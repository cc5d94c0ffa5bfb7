"""Length budgets: what the config asks a response to take, drawn for each problem. Prompts say it (templates.py)."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxrl.types import Problem

BUDGET_SAMPLERS = ("uniform", "log_uniform")


def sample_budgets(rng: np.random.Generator, n: int, kind: str, low: int, high: int) -> np.ndarray:
    """n length budgets in tokens, int64 in [low, high].

    uniform: all integers equally likely (L1: 100 to 4000). log_uniform: floor(2^U(log2 low, log2 (high + 1))), as
    much mass from 100 to 200 as from 1000 to 2000 (the released code's use_log option: 2^U(8, 14.5)).
    Raises ValueError unless 1 <= low <= high and the kind is known.
    """
    if kind not in BUDGET_SAMPLERS:
        raise ValueError(f"unknown budget sampler {kind!r}; valid: {', '.join(BUDGET_SAMPLERS)}")
    if not 1 <= low <= high:
        raise ValueError(f"budgets need 1 <= low <= high, not low {low}, high {high}")
    if kind == "uniform":
        return rng.integers(low, high, n, endpoint=True)
    drawn = np.exp2(rng.uniform(np.log2(low), np.log2(high + 1), n))
    return np.clip(np.floor(drawn), low, high).astype(np.int64)


def with_budget(problem: Problem, config, position: int, factor: float = 1.0) -> Problem:
    """The problem with a length budget drawn for this position, if the config asks for one, times `factor`."""
    mode = config.length.mode
    if mode == "none" or problem.budget is not None:
        return problem
    rng = np.random.default_rng([config.seed, 7, position])
    if mode == "both":
        mode = ("exact", "max")[int(rng.integers(2))]
    budget = int(sample_budgets(rng, 1, config.length.budgets, config.length.low, config.length.high)[0])
    return dataclasses.replace(problem, budget=max(round(budget * factor), 1), mode=mode)


def with_widest_budget(problem: Problem, config) -> Problem:
    """The problem with the largest budget it could be given."""
    if config.length.mode == "none" or problem.budget is not None:
        return problem
    control = config.length.control
    steered = control.target != "none" and control.steers == "budget"
    widest = round(config.length.high * (control.high if steered else 1))
    return dataclasses.replace(problem, budget=max(widest, config.length.high), mode="max")
