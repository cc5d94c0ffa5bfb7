"""The decode program as compiled: the cache is updated in place."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.rollout import programs as rollout_programs
from jaxrl.rollout.cache import idle_rows
from jaxrl.rollout.kernels import ProgramSpec, SamplingArrays
from jaxrl.rollout.programs import known_options, sampler_programs
from jaxrl.runtime import compilers
from models.decoder import abstract_params
from models.layout import sampling_layout
from tests.rollout import tiny

pytestmark = pytest.mark.optimized

ROWS, WINDOW, STEPS = 8, 96, 16


def lower(platform: str, sharding=None):
    """(lowered decode program, shapes of one layer's keys and values)."""
    programs = sampler_programs(ProgramSpec(tiny.CONFIG, jnp.float32, STEPS, platform, sharding=sharding))
    cpu = platform == "cpu"
    weights = jax.eval_shape(
        lambda p: sampling_layout(p, tiny.CONFIG, jnp.float32, untie=cpu), abstract_params(tiny.CONFIG)[0]
    )
    cache = jax.eval_shape(lambda: programs.new_cache(ROWS, WINDOW))
    settings = SamplingArrays(np.float32(1), np.array(tiny.EOS, np.int32))
    args = (weights, cache, idle_rows(ROWS), settings, np.int32(STEPS), np.int32(1))
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    return programs.decode.lower(*placed), {tuple(cache.k[0].shape), tuple(cache.v[0].shape)}


def tpu():
    """A chip to compile for."""
    return compilers.target("v5e:2x2").devices[0]


def cache_copies(text: str, shapes) -> list[str]:
    """Instructions that copy or transpose a whole cache array."""
    wanted = "|".join(re.escape("[" + ",".join(map(str, shape)) + "]") for shape in shapes)
    return re.findall(rf"= f32(?:{wanted})\S* (?:copy|copy-start|transpose|convert)\(.*", text)


def check(compiled, shapes):
    size = 4 * ROWS * WINDOW * tiny.CONFIG.num_kv_heads * tiny.CONFIG.head_dim
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * tiny.CONFIG.num_layers * size  # donated and reused
    assert cache_copies(compiled.as_text(), shapes) == []


def test_no_copy_of_the_cache_on_cpu():
    lowered, shapes = lower("cpu")
    check(lowered.compile(), shapes)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_no_copy_of_the_cache_on_tpu():
    lowered, shapes = lower("tpu", jax.sharding.SingleDeviceSharding(tpu()))
    check(lowered.compile(), shapes)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_compiler_option_of_another_libtpu_is_left_out(monkeypatch, caplog):
    options = tuple(rollout_programs.TPU_OPTIONS.items())
    assert known_options(options, tpu()) == dict(options) and not caplog.records
    monkeypatch.setattr(rollout_programs, "TPU_OPTIONS", {"xla_tpu_option_of_tomorrow": "1"})
    sampler_programs.cache_clear()
    lowered, _ = lower("tpu", jax.sharding.SingleDeviceSharding(tpu()))
    sampler_programs.cache_clear()
    (record,) = caplog.records
    assert "xla_tpu_option_of_tomorrow" in record.getMessage()
    lowered.compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="many"):  # a mistake of ours is not swallowed
        known_options(((options[0][0], "many"),), tpu())
