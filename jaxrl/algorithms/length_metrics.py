"""How well lengths follow budgets (L1), and how accuracy scales with them (s1)."""

from __future__ import annotations

import numpy as np


def budget_metrics(lengths, budgets, tolerance: int = 500) -> dict[str, float]:
    """Length-control metrics of L1 (2503.04697, section 5) over completions with a budget (> 0), as fractions.

    mean_error: mean of (n - n_gold) / n_gold, signed; within one budget this is (E[n] - n_gold) / n_gold.
    rmse: root mean square of the same. hard_violation: share with n > n_gold. soft_violation: share with n
    > n_gold + tolerance. Without any budget all are 0. lengths, budgets: [N] in tokens.
    """
    lengths, budgets = np.asarray(lengths, np.float64), np.asarray(budgets, np.float64)
    lengths, budgets = lengths[budgets > 0], budgets[budgets > 0]
    if not len(lengths):
        return {"mean_error": 0.0, "rmse": 0.0, "hard_violation": 0.0, "soft_violation": 0.0}
    deviation = (lengths - budgets) / budgets
    return {
        "mean_error": float(deviation.mean()),
        "rmse": float(np.sqrt((deviation**2).mean())),
        "hard_violation": float((lengths > budgets).mean()),
        "soft_violation": float((lengths > budgets + tolerance).mean()),
    }


def control(thinking_tokens, maxima) -> float:
    """s1's Control (2501.19393 eq. 1): the share of runs whose measured thinking tokens lie within their limits.

    thinking_tokens: [A] means measured per requested budget. maxima: [A] limits in tokens.
    """
    tokens = np.asarray(thinking_tokens, np.float64)
    return float((tokens <= np.asarray(maxima, np.float64)).mean())


def scaling(thinking_tokens, accuracies) -> float:
    """s1's Scaling (2501.19393 eq. 2): mean slope over all pairs of runs, in accuracy units per token.

    [A] each. Pairs with equal token counts have no slope and are left out; fewer than two distinct counts
    give 0. Multiply by 1000 for accuracy per thousand tokens.
    """
    tokens, accuracies = np.asarray(thinking_tokens, np.float64), np.asarray(accuracies, np.float64)
    i, j = np.triu_indices(len(tokens), 1)
    distance = tokens[j] - tokens[i]
    keep = distance != 0
    return float(np.mean((accuracies[j] - accuracies[i])[keep] / distance[keep])) if keep.any() else 0.0


def performance(accuracies) -> float:
    """s1's Performance (2501.19393 eq. 3): the best accuracy over the runs."""
    return float(np.max(accuracies))
