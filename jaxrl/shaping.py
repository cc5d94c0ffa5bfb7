"""From grades to the rewards that are trained on: the length reward and what adapts with it from step to step.

Pure functions of rollouts, of the config, and of one small dict that JSON can hold, which the collector keeps.
"""

from __future__ import annotations

import numpy as np

from jaxrl.algorithms.length import LengthInputs, length_rewards, next_state
from jaxrl.rollouts import Rollouts


def length_weight(config, step: int) -> float:
    """Weight of the length term at a step: config.length.weight, reached linearly in warmup_steps steps."""
    c = config.length
    return c.weight * min(1.0, step / c.warmup_steps) if c.warmup_steps else c.weight


def length_inputs(rollouts: Rollouts, config, state: dict) -> LengthInputs:
    """What the length reward sees: the valid responses. state: of `adapt`."""
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
    """With the length reward of config.length in the rewards; invalid responses keep out of its statistics.

    The term that is added to the task's reward is weight x (shaped - correct), so that the value of a user's
    reward function is kept and the term can be warmed up.
    """
    name, r = config.length.reward, rollouts
    if name == "none" or not len(r):
        return r
    shaped = r.correct.astype(np.float64)
    shaped[r.valid] = length_rewards(name, length_inputs(r, config, state or {}), dict(config.length.hyper[name]))
    return r.replace(reward=r.reward + (weight * (shaped - r.correct)).astype(np.float32))


def adapt(state: dict, sampled: Rollouts, config) -> dict:
    """The state for the next step: of the length reward, after everything that this step has sampled."""
    name = config.length.reward
    if not sampled.valid.any():
        return state
    inputs = length_inputs(sampled, config, state)
    return state | {"reward": next_state(name, inputs, dict(config.length.hyper[name]))}


def shaping_metrics(state: dict, config, weight: float) -> dict[str, float]:
    """What the step's rewards were shaped with: weight of the length term, and the state of the length reward."""
    if config.length.reward == "none":
        return {}
    return {"length/weight": weight, **{f"length/state/{k}": v for k, v in state.get("reward", {}).items()}}
