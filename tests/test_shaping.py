"""Controls that adapt: their error and bounds by hand, and that they bring a simulated policy to their target."""

import json
import math

import numpy as np
import pytest

from jaxrl.algorithms.control import control_update
from jaxrl.rollouts import Prompt, from_sequences
from jaxrl.runtime.config import base_config
from jaxrl.shaping import adapt, budget_factor, length_weight, restored, shape_rewards, shaping_metrics
from jaxrl.tasks.budgets import with_budget, with_widest_budget
from jaxrl.types import Problem

LIMIT = 100


def config(**control):
    c = base_config()
    c.sampling.max_tokens, c.length.reward = LIMIT, "linear"
    c.length.control.update(control)
    return c


def sampled(rng, length, accuracy, budget=0, n=64):
    lengths = np.clip(rng.normal(length, length / 10, n), 1, LIMIT).astype(int)
    r = from_sequences([[1]], [[5] * k for k in lengths], group=[0] * n)
    r = r.replace(prompts=(Prompt(Problem("p", "", "", budget=budget or None, mode="max"), np.array([1]), n),))
    correct = (rng.random(n) < accuracy).astype(np.float32)
    return r.replace(correct=correct, reward=correct)


def test_the_factor_by_hand():
    c = config(target="length", value=40.0, rate=0.3).length.control
    assert control_update({}, 60.0, c) == {"factor": pytest.approx(math.exp(0.3 * 0.5))}
    assert control_update({"factor": 2.0}, 20.0, c)["factor"] == pytest.approx(2 * math.exp(-0.15))
    assert control_update({"factor": 9.9}, 4000.0, c) == {"factor": 10.0}
    assert control_update({"factor": 0.011}, 0.0, c)["factor"] == 0.01
    c = config(target="accuracy", value=0.02, rate=1.0).length.control
    first = control_update({}, 0.6, c)  # the first accuracy is the baseline, and 0.02 below it is allowed
    assert first == {"baseline": 0.6, "factor": pytest.approx(math.exp(0.02))}
    assert control_update(first, 0.5, c) == {"baseline": 0.6, "factor": pytest.approx(math.exp(0.02 - 0.08))}
    c = config(target="violations", value=0.1, rate=1.0).length.control
    assert control_update({}, 0.3, c)["factor"] == pytest.approx(math.exp(0.2))
    c = config(target="accuracy", baseline=0.9).length.control  # set later, it wins over the one that was measured
    assert control_update(first, 0.5, c)["baseline"] == 0.9
    # budgets go the other way, but for violations, which wider budgets cure
    for target, sign in (("length", -1), ("accuracy", -1), ("violations", 1)):
        c = config(target=target, value=0.5, steers="budget", rate=1.0, baseline=0.5).length.control
        assert math.log(control_update({}, 1.0, c)["factor"]) * sign > 0


def test_the_factor_multiplies_the_weight_or_the_budgets_after_the_warm_up():
    rng, c = np.random.default_rng(0), config(target="length", value=20.0)
    c.length.warmup_steps, c.length.weight = 2, 0.5
    state = {}
    for step in range(2):  # it waits
        state = adapt(state, sampled(rng, 50, 0.5), c, step)
        assert "control" not in state and length_weight(c, step, state) == 0.25 * step
    state = json.loads(json.dumps(adapt(state, sampled(rng, 50, 0.5), c, 2)))
    factor = state["control"]["factor"]
    assert factor > 1.5 and length_weight(c, 3, state) == 0.5 * factor and budget_factor(c, state) == 1
    assert shaping_metrics(state, c, 3) == {"length/weight": 0.5 * factor, "length/control": factor}
    r = sampled(rng, 50, 0.5)
    term = shape_rewards(r, c, length_weight(c, 3, state)).reward - r.reward
    np.testing.assert_allclose(term, factor * (shape_rewards(r, c, 0.5).reward - r.reward), rtol=1e-4, atol=1e-6)
    c.length.control.steers, c.length.mode = "budget", "max"
    assert budget_factor(c, restored(state, c)) == 1  # this one was learned as a factor on the weight
    assert length_weight(c, 3, state) == 0.5 and budget_factor(c, state) == factor
    plain, scaled = (with_budget(Problem("p", "", ""), c, 3, f).budget for f in (1.0, 0.25))
    assert scaled == max(round(plain / 4), 1)
    assert with_widest_budget(Problem("p", "", ""), c).budget == 40000 and config().length.high == 4000
    c.length.control.target = "none"
    assert length_weight(c, 3, state) == 0.5 and budget_factor(c, state) == 1


def test_a_length_reward_does_not_inherit_the_multiplier_of_another():
    rng, c = np.random.default_rng(0), config()
    c.length.reward, c.length.hyper.leash.start = "leash", 0.4
    state = json.loads(json.dumps(adapt({}, sampled(rng, 90, 0.5), c, 0)))
    multiplier = state["reward"]["multiplier"]
    assert multiplier > 0.4 and shaping_metrics(state, c, 1)["length/state/multiplier"] == multiplier
    older = {"reward": {"multiplier": 2.0}}  # names no method
    assert restored(state, c) == state and restored(older, c) == older
    c.length.reward, r = "a_dlp", sampled(rng, 90, 0.5)
    state = restored(state, c)
    np.testing.assert_array_equal(shape_rewards(r, c, 1.0, state).reward, shape_rewards(r, c, 1.0, {}).reward)
    assert adapt(state, r, c, 1)["reward"] == adapt({}, r, c, 1)["reward"]


@pytest.mark.parametrize("reward", ["linear", "kimi", "gr3", "leash"])
def test_nothing_changes_without_a_control(reward):
    rng, c = np.random.default_rng(0), config()
    c.length.reward = reward
    state = adapt({}, sampled(rng, 50, 0.5), c, 0)
    assert "control" not in state and length_weight(c, 5, state) == 1.0 and "length/control" not in shaping_metrics(
        state, c, 5)  # fmt: skip


@pytest.mark.parametrize(
    "target, value, steers",
    [("length", 30.0, "weight"), ("accuracy", 0.1, "weight"), ("violations", 0.2, "weight"),
     ("length", 30.0, "budget"), ("violations", 0.2, "budget"), ("accuracy", 0.1, "budget")],
)  # fmt: skip
def test_a_simulated_policy_comes_to_the_target(target, value, steers):
    """Length follows the gain of the length term, or the budget; accuracy falls where answers get short."""
    rng, c = np.random.default_rng(1), config(target=target, value=value, steers=steers, rate=0.3, high=100.0)
    state, length, seen = {}, 80.0, []
    for step in range(250):
        accuracy = min(length / 80, 1.0)
        budget = round(60 * budget_factor(c, state)) if steers == "budget" else 50
        r = sampled(rng, length, accuracy, budget)
        weight = length_weight(c, step, state)
        wanted = budget if steers == "budget" and target != "violations" else 80 / (1 + weight)
        if steers == "budget" and target == "violations":
            wanted = 60  # a policy that does not follow budgets: they must be widened
        length += 0.3 * (wanted - length)
        state = adapt(state, r, c, step)
        seen.append({"length": r.lengths.mean(), "accuracy": r.correct.mean(),
                     "violations": (r.lengths > budget).mean()}[target])  # fmt: skip
    assert c.length.control.low < state["control"]["factor"] < c.length.control.high
    aim = state["control"]["baseline"] - value if target == "accuracy" else value
    assert np.mean(seen[-100:]) == pytest.approx(aim, rel=0.05, abs=0.02)
    assert abs(seen[0] - aim) > 0.05  # it was elsewhere
