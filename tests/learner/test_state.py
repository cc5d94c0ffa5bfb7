"""The optimizer against a NumPy AdamW in float64, its schedules and masks, and states created in shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.learner.packing import PackSettings, pack
from jaxrl.learner.state import HOST, abstract_state, build_optimizer, decays, fresh_state, init_state
from jaxrl.learner.update import Objective, _apply, build_programs, place_batch
from jaxrl.rollouts import from_sequences
from jaxrl.runtime.checkpoint import Checkpointer
from jaxrl.runtime.config import base_config
from jaxrl.runtime.mesh import make_mesh
from models.config import DecoderConfig
from models.decoder import abstract_params, init_params

CONFIG = DecoderConfig(11, 8, 12, 2, 2, 1, 4, qkv_bias=True, model_type="qwen2")


def numpy_adamw(params, grads, lr, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, clip=0.0):
    """Loshchilov and Hutter's AdamW over a list of gradients, float64; decay only where the name says matrix."""
    params = {k: np.float64(v) for k, v in params.items()}
    m, v = ({k: np.zeros_like(x) for k, x in params.items()} for _ in range(2))
    for t, g in enumerate(grads, 1):
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        scale = min(1.0, clip / norm) if clip else 1.0
        for k in params:
            m[k] = b1 * m[k] + (1 - b1) * g[k] * scale
            v[k] = b2 * v[k] + (1 - b2) * (g[k] * scale) ** 2
            step = m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            params[k] = params[k] - lr(t - 1) * (step + (decay * params[k] if k == "matrix" else 0))
    return params


def run(optimizer, params, grads):
    names = {"matrix": "lm_head", "q_bias": "layers"}
    tree = lambda d: {names[k]: {"attn": {k: jnp.float32(v)}} for k, v in d.items()}  # noqa: E731
    state = fresh_state(tree(params), optimizer)
    params, opt_state = state.params, state.opt_state
    update = jax.jit(optimizer.transform.update)
    for g in grads:
        updates, opt_state = update(tree(g), opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)

    def flat(tree):
        return {k: v for m in tree.values() for k, v in m["attn"].items()} if isinstance(tree, dict) else tree

    return flat(params), jax.tree.map(flat, opt_state, is_leaf=lambda x: isinstance(x, dict))


def example(steps, size=5, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda: {"matrix": rng.normal(size=(size, 3)), "q_bias": rng.normal(size=size)}  # noqa: E731
    return make(), [make() for _ in range(steps)]


def test_matches_numpy_adamw_with_clip_decay_and_warm_up():
    params, grads = example(12)
    optimizer = build_optimizer(
        1e-2, warmup_steps=4, schedule="linear", total_steps=12, b2=0.95, weight_decay=0.1, grad_clip=1.5)
    want = numpy_adamw(params, grads, lambda t: 1e-2 * min((t + 1) / 4, 1) * (1 - max(t - 4, 0) / 8),
                       b2=0.95, decay=0.1, clip=1.5)
    got, _ = run(optimizer, params, grads)
    for k in want:
        np.testing.assert_allclose(got[k], want[k], rtol=2e-5, atol=2e-6)


def test_schedules():
    settings = dict(warmup_steps=10, total_steps=110)
    lr = {k: build_optimizer(2.0, schedule=k, **settings).schedule for k in ("constant", "linear", "cosine")}
    for schedule in lr.values():
        assert schedule(0) == pytest.approx(0.2) and schedule(9) == pytest.approx(2.0) == schedule(10)
    assert [float(lr["constant"](t)) for t in (60, 500)] == [2.0, 2.0]
    assert [float(lr["linear"](t)) for t in (60, 110, 500)] == pytest.approx([1.0, 0, 0], abs=1e-6)
    assert [float(lr["cosine"](t)) for t in (35, 60, 110)] == pytest.approx([1 + 0.5**0.5, 1.0, 0], abs=1e-6)
    assert float(build_optimizer(2.0).schedule(0)) == 2.0


@pytest.mark.parametrize("arguments, message", [
    (dict(schedule="exponential"), "schedule='exponential'"),
    (dict(schedule="cosine", warmup_steps=5, total_steps=5), "must be after"),
])
def test_schedule_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(1e-3, **arguments)


def test_decay_spares_norms_and_biases():
    params, _ = abstract_params(CONFIG)
    named = jax.tree_util.tree_leaves_with_path(decays(params))
    spared = {jax.tree_util.keystr(p, simple=True, separator="/") for p, decayed in named if not decayed}
    assert spared == {"final_norm/scale", "layers/attn_norm/scale", "layers/mlp_norm/scale", "layers/attn/q_bias",
                      "layers/attn/k_bias", "layers/attn/v_bias"}


def test_bfloat16_moments_follow_float32_ones():
    """Over hundreds of steps, through a drop of the gradient by 30: rounding to nearest would freeze the second
    moment (its relative change per step, 0.001, is below half a bfloat16 step) and with it the step size."""
    rng = np.random.default_rng(0)
    grads = [{"matrix": rng.normal(size=(64, 64)) * (1.0 if t < 20 else 0.03)} for t in range(500)]
    params = {"matrix": np.zeros((64, 64))}
    optimizer = build_optimizer(1e-3, state_dtype=jnp.bfloat16)
    _, stored = run(optimizer, params, grads)
    _, full = run(build_optimizer(1e-3), params, grads)
    adam = next(s for s in stored if hasattr(s, "nu"))
    reference = next(s for s in full if hasattr(s, "nu"))
    assert adam.nu["matrix"].dtype == adam.mu["matrix"].dtype == jnp.bfloat16
    ratio = np.float32(adam.nu["matrix"]) / np.float32(reference.nu["matrix"])
    assert abs(ratio.mean() - 1) < 0.01 and np.abs(ratio - 1).max() < 0.2
    nearest = jnp.float32(1.0)
    for g in grads[20:]:  # what this guards against, on one element
        nearest = jnp.float32(jnp.bfloat16(0.999 * nearest + 0.001 * g["matrix"][0, 0] ** 2))
    assert nearest > 0.99


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_steps_far_below_bfloat16s_resolution_still_move_the_parameters(dtype):
    """On average by what float32 does: rounded to nearest, none of 200 steps of 1e-5 would change a weight of 0.02."""
    optimizer = build_optimizer(1e-5)
    state = fresh_state({"matrix": jnp.full((64, 64), 0.02, dtype), "norm": jnp.full(64, 0.5, dtype)}, optimizer)
    before = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    step = jax.jit(lambda s: _apply(s, jax.tree.map(lambda x: jnp.ones(x.shape), s.params), optimizer, True)[0])
    for _ in range(200):
        state = step(state)
    for name, x in state.params.items():
        assert x.dtype == dtype
        assert (before[name] - np.asarray(x, np.float64)).mean() == pytest.approx(200e-5, rel=0.1), name


@pytest.mark.parametrize("settings, gradient", [
    (dict(learning_rate=float("nan")), 1.0),
    (dict(learning_rate=1e-3, b2=1.0), 1.0),  # the bias correction of the second moment is 0 / 0
    (dict(learning_rate=1e-3, eps=0.0), 0.0),  # 0 / 0
    (dict(learning_rate=1e-3), 1e25),  # finite itself, but not its square
    (dict(learning_rate=3e38), 1.0),
], ids=["rate", "b2", "eps", "moment", "overflow"])
def test_a_step_that_is_not_finite_is_not_taken(settings, gradient):
    """Parameters and moments stay as they were, bit for bit, and the next good gradient finds them so."""
    optimizer = build_optimizer(**settings)
    state = fresh_state({"matrix": jnp.full((3, 2), -3e38), "q_bias": jnp.ones(2)}, optimizer)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, gradient), state.params)
    after, ok = jax.jit(lambda s: _apply(s, grads, optimizer, jnp.bool_(True)))(state)
    assert not ok and (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (0, 1, 1)
    for a, b in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (after, state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_moments_keep_their_dtype_beside_bfloat16_parameters():
    state = fresh_state({"w": jnp.ones((3, 2), jnp.bfloat16)}, optimizer := build_optimizer(1e-3))
    _, after = optimizer.transform.update({"w": jnp.ones((3, 2))}, state.opt_state, state.params)
    for opt_state in (state.opt_state, after):
        assert {x.dtype for x in jax.tree.leaves(opt_state) if x.ndim} == {jnp.dtype(jnp.float32)}


def test_a_state_is_what_its_abstract_says():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    optimizer = build_optimizer(1e-3, grad_clip=1.0, state_dtype=jnp.bfloat16)
    abstract = abstract_state(CONFIG, optimizer, mesh, param_dtype=jnp.bfloat16)
    state = init_state(CONFIG, optimizer, mesh, jax.random.key(0), param_dtype=jnp.bfloat16)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    given = init_state(CONFIG, optimizer, mesh, params=jax.tree.map(jnp.copy, state.params), param_dtype=jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_offloaded_moments_rest_on_the_host_and_change_nothing():
    """Two updates with and without: the same parameters and moments, only elsewhere; no second compilation."""
    mesh, results = make_mesh(1, 1, 1, devices=jax.devices()[:1]), []
    tokens = [np.arange(1, 6)] * 3
    batch, _ = pack(from_sequences(tokens, tokens), np.array([1.0, -0.5, 0.3]), PackSettings(16, 32))
    for offload in (False, True):
        optimizer = build_optimizer(1e-2, grad_clip=1.0, offload=offload)
        programs = build_programs(CONFIG, mesh, optimizer, Objective(on_policy=True))
        state = init_state(CONFIG, optimizer, mesh, jax.random.key(0))
        for _ in range(2):
            state, _ = programs.update(state, place_batch(batch, mesh))
            adam = next(s for s in state.opt_state if hasattr(s, "nu"))
            kinds = {x.sharding.memory_kind for x in jax.tree.leaves((adam.mu, adam.nu))}
            assert kinds == {HOST if offload else "device"}
            assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
        assert programs.update._cache_size() == 1
        results.append(state)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_checkpoint_brings_offloaded_moments_back_to_the_host(tmp_path):
    """A run cut between two updates: bit for bit the state of one that was not, and nothing compiles anew."""
    config = base_config()
    config.optimizer.offload, config.batch.row_tokens = True, 16
    learner = Learner(config, CONFIG, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    tokens = [np.arange(1, 6)] * 3
    batch, _ = pack(from_sequences(tokens, tokens), np.array([1.0, -0.5, 0.3]), PackSettings(16, 16))
    state, _ = learner.update(learner.init(init_params(CONFIG, jax.random.key(0))), [batch])
    with Checkpointer(tmp_path) as saver:
        saver.save(1, state, {})
        state, _ = learner.update(state, [batch])  # donates what was saved
        saver.wait()
        restored = saver.restore(learner.abstract_state()).arrays
    assert [(x.sharding, x.committed) for x in jax.tree.leaves(restored)] == [
        (x.sharding, x.committed) for x in jax.tree.leaves(state)]
    moments = jax.tree.leaves([s.nu for s in restored.opt_state if hasattr(s, "nu")])
    assert moments and {x.sharding.memory_kind for x in moments} == {HOST}
    restored, _ = learner.update(restored, [batch])
    assert learner.compiles == 1
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
