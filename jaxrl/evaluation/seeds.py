"""The same measurement over several seeds: means with 95 % t intervals, and sweeps over budgets averaged that way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxrl.evaluation.lengths import sweep_metrics
from jaxrl.evaluation.tables import markdown

PER_BUDGET = ("accuracy", "mean_tokens", "mean_error", "mean_deviation", "rmse", "hard_violation", "soft_violation")
SUMMARY = {  # column: (key of evaluation.lengths.sweep_metrics, or of a row and then averaged over budgets, factor)
    "mean error": ("mean_error", 100),
    "RMSE": ("rmse", 100),
    "over budget": ("hard_violation", 100),
    "accuracy per doubling": ("log_linear_slope", 100 * math.log(2)),
    "Control": ("control", 100),
    "Scaling, per token": ("scaling", 0.1),  # stored per 1000 tokens
    "Performance": ("performance", 100),
}


def t_half_width(values: np.ndarray) -> np.ndarray:
    """[..] half-widths of the 95 % t interval of the mean over axis 0 of values [n, ..]; 0 for n = 1."""
    n = len(values)
    if n < 2:
        return np.zeros(values.shape[1:])
    import scipy.stats  # here, because it takes a second

    return scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values)


def mean_and_half(values: Sequence[float]) -> list[float]:
    """[mean, half-width of its 95 % t interval]; NaN for the latter with one value."""
    array = np.asarray(values, np.float64)
    return [float(array.mean()), float(t_half_width(array)) if len(array) > 1 else math.nan]


def plus_minus(pair: Sequence[float] | None, factor: float = 100, signed: bool = False, star: bool = False) -> str:
    """"41.0 ± 1.5"; without the second part if there is no interval. star: marks an interval that excludes 0."""
    if pair is None or math.isnan(pair[0]):
        return ""
    mean, half = factor * pair[0], factor * pair[1]
    said = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    if not math.isfinite(half):
        return said
    return f"{said} ± {half:.1f}" + ("*" if star and abs(mean) > half else "")


def average_sweeps(results: Sequence[dict]) -> dict[str, dict]:
    """{data: {"budgets": {budget: {metric: [mean, half]}}, "summary": {metric: [mean, half]}}} over seeds.

    results: one result.json of a budget sweep of one checkpoint per seed. A metric that a seed does not have (no
    slope) is NaN.
    """
    out = {}
    for data in dict.fromkeys(row["data"] for row in results[0]["results"] if row["budget"]):
        rows = [[row for row in result["results"] if row["data"] == data and row["budget"]] for result in results]
        budgets = {
            row["budget"]: {k: mean_and_half([seed[i][k] for seed in rows]) for k in PER_BUDGET}
            for i, row in enumerate(rows[0])
        }
        found = [{k: np.mean([r[k] for r in seed]) for k in PER_BUDGET} | sweep_metrics(seed) for seed in rows]
        summary = {name: mean_and_half([f[name] for f in found]) for name, _ in SUMMARY.values()}
        out[data] = {"budgets": budgets, "summary": summary, "seeds": len(results)}
    return out


def sweep_tables(sweeps: dict[str, dict[str, dict]]) -> str:
    """Markdown of {label: average_sweeps(...)}: per data set, how well lengths are controlled, then accuracies."""
    text = ""
    for data in dict.fromkeys(d for found in sweeps.values() for d in found):
        chosen = {label: found[data] for label, found in sweeps.items() if data in found}
        rows = [
            [label, s["seeds"], *(plus_minus(s["summary"][key], factor) for key, factor in SUMMARY.values())]
            for label, s in chosen.items()
        ]
        text += f"\nBudgets on {data}:\n\n" + markdown(["model", "seeds", *SUMMARY], rows)
        budgets = sorted({b for s in chosen.values() for b in s["budgets"]})
        rows = [
            [label]
            + [f"{plus_minus(at['accuracy'])} ({at['mean_tokens'][0]:.1f})" for at in map(s["budgets"].get, budgets)]
            for label, s in chosen.items()
        ]
        text += "\n" + markdown(["accuracy (mean tokens) at", *map(str, budgets)], rows)
    said = "mean ± 95 % t interval over seeds; RMSE and over budget are means over the budgets"
    return f"{text}\nPercent, {said}.\n" if text else ""
