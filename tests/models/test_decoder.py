"""The decoder against transformers, against itself in its other forms, and on a trained model.

Parity is fp32 with max abs difference of logits below 1e-4 on random tiny models of every family.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cpu
from models.attention import from_blocks
from models.config import DecoderConfig, from_hf
from models.decoder import (
    Decoder,
    abstract_params,
    apply_rope,
    empty_cache,
    head_matrix,
    init_params,
    linear,
    logits,
)
from models.layout import sampling_layout
from models.tokenizers import load_tokenizer
from models.weights import load_params, save_params
from tests.models import make_fixtures
from tests.models.hf_cases import CASES, hf_tensors, write_model
from tests.shared import shared_path

TOLERANCE = 1e-4
ROWS, WIDTH = 3, 24
FORMS = {
    "scanned": {"scan_layers": True},
    "fused": {"scan_layers": False},
}


@pytest.fixture(autouse=True)
def exact_matmul():
    """Accelerators round fp32 products by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, directory, config, params) of one model."""
    return load_case(request, tmp_path_factory)


@pytest.fixture(scope="module", params=["llama3", "qwen2_tied", "qwen3", "smollm3", "olmo2", "gemma3", "qwen3_moe"])
def family(request, tmp_path_factory):
    """As case, one per family: for what does not depend on the head being tied."""
    return load_case(request, tmp_path_factory)


def load_case(request, tmp_path_factory):
    hf = CASES[request.param]
    directory = write_model(tmp_path_factory.mktemp(request.param), hf, hf_tensors(hf))
    config = from_hf(directory)
    return request.param, directory, config, load_params(directory, config)


def random_tokens(config, *shape, seed=0):
    return np.random.RandomState(seed).randint(config.vocab_size, size=shape).astype(np.int32)


def padded(tokens):
    """tokens [..., n] with zeros up to WIDTH, so that one compiled shape serves all tests."""
    return np.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, WIDTH - tokens.shape[-1])])


def forward(model, params, tokens, positions=None, segment_ids=None):
    """Logits float32 [B, T, V] without a cache; by default one sequence per row, from position 0."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
    return np.asarray(_forward(model, params, tokens, positions, segment_ids))


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens, positions, segment_ids):
    return logits(params, model.apply({"params": params}, tokens, positions, segment_ids)[0])


@functools.partial(jax.jit, static_argnums=0)
def _cached(model, params, tokens, positions, cache):
    hidden, cache = model.apply({"params": params}, tokens, positions, None, cache)
    return logits(params, hidden), cache


def in_form(form, config, params, dtype=jnp.float32):
    """(model, params) of one of FORMS."""
    options = FORMS[form]
    if not options["scan_layers"]:
        params = sampling_layout(params, config, dtype)
    return Decoder(config, dtype, **options), params


# --- against transformers


def test_parity_without_torch(case):
    name, _, config, params = case
    expected = np.load(make_fixtures.PATH)[name]
    got = forward(Decoder(config), params, make_fixtures.tokens(name).astype(np.int32))
    assert np.abs(expected).max() > 1  # not a comparison of zeros
    assert np.abs(got[0, list(make_fixtures.POSITIONS)] - expected).max() < TOLERANCE


def hf_logits(directory, tokens):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["missing_keys"]
    with torch.no_grad():
        return model, model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def test_parity_with_transformers_both_ways(case, tmp_path):
    _, directory, config, params = case
    tokens = random_tokens(config, ROWS, WIDTH)
    model, expected = hf_logits(directory, tokens)
    got = forward(Decoder(config), params, tokens)
    assert np.abs(got - expected).max() < TOLERANCE

    # what transformers saves (its own spelling of the config), we load as the same model
    model.save_pretrained(tmp_path / "theirs")
    assert from_hf(tmp_path / "theirs") == config
    theirs = load_params(tmp_path / "theirs", config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), theirs, params))

    # what we save, in one file or several, transformers loads as the same model
    for max_shard_bytes in (10**9, 20_000):
        save_params(tmp_path / "ours", params, config, max_shard_bytes=max_shard_bytes)
        np.testing.assert_array_equal(hf_logits(tmp_path / "ours", tokens)[1], expected)


# --- one model in its several forms


def cached_logits(model, params, config, tokens, lengths, chunks, scan_layers):
    """Logits of ragged rows through the cache: prompts right-aligned, then token by token.

    tokens: int32 [B, n]. lengths [B]: prompt length of each row. chunks: widths in which the prompt columns
    are prefilled. Returns per row the logits of its own positions, to compare with a full forward pass.
    """
    rows, prompt = len(lengths), sum(chunks)
    steps = tokens.shape[1] - max(lengths)
    start = prompt - np.array(lengths)
    cache = empty_cache(config, rows, prompt + steps + 3, jnp.float32, scan_layers=scan_layers)
    cache = cache.replace(start=jnp.asarray(start, jnp.int32))
    column = np.arange(prompt + steps) - start[:, None]  # position of each column in its own row
    # left padding holds arbitrary tokens: nobody may look at them
    text = np.where(column < 0, 7, np.take_along_axis(tokens, np.maximum(column, 0), axis=1)).astype(np.int32)
    column = np.maximum(column, 0).astype(np.int32)

    out, at = [], 0
    for width in (*chunks, *[1] * steps):
        part, cache = _cached(model, params, text[:, at : at + width], column[:, at : at + width], cache)
        out.append(np.asarray(part))
        at += width
    assert int(cache.end) == at
    out = np.concatenate(out, axis=1)
    return [out[b, start[b] :] for b in range(rows)]


@pytest.mark.parametrize("form, chunks", [("scanned", (5, 5)), ("fused", (9,))])
def test_prefill_and_decode_match_the_full_forward(family, form, chunks):
    _, _, config, params = family
    tokens = random_tokens(config, ROWS, 16)
    expected = forward(Decoder(config), params, padded(tokens))
    model, own = in_form(form, config, params)
    lengths = [9, 4, 1]
    got = cached_logits(model, own, config, tokens, lengths, chunks, FORMS[form]["scan_layers"])
    for b, length in enumerate(lengths):
        assert len(got[b]) == length + 7
        assert np.abs(got[b] - expected[b, : len(got[b])]).max() < TOLERANCE


@pytest.mark.parametrize(
    "form, key_blocks", [pytest.param("scanned", False, marks=pytest.mark.slow), ("fused", True)]
)
def test_an_int8_cache_holds_the_exact_one_quantised(form, key_blocks):
    config = DecoderConfig(64, 32, 48, 3, 4, 2, 16, qk_norm=True, model_type="qwen3", init_std=0.25)
    model, own = in_form(form, config, init_params(config, jax.random.key(1)))
    tokens = random_tokens(config, ROWS, 12)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    out, caches = {}, {}
    for dtype in (jnp.float32, jnp.int8):
        layout = dict(scan_layers=FORMS[form]["scan_layers"], key_blocks=key_blocks)
        cache, parts = empty_cache(config, ROWS, 14, dtype, **layout), []
        for at, to in ((0, 7), (7, 8), (8, 12)):
            part, cache = _cached(model, own, tokens[:, at:to], positions[:, at:to], cache)
            parts.append(part)
        out[dtype], caches[dtype] = np.concatenate(parts, axis=1), cache
    exact, int8 = caches[jnp.float32], caches[jnp.int8]
    for i in range(2):
        for layer in range(config.num_layers):
            arrays = exact.arrays[i][layer], int8.arrays[i][layer]
            want, q = map(np.asarray, map(from_blocks, arrays) if key_blocks and i == 0 else arrays)
            want, scale = want.astype(np.float64), np.asarray(int8.scales[i][layer])
            assert q.dtype == np.int8 and not scale[..., 12:].any() and (np.abs(q).max(-1)[..., :12] == 127).all()
            got = q * scale.astype(np.float64)[..., None]
            if layer == 0:  # of the same inputs: exact to half a step
                step = np.abs(want).max(-1, keepdims=True) / 127
                assert (np.abs(got - want) <= 0.5001 * step).all()
            assert np.abs(got - want).max() < 0.05 * np.abs(want).max()  # later ones see rounded attention
    assert 1e-4 < np.abs(out[jnp.int8] - out[jnp.float32]).max() < 0.03 * np.abs(out[jnp.float32]).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_by_a_product_is_the_same_rotation(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 16), dtype)
    angle = jax.random.uniform(jax.random.key(1), (2, 3, 1, 8)) * 100
    plain, product = (rope(x, jnp.sin(angle), jnp.cos(angle)) for rope in (apply_rope, cpu.apply_rope))
    assert product.dtype == plain.dtype == dtype
    wide = (a.astype(jnp.float32) for a in (product, plain))
    np.testing.assert_allclose(*wide, rtol=1e-5 if dtype == jnp.float32 else 1e-2, atol=1e-6)


def test_packed_segments_match_separate_rows(family):
    _, _, config, params = family
    lengths = [[7, 5, 9], [1, 17, 4], [24, 0, 0]]
    tokens = random_tokens(config, ROWS, WIDTH)
    segments, positions = np.zeros((ROWS, WIDTH), np.int32), np.zeros((ROWS, WIDTH), np.int32)
    for row, parts in enumerate(lengths):
        at = 0
        for i, n in enumerate(parts):
            segments[row, at : at + n], positions[row, at : at + n] = i + 1, np.arange(n)
            at += n
    packed = forward(Decoder(config), params, tokens, positions, segments)
    assert np.isfinite(packed).all()
    for segment in (1, 2, 3):
        parts = [tokens[row][segments[row] == segment] for row in range(ROWS)]
        alone = np.stack([padded(part) for part in parts])  # causal, so the tail is harmless
        separate = forward(Decoder(config), params, alone)
        for row, part in enumerate(parts):
            if len(part):
                got = packed[row][segments[row] == segment]
                assert np.abs(got - separate[row, : len(part)]).max() < TOLERANCE


def test_sampling_layout_agrees(family):
    _, _, config, params = family
    tokens = random_tokens(config, ROWS, WIDTH)
    expected = forward(Decoder(config), params, tokens)
    largest = max(1.0, np.abs(expected).max())  # Gemma's scaled embeddings make larger logits
    assert np.abs(forward(*in_form("fused", config, params), tokens) - expected).max() < 1e-5 * largest
    transposed = sampling_layout(params, config, jnp.float32, untie=True, transpose_from=256)  # the form of a CPU
    assert "o_transposed" in transposed["layer_0"]["attn"] and "kernel_transposed" in transposed["lm_head"]
    assert np.abs(forward(Decoder(config, scan_layers=False), transposed, tokens) - expected).max() < 1e-5 * largest


def test_only_relative_position_matters(family):
    """RoPE encodes distance: a sequence moved along the position axis has the same logits."""
    _, _, config, params = family
    tokens = random_tokens(config, ROWS, WIDTH)
    far = np.broadcast_to(np.arange(WIDTH, dtype=np.int32) + 100, tokens.shape)
    moved, expected = forward(Decoder(config), params, tokens, far), forward(Decoder(config), params, tokens)
    assert np.abs(moved - expected).max() < 2e-4


def test_future_tokens_are_not_seen(family):
    _, _, config, params = family
    tokens = random_tokens(config, ROWS, WIDTH)
    changed = tokens.copy()
    changed[:, 8] = (changed[:, 8] + 1) % config.vocab_size
    a, b = forward(Decoder(config), params, tokens), forward(Decoder(config), params, changed)
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert np.abs(a[:, 8:] - b[:, 8:]).max(axis=-1).min() > 1e-4


# --- gradients and initialisation


@pytest.mark.slow
def test_gradients_do_not_depend_on_remat_or_scan():
    config = from_hf(CASES["qwen3"] | {"num_hidden_layers": 2})
    params = random_params(config)
    tokens = random_tokens(config, 2, 10)
    positions = np.broadcast_to(np.arange(10, dtype=np.int32), tokens.shape)

    def gradient(**options):
        model = Decoder(config, **options)

        def loss(params):
            own = params if model.scan_layers else sampling_layout(params, config, jnp.float32, fuse=False)
            out = logits(own, model.apply({"params": own}, tokens, positions)[0])
            return jnp.mean(jax.nn.logsumexp(out, axis=-1) - out[..., 0])

        return jax.jit(jax.grad(loss))(params)

    expected = gradient(remat="none")
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(expected))
    for options in ({"remat": "dots"}, {"remat": "full", "scan_layers": False}):
        got = gradient(**options)
        difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, expected)
        assert max(jax.tree.leaves(difference)) < 1e-6, options


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_params(config, dtype=jnp.float32):
    return init_params(config, jax.random.key(1), dtype)


@pytest.mark.parametrize("name", ["llama3_tied", "qwen2"])
def test_init_and_abstract_params_agree(name):
    config = from_hf(CASES[name] | {"initializer_range": 0.05})
    params = random_params(config, jnp.bfloat16)
    shapes, axes = abstract_params(config, jnp.bfloat16)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    named = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    for shape, spec in zip(jax.tree.leaves(shapes), named, strict=True):
        assert len(spec) == shape.ndim and None not in spec
    q = params["layers"]["attn"]["q"].astype(jnp.float32)
    assert 0.04 < float(q.std()) < 0.06 and float(jnp.abs(q[0] - q[1]).max()) > 0.01
    assert head_matrix(params).shape == (config.hidden_size, config.vocab_size)


# --- a trained model


@pytest.fixture(scope="module")
def stories():
    directory = shared_path("data", "models", "stories260K")
    config = from_hf(directory)
    reference = json.loads((directory / "reference.json").read_text())
    return config, load_params(directory, config), reference, load_tokenizer(directory)


def test_stories260k_greedy_text(stories):
    config, params, reference, tokenizer = stories
    model, own = in_form("fused", config, params)
    count = len(reference["ids"]) - 1
    cache = empty_cache(config, 1, count, jnp.float32)

    @jax.jit
    def decode(params, cache):
        def step(carry, position):
            token, cache = carry
            hidden, cache = model.apply({"params": params}, token[:, None], position[None, None], None, cache)
            out = jax.nn.log_softmax(logits(params, hidden[:, 0]))
            best = jnp.argmax(out, axis=-1).astype(jnp.int32)
            return (best, cache), (best[0], out[0, best[0]])

        first = jnp.full((1,), tokenizer.bos_id, jnp.int32)
        return jax.lax.scan(step, (first, cache), jnp.arange(count, dtype=jnp.int32))[1]

    ids, logprobs = decode(own, cache)
    assert [tokenizer.bos_id, *ids.tolist()] == reference["ids"]
    assert " " + tokenizer.decode(ids) == reference["text"]
    assert np.abs(np.asarray(logprobs) - reference["logprobs"]).max() < TOLERANCE
    first = forward(Decoder(config), params, np.array([[tokenizer.bos_id]], np.int32))[0, 0]
    assert np.abs(first - np.array(reference["first_logits"])).max() < TOLERANCE


@pytest.mark.parametrize("form", ["scanned", "fused"])
def test_bfloat16_is_close_to_float32(stories, form):
    config, params, reference, _ = stories
    tokens = np.array([reference["ids"]], np.int32)
    exact = jax.nn.log_softmax(forward(Decoder(config), params, tokens)[0])
    model, own = in_form(form, config, params, jnp.bfloat16)
    rounded = jax.nn.log_softmax(forward(model, own, tokens)[0])
    taken = np.arange(len(reference["ids"]) - 1), np.array(reference["ids"][1:])
    difference = np.abs(np.asarray(exact - rounded))
    assert 1e-5 < difference[taken].mean() < 0.02 and difference[taken].max() < 0.25
    agree = (exact.argmax(-1) == rounded.argmax(-1)).mean()
    assert agree > 0.97


def test_gradients_are_written_out_on_a_cpu_only():
    """The barrier that keeps XLA's CPU compiler from computing them twice would keep a TPU's from fusing them."""
    x, w = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(linear(x, w) ** 3), (0, 1))).trace(x, w)
    found = {p: "optimization_barrier" in gradient.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert found == {"cpu": True, "tpu": False}


@pytest.mark.parametrize("shape", [(1, 24), (3, 2, 24), (cpu.FEW_ROWS + 1, 24)])
def test_a_transposed_product_is_the_product(shape):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=shape), rng.normal(size=(24, 40))
    got = jax.jit(cpu.transposed_product)(jnp.asarray(x, jnp.float32), jnp.asarray(w.T, jnp.float32))
    np.testing.assert_allclose(got, x @ w, atol=1e-5)
