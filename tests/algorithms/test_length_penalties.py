"""The newer length rewards against formulas written out here, and the properties they are chosen for."""

import json

import numpy as np
import pytest

from jaxrl.algorithms.length import LENGTH_REWARDS, AdaptiveReward, LengthInputs, length_rewards, next_state


def reward(name, correct, lengths, group=0, max_length=1000, state=None, **constants):
    return length_rewards(name, LengthInputs(correct, lengths, max_length, group=group, state=state or {}), constants)


def batches(count=60, size=6):
    """Random batches of four groups, with groups that are all wrong and all correct."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        rate = rng.choice([0.0, 0.3, 0.7, 1.0], 4)
        correct = (rng.random((4, size)) < rate[:, None]).astype(float)
        yield correct, rng.integers(1, 1000, (4, size)).astype(float)


def per_group(name, fn, **constants):
    """That the reward equals fn(correct, lengths) of each group on its own."""
    for correct, lengths in batches():
        found = reward(name, correct.ravel(), lengths.ravel(), np.repeat(np.arange(4), 6), **constants)
        expected = [fn(c.tolist(), n.tolist()) for c, n in zip(correct, lengths, strict=True)]
        np.testing.assert_allclose(found.reshape(4, 6), expected, rtol=1e-12, atol=1e-15)


def mean(values):
    return sum(values) / len(values)


# ---- GR3


def test_gr3_without_calibration_is_prime_rls():
    def plain(correct, lengths):
        return [c / (1 + 0.5 * n / mean(lengths)) for c, n in zip(correct, lengths, strict=True)]

    per_group("gr3", plain, alpha=0.5, calibration="none")
    # prime-rl's own example after #2040: lengths 100, 200, 300 correct, 100 wrong, alpha 0.33
    found = reward("gr3", [1, 1, 1, 0], [100, 200, 300, 100], alpha=0.33, calibration="none")
    np.testing.assert_allclose((found - found.mean())[[0, 3]] > 0, [True, False])
    assert found[0] > found[1] > found[2] > found[3] == 0


@pytest.mark.parametrize("calibration", ["representative", "correct"])
def test_gr3_calibration_protects_whom_it_names_at_the_largest_alpha(calibration):
    def worst(a, correct, lengths):
        found = correct / (1 + a * lengths / lengths.mean())
        least = 1 / (1 + a) if calibration == "representative" else found[correct > 0].min()
        return least - found.mean()

    calibrated = 0
    for correct, lengths in batches(200):
        found = reward("gr3", correct.ravel(), lengths.ravel(), np.repeat(np.arange(4), 6), calibration=calibration)
        for c, n, r in zip(correct, lengths, found.reshape(4, 6), strict=True):
            if not c.any():
                assert not r.any()
                continue
            i = int(np.argmax(c))
            a = (1 / r[i] - 1) * n.mean() / n[i]  # the alpha that was used
            np.testing.assert_allclose(r, c / (1 + a * n / n.mean()), rtol=1e-9)
            assert -1e-9 <= a <= 0.33 + 1e-9 and worst(a, c, n) >= -1e-9
            calibrated += a < 0.32
            assert a > 0.32 or worst(a + 1e-3, c, n) < 0  # no larger one would do
    assert calibrated > 100


def test_gr3_without_calibration_pushes_a_long_correct_answer_down_and_with_it_does_not():
    correct, lengths = [1, 1, 1, 1, 1, 0], [100, 100, 100, 100, 900, 100]
    push = lambda c: reward("gr3", correct, lengths, calibration=c, alpha=0.5)  # noqa: E731
    assert push("none")[4] < push("none").mean() and push("correct")[4] >= push("correct").mean() - 1e-12
    assert push("correct")[0] > push("correct")[4]  # the shorter is still worth more


# ---- prime-rl's


@pytest.mark.parametrize("per", ["group", "limit"])
@pytest.mark.parametrize("gated", [False, True])
def test_linear(per, gated):
    def penalised(correct, lengths):
        most = max(lengths) if per == "group" else 1000
        penalty = [0.25 * mean(correct) * n / most * (c if gated else 1) for c, n in zip(correct, lengths, strict=True)]
        return [c - p for c, p in zip(correct, penalty, strict=True)]

    per_group("linear", penalised, per=per, gated=gated)


def test_linear_golden():
    """prime-rl's test: coef 0.25, pass rate 0.5, limit 1000: centred 0.50625, 0.49375, -0.49375, -0.50625."""
    found = reward("linear", [1, 1, 0, 0], [100, 200, 100, 200], per="limit")
    np.testing.assert_allclose(found - found.mean(), [0.50625, 0.49375, -0.49375, -0.50625])
    gated = reward("linear", [1, 1, 0, 0], [100, 200, 100, 200], per="limit", gated=True)
    assert gated[2] == gated[3] == 0 and gated[0] > gated[1]
    assert reward("linear", [0, 0], [10, 999]).tolist() == [0, 0]  # nothing where nobody succeeds


def test_efficiency():
    def bonus(correct, lengths):
        chosen = [n for c, n in zip(correct, lengths, strict=True) if c]
        return [c * (1 + min(max(1 - n / mean(chosen), 0), 1)) if c else 0.0
                for c, n in zip(correct, lengths, strict=True)]  # fmt: skip

    def attenuated(correct, lengths):
        chosen = [n for c, n in zip(correct, lengths, strict=True) if c]
        return [min(chosen) / n if c else 0.0 for c, n in zip(correct, lengths, strict=True)]

    per_group("efficiency", bonus)
    per_group("efficiency", attenuated, form="attenuate")
    found = reward("efficiency", [1, 1, 0, 1], [0, 2, 0, 1], form="attenuate")  # a response without thinking
    assert found.tolist() == [1, 0.5, 0, 1]
    # prime-rl's test: bonus 0.5 for the shortest, centred 0.625, 0.125, -0.875, 0.125
    found = reward("efficiency", [1, 1, 0, 1], [10, 30, 20, 20])
    np.testing.assert_allclose(found - found.mean(), [0.625, 0.125, -0.875, 0.125])


def test_quantile_slack():
    def slack(correct, lengths):
        chosen = sorted(n for c, n in zip(correct, lengths, strict=True) if c)
        if len(chosen) < 2:
            return correct
        place = 0.5 * (len(chosen) - 1)
        low = int(place)
        ref = chosen[low] + (chosen[min(low + 1, len(chosen) - 1)] - chosen[low]) * (place - low)
        out = []
        for c, n in zip(correct, lengths, strict=True):
            excess = max(n - ref * 1.25 - 20, 0)
            out.append(max(0.5, c - min(0.3, 0.2 * excess / ref)) if c and excess else c)
        return out

    per_group("quantile_slack", slack, tokens=20)
    assert reward("quantile_slack", [1, 0, 0], [900, 1, 1]).tolist() == [1, 0, 0]
    assert reward("quantile_slack", [1, 1, 1], [10, 10, 990], cap=9.0, beta=9.0).tolist() == [1, 1, 0.5]  # the floor


# ---- with a multiplier


def test_leash_is_one_sided_and_its_multiplier_a_dual_ascent():
    lengths = [100, 500, 600, 1000]
    assert reward("leash", [1, 1, 1, 0], lengths, target=500).tolist() == [1, 1, 1 - 0.2 * 0.2, -0.2]
    assert reward("leash", [1, 0], [10**6] * 2, target=500).tolist() == [-1, -1]
    harder = reward("leash", [1] * 4, lengths, state={"multiplier": 0.7})  # half the limit is 500, too
    np.testing.assert_allclose(harder, [1, 1, 1 - 0.7 * 0.2, 1 - 0.7])
    state, inputs = {}, LengthInputs([1] * 4, lengths, 1000)
    excess = mean(lengths) / 500 - 1
    for n in range(1, 30):
        state = next_state("leash", LengthInputs([1] * 4, lengths, 1000, state=state))
        assert state["multiplier"] == pytest.approx(min(0.2 + 0.05 * excess * n, 1.0))
    relaxed = next_state("leash", LengthInputs([1], [100], 1000, state=state))
    assert relaxed["multiplier"] == pytest.approx(state["multiplier"] - 0.05 * 0.8)
    assert next_state("leash", LengthInputs([1], [1], 10**6, state={"multiplier": 0.01}))["multiplier"] == 0
    assert next_state("leash", inputs, {"rate": 0.0}) == {"multiplier": 0.2}


def test_a_dlp_follows_accuracy():
    np.testing.assert_allclose(reward("a_dlp", [1, 0], [100, 200]), [0.9, -0.2])
    np.testing.assert_allclose(reward("a_dlp", [1], [100], state={"multiplier": 0.002}), [0.8])
    up = next_state("a_dlp", LengthInputs([1, 1, 1, 0], [5] * 4, 1000))["multiplier"]
    assert up == pytest.approx(1e-3 + 1e-3 * (0.75 - 0.62))
    down = next_state("a_dlp", LengthInputs([0, 1], [5] * 2, 1000, state={"multiplier": up}))["multiplier"]
    assert down == pytest.approx(up - 1e-3 * 0.12)
    assert next_state("a_dlp", LengthInputs([0], [5], 1000), {"rate": 1.0}) == {"multiplier": 0.0}


@pytest.mark.parametrize("name", LENGTH_REWARDS)
def test_states_are_json_and_of_adaptive_rewards_only(name):
    state = next_state(name, LengthInputs([1, 0], [3, 900], 1000, budgets=50))
    assert bool(state) == isinstance(LENGTH_REWARDS[name], AdaptiveReward)
    assert json.loads(json.dumps(state)) == state
    assert next_state(name, LengthInputs([], [], 1000)).keys() == state.keys()


@pytest.mark.parametrize("name", ["leash", "a_dlp"])
def test_multipliers_bring_a_simulated_policy_to_their_aim(name):
    """A policy whose mean length follows the penalty, and whose accuracy falls with the length that it saves."""
    rng, length, state = np.random.default_rng(0), 900.0, {}
    constants = {"target": 400, "rate": 0.02} if name == "leash" else {"rate": 2e-4, "start": 0.0, "reference": 0.7}
    seen = []
    for _ in range(600):
        lengths = np.clip(rng.normal(length, 20, 64), 1, 1000)
        correct = (rng.random(64) < np.clip(length / 1000, 0, 0.95)).astype(float)
        inputs = LengthInputs(correct, lengths, 1000, state=state)
        weight = state.get("multiplier", 0.0) * (1 if name == "leash" else 1000)
        over = length > 400 if name == "leash" else True
        length += 4 * (900 - length) / 500 - 30 * weight * over  # what accuracy pulls up, the penalty pulls down
        length = float(np.clip(length, 50, 950))
        state = next_state(name, inputs, constants)
        seen.append(length if name == "leash" else correct.mean())
    assert np.mean(seen[-200:]) == pytest.approx(400 if name == "leash" else 0.7, rel=0.08)
