"""Every loss against the NumPy reference: value, gradient and statistics, in float64 and float32, on packed
rows.
"""

import numpy as np
import pytest

from jaxrl.algorithms.aggregation import AGGREGATIONS
from jaxrl.algorithms.hyper import resolve
from jaxrl.algorithms.losses import LOSSES
from tests.algorithms import reference
from tests.algorithms.harness import pack, random_sequences, run_loss

LENGTHS = [1, 9, 17, 4, 30, 2, 12, 25, 6, 1, 14]
ROWS = [[0, 1, 2], [3, 4], [], [5, 6, 7], [8, 9, 10]]
# Constants other than the defaults, so that nothing passes by being hard-coded.
VARIANTS = [(name, {}) for name in LOSSES] + [
    ("ppo", {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": 1.5}),
    ("dac", {"eps_low": 0.05, "eps_high": 0.4, "ratio_max": 2.0, "dual_clip": 1.5}),
    ("gspo", {"clip_low": 0.2, "clip_high": 0.1}),
    ("gspo_token", {"clip_low": 0.1, "clip_high": 0.2}),
    ("gmpo", {"clip_low": 0.2, "clip_high": 0.1}),
    ("cispo", {"clip_low": 0.3, "clip_high": 0.5}),
    ("cispo", {"cap": 1.5, "clip_low": 0.3}),  # with a cap there is no lower bound
    ("sapo", {"tau_pos": 2.0, "tau_neg": 0.5}),
    ("maspo", {"differentiable_gate": True}),
    ("maspo", {"sigma_base": 0.5, "alpha": 0.5, "beta_high": 0.2, "beta_low": 0.4, "sigma_high": 1.5}),
    (
        "maspo",
        {
            "sigma_base": 0.7,
            "alpha": 0.0,
            "beta_high": 3.0,
            "beta_low": 9.0,
            "risk_low": 0.6,
            "risk_high": 1.4,
        },
    ),
    ("bapo", {"target": 0.9, "high_max": 1.5}),
    ("bapo", {"target": 0.1}),
    ("dppo_tv", {"low": 0.05, "high": 0.02, "ratio_max": 1.2}),
    ("dppo_kl", {"low": 0.01, "high": 0.005, "ratio_max": 1.5}),
    ("vespo", {"k_pos": 1.0, "lambda_pos": 0.5, "k_neg": 0.5, "lambda_neg": 1.5}),
    ("dro", {"beta": 0.7}),
    ("clip_cov", {"ratio": 0.1, "cov_low": 0.2, "cov_high": 2.0, "clip_low": 0.3}),
    ("kl_cov", {"ratio": 0.2, "kl_coef": 0.3}),
]
IDS = [f"{n}-{'-'.join(f'{k}{v}' for k, v in h.items()) or 'defaults'}" for n, h in VARIANTS]


def _sequences(seed=0, token_advantages=False):
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng, LENGTHS, spread=0.6)
    if token_advantages:
        for s in sequences:
            s["advantages"] = rng.normal(size=len(s["logp"]))
    return sequences


def _constants(name, overrides, sequences):
    return reference.prepared(name, sequences, resolve(LOSSES, "loss", name, overrides)[1])


def _spread_out(places, batch, values):
    out = np.zeros(batch["logp"].shape)
    for i, (r, where) in places.items():
        out[r, where] = values[i]
    return out


@pytest.mark.parametrize(("name", "overrides"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_value_and_gradient_match_the_formula(name, overrides, dtype):
    for seed in range(2):
        sequences = _sequences(seed, token_advantages=seed == 1)
        batch, places = pack(sequences, ROWS, np.random.default_rng(seed))
        hyper = _constants(name, overrides, sequences)
        tokens = [reference.token_losses(name, s, hyper) for s in sequences]
        for aggregation in AGGREGATIONS:
            weights = reference.token_weights(sequences, aggregation, 37.0)
            value = sum(np.sum(w * t) for w, t in zip(weights, tokens, strict=True))
            slopes = [reference.gradient(name, s, hyper, w) for s, w in zip(sequences, weights, strict=True)]
            loss, grad, per_token, stats = run_loss(
                name, batch, aggregation, overrides, norm_length=37.0, dtype=dtype
            )
            tolerance = 1e-6 if dtype == np.float64 else 1e-5
            size = sum(np.sum(np.abs(w * t)) for w, t in zip(weights, tokens, strict=True))
            assert abs(loss - value) <= tolerance * size
            expected = _spread_out(places, batch, slopes)
            assert np.abs(grad - expected).max() <= tolerance * np.abs(expected).max()
            assert not np.any(grad[batch["response_mask"] == 0])
        mask = batch["response_mask"] != 0
        expected = _spread_out(places, batch, tokens)
        np.testing.assert_allclose(
            per_token[mask], expected[mask], rtol=tolerance, atol=tolerance * np.abs(expected).max()
        )
        assert np.abs(stats["ratio"]) > 0


@pytest.mark.parametrize(("name", "overrides"), VARIANTS, ids=IDS)
def test_hand_derived_gradients_match_finite_differences(name, overrides):
    """The reference against itself: central differences with the stop-gradient factors frozen."""
    step, rng = 1e-6, np.random.default_rng(3)
    sequences = _sequences(2)
    hyper = _constants(name, overrides, sequences)
    for s in sequences:
        w = rng.uniform(0.5, 1.5, len(s["logp"]))
        exact = reference.gradient(name, s, hyper, w)
        for t in range(len(w)):
            up, down = ({**s, "logp": s["logp"] + step * sign * (np.arange(len(w)) == t)} for sign in (1, -1))
            difference = np.sum(
                w
                * (reference.token_losses(name, up, hyper, s) - reference.token_losses(name, down, hyper, s))
            ) / (2 * step)
            assert abs(difference - exact[t]) <= 1e-6 * max(1, np.abs(exact).max())


def test_statistics_are_counts_over_response_tokens():
    sequences = _sequences(0)
    batch, _ = pack(sequences, ROWS, np.random.default_rng(0))
    rho = np.concatenate([np.exp(s["logp"] - s["old_logp"]) for s in sequences])
    adv = np.concatenate([s["advantages"] for s in sequences])
    log = np.log(rho)
    *_, stats = run_loss("ppo", batch, overrides={"dual_clip": 1.2})
    np.testing.assert_allclose(stats["ratio"], rho.sum())
    np.testing.assert_allclose(stats["old_kl"], (rho - 1 - log).sum())
    assert stats["clip_high"] == ((adv > 0) & (rho > 1.2)).sum() > 0
    assert stats["clip_low"] == ((adv < 0) & (rho < 0.8)).sum() > 0
    assert stats["dual_clip"] == ((adv < 0) & (rho > 1.2)).sum() > 0
    *_, stats = run_loss("gspo", batch)
    mean = [np.exp(np.mean(s["logp"] - s["old_logp"])) for s in sequences]
    high = [
        (s["advantages"][0] > 0) * (m > 1 + 4e-4) * len(s["logp"])
        for s, m in zip(sequences, mean, strict=True)
    ]
    assert stats["clip_high"] == sum(high) > 0
    *_, stats = run_loss("bapo", batch)
    low, high = reference.bapo_bounds(sequences, resolve(LOSSES, "loss", "bapo")[1])
    assert low > 0.6  # the search had something to do
    np.testing.assert_allclose([stats["bound_low"], stats["bound_high"]], [low * len(rho), high * len(rho)])
    *_, stats = run_loss("cispo", batch, overrides={"cap": 1.5})
    assert (stats["clip_low"], stats["clip_high"]) == (0, (rho > 1.5).sum())
    *_, stats = run_loss("sapo", batch)
    p = 1 / (1 + np.exp(-np.where(adv > 0, 1.0, 1.05) * (rho - 1)))
    np.testing.assert_allclose(stats["gate"], (4 * p * (1 - p)).sum())


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_gradient_is_the_policy_gradient(name):
    """At old_logp = logp every method's first step is -w A grad log pi: no clip, gate or bound acts."""
    sequences = _sequences(4)
    for s in sequences:
        s["old_logp"] = s["logp"]
    batch, places = pack(sequences, ROWS, np.random.default_rng(4))
    _, grad, *_ = run_loss(name, batch, overrides={"ratio": 0.0} if name == "clip_cov" else None)
    weights = reference.token_weights(sequences, LOSSES[name].aggregation)
    slopes = [-w * s["advantages"] for w, s in zip(weights, sequences, strict=True)]
    np.testing.assert_allclose(grad, _spread_out(places, batch, slopes), rtol=1e-9, atol=1e-12)


def test_the_covariance_losses_choose_as_many_tokens_as_they_should():
    """KL-Cov exactly those with the most covariance; Clip-Cov as many on average, by lots that look random."""
    rng = np.random.default_rng(0)
    sequences = random_sequences(rng, [50] * 60, spread=0.3)
    batch, _ = pack(sequences, [[i] for i in range(60)])
    *_, stats = run_loss("kl_cov", batch, overrides={"ratio": 0.01})
    assert stats["held"] == 30
    band = {"cov_low": 0.1, "cov_high": 5.0}
    hyper = _constants("clip_cov", band, sequences)
    eligible = sum(reference._in_the_band(s, hyper).sum() for s in sequences)
    assert eligible > 500
    for ratio in (0.0, 0.02, 0.05):
        *_, stats = run_loss("clip_cov", batch, overrides={"ratio": ratio, **band})
        spread = np.sqrt(3000 * ratio * (1 - 3000 * ratio / eligible))
        assert abs(stats["left_out"] - 3000 * ratio) <= 3 * spread
    *_, stats = run_loss("clip_cov", batch, overrides={"ratio": 1.0, **band})
    assert stats["left_out"] == eligible


def test_vespos_weight_is_largest_at_k_over_lambda_and_one_without_a_ratio():
    hyper = resolve(LOSSES, "loss", "vespo")[1]
    w = np.linspace(0.01, 3, 3000)
    phi = np.array([reference._vespo_phi(np.array([np.log(x)]), np.array([1.0]), hyper)[0] for x in w])
    assert w[phi.argmax()] == pytest.approx(2 / 3, abs=1e-3)
    x = np.log([[1.0, 0.5, 2.0]])
    batch, _ = pack([{"logp": x[0] - 1, "old_logp": np.full(3, -1.0), "advantages": np.ones(3)}], [[0]])
    assert run_loss("vespo", batch)[3]["phi"] == pytest.approx(3.0)  # W = 1 * 0.5 * 2


@pytest.mark.parametrize(("low", "high"), [(0.6, 1.2), (0.9, 2.1), (0.9, 2.6)])
def test_bapo_finds_the_first_bounds_that_meet_the_target(low, high):
    """Negative advantages are scaled so that the share reaches the target just before these bounds. A higher low never
    helps (clipped negatives count as low), so the search passes through low_max to the higher highs."""
    hyper = resolve(LOSSES, "loss", "bapo", {"target": 0.55})[1]
    sequences = random_sequences(np.random.default_rng(0), LENGTHS, spread=1.0)
    for i, s in enumerate(sequences):
        s["advantages"] = np.full(len(s["logp"]), 1.0 if i % 2 else -1.0)
    rho = np.concatenate([np.exp(s["logp"] - s["old_logp"]) for s in sequences])
    adv = np.concatenate([s["advantages"] for s in sequences])
    positive, negative = np.minimum(rho, high - 0.01)[adv > 0].sum(), np.maximum(rho, low)[adv < 0].sum()
    for s in sequences[::2]:
        s["advantages"] *= positive / negative * (1 / 0.55 - 1)
    assert reference.bapo_bounds(sequences, hyper) == pytest.approx((low, high))
    batch, _ = pack(sequences, ROWS, np.random.default_rng(0))
    *_, stats = run_loss("bapo", batch, overrides={"target": 0.55})
    assert (stats["bound_low"], stats["bound_high"]) == pytest.approx((low * len(rho), high * len(rho)))


@pytest.mark.parametrize("size", [1.0, 0.0], ids=["met exactly", "nothing to balance"])
def test_bapo_stays_where_it_starts(size):
    sequences = [{k: np.full(4, v) for k, v in (("logp", -1.0), ("old_logp", -1.0))} for _ in LENGTHS[:10]]
    for i, s in enumerate(sequences):
        s["advantages"] = np.full(4, size * (-1) ** i)
    batch, _ = pack(sequences, [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]])
    hyper = resolve(LOSSES, "loss", "bapo")[1]
    *_, stats = run_loss("bapo", batch)
    assert (stats["bound_low"], stats["bound_high"]) == pytest.approx((40 * hyper["low"], 40 * hyper["high"]))


def test_gmpo_leaves_out_the_ratio_of_tokens_without_an_advantage():
    x, adv = np.array([0.1, 0.9, -0.3, 0.2]), np.array([1.0, 2.0, 0.0, 0.0])
    batch, _ = pack([{"logp": x - 2, "old_logp": np.full(4, -2.0), "advantages": adv}], [[0]])
    assert run_loss("gmpo", batch)[0] == pytest.approx(-np.mean(adv) * np.exp((0.1 + 0.4) / 4))


def test_empty_rows_are_not_counted_as_sequences_unless_asked():
    sequences = _sequences(5)[:2]
    batch, _ = pack(sequences, [[0], [1]], None)
    third = {k: np.concatenate([v, v[:1]]) for k, v in batch.items()}
    third["response_mask"][2] = 0
    verl = run_loss("grpo", third)[0]
    assert verl == run_loss("grpo", batch)[0]
    tokens = third["response_mask"].sum()
    np.testing.assert_allclose(run_loss("grpo", third, counts=(tokens, 3))[0], verl * 2 / 3)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="unknown loss 'gppo'; valid: .*grpo"):
        resolve(LOSSES, "loss", "gppo")
    with pytest.raises(ValueError, match="unknown constant 'sigma' of loss 'maspo'; valid: .*sigma_base"):
        resolve(LOSSES, "loss", "maspo", {"sigma": 1.0})
    batch, _ = pack(_sequences(5)[:1], [[0]], None)
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; valid: token-mean"):
        from jaxrl.algorithms.aggregation import aggregate

        aggregate(batch["logp"], batch["response_mask"], batch["sequence_ids"], "mean", 1, 1)
