"""A tiny random model whose answers end at different lengths, and the reference loop it is compared with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rollout.engine import Engine, Request
from models.config import DecoderConfig
from models.decoder import Decoder, init_params, logits

EOS = (3, 7)
CONFIG = DecoderConfig(
    vocab_size=300,  # more than one block of the inverse CDF, and not a multiple of their number
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
    tie_embeddings=True,
    model_type="qwen3",
    init_std=0.25,
)
MAX_PROMPT, MAX_TOKENS, LENGTH = 40, 24, 64  # LENGTH: the reference pads to it


@functools.cache
def params():
    """Random weights; the two end tokens are made likely enough to end some answers early."""
    p = init_params(CONFIG, jax.random.key(4))
    table = p["embed"]["embedding"]
    return {**p, "embed": {"embedding": table.at[np.array(EOS)].mul(2.0)}}


def requests(samples=3):
    """Prompts of length 1, short ones, and one longer than the answers before it; ragged limits."""
    rng = np.random.default_rng(0)
    lengths = [1, 5, 40, 2, 33, 9]
    limits = [24, 17, 9, 24, 1, 13]
    return [
        Request(rng.integers(8, CONFIG.vocab_size, n).astype(np.int32), samples, limit, 100 + i)
        for i, (n, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def sampler(**options):
    return Engine(CONFIG, EOS, **(dict(max_prompt=MAX_PROMPT, max_tokens=MAX_TOKENS, slots=8) | options))


@functools.cache
def _forward():
    model = Decoder(CONFIG)

    @jax.jit
    def run(p, tokens):
        positions = jnp.arange(LENGTH)[None]
        return logits(p, model.apply({"params": p}, tokens[None], positions)[0][0])

    return run


def all_logits(tokens):
    """float32 [len(tokens), V]: one full forward pass in the training layout."""
    padded = np.zeros(LENGTH, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_forward()(params(), padded))[: len(tokens)]


def uniforms(seed, step, problem, sample, position):
    """The two uniforms of one token, spelled out from the documented key."""
    key = jax.random.key(seed, impl="threefry2x32")
    for part in (step, problem, sample, position):
        key = jax.random.fold_in(key, part)
    bits = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    return ((bits >> 8).astype(np.float64) + 1) / 2**24


def pick(weights, u):
    """Two-level inverse CDF over 128 blocks in float64."""
    blocks = np.pad(weights, (0, -len(weights) % 128)).reshape(128, -1)
    sums = np.cumsum(blocks.sum(1))
    block = int(np.searchsorted(sums, u[0] * sums[-1]))
    within = np.cumsum(blocks[block])
    return blocks.shape[1] * block + int(np.searchsorted(within, u[1] * within[-1]))


def reference(request, sample, *, seed, step=0, temperature=1.0, filtered=lambda w: w):
    """(tokens, logprobs) of one completion: a full forward pass per token, float64 arithmetic after it."""
    tokens, logps = list(request.prompt), []
    limit = request.limits[sample]
    for position in range(limit):
        z = all_logits(tokens)[-1].astype(np.float64) / (temperature or 1.0)
        held = z.copy()
        if position < request.min_tokens:
            held[list(EOS)] = -np.inf
        held -= held.max()
        if temperature == 0:
            token = int(np.argmax(held))
        else:
            weights = filtered(np.exp(held))
            token = pick(weights, uniforms(seed, step, request.key, request.first_sample + sample, position))
        logps.append(held[token] - np.log(np.exp(held).sum()))
        tokens.append(token)
        if token in EOS:
            break
    return np.array(tokens[len(request.prompt) :]), np.array(logps)


def same(a, b, atol=1e-5):
    """Equal tokens and finish reasons, log-probs within atol; a, b: lists of groups of completions."""
    assert [len(g) for g in a] == [len(g) for g in b]
    for x, y in zip(sum(a, []), sum(b, []), strict=True):
        np.testing.assert_array_equal(x.tokens, y.tokens)
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=atol, rtol=0)
        assert x.finish == y.finish
