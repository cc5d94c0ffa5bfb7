"""Mixture of experts: grouped products against one token at a time, the load-balancing loss, and meshes."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import moe
from models.config import from_hf
from models.decoder import AUXILIARY, Decoder, empty_cache, init_params
from models.table import matrix_elements
from tests.models.hf_cases import CASES

B, T, D, E, M, K = 8, 5, 6, 4, 10, 2


def silu(x):
    return x / (1 + np.exp(-x))


def inputs():
    rng = np.random.default_rng(0)
    x, logits = rng.normal(size=(B, T, D)), 2 * rng.normal(size=(B, T, E))
    logits[..., 1] -= 100  # nobody chooses this expert
    gate, up, down = rng.normal(size=(E, D, M)), rng.normal(size=(E, D, M)), rng.normal(size=(E, M, D))
    return [a.astype(np.float32) for a in (x, logits, gate, up, down)]


def plain(x, logits, gate, up, down, normalise):
    """float64, a token at a time."""
    x, logits, gate, up, down = (np.float64(a) for a in (x, logits, gate, up, down))
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        p = np.exp(logits[at] - logits[at].max())
        p /= p.sum()
        best = np.argsort(-p)[:K]
        for e in best:
            w = p[e] / p[best].sum() if normalise else p[e]
            out[at] += w * (silu(x[at] @ gate[e]) * (x[at] @ up[e])) @ down[e]
    return out


def ours(x, logits, gate, up, down, normalise=True, fused=False):
    _, weights, experts = moe.route(logits, K, normalise)
    gate_up = jnp.concatenate([gate, up], -1) if fused else (gate, up)
    return moe.apply_experts(x, weights, experts, gate_up, down, jax.nn.silu)


@pytest.mark.parametrize("normalise, fused", [(True, False), (False, True)])
def test_matches_one_token_at_a_time(normalise, fused):
    got = jax.jit(ours, static_argnums=(5, 6))(*inputs(), normalise, fused)
    np.testing.assert_allclose(got, plain(*inputs(), normalise), atol=1e-4)


def test_on_a_mesh():
    """In a process with eight devices: tokens travel to the experts (the learner's rules), or all devices have all
    tokens (the sampler's); values and gradients as on one device."""
    program = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.models.test_moe import inputs, ours
x, logits, *matrices = inputs()
loss = lambda *a: jnp.sum(jnp.sin(ours(*a)))
want = jax.jit(jax.value_and_grad(loss, argnums=range(5)))(x, logits, *matrices)
for shape, rules in [
    ((2, 2, 2), dict(batch=("data", "fsdp"), expert="fsdp", expert_mlp="tensor")),
    ((2, 4, 1), dict(batch=("data", "fsdp"), expert="fsdp", expert_mlp="tensor")),
    ((4, 1, 2), dict(batch="data", expert="tensor", expert_mlp=None)),
]:
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    def f(*a):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(tuple(rules.items())):
            return loss(*a)
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    experts = [place(w, rules["expert"]) for w in matrices]
    rows = [place(a, rules["batch"]) for a in (x, logits)]
    got = jax.jit(jax.value_and_grad(f, argnums=range(5)))(*rows, *experts)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4, rtol=1e-4)
"""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_load_balancing_loss_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe").load_balancing_loss_func
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, B, T, E)).astype(np.float32)  # by layer
    live = np.arange(T) < rng.integers(1, T, B)[:, None]
    want = theirs(tuple(torch.from_numpy(x.reshape(-1, E)) for x in logits), E, K, torch.from_numpy(live.astype(int)))
    sums = []
    for layer in logits:
        probabilities, _, experts = moe.route(layer, K, True)
        sums.append(moe.balance(probabilities, experts, live))
    assignments, probabilities = map(jnp.stack, zip(*sums, strict=True))
    assert float(assignments.sum()) == 3 * K * live.sum()
    got = moe.balance_loss(assignments, probabilities, live.sum())
    np.testing.assert_allclose(got, float(want), rtol=1e-5)
    even = jnp.full((3, E), K * 10.0 / E), jnp.full((3, E), 10.0 / E)
    assert float(moe.balance_loss(*even, 10)) == pytest.approx(K)


def test_the_decoder_tells_the_load_of_every_layer():
    config = from_hf(CASES["qwen3_moe"])
    params = init_params(config, jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6)
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    _, found = Decoder(config).apply({"params": params}, tokens, positions, segments, mutable=[AUXILIARY])
    assignments, probabilities = found[AUXILIARY]["layers"]["mlp"]["load"]
    assert assignments.shape == probabilities.shape == (3, 6)
    np.testing.assert_allclose(assignments.sum(-1), 6 * 2)
    np.testing.assert_allclose(probabilities.sum(-1), 6, rtol=1e-5)


def test_a_token_meets_its_own_experts_only():
    c = from_hf(CASES["qwen3_moe"])
    heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = c.hidden_size * (heads + c.num_experts + 2 * 3 * c.expert_size)
    assert matrix_elements(c) == (3 * layer, c.hidden_size * c.vocab_size)


def test_a_prompt_cached_in_parts():
    """As a kernel's prefill does it: the second part names the segments of all columns, and has half of them."""
    config = from_hf(CASES["qwen3_moe"])
    params, tokens = init_params(config, jax.random.key(0)), jax.random.randint(jax.random.key(1), (2, 8), 0, 48)
    cache, ids = empty_cache(config, 2, 8, jnp.float32, scan_layers=True), jnp.ones((2, 8), jnp.int32).at[0, :3].set(0)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    model = Decoder(config)
    whole = model.apply({"params": params}, tokens, positions, ids, cache)[0]
    _, cache = model.apply({"params": params}, tokens[:, :4], positions[:, :4], ids[:, :4], cache)
    part = model.apply({"params": params}, tokens[:, 4:], positions[:, 4:], ids, cache)[0]
    np.testing.assert_allclose(part, whole[:, 4:], atol=2e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("choices", [12, 96])
def test_the_kernels_of_gpu_and_tpu_give_the_sorted_products(choices, fused):
    """Values and gradients, in interpret mode; some choices are of experts elsewhere, one expert has none."""
    E, D, M, k, tokens = 3, 32, 16, 2, choices // 2
    rng = np.random.default_rng(choices)
    shapes = (tokens, D), (E, D, M), (E, D, M), (E, M, D)
    x, gate, up, down = (0.3 * rng.normal(size=shape).astype(np.float32) for shape in shapes)
    chosen = jnp.asarray(rng.choice([0, 2, E], choices))
    gate_up = np.concatenate([gate, up], -1) if fused else (gate, up)
    weight = rng.normal(size=(choices, D)) * (np.asarray(chosen) < E)[:, None]

    def loss(form, x, gate_up, down):
        return jnp.sum(jnp.sin(form(x, chosen, gate_up, down, k=k, activation=jax.nn.silu)) * weight)

    blocks = functools.partial(moe._in_blocks, total=2 * E, interpret=True)
    megablox = functools.partial(moe._megablox, total=2 * E, interpret=True)
    forms = moe._sorted, blocks, functools.partial(moe._sorted, product=megablox)
    want, *others = (jax.value_and_grad(functools.partial(loss, form), (0, 1, 2))(x, gate_up, down) for form in forms)
    for got in others:
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, atol=2e-4, rtol=1e-4)


def test_a_cpu_computes_in_bfloat16_too():
    """Sizes that the kernels of GPU and TPU take: lowered for a CPU, theirs are left out."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, 32), (2, 4, 4), (4, 32, 16), (4, 32, 16), (4, 16, 32)
    x, logits, gate, up, down = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (x, gate / 4, up / 4, down / 4)]
    got = jax.jit(lambda x, gate, up, down: ours(x, logits, gate, up, down))(*half)
    x, gate, up, down = (np.asarray(a, np.float32) for a in half)
    np.testing.assert_allclose(np.asarray(got, np.float32), plain(x, logits, gate, up, down, True), atol=0.05)
