"""Utilisation, throughput and memory of a step's updates, against counts made one matrix and one token at a time."""

import types

import jax
import numpy as np
import pytest

from jaxrl.learner.packing import PackSettings, pack
from jaxrl.learner.performance import needed_flops, performance
from jaxrl.rollouts import from_sequences
from jaxrl.runtime import hardware
from models.config import DecoderConfig
from models.decoder import abstract_params

pytestmark = pytest.mark.optimized

CONFIG = DecoderConfig(50, 16, 24, 2, 4, 2, 8, model_type="llama")


def batch():
    rng = np.random.default_rng(0)
    prompts, responses = ([np.ones(n, int) for n in rng.integers(1, 12, 9)] for _ in range(2))
    lengths = [(len(p), len(r)) for p, r in zip(prompts, responses, strict=True)]
    return pack(from_sequences(prompts, responses), np.ones(9), PackSettings(24, 48)), lengths


def test_needed_flops_is_the_sum_over_matrices_and_tokens():
    (data, _), lengths = batch()
    params, _ = abstract_params(CONFIG)
    matrices = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)
    want = 0
    for prompt, response in lengths:
        want += 2 * matrices * (prompt + response) + 2 * params["lm_head"]["kernel"].size * response
        for seen in range(1, prompt + response + 1):
            want += CONFIG.num_layers * 2 * (2 * CONFIG.num_heads * CONFIG.head_dim * seen)  # scores, weighted values
    assert needed_flops(CONFIG, data) == pytest.approx(want)


def learner(kind, stats, on_policy=True, scores_reference=False):
    device = types.SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats)
    mesh = types.SimpleNamespace(devices=np.array([device, device], object))
    objective = types.SimpleNamespace(on_policy=on_policy, scores_reference=scores_reference)
    return types.SimpleNamespace(decoder=CONFIG, mesh=mesh, objective=objective, compiles=3)


def test_utilisation_counts_scoring_passes_and_all_chips():
    (data, packing), lengths = batch()
    stats = {"peak_bytes_in_use": 4 * hardware.GIB, "bytes_limit": 16 * hardware.GIB}
    got = performance([(data, packing)] * 2, learner("TPU v5 lite", stats), 0.5)
    forward = needed_flops(CONFIG, data)
    assert got["perf/mfu"] == pytest.approx(2 * 3 * forward / (0.5 * 2 * 197e12))
    assert got["perf/update_tokens_per_second"] == 2 * sum(map(sum, lengths)) / 0.5
    assert got["perf/padding_waste"] == pytest.approx(packing.waste) and got["perf/learner_compiles"] == 3
    assert (got["perf/hbm_peak_gib"], got["perf/hbm_peak_share"]) == (4, 0.25)
    more = performance([(data, packing)], learner("TPU v5 lite", stats, on_policy=False, scores_reference=True), 0.5)
    assert more["perf/mfu"] == pytest.approx(5 * forward / (0.5 * 2 * 197e12))


def test_no_peak_is_invented_for_a_cpu():
    (data, packing), _ = batch()
    got = performance([(data, packing)], learner("cpu", None), 1.0)
    assert "perf/mfu" not in got and "perf/hbm_peak_gib" not in got and got["perf/host_peak_gib"] > 0.05
    assert performance([], learner("cpu", None), 1.0) == {}
