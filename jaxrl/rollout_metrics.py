"""A step's rollouts as the metrics of its record (docs/metrics.md explains them) and as the rows of its samples."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrl.algorithms.selection import dropped, group_reasons, mean_accuracy, mean_length
from jaxrl.rollouts import Rollouts
from models.tokenizers import token_texts


class Collected(NamedTuple):
    """One step's collection.

    chosen: what to train on. sampled: everything that was finished in this step. reason: object [N] of `sampled`, why
    selection dropped the response ("lspo/middle"), "" for kept ones. step: the version of the current parameters;
    tokens of older versions are stale. metrics: for the step's record.
    """

    chosen: Rollouts
    sampled: Rollouts
    reason: np.ndarray
    step: int
    metrics: Mapping[str, Any] = types.MappingProxyType({})


def selection_metrics(collected: Collected, thrown_away: int) -> dict[str, Any]:
    """What selection kept and dropped, and what is trained on.

    thrown_away: tokens of graded responses in selected groups beyond the batch, never trained on.
    """
    chosen, sampled, reason, step, _ = collected
    kept = reason == ""
    lengths, why = [round(n, 2) for n in mean_length(sampled).tolist()], group_reasons(sampled, reason)
    return {
        "acceptance_rate": int(sampled.lengths[kept & sampled.valid].sum() - thrown_away) / max(len(sampled.tokens), 1),
        "selection/groups": chosen.num_groups,
        "selection/stale_tokens": int((chosen.version < step).sum()) / max(len(chosen.tokens), 1),
        "selection/kept_lengths": [n for n, w in zip(lengths, why, strict=True) if not w],
        "selection/dropped_lengths": [n for n, w in zip(lengths, why, strict=True) if w],
        "selection/dropped_reasons": [w.rpartition("/")[2] for w in why if w],
        **{f"selection/dropped/{w}": n for w, n in dropped(sampled, reason).items()},
    }


def outcome_counts(rollouts: Rollouts) -> dict[str, int]:
    """How often each grading outcome occurred."""
    words, counts = np.unique(rollouts.outcome.astype(str), return_counts=True)
    return dict(zip(words.tolist(), counts.tolist(), strict=True))


def sampled_metrics(rollouts: Rollouts) -> dict[str, Any]:
    """Metrics of everything that was sampled, before selection."""
    rewards, lengths = rollouts.reward[rollouts.valid], rollouts.lengths
    named = {k: v[rollouts.valid] for k, v in rollouts.columns.items() if k.startswith("reward/")}
    least, most = rollouts.group_range(rollouts.reward)
    out = {
        "reward/mean": float(rewards.mean()) if len(rewards) else 0.0,
        "reward/std": float(rewards.std()) if len(rewards) else 0.0,
        **{f"{k}/mean": float(v.mean()) if len(v) else 0.0 for k, v in named.items()},
        "accuracy": float(np.nanmean(mean_accuracy(rollouts))) if len(rewards) else 0.0,
        "zero_std_fraction": 1.0 - float(np.mean(least < most)),
        "response_length/mean": float(lengths.mean()),
        "response_length/min": int(lengths.min()),
        "response_length/max": int(lengths.max()),
        "response_length/p10": float(np.percentile(lengths, 10)),
        "response_length/p50": float(np.percentile(lengths, 50)),
        "response_length/p90": float(np.percentile(lengths, 90)),
        "truncated_fraction": float(np.mean(rollouts.truncated)),
        "hist/length": length_histogram(lengths),
        **{f"outcome/{k}": v for k, v in outcome_counts(rollouts).items()},
    }
    targets = rollouts.budgets
    if targets.any():
        has = targets > 0
        deviation = np.abs(lengths[has] - targets[has]) / targets[has]
        out["length/deviation"] = float(deviation.mean())
        out["length/violations"] = float((lengths[has] > targets[has]).mean())
    return out


def length_histogram(lengths: np.ndarray, bins: int = 32) -> list[list[int]]:
    """[[upper edge in tokens, count], ...] of at most `bins` bins of equal width."""
    width = max(1, -(-int(lengths.max()) // bins))
    index, counts = np.unique((lengths - 1) // width, return_counts=True)
    return [[int((i + 1) * width), int(n)] for i, n in zip(index, counts, strict=True)]


def sample_rows(collected: Collected, trained: Rollouts, tokenizer, most: int) -> list[dict[str, Any]]:
    """The rows of samples/step_*.jsonl: all responses of the first `most` kept groups and of as many dropped groups,
    with their tokens, log-probs, rewards and advantages. "reason" says why selection dropped the response
    ("lspo/middle"), or is empty.

    trained: the step's rollouts with their advantages. "advantage" is None for responses that are not trained on. If
    the method gives one advantage per token, "advantages" holds them and "advantage" is their mean. versions: [step
    whose parameters drew them, number of tokens] for each run of tokens.
    """
    _, sampled, reason, step, _ = collected
    values, each = trained.column("advantage"), {}
    if len(values) != len(trained):
        each = dict(zip(trained.identity, trained.split_tokens(values), strict=True))
        values = trained.token_sum(values) / trained.lengths
    shown = zip(trained.identity, trained.valid, values, strict=True)
    advantage = {who: round(float(a), 4) for who, valid, a in shown if valid}
    kept = sampled.group_any(reason == "")
    groups = [*np.flatnonzero(kept)[:most], *np.flatnonzero(~kept)[:most]]
    r = sampled.replace(columns=sampled.columns | {"reason": reason}).take_groups(groups)
    named = {k.removeprefix("reward/"): v for k, v in r.columns.items() if k.startswith("reward/")}
    per_response = (r.split_tokens(), r.split_tokens(r.logprobs), r.split_tokens(r.version))
    rows = []
    for i, (who, tokens, logprobs, versions) in enumerate(zip(r.identity, *per_response, strict=True)):
        prompt = r.prompts[r.group[i]]
        row = {
            "id": prompt.problem.id,
            "prompt": tokenizer.decode(prompt.tokens),
            "answer": prompt.problem.answer,
            "budget": prompt.problem.budget,
            "text": tokenizer.decode(tokens),
            "tokens": token_texts(tokenizer, tokens.tolist()),
            "logprobs": [round(float(x), 4) for x in logprobs],
            "advantage": advantage.get(who),
            "reward": float(r.reward[i]),
            "rewards": {k: float(v[i]) for k, v in named.items()},
            "correct": float(r.correct[i]),
            "outcome": r.outcome[i],
            "length": len(tokens),
            "finish": r.finish[i],
            "stale": int((versions < step).sum()),
            "versions": _runs(versions),
            "selected": not r.columns["reason"][i],
            "reason": r.columns["reason"][i],
        }
        if who in each and who in advantage:
            row["advantages"] = [round(float(a), 4) for a in each[who]]
        rows.append(row)
    return rows


def _runs(values: np.ndarray) -> list[list[int]]:
    """[value, how often in a row] of each run of equal values."""
    parts = np.split(values, np.flatnonzero(np.diff(values)) + 1) if len(values) else []
    return [[int(part[0]), len(part)] for part in parts]
