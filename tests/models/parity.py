"""The parity table of docs/models.md: every family of hf_cases, random float32 weights, against transformers.

    python -m tests.models.parity          # needs torch and transformers

Largest difference of logits of a full pass; of a prefill and then a token at a time through the sampler's cache; the
same of what transformers computes from our export; and whether 12 tokens of greedy text are equal.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxrl.rollout.engine import Engine, Request
from jaxrl.rollout.requests import SamplingParams
from models.config import from_hf
from models.decoder import Decoder, empty_cache, logits
from models.layout import sampling_layout
from models.weights import load_params, save_params
from tests.models.hf_cases import CASES, hf_tensors, write_model

ROWS, WIDTH, PREFIX, NEW = 3, 24, 9, 12


def theirs(folder: pathlib.Path):
    """transformers' model of a directory."""
    options = dict(dtype=torch.float32, attn_implementation="eager")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens.astype(np.int64))).logits.numpy()


def our_logits(config, params, tokens: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.asarray(logits(params, Decoder(config).apply({"params": params}, tokens, positions)[0]))


def cached_logits(config, params, tokens: np.ndarray) -> np.ndarray:
    """A prefill of PREFIX tokens, then the others one by one."""
    model, laid_out = Decoder(config, scan_layers=False), sampling_layout(params, config, jnp.float32)
    cache, out = empty_cache(config, ROWS, WIDTH, jnp.float32), []
    for first, end in [(0, PREFIX), *((i, i + 1) for i in range(PREFIX, WIDTH))]:
        positions = np.broadcast_to(np.arange(first, end, dtype=np.int32), (ROWS, end - first))
        hidden, cache = model.apply({"params": laid_out}, tokens[:, first:end], positions, None, cache)
        out.append(np.asarray(logits(laid_out, hidden)))
    return np.concatenate(out, axis=1)


def greedy(config, params, prompts: np.ndarray) -> np.ndarray:
    engine = Engine(config, (config.vocab_size - 1,), max_prompt=PREFIX, max_tokens=NEW, slots=ROWS)
    requests = [Request(p, 1, NEW, i) for i, p in enumerate(prompts)]
    found = engine.generate(engine.layout(params), requests, seed=0, sampling=SamplingParams(temperature=0))
    return [completion.tokens for (completion,) in found]


def row(name: str, folder: pathlib.Path) -> str:
    """The line of one family."""
    write_model(folder, CASES[name], hf_tensors(CASES[name]))
    config = from_hf(folder)
    params = load_params(folder, config)
    tokens = np.random.RandomState(0).randint(config.vocab_size, size=(ROWS, WIDTH)).astype(np.int32)
    model = theirs(folder)
    want = their_logits(model, tokens)
    save_params(folder / "ours", params, config)
    exported = their_logits(theirs(folder / "ours"), tokens)
    equal = True
    for prompt, found in zip(tokens[:, :PREFIX], greedy(config, params, tokens[:, :PREFIX]), strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        ends = dict(eos_token_id=config.vocab_size - 1, pad_token_id=0, attention_mask=torch.ones_like(ids))
        text = model.generate(ids, max_new_tokens=NEW, do_sample=False, **ends)
        equal &= np.array_equal(found, text[0, PREFIX:].numpy()[: len(found)])
    gaps = [np.abs(x - want).max() for x in (our_logits(config, params, tokens), cached_logits(config, params, tokens),
                                             exported)]
    full, cached, back = (f"{gap:.1e}" for gap in gaps)
    return f"| {name} | {np.abs(want).max():.1f} | {full} | {cached} | {'equal' if equal else 'different'} | {back} |"


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    print("| model | largest logit | full pass | prefill + decode | greedy text | export |\n|---|---|---|---|---|---|")
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(row(name, pathlib.Path(folder)), flush=True)
