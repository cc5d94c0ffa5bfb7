"""The arithmetic of benchmarks/rollout_goals.py, against sums by hand."""

import dataclasses
import sys
import types

import pytest

from jaxrl.rollout.replay import Call, Rollout
from jaxrl.rollout.requests import Stats
from jaxrl.runtime import hardware
from tests.test_docs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
goals = pytest.importorskip("rollout_goals")

CHIP = dataclasses.replace(hardware.chip("tpu v5e"), flops=1e12, bandwidth=1e9)
HOST = goals.Host(CHIP, 2, 4, 9e6, 1e3, 7e6)  # two replicas of four chips


def test_a_step_reads_weights_and_its_own_replicas_cache_or_multiplies():
    assert HOST.step(2, 0) == pytest.approx(9e6 / 0.9e9)
    assert HOST.step(2, 1800) == pytest.approx(0.01 + 900 * 1e3 / 0.9e9)
    assert HOST.step(16000, 0) == pytest.approx(8000 * 7e6 / 4 / 0.7e12)  # more rows than the bandwidth hides
    assert HOST.prefill(1000) == pytest.approx(1000 * 7e6 / (8 * 0.5e12))


def test_a_rollout_is_the_sum_of_its_calls():
    calls = [Call("prefill", 4, 100), Call("decode", 2, 9, 10, 2, contexts=9000, read=18000),
             Call("write_pages", 1, 1), Call("decode", 2, 9, 5, 1, contexts=0, read=0)]  # fmt: skip
    rollout = Rollout(calls, Stats(), 0)
    assert HOST.seconds(rollout) == pytest.approx(10 * HOST.step(2, 1800) + 5 * HOST.step(2, 0) + HOST.prefill(400))
    weights = 15 * 9e6 * 2
    assert HOST.reads(rollout) == pytest.approx((weights + 18e6) / (weights + 9e6))


def test_the_dense_cache_has_full_slots_of_mean_length():
    config = types.SimpleNamespace(
        sampling=types.SimpleNamespace(max_prompt=100, max_tokens=400, window=512),
        batch=types.SimpleNamespace(prompts=8, generation_prompts=16, group_size=4),
    )
    steps = 16 / 2 * 4 * 200 / 8  # a host of two, eight slots
    assert goals.dense(config, HOST, 2, 8) == pytest.approx(steps * HOST.step(8, 8 * 512) + HOST.prefill(8 * 100))


def test_the_published_work_is_counted_from_the_published_shape():
    import published

    one = published.host()
    assert one.weights * 4 == pytest.approx(2 * (8.19e9 - 151936 * 4096), rel=0.01)  # 8.2 B, less the embedding
    rate, prefill, decode = published.expected(256, 1024, 1024)
    bandwidth = 0.9 * one.chip.bandwidth
    least = 1024 * (one.weights + 256 * (1024 + 512) * 36864) / bandwidth  # every context, to the token
    assert least < decode < 1.1 * least and rate == pytest.approx(256 * 1024 / (prefill + decode))
    assert prefill == pytest.approx(256 * 1024 * 2 * 7.6e9 / (4 * 0.5 * 918e12), rel=0.05)
    with pytest.raises(ValueError, match="GiB a chip of 31.2"):
        published.expected(4096, 1024, 1024)
