"""Sampling replay: log-probs of the distribution that top-k, top-p and min-p left, from the sampler to the learner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.learner.learner import Learner
from jaxrl.learner.logprobs import HeadSettings, logprobs_and_entropy
from jaxrl.learner.packing import PackSettings, pack
from jaxrl.rollout.engine import Engine, Request, SamplingParams
from jaxrl.rollout.sampling import draw
from jaxrl.rollouts import Prompt, Rollouts, begin, concat
from jaxrl.runtime.config import base_config
from jaxrl.runtime.mesh import make_mesh
from jaxrl.types import Completion, Problem
from models.config import DecoderConfig
from models.decoder import Decoder, init_params, logits

N, D, V = 13, 8, 37
CUTS = [dict(top_k=3), dict(top_p=0.7), dict(min_p=0.2), dict(top_k=9, top_p=0.8, min_p=0.05)]


def kept_sets(p, top_k=0, top_p=1.0, min_p=0.0):
    """bool [n, V], float64, by sorting: what the sampler keeps of each distribution."""
    order = np.argsort(-p, axis=1)
    ranked = np.take_along_axis(p, order, 1)
    ranked[:, top_k or p.shape[1] :] = 0
    before = np.cumsum(ranked, 1) - ranked
    ranked[before >= top_p * ranked.sum(1, keepdims=True)] = 0
    ranked[ranked < min_p * ranked[:, :1]] = 0
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, ranked > 0, 1)
    return kept


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_sampler_records_the_mass_and_the_border_of_what_it_kept(cut):
    rng = np.random.default_rng(0)
    z, u = 2 * rng.normal(size=(64, V)), rng.uniform(0.01, 1, (64, 2))
    settings = dict(top_k=0, top_p=1.0, min_p=0.0) | cut
    arrays = {k: np.full(64, v, np.int32 if k == "top_k" else np.float32) for k, v in settings.items()}
    u, temperature = np.float32(u), np.full(64, 0.7, np.float32)
    token, logp, found = draw(np.float32(z), u, temperature, **arrays, record=True)
    p = softmax(z / 0.7)
    kept = kept_sets(p, **cut)
    np.testing.assert_allclose(found["kept"], np.log((p * kept).sum(1)), atol=1e-5)
    assert (np.asarray(found["kept"]) < 0).all()
    np.testing.assert_array_equal(p >= np.asarray(found["least"])[:, None], kept)
    for a, b in zip(draw(np.float32(z), u, temperature, **arrays), (token, logp), strict=True):
        np.testing.assert_array_equal(a, b)  # recording changes nothing
    *_, nothing = draw(np.float32(z), u, temperature, record=True)
    assert not np.asarray(nothing["kept"]).any() and not np.asarray(nothing["least"]).any()


def reference(h, w, y, temperature, least, g, e):
    """(logp, entropy, d hidden, d head) of sum(g logp + e H), float64: logp over the kept tokens, H over all."""
    z = h @ w / temperature
    p, target = softmax(z), np.eye(V)[y]
    kept = (p >= least[:, None]) | (target > 0)
    truncated = p * kept / (p * kept).sum(1, keepdims=True)
    entropy = -(p * np.log(p)).sum(1)
    d_z = g[:, None] * (target - truncated) - e[:, None] * p * (np.log(p) + entropy[:, None])
    d_z /= temperature
    return np.log((truncated * target).sum(1)), entropy, d_z @ w.T, h.T @ d_z


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk, saved", [(37, 0), (8, 4 * N * 16), (12, 10**9)], ids=["one", "some", "all"])
def test_truncated_log_probs_match_float64(tied, chunk, saved):
    rng = np.random.default_rng(1)
    h, w, y = rng.normal(size=(N, D)), rng.normal(size=(D, V)), rng.integers(0, V, N)
    g, e = rng.normal(size=(2, N))
    least = rng.uniform(0, 0.1, N)
    least[:2] = 0, 0.999  # everything; nothing but the target
    settings = HeadSettings(temperature=0.7, tied=tied, chunk=chunk, saved_bytes=saved)

    def objective(h, w):
        out = logprobs_and_entropy(h, w, y, np.ones(N), N, settings=settings, least=np.float32(least))
        return jnp.sum(g * out[0] + e * out[1]), out

    head = np.float32(w.T if tied else w)
    (_, out), (d_h, d_w) = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(np.float32(h), head)
    want = reference(h, w, y, 0.7, least, g, e)
    for a, b in zip((*out, d_h, d_w.T if tied else d_w), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert out[0][1] == 0


def test_columns_go_where_tokens_go():
    """Through partial rollouts, concatenation, selection and checkpoints; what nobody recorded is 0."""
    problem = Problem("0", "", "")
    column = lambda *x: {"kept": np.array(x, np.float32)}  # noqa: E731
    old = begin([Prompt(problem, np.array([1, 2]), 2)])
    first = [Completion(np.array(t), np.zeros(len(t)), "length", columns=c)
             for t, c in (([5, 6], column(-1, -2)), ([7], column(-3)))]
    r = old.extend(first, 0, 4)
    then = [Completion(np.array([t]), np.zeros(1), "eos", columns=column(c)) for t, c in ((8, -4), (9, -5))]
    r = r.extend(then, 1, 4)
    assert r.tokens.tolist() == [5, 6, 8, 7, 9] and r.token_columns["kept"].tolist() == [-1, -2, -4, -3, -5]
    back = Rollouts.from_arrays(r.take([1, 0]).to_arrays())
    assert back.token_columns["kept"].tolist() == [-3, -5, -1, -2, -4]
    plain = begin([Prompt(problem, np.array([1]), 1)]).extend([Completion(np.array([3]), np.zeros(1), "eos")], 0, 4)
    assert concat([plain, r]).token_columns["kept"].tolist() == [0, -1, -2, -4, -3, -5]
    forced = first[0].head(1).forced([9, 9]).joined(first[1])
    assert forced.columns["kept"].tolist() == [-1, 0, 0, -3]


@pytest.fixture(scope="module")
def truncated():
    """(decoder, parameters, rollouts that it drew at temperature 0.7 with top-p 0.8)."""
    decoder = DecoderConfig(31, 16, 24, 2, 2, 1, 8, model_type="llama", init_std=0.5)
    params, prompts = init_params(decoder, jax.random.key(0)), [np.array([1, 2, 3]), np.array([4, 5])]
    engine = Engine(decoder, (0,), max_prompt=8, max_tokens=12, slots=4, chunk=5, window=16, record=("kept",))
    drawn = engine.generate(engine.layout(params), [Request(p, 3, 12, i) for i, p in enumerate(prompts)], seed=1,
                            sampling=SamplingParams(0.7, top_p=0.8))
    rows = begin(Prompt(Problem(str(i), "", ""), p, 3, i) for i, p in enumerate(prompts))
    rows = rows.extend([c for group in drawn for c in group], 0, 12)
    return decoder, params, rows.replace(valid=np.ones(6, bool))


def test_the_learner_finds_the_distribution_that_drew(truncated):
    """At the sampler's parameters the log-probs of both are equal, and they are those of a plain float64 truncation."""
    decoder, params, rows = truncated
    assert (rows.token_columns["kept"] <= 0).all() and (rows.token_columns["kept"] < -0.01).mean() > 0.5
    config = base_config()
    config.sampling.temperature, config.sampling.top_p, config.sampling.replay = 0.7, 0.8, True
    config.optimizer.learning_rate, config.batch.updates = 1e-2, 2
    learner = Learner(config, decoder, make_mesh(devices=jax.devices()[:1]))
    batch, packing = pack(rows, np.ones(6), PackSettings(32, 64, replay=True))
    scores = packing.collect(learner.score(params, batch))
    np.testing.assert_allclose(scores, packing.collect(batch.sampler_logprobs), atol=2e-5)
    at = 0
    for i, response in enumerate(rows.split_tokens()):
        prompt = rows.prompts[rows.group[i]].tokens
        whole = np.concatenate([prompt, response])[None]
        hidden, _ = Decoder(decoder).apply({"params": params}, whole, np.arange(whole.shape[1])[None])
        p = softmax(np.float64(logits(params, hidden)[0, len(prompt) - 1 : -1]) / 0.7)
        p *= kept_sets(p, top_p=0.8)
        want = np.log(p[np.arange(len(response)), response] / p.sum(1))
        np.testing.assert_allclose(scores[at : at + len(response)], want, atol=2e-5)
        at += len(response)
    state = learner.init(jax.tree.map(jnp.copy, params))
    _, metrics = learner.update(state, [batch, batch])
    assert metrics["logprob_diff/mean"] < 2e-5 and metrics["nonfinite"] == 0

