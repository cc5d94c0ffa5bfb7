"""Result tables in Markdown, percentages as papers print them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def percent(value: float | None) -> str:
    """0.1234 -> "12.3"; "-" for a missing value or NaN."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def estimate(summary: dict, key: str) -> str:
    """A value with its 95 % interval: "41.0 [38.2, 43.9]"; "-" if it was not measured."""
    if key not in summary:
        return "-"
    return f"{percent(summary[key])} [{percent(summary[key + '_low'])}, {percent(summary[key + '_high'])}]"


def accuracy_table(results: Sequence[dict]) -> str:
    """One row per result (a summary with "name"): avg@k, pass@k and maj@k with intervals, and lengths."""
    counts = sorted({r["samples"] for r in results})
    k = str(counts[0]) if len(counts) == 1 else "k"
    voted = any(key.startswith("maj@") for r in results for key in r)
    header = ["data", "problems", f"avg@{k}", *([f"pass@{k}"] if counts[-1] > 1 else [])]
    header += [f"maj@{k}"] if voted else []
    header += ["mean tokens", "median", "truncated", "unparsed", "ungraded"]
    rows = []
    for r in results:
        n = r["samples"]
        row = [r["name"], r["problems"], estimate(r, "accuracy")]
        row += [estimate(r, f"pass@{n}")] if counts[-1] > 1 else []
        row += [estimate(r, f"maj@{n}")] if voted else []
        row += [f"{r['mean_tokens']:.1f}", f"{r['median_tokens']:.0f}"]
        rows.append([*row, *(percent(r[key]) for key in ("truncated", "unparsed", "ungraded"))])
    return markdown(header, rows) + "\nPercent, with 95 % intervals over problems.\n"


def length_table(results: Sequence[dict]) -> str:
    """One row per result with a budget: how far lengths are from it, and the accuracy reached."""
    header = ["data", "mode", "budget", "mean tokens", "mean error", "mean deviation", "RMSE"]
    header += ["over budget", "over by more", "accuracy"]
    voted = [f"maj@{r['samples']}" for r in results]  # the majority's accuracy, beside the mean over samples
    header += ["maj@k"] if any(key in r for key, r in zip(voted, results, strict=True)) else []
    keys = ("mean_error", "mean_deviation", "rmse", "hard_violation", "soft_violation")
    rows = [
        [r["name"], r["mode"], r["budget"] or "own", f"{r['mean_tokens']:.1f}"]
        + [percent(r[key]) for key in keys]
        + [estimate(r, "accuracy"), estimate(r, key)][: len(header) - 9]
        for key, r in zip(voted, results, strict=True)
    ]
    return markdown(header, rows) + "\nPercent of the budget; accuracy in percent.\n"


def profile_table(results: Sequence[dict]) -> str:
    """One row per result: lengths of correct and of wrong answers, and the accuracy of each part of the answers, from
    the shortest to the longest, as "most tokens: accuracy" (evaluation.lengths.length_profile)."""
    rows = []
    for r in results:
        means = ["-" if r[k] is None else f"{r[k]:.1f}" for k in ("tokens_correct", "tokens_wrong")]
        parts = " · ".join(f"≤{part['up_to']}: {percent(part['accuracy'])}" for part in r["by_length"])
        rows.append([r["name"], *means, parts])
    return markdown(["data", "tokens, correct", "tokens, wrong", "accuracy by length"], rows)


def sweep_table(sweeps: dict[str, dict]) -> str:
    """One row per swept data set: see evaluation.lengths.sweep_metrics."""
    header = [
        "data",
        "mean error",
        "accuracy per doubling",
        "Control",
        "Scaling per 1k tokens",
        "Performance",
    ]
    rows = [
        [
            name,
            percent(s["mean_error"]),
            percent(s["log_linear_slope"] * math.log(2)),
            percent(s["control"]),
            percent(s["scaling"]),
            percent(s["performance"]),
        ]
        for name, s in sweeps.items()
    ]
    return markdown(header, rows)
