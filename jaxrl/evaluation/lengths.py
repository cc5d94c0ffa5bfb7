"""Length control measured as L1 does (2503.04697 section 5), and accuracy as a function of tokens spent.

A sweep asks the same problems at several budgets, in one of four modes: "exact" and "max" name the budget in the
prompt (LCPO); "forced" does not, and holds the response to it from outside (s1's budget forcing); "none" leaves
the model alone and measures how far its own length is from each budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrl.algorithms.length_metrics import budget_metrics, control, performance, scaling
from jaxrl.errors import UserError
from jaxrl.evaluation.scoring import Records
from jaxrl.rollout.budget_forcing import Delimiters, generate_forced
from jaxrl.rollout.engine import Engine

MODES = ("exact", "max", "forced", "none")
MAX_MODE_CAP = 8192  # L1's generation limit for "at most" budgets


def generation_cap(budget: int, mode: str, max_tokens: int = 0) -> int:
    """Response limit for a budget: the budget ("forced"), else max_tokens if given, else twice the budget ("exact")
    or 8192 ("max", "none")."""
    caps = {"forced": budget, "exact": max_tokens or 2 * budget}
    return caps.get(mode, max_tokens or MAX_MODE_CAP)


def forced_generate(sampler: Engine, budget: int, delimiters: Delimiters, answer_tokens: int, waits: int) -> Callable:
    """A stand-in for sampler.generate whose responses are held to `budget` tokens by s1's budget forcing.

    The budget is that of the whole response, as in every other mode: thinking gets what the closing delimiters
    and `answer_tokens` leave (s1's own figure counts thinking only). waits: how often an early end of thinking is
    taken back, which s1 uses to prolong (L1's baseline: 100). Raises UserError for a budget with no room to think.
    """
    d = delimiters
    closing = len(d.newline) + len(d.end_thinking) + len(d.final_answer)
    thinking = budget - closing - answer_tokens
    if thinking < 1:
        raise UserError(
            f"--budgets={budget}: budget forcing needs more than {closing + answer_tokens} tokens here, {closing} to "
            f"close the thinking and {answer_tokens} for the answer (--answer_tokens)"
        )

    def generate(params, requests, *, seed, step, sampling):
        limits = dict(max_thinking=thinking, max_answer=answer_tokens, ignore=waits)
        options = dict(seed=seed, step=step, sampling=sampling)
        return generate_forced(sampler, params, requests, delimiters, **limits, **options)

    return generate


def length_metrics(records: Records, tolerance: int = 500) -> dict[str, float]:
    """Of all samples of records with a budget; {} if none has one. Fractions.

    mean_error: (E[n] - n_gold) / n_gold, signed, so that too short and too long cancel (L1's figure).
    mean_deviation: E|n - n_gold| / n_gold, where they do not cancel. rmse: of the relative deviation.
    hard_violation: share above the budget; soft_violation: above it by more than `tolerance` tokens.
    """
    pairs = [(s["tokens"], r["budget"]) for r in records if r["budget"] for s in r["samples"]]
    if not pairs:
        return {}
    lengths, budgets = np.array(pairs, np.float64).T
    deviation = float(np.mean(np.abs(lengths - budgets) / budgets))
    return {"mean_deviation": deviation, **budget_metrics(lengths, budgets, tolerance)}


def length_profile(records: Records, parts: int = 4) -> dict[str, Any]:
    """How correctness depends on length, over all graded samples; {} if there are none.

    tokens_correct, tokens_wrong: mean lengths of either kind (None where there is none). by_length: the samples in
    `parts` groups of about equal number from short to long, each {"up_to": longest of the group in tokens, "accuracy",
    "samples"}; equal lengths are never split, so there may be fewer groups.
    """
    pairs = [(s["tokens"], s["correct"]) for r in records for s in r["samples"] if s["valid"]]
    if not pairs:
        return {}
    lengths, correct = np.array(pairs, np.float64).T
    edges = np.unique(np.quantile(lengths, np.arange(1, parts + 1) / parts, method="inverted_cdf"))
    group = np.searchsorted(edges, lengths)
    found = [
        {"up_to": int(edge), "accuracy": float(correct[group == i].mean()), "samples": int((group == i).sum())}
        for i, edge in enumerate(edges)
    ]
    kinds = {"tokens_correct": lengths[correct >= 1], "tokens_wrong": lengths[correct < 1]}
    return {k: float(v.mean()) if len(v) else None for k, v in kinds.items()} | {"by_length": found}


def log_linear_slope(tokens: Sequence[float], accuracies: Sequence[float]) -> float:
    """Least-squares slope of accuracy against ln(mean tokens): accuracy gained per e-fold of tokens.

    Times ln 2 it is the gain per doubling. NaN if the counts lie within 5 %, where the slope would be noise.
    """
    x, y = np.log(np.maximum(np.asarray(tokens, np.float64), 1e-9)), np.asarray(accuracies, np.float64)
    x = x - x.mean() if len(x) else x
    return float(x @ (y - y.mean()) / (x @ x)) if len(x) > 1 and np.ptp(x) > math.log(1.05) else math.nan


def sweep_metrics(rows: Sequence[dict]) -> dict[str, float]:
    """Summary figures of a sweep over budgets. rows: one summary per budget with budget, mean_tokens, accuracy.

    mean_error: mean over budgets of |mean_error|. slope: see log_linear_slope. control, scaling (per 1000
    tokens; NaN where slope is) and performance: s1's three figures (2501.19393 section 4), the budget being the limit.
    """
    tokens, accuracies = [r["mean_tokens"] for r in rows], [r["accuracy"] for r in rows]
    slope = log_linear_slope(tokens, accuracies)
    return {
        "mean_error": float(np.mean([abs(r["mean_error"]) for r in rows])),
        "log_linear_slope": slope,
        "control": control(tokens, [r["budget"] for r in rows]),
        "scaling": math.nan if math.isnan(slope) else 1000 * scaling(tokens, accuracies),
        "performance": performance(accuracies),
    }
