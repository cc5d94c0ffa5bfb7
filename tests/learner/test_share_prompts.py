"""Shared prompts: every response still sees its prompt and nothing else, and the numbers are those of unshared rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.learner.packing import PackSettings, pack
from jaxrl.learner.state import Optimizer, init_state
from jaxrl.learner.update import Objective, build_programs, place_batch
from jaxrl.rollouts import from_sequences
from jaxrl.runtime.config import base_config
from jaxrl.runtime.mesh import make_mesh
from models import attention
from models.attention import segment_mask
from models.config import DecoderConfig
from models.decoder import init_params

CONFIG = DecoderConfig(29, 16, 24, 2, 4, 2, 8, qk_norm=True, tie_embeddings=True, model_type="qwen3", init_std=0.3)


def rollouts(groups=4, samples=5, longest=9, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 29, rng.integers(1, 9)) for _ in range(groups)]
    group = rng.permutation(np.repeat(np.arange(groups), samples))
    responses = [rng.integers(1, 29, rng.integers(1, longest)) for _ in group]
    return from_sequences(prompts, responses, [rng.normal(size=len(r)) for r in responses], group)


@pytest.mark.parametrize("seed", range(4))
def test_every_response_sees_its_prompt_and_itself_in_order_and_nothing_else(seed):
    r = rollouts(seed=seed)
    batch, packing = pack(r, np.arange(len(r.group)), PackSettings(48, 48 * 4, share_prompts=True))
    tokens, positions, ids, parents = (
        np.asarray(getattr(batch, k)).reshape(-1, 48) for k in ("tokens", "positions", "segment_ids", "parents")
    )
    mask = np.asarray(segment_mask(jnp.asarray(ids), shared=(jnp.asarray(parents), jnp.asarray(positions))))
    for i, response in enumerate(r.split_tokens()):
        prompt = r.prompts[r.group[i]].tokens
        where = packing.index[packing.offsets[i] : packing.offsets[i + 1]]
        row, last = divmod(where[-1], 48)
        seen = np.flatnonzero(mask[row, last])
        np.testing.assert_array_equal(tokens[row, seen], [*prompt, *response])
        np.testing.assert_array_equal(positions[row, seen], np.arange(len(prompt) + len(response)))
        first = where[0] % 48 - 1  # predicts the first response token: the prompt's last
        assert (tokens[row, first], positions[row, first]) == (prompt[-1], len(prompt) - 1)
        assert list(tokens[row, np.flatnonzero(mask[row, first])]) == list(prompt)
    once = sum(len(p.tokens) for p in r.prompts)
    assert once + len(r.tokens) <= (ids > 0).sum() < sum(len(r.prompts[g].tokens) for g in r.group) + len(r.tokens)
    plain, _ = pack(r, np.arange(len(r.group)), PackSettings(48, 48 * 4))
    assert batch.num_tokens == plain.num_tokens and batch.num_sequences == plain.num_sequences


def test_responses_of_one_prompt_that_fill_a_row_begin_another_copy():
    r = from_sequences([np.arange(1, 11)], [np.full(12, 3)] * 7, group=[0] * 7)
    batch, packing = pack(r, np.zeros(7), PackSettings(40, 160, share_prompts=True))
    per_row = np.bincount(packing.index[packing.offsets[:-1]] // 40, minlength=4)
    assert sorted(per_row.tolist()) == [1, 2, 2, 2]  # 9 + 2 x 13 = 35 of 40, one more would not fit
    assert (np.asarray(batch.parents) == 0).all(axis=-1).sum() >= 1  # the lone one has its prompt in its own segment


@pytest.mark.parametrize("objective", [
    Objective(on_policy=True, entropy_coef=0.1), Objective(loss="gspo"),
], ids=["grpo", "gspo"])  # fmt: skip
def test_log_probs_and_gradients_are_those_of_unshared_rows(objective):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    optimizer = Optimizer(optax.sgd(1.0), lambda step: jnp.float32(1.0))
    programs = build_programs(CONFIG, mesh, optimizer, objective)
    params = init_params(CONFIG, jax.random.key(3))
    r, found = rollouts(groups=3, samples=4), []
    for share in (False, True):
        batch, packing = pack(r, np.linspace(-1, 1, 12), PackSettings(64, 128, share_prompts=share))
        batch = place_batch(batch, mesh)
        logp, _ = programs.score(params, batch)
        state = init_state(CONFIG, optimizer, mesh, params=jax.tree.map(jnp.copy, params))
        state, metrics = programs.update(state, batch.replace(old_logprobs=logp - 0.01))
        gradient = jax.tree.map(lambda a, b: np.asarray(a - b), params, state.params)
        found.append((packing.collect(logp), gradient, float(metrics["loss"])))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=2e-5)
    assert found[1][2] == pytest.approx(found[0][2], abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found[1][1], found[0][1])


def test_a_kernel_that_cannot_share_is_refused_before_it_is_compiled(monkeypatch):
    monkeypatch.setitem(attention.RUNS_ON, "cpu", ("splash",))
    config = base_config()
    config.batch.share_prompts, config.model.attention = True, "splash"
    with pytest.raises(UserError, match="config.batch.share_prompts: attention splash cannot"):
        Learner(config, CONFIG, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
