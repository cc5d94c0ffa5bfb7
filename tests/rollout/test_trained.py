"""A trained model's published text, through the whole engine."""

import json

import numpy as np
import pytest

from jaxrl.rollout.engine import Engine, Request, SamplingParams
from models.config import from_hf
from models.weights import load_params
from tests.shared import shared_path


@pytest.mark.optimized
def test_stories_greedy_text_is_the_published_one():
    root = shared_path("data", "models", "stories260K")
    reference = json.loads((root / "reference.json").read_text())
    config, ids = from_hf(root), reference["ids"]
    sampler = Engine(config, (2,), max_prompt=16, max_tokens=128, slots=2, window=128, chunk=32)
    params = sampler.layout(load_params(root, config))
    requests = [Request(np.array(ids[:n], np.int32), 1, 128, n) for n in (1, 9)]
    for n, group in zip(
        (1, 9), sampler.generate(params, requests, seed=0, sampling=SamplingParams(0.0)), strict=True
    ):
        np.testing.assert_array_equal(group[0].tokens, ids[n : n + 128])
        np.testing.assert_allclose(group[0].logprobs, reference["logprobs"][n - 1 : n + 127], atol=1e-4)
