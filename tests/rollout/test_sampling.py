"""Drawing tokens: exact log-probs, unbiased draws, and the supports that NumPy and transformers give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.rollout import sampling
from tests.rollout import tiny

draw = jax.jit(sampling.draw)
inverse_cdf = jax.jit(sampling.inverse_cdf)
truncate = jax.jit(sampling.truncate)


def softmax(z):
    w = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


def support(z, top_k=0, top_p=1.0, min_p=0.0):
    """bool [B, V]: what truncate keeps."""
    B = len(z)
    weights = np.exp(z - z.max(-1, keepdims=True))
    args = (np.full(B, top_k, np.int32), np.full(B, top_p, np.float32), np.full(B, min_p, np.float32))
    return np.asarray(truncate(z, weights, *args)) > 0


def expected_support(z, top_k=0, top_p=1.0, min_p=0.0):
    """By sorting, in float64: top-k, then the smallest set of at least top_p of what is left, then min-p."""
    out = np.zeros(z.shape, bool)
    for row, keep in zip(z.astype(np.float64), out, strict=True):
        order = np.argsort(-row, kind="stable")
        order = order[: top_k or len(row)]
        p = np.exp(row[order] - row.max())
        p /= p.sum()
        before = np.cumsum(p) - p
        order, p = order[before < top_p], p[before < top_p]
        keep[order[p >= min_p * p[0]]] = True
    return out


CASES = [dict(top_k=1), dict(top_k=7), dict(top_k=1000), dict(top_p=0.1), dict(top_p=0.9), dict(top_p=0.999)]
CASES += [
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(top_k=20, top_p=0.8),
    dict(top_k=40, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_supports(case):
    z = np.random.default_rng(1).normal(0, 3, (16, 500)).astype(np.float32)
    np.testing.assert_array_equal(support(z, **case), expected_support(z, **case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_supports_are_those_of_transformers(case):
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    z = np.random.default_rng(2).normal(0, 3, (16, 500)).astype(np.float32)
    kept = torch.tensor(z)
    if case.get("top_k"):
        kept = warpers.TopKLogitsWarper(case["top_k"])(None, kept)
    if case.get("top_p", 1) < 1:
        kept = warpers.TopPLogitsWarper(case["top_p"])(None, kept)
    if case.get("min_p"):
        kept = warpers.MinPLogitsWarper(case["min_p"])(None, kept)
    np.testing.assert_array_equal(support(z, **case), np.isfinite(kept.numpy()))


def test_supports_with_banned_tokens_and_huge_logits():
    z = np.random.default_rng(3).normal(0, 3, (4, 300)).astype(np.float32)
    z[:, ::2] = -np.inf
    z[1, 5], z[2, 7] = 1e4, -1e4
    for case in (dict(top_k=3), dict(top_p=0.9), dict(min_p=0.1)):
        np.testing.assert_array_equal(support(z, **case), expected_support(z, **case))


@pytest.mark.parametrize("bias", [-1e4, -1e9, -1e30])
@pytest.mark.parametrize("case", [dict(top_k=5), dict(top_p=0.9)], ids=str)
def test_a_large_bias_leaves_the_supports_of_the_rest_alone(bias, case):
    z = np.random.default_rng(2).normal(0, 3, (4, 300)).astype(np.float32)
    z[:, 100:] += np.float32(bias)
    np.testing.assert_array_equal(support(z, **case), expected_support(z, **case))


def test_ties_at_the_threshold_are_all_kept():
    z = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    assert support(z, top_k=2).tolist() == [[True, True, True, True, False]]


def chi_square(counts, p, least=20):
    """(statistic, degrees of freedom), neighbours pooled until each bin expects `least`."""
    n, stat, bins, o, e = counts.sum(), 0.0, 0, 0.0, 0.0
    for c, q in zip(counts, p * counts.sum(), strict=True):
        o, e = o + c, e + q
        if e >= least:
            stat, bins, o, e = stat + (o - e) ** 2 / e, bins + 1, 0.0, 0.0
    assert n > 0 and bins >= 5
    return stat, bins - 1


@pytest.mark.parametrize("V, draws", [(5, 20_000), (128, 20_000), (1000, 50_000), (152_064, 20_000)])
def test_draws_follow_the_softmax(V, draws):
    rng = np.random.default_rng(V)
    z = rng.normal(0, 2, V).astype(np.float32)
    weights = np.exp(z - z.max())
    counts, batch = np.zeros(V), 200
    for _ in range(0, draws, batch):
        u = ((rng.integers(0, 2**24, (batch, 2)) + 1) * 2.0**-24).astype(np.float32)
        tokens = inverse_cdf(np.broadcast_to(weights, (batch, V)), u)
        counts += np.bincount(np.asarray(tokens), minlength=V)
    order = np.argsort(-weights)  # pools rare tokens with rare ones
    stat, freedom = chi_square(counts[order], softmax(z)[order])
    assert stat < freedom + 5 * np.sqrt(2 * freedom), (stat, freedom)


def test_no_bias_along_a_flat_vocabulary():
    """One running float32 sum over 152k entries drifts; block by block, the exact quantile comes out."""
    V, points = 152_064, 400
    weights, size = np.full((points, V), 0.1, np.float32), V // sampling.BLOCKS
    block = np.arange(points) % sampling.BLOCKS
    within = np.linspace(0.001, 1.0, points)
    u = np.stack([(block + 0.5) / sampling.BLOCKS, within], 1).astype(np.float32)
    np.testing.assert_allclose(inverse_cdf(weights, u), block * size + within * size, atol=1.5)


def test_zero_weights_are_never_drawn_not_even_at_the_ends():
    rng = np.random.default_rng(5)
    weights = rng.random((64, 1000)).astype(np.float32)
    weights[:, rng.random(1000) < 0.7] = 0
    weights[:, :200] = 0
    weights[:, -200:] = 0
    for value in (2.0**-24, 0.5, 1.0):
        u = np.full((64, 2), value, np.float32)
        assert (weights[np.arange(64), np.asarray(inverse_cdf(weights, u))] > 0).all()


def test_a_single_candidate_is_always_drawn():
    z = np.full((3, 700), -np.inf, np.float32)
    z[:, 650] = -3.0
    u = np.array([[2.0**-24, 1.0], [1.0, 2.0**-24], [0.3, 0.7]], np.float32)
    token, logp = draw(z, u, np.ones(3, np.float32))
    assert token.tolist() == [650] * 3 and np.allclose(logp, 0)


@pytest.mark.parametrize("V", [5, 300, 152_064])
def test_logprob_of_the_drawn_token_is_exact(V):
    rng = np.random.default_rng(6)
    z = rng.normal(0, 4, (8, V)).astype(np.float32)
    t = np.array([0.0, 0.3, 0.7, 1.0, 1.0, 1.3, 2.0, 5.0], np.float32)
    u = rng.random((8, 2)).astype(np.float32) * 0.99 + 0.005
    token, logp = draw(z, u, t)
    scaled = z.astype(np.float64) / np.where(t == 0, 1, t)[:, None]
    expected = np.log(softmax(scaled))[np.arange(8), np.asarray(token)]
    np.testing.assert_allclose(logp, expected, atol=1e-5)
    assert token[0] == z[0].argmax()


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-9, 1e-7, 1e-4, 1e30])
def test_any_temperature_gives_a_token_and_a_log_prob(temperature):
    z = np.random.default_rng(7).normal(0, 4, (64, 300)).astype(np.float32) + 30
    u = np.random.default_rng(8).random((64, 2)).astype(np.float32) * 0.99 + 0.005
    for options in ({}, dict(top_k=np.full(64, 3), top_p=np.full(64, 0.9, np.float32), min_p=np.zeros(64, np.float32))):
        token, logp = (np.asarray(a) for a in draw(z, u, np.full(64, temperature, np.float32), **options))
        assert np.isfinite(logp).all() and (logp <= 0).all()
        if temperature < 1e-3:
            np.testing.assert_array_equal(token, z.argmax(-1))
        if 0 < np.float32(temperature) < 1e-6 and temperature > 1e-38:
            np.testing.assert_array_equal(logp, 0)


@pytest.mark.parametrize("options", [{}, dict(top_k=40, top_p=0.9, min_p=0.01)], ids=str)
def test_what_is_not_allowed_is_never_drawn_and_log_probs_are_the_learners(options):
    """The learner's softmax runs over every row of the vocabulary, those without a token included."""
    rng, B, V = np.random.default_rng(9), 256, 300
    z = rng.normal(0, 2, (B, V)).astype(np.float32)
    allowed = np.arange(V) < 280
    allowed[5] = False
    z[:, ~allowed] += 3
    z[0, 290] = 500  # all that is allowed underflows
    temperature = np.where(np.arange(B) % 2, 1.0, 0.0).astype(np.float32)
    u = rng.random((B, 2)).astype(np.float32) * 0.99 + 0.005
    args = {k: np.full(B, v, np.int32 if k == "top_k" else np.float32) for k, v in options.items()}
    token, logp = draw(z, u, temperature, allowed=allowed, **args)
    assert allowed[np.asarray(token)].all()
    held = np.where(allowed, z, -np.inf)
    np.testing.assert_array_equal(np.asarray(token)[::2], held[::2].argmax(-1))
    expected = z.astype(np.float64)[np.arange(B), token]
    expected -= np.log(np.exp(z.astype(np.float64) - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
    np.testing.assert_allclose(logp, expected, atol=2e-5, rtol=1e-6)
    if options:
        kept = expected_support(held, **options)
        assert kept[np.arange(1, B, 2), np.asarray(token)[1::2]].all()
    everything = draw(z, u, temperature, allowed=np.ones(V, bool), **args)
    for a, b in zip(everything, draw(z, u, temperature, **args), strict=True):
        np.testing.assert_array_equal(a, b)


def test_greedy_takes_the_first_of_equals():
    z = np.zeros((1, 400), np.float32)
    z[0, [200, 300]] = 1.0
    assert draw(z, np.full((1, 2), 0.9, np.float32), np.zeros(1, np.float32))[0].tolist() == [200]


def test_keys_and_uniforms_are_the_documented_ones():
    keys = sampling.sample_keys(
        np.uint32(3), np.uint32(4), np.array([5, 6], np.uint32), np.array([0, 1], np.uint32)
    )
    u = np.asarray(sampling.uniforms(keys, jnp.array([7, 8])))
    for row, (problem, sample, position) in enumerate([(5, 0, 7), (6, 1, 8)]):
        np.testing.assert_array_equal(u[row], tiny.uniforms(3, 4, problem, sample, position))
    assert (u > 0).all() and (u <= 1).all()


def test_uniforms_are_uniform_and_independent_of_each_other():
    n = 20_000
    keys = np.zeros((n, 2), np.uint32)
    keys[:, 0] = np.arange(n)
    u = np.asarray(sampling.uniforms(keys, np.zeros(n, np.int32)))
    counts = np.histogram2d(u[:, 0], u[:, 1], bins=16, range=[[0, 1], [0, 1]])[0].ravel()
    stat, freedom = chi_square(counts, np.full(256, 1 / 256))
    assert stat < freedom + 5 * np.sqrt(2 * freedom)


def test_a_target_that_underflows_still_draws_a_candidate():
    weights = np.zeros((1, 300), np.float32)
    weights[0, [5, 6]] = 2e-38  # times 2**-24 is zero: every running sum reaches it
    u = np.full((1, 2), 2.0**-24, np.float32)
    assert inverse_cdf(weights, u).tolist() in ([5], [6])
