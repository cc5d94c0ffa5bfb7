"""Bytes counted from shapes against arrays that are there, and capacities that fit what they are computed from."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from configs.pods.shapes import R1_DISTILL_QWEN_1_5B
from jaxrl import build, memory
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.rollout.engine import Engine
from jaxrl.rollout.paged import PREFILL
from jaxrl.runtime import compilers
from jaxrl.runtime.config import base_config
from models.config import DecoderConfig, LayerKind
from models.decoder import init_params
from models.pages import PAGE
from tests.rollout import tiny
from tests.rollout.test_paged import WINDOWED
from tests.test_preflight import pod

SIZES = dict(max_prompt=tiny.MAX_PROMPT, max_tokens=tiny.MAX_TOKENS)
GIB = 2**30


def held(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("cache", ["same", "int8"])
def test_bytes_of_a_token_and_of_the_weights_are_those_of_the_arrays(cache):
    engine = tiny.sampler(pages=8, cache=cache, weights=cache)
    engine.cache.begin(8)
    tokens = engine.cache.pages * engine.cache.page
    int8 = cache == "int8"
    assert held(engine.cache.arrays) == tokens * memory.of_token(tiny.CONFIG, jnp.float32, None, int8)
    fused = jax.eval_shape(engine._layout, tiny.params())
    head = 4 * tiny.CONFIG.vocab_size * tiny.CONFIG.hidden_size  # a CPU gives tied embeddings a head; chips do not
    small = memory.of_sampler(tiny.CONFIG, jnp.float32, None, int8)
    assert held(fused) - (head / 4 + 4 * tiny.CONFIG.vocab_size if int8 else head) == small


def test_layers_with_a_window_leave_memory_to_the_others():
    engine = Engine(WINDOWED, tiny.EOS, slots=8, pages=4, chunk=8, **SIZES)
    engine.cache.begin(8)
    everything, local = engine.cache.counts
    token = {which: memory.of_token(WINDOWED, jnp.float32, None, local=which) for which in (True, False, None)}
    assert token[True] == token[False] == token[None] / 2
    assert held(engine.cache.arrays) == 4 * (everything * token[False] + local * token[True])
    kinds = (LayerKind(1e4), *(LayerKind(1e4, window=512),) * 27)
    sizes = dict(slots=64, max_prompt=1024, max_tokens=4096, lives=lambda: 8 * GIB)
    decoders = [dataclasses.replace(DecoderConfig(**R1_DISTILL_QWEN_1_5B), layer_kinds=k) for k in ((), kinds)]
    plain, small = (memory.cache_sizes(d, jnp.bfloat16, None, chip(), **sizes)["cache_tokens"] for d in decoders)
    assert plain < 64 * 5120 == small  # all responses of full length fit


def test_bytes_of_the_learner_are_those_of_its_state_and_reference():
    c = tiny.CONFIG
    config = base_config()
    config.algorithm.kl_coef = 0.1
    mesh = build.mesh(config, jax.devices()[:1])
    learner = Learner(config, c, mesh)
    params = init_params(c, jax.random.key(0))
    state = learner.init(jax.tree.map(jnp.copy, params))
    assert memory.of_learner(config, learner) == held(state) + held(params) == memory.bytes_of(state) + held(params)


def chip(kind="TPU v5 lite", limit=None, platform="tpu"):
    return types.SimpleNamespace(
        platform=platform, device_kind=kind, memory_stats=lambda: {"bytes_limit": limit} if limit else None
    )


def big(tokens=0, pages=-1, device=None, lives=8 * GIB, **changes):
    """Of a 1.5B model in bfloat16 on one chip."""
    decoder = DecoderConfig(**R1_DISTILL_QWEN_1_5B)
    sizes = dict(slots=512, max_prompt=1024, max_tokens=4096) | changes
    return decoder, memory.cache_sizes(
        decoder, jnp.bfloat16, None, device or chip(), lives=lambda: lives, pages=pages, tokens=tokens, **sizes
    )


def test_capacity_is_what_the_memory_leaves():
    decoder, found = big()
    token = 28 * 2 * 2 * 128 * 2  # layers, keys and values, heads of 128, bfloat16
    weights = memory.of_sampler(decoder, jnp.bfloat16, None)
    assert weights == pytest.approx(2 * 1_777_088_000, rel=1e-3)
    assert found["pages"] == PAGE
    free = 15.75 * GIB * 0.95 - 8 * GIB - weights - PREFILL * (2 * token + memory.ACTIVATIONS * 2 * 8960)
    assert found["cache_tokens"] == int(free / token) and found["cache_tokens"] * token > 1.2 * GIB
    assert big(lives=9 * GIB)[1]["cache_tokens"] == pytest.approx(found["cache_tokens"] - GIB / token, abs=1)
    assert big(int8_cache=True)[1] == dict(pages=0, cache_tokens=0)  # no kernel on a TPU, so no pages


def test_capacity_is_no_more_than_the_slots_and_no_less_than_one_response_take():
    assert big(slots=4)[1]["cache_tokens"] == 4 * 5120
    assert big(lives=15 * GIB)[1]["cache_tokens"] == 5120
    assert big(tokens=7000)[1] == dict(pages=PAGE, cache_tokens=7000)
    assert big(pages=0)[1] == dict(pages=0, cache_tokens=0)


def test_an_unknown_chip_says_so_unless_it_tells_its_memory(caplog):
    assert big(device=chip("TPU v99"))[1] == dict(pages=PAGE, cache_tokens=0)
    assert "how much memory 'TPU v99' has is unknown" in caplog.text and "set cache_tokens" in caplog.text
    caplog.clear()
    told = big(device=chip("TPU v99", int(15.75 * GIB)))[1]
    assert told == big()[1] and not caplog.text


def test_a_cpu_is_dense_unless_asked_and_asks_for_no_memory(caplog):
    assert big(device=jax.devices()[0])[1] == dict(pages=0, cache_tokens=0)
    assert big(device=jax.devices()[0], pages=32)[1] == dict(pages=32, cache_tokens=0) and not caplog.text


def test_a_gpu_has_a_kernel_for_powers_of_two_and_takes_a_share_of_the_card():
    card = chip("NVIDIA H100 80GB HBM3", platform="gpu")
    tokens = big(device=card, slots=10**6)[1]["cache_tokens"]
    more = (79 * 0.92 - 15.75) * 0.95 * GIB / (28 * 1024)
    assert tokens - big()[1]["cache_tokens"] == pytest.approx(more, abs=2)


@pytest.mark.optimized  # loads the compiler for TPUs
@pytest.mark.parametrize("name", ["l1_r1_distill_1_5b.py", "lspo_qwen25_math_7b_256.py", "maspo_r1_distill_14b.py"])
def test_pages_are_split_over_replicas_and_heads(name):
    """Everything that lives on a chip of the slice, with the pages, fits in it."""
    config = pod(name)
    try:
        devices = compilers.target(config.topology).devices
    except UserError as e:
        pytest.skip(str(e))
    mesh, decoder = build.mesh(config, devices), build.decoder_config(config)
    tokenizer = types.SimpleNamespace(eos_ids=(0, 1), vocab_size=decoder.vocab_size, unused_ids=())
    sampler = build.sampler(config, decoder, tokenizer, mesh)
    pool = jax.eval_shape(lambda: sampler.programs.new_pages(*sampler.cache.counts))
    pool = memory.bytes_of(memory.placed(pool, sampler.placement.cache(True)))
    lives = memory.of_learner(config, Learner(config, decoder, mesh))
    weights = memory.of_sampler(decoder, jnp.bfloat16, sampler.placement)
    full = -(-(config.sampling.max_prompt + config.sampling.max_tokens) // PAGE) * config.sampling.slots
    hbm = memory.hardware.memory(devices[0])
    used = (pool + lives + weights) / hbm
    assert used < 0.95 and (used > 0.75 or sampler.cache.pages * sampler.cache.replicas > full)
