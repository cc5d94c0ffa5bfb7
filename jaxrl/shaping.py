"""From grades to the rewards that are trained on: named rewards with weights, the length reward, its adaptive state.

Every response has named rewards, columns "reward/NAME" of the rollouts, each with a weight, "weight/NAME": `correct`
(what the task's grader gives) or what a reward function returns (`user`, or the names of its dict), `length` (the
length reward minus correctness) and, if config.rewards.weights names it, `format`. The reward is their weighted sum.

Pure functions of rollouts, of the config, and of one small dict that JSON can hold, which the collector keeps.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import numpy as np

from jaxrl.algorithms.control import control_factor, control_update
from jaxrl.algorithms.length import LengthInputs, length_rewards, next_state
from jaxrl.rollouts import Rollouts
from jaxrl.tasks.task import Grade

_log = logging.getLogger(__name__)


# ---- named rewards


def reward_weights(text: str) -> dict[str, float]:
    """ "correct=1,format=0.2" (config.rewards.weights) -> {"correct": 1.0, "format": 0.2}."""
    return {name: float(value) for name, _, value in (part.partition("=") for part in text.split(",") if part)}


def named_columns(grades: Sequence[Grade], index: np.ndarray, total: int, config) -> dict[str, np.ndarray]:
    """{"reward/NAME": float32 [total]}: the named rewards of the graded responses `index`, 0 for the others.

    A reward without a name is `correct`, or `user` where config.task.reward is a function.
    """
    unnamed = "user" if config.task.reward else "correct"
    rows = [g.named or {unnamed: g.reward} for g in grades]
    columns = {f"reward/{name}": np.zeros(total, np.float32) for name in sorted({k for row in rows for k in row})}
    for i, row in zip(index, rows, strict=True):
        for name, value in row.items():
            columns[f"reward/{name}"][i] = value
    return columns


def well_formed(rollouts: Rollouts) -> np.ndarray:
    """float32 [N], the reward `format`: 1 for a response that ended by itself with an answer that could be read."""
    read = np.isin(rollouts.outcome.astype(str), ("correct", "wrong"))
    return (read & ~rollouts.truncated).astype(np.float32)


@functools.cache
def _warn(name: str) -> None:
    _log.warning("config.rewards.weights: no response of this batch has a reward named %r", name)


# ---- the length reward


def length_weight(config, step: int, state: dict | None = None) -> float:
    """Weight of the length term at a step: config.length.weight, reached linearly in warmup_steps steps, times the
    factor of config.length.control where that steers the weight."""
    c = config.length
    weight = c.weight * min(1.0, step / c.warmup_steps) if c.warmup_steps else c.weight
    return weight * (_factor(config, state or {}) if c.control.steers == "weight" else 1.0)


def budget_factor(config, state: dict) -> float:
    """What drawn budgets are multiplied with: the factor of config.length.control if it steers budgets, else 1."""
    return _factor(config, state) if config.length.control.steers == "budget" else 1.0


def _factor(config, state: dict) -> float:
    return 1.0 if config.length.control.target == "none" else control_factor(state.get("control", {}))


def length_inputs(rollouts: Rollouts, config, state: dict) -> LengthInputs:
    """The inputs of the length reward: the valid responses. state: as `adapt` returns it."""
    r, v = rollouts, rollouts.valid
    lengths = r.lengths if config.length.count == "response" else r.columns["thinking_tokens"]
    return LengthInputs(
        correct=r.correct[v],
        lengths=lengths[v],
        max_length=config.sampling.max_tokens,
        budgets=r.budgets[v],
        modes=r.modes[v],
        group=r.group[v],
        truncated=r.truncated[v],
        columns={k: column[v] for k, column in r.columns.items()},
        state=state.get("reward", {}),
    )


def shape_rewards(rollouts: Rollouts, config, weight: float = 1.0, state: dict | None = None) -> Rollouts:
    """Graded responses with their rewards, the weighted sums of the named rewards. The named reward `length` is made
    here; invalid responses are left out of its statistics.

    weight: of the length term at this step, times its weight among the named rewards. The term is weight x (shaped -
    correct), so that the value of a user's reward function is kept and the term can be warmed up. For rollouts without
    named rewards, their `reward` counts as one.
    """
    name, r = config.length.reward, rollouts
    if not len(r):
        return r
    given = reward_weights(config.rewards.weights)
    named = {k.removeprefix("reward/"): v for k, v in r.columns.items() if k.startswith("reward/")}
    named = named or {"user" if config.task.reward else "correct": r.reward}
    for other, values in (("correct", r.correct), ("format", well_formed(r))):
        if other in given:
            named.setdefault(other, values)
    weights = {k: given.get(k, 1.0) for k in named}
    reward = sum((weights[k] * v for k, v in named.items()), np.zeros(len(r), np.float32))
    if name != "none":
        shaped = r.correct.astype(np.float64)
        shaped[r.valid] = length_rewards(name, length_inputs(r, config, state or {}), dict(config.length.hyper[name]))
        weights["length"] = weight * given.get("length", 1.0)
        named["length"] = (shaped - r.correct).astype(np.float32)
        reward = reward + (weights["length"] * (shaped - r.correct)).astype(np.float32)
    for missing in sorted(set(given) - set(named)):
        _warn(missing)
    columns = {f"reward/{k}": v for k, v in named.items()}
    columns |= {f"weight/{k}": np.full(len(r), w, np.float32) for k, w in weights.items()}
    return r.replace(reward=reward.astype(np.float32), columns=r.columns | columns)


def adapt(state: dict, sampled: Rollouts, config, step: int) -> dict:
    """The state of the length reward and of the control for the next step, updated with everything that this step has
    sampled. The control is not updated while the length term is warmed up."""
    name, control = config.length.reward, config.length.control
    if not sampled.valid.any():
        return state
    inputs = length_inputs(sampled, config, state)
    state = state | {"of": _methods(config), "reward": next_state(name, inputs, dict(config.length.hyper[name]))}
    if control.target != "none" and step >= config.length.warmup_steps:
        measured = measure(control.target, inputs)
        state["control"] = control_update(state.get("control", {}), measured, control)
    return state


def restored(state: dict, config) -> dict:
    """The state of a checkpoint for a run that goes on with `config`: without what a length reward or a control that
    has been replaced since had left. Older checkpoints do not name their methods; their state is kept."""
    now, then = _methods(config), state.get("of", {})
    return {part: value for part, value in state.items() if then.get(part, now.get(part)) == now.get(part)}


def _methods(config) -> dict[str, str]:
    """What each part of the state belongs to."""
    return {"reward": config.length.reward, "control": config.length.control.steers}


def measure(target: str, inputs: LengthInputs) -> float:
    """The quantity that config.length.control holds. Violations are responses above their budget; if no response has a
    budget, those above the token limit."""
    if target == "accuracy":
        return float(inputs.correct.mean())
    if target == "length":
        return float(inputs.lengths.mean())
    has = inputs.budgets > 0
    return float((inputs.lengths > inputs.budgets)[has].mean() if has.any() else inputs.truncated.mean())


def shaping_metrics(state: dict, config, step: int) -> dict[str, float]:
    """Metrics of the step's shaping: weight of the length term, state of the length reward and control."""
    out = {} if config.length.reward == "none" else {"length/weight": length_weight(config, step, state)}
    if config.length.control.target != "none":
        out["length/control"] = _factor(config, state)
    return out | {f"length/state/{k}": v for k, v in state.get("reward", {}).items()}
