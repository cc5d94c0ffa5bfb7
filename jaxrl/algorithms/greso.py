"""GRESO (2506.02177): before sampling, skip prompts whose last groups had no spread. NumPy, host.

The state is a plain dict that JSON can hold, {"explore": {"easy": p, "hard": p}, "streaks": {problem id: [kind, n]}},
so it goes into a checkpoint as it is. A prompt whose last n groups were all correct ("easy") or all wrong ("hard") is
sampled with probability max(p^n, floor), where p is the exploration probability of its kind. Other prompts are always
sampled. hyper: a value for each constant of GRESO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxrl.algorithms.hyper import Number

# Released constants: the target share of groups without spread is split 1 : 2 between easy and hard.
GRESO = {
    "start": Number(0.5, 0, 1),
    "step": Number(0.01, 0, 1),
    "low": Number(0.05, 0, 1),
    "high": Number(0.95, 0, 1),
    "floor": Number(0.01, 0, 1, above=True),  # 0 could skip every prompt for ever
    "target_easy": Number(0.25 / 3, 0, 1),
    "target_hard": Number(0.5 / 3, 0, 1),
}


def greso_init(hyper: Mapping) -> dict:
    """State before the first step."""
    return {"explore": {"easy": hyper["start"], "hard": hyper["start"]}, "streaks": {}}


def greso_keep(state: Mapping, ids: Sequence[str], rng: np.random.Generator, hyper: Mapping):
    """Which of the prompts to sample, bool [len(ids)]. One random number is drawn for every prompt, with a streak or
    without, so that the random stream does not depend on the state.
    """
    drawn = rng.random(len(ids))
    probability = np.ones(len(ids))
    for i, problem in enumerate(ids):
        kind, n = state["streaks"].get(problem, ("", 0))
        if n:
            probability[i] = max(state["explore"][kind] ** n, hyper["floor"])
    return drawn < probability


def greso_update(state: Mapping, ids: Sequence[str], accuracies: Sequence[float], hyper: Mapping,
                 again: Sequence[bool] | None = None):
    """State after a step, from all groups it sampled (before any other selection); the argument is not changed.

    ids: problem of each group. accuracies: share of correct responses, NaN for groups without graded ones, which are
    ignored. again: whether the problem comes from a later pass over the data, default all; the probabilities decide
    about no others. Streaks grow, or reset at a group with spread. Then each kind's exploration probability goes one
    step down if its share of the later groups is at or above its target (explore less), else one step up, within
    [low, high]; without such groups it stays, as in the released code.
    """
    streaks, explore = dict(state["streaks"]), dict(state["explore"])
    counts, graded = {"easy": 0, "hard": 0}, 0
    again = [True] * len(ids) if again is None else again
    for problem, accuracy, counted in zip(ids, accuracies, again, strict=True):
        if np.isnan(accuracy):
            continue
        graded += counted
        kind = "easy" if accuracy == 1 else "hard" if accuracy == 0 else ""
        if not kind:
            streaks.pop(problem, None)
            continue
        counts[kind] += counted
        before, n = streaks.get(problem, (kind, 0))
        streaks[problem] = [kind, n + 1 if before == kind else 1]
    if graded:
        for kind, target in (("easy", hyper["target_easy"]), ("hard", hyper["target_hard"])):
            step = -hyper["step"] if counts[kind] / graded >= target else hyper["step"]
            explore[kind] = min(max(explore[kind] + step, hyper["low"]), hyper["high"])
    return {"explore": explore, "streaks": streaks}
