"""Adapters: the same function as the merged matrix, in learner and sampler; PEFT's files in and out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import DecoderConfig, from_hf
from models.decoder import Decoder, init_params, logits
from models.layout import sampling_layout
from models.lora import (
    LoRA,
    abstract_adapters,
    abstract_base,
    adapter_table,
    fingerprint,
    frozen_base,
    init_adapters,
    join,
    load_adapters,
    merge,
    save_adapters,
    targeted,
)
from models.weights import load_params
from tests.models.hf_cases import CASES, hf_tensors, write_model

ALL = LoRA(3, 6.0)
CONFIG = DecoderConfig(29, 16, 24, 2, 4, 2, 8, qkv_bias=True, model_type="qwen2", init_std=0.3, lora_scale=ALL.scale)
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 9))


def random_adapters(config, lora, seed=1):
    """As after some training: neither half is zero."""
    start = init_adapters(config, lora, jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), start)


def forward(params, config, dtype=jnp.float32, tokens=TOKENS, **kwargs):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = Decoder(config, dtype=dtype, **kwargs).apply({"params": params}, tokens, positions)
    return np.asarray(logits(params, hidden), np.float64)


def plain_merge(params, adapters, scale):
    """W + scale a b in float64, by names written out here."""
    out = jax.tree.map(lambda x: np.float64(x), params)
    for part, names in (("attn", "q k v o".split()), ("mlp", "gate up down".split())):
        for name in names:
            if f"{name}_lora_a" in adapters["layers"].get(part, {}):
                a, b = (np.float64(adapters["layers"][part][f"{name}_lora_{half}"]) for half in "ab")
                out["layers"][part][name] = out["layers"][part][name] + scale * a @ b
    return jax.tree.map(np.float32, out)


@pytest.mark.parametrize("lora", [ALL, LoRA(2, 1.0, ("q", "mlp"), rslora=True)], ids=["all", "some"])
def test_the_decoder_with_adapters_is_the_decoder_of_the_sum(lora):
    config = dataclasses.replace(CONFIG, lora_scale=lora.scale)
    params, adapters = init_params(config, jax.random.key(0)), random_adapters(config, lora)
    want = forward(merged := plain_merge(params, adapters, lora.scale), config)
    both = join(params, adapters)
    np.testing.assert_allclose(forward(both, config), want, atol=2e-5 * np.abs(want).max())
    assert np.abs(forward(params, config) - want).max() > 0.1  # they do something
    for ours, plain in zip(*map(jax.tree.leaves, (merge(both, config, jnp.float32), merged)), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-6)


def test_new_adapters_change_nothing():
    params = init_params(CONFIG, jax.random.key(0))
    both = join(params, init_adapters(CONFIG, ALL, jax.random.key(5)))
    np.testing.assert_array_equal(forward(both, CONFIG), forward(params, CONFIG))


@pytest.mark.parametrize("kind", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16", "int8"])
def test_the_samplers_merged_matrices_compute_what_the_learner_does(kind):
    """Log-probabilities agree to rounding, for every form of the base: in float32 exactly so, and in bfloat16 the
    merged model is as near to exact arithmetic as the learner is."""
    base = frozen_base(init_params(CONFIG, jax.random.key(0)), CONFIG, kind)
    both = join(base, random_adapters(CONFIG, ALL))
    # the sum of the base, as it is stored, and the adapters
    exact = plain_merge(merge(base, CONFIG, jnp.float32), random_adapters(CONFIG, ALL), CONFIG.lora_scale)
    exact = jax.nn.log_softmax(forward(exact, CONFIG))
    for dtype in (jnp.float32, jnp.bfloat16):
        layout = sampling_layout(both, CONFIG, dtype)
        assert "qkv" in layout["layer_0"]["attn"] and not [k for k in layout["layer_0"]["attn"] if "lora" in k]
        learner, sampler = forward(both, CONFIG, dtype), forward(layout, CONFIG, dtype, scan_layers=False)
        learner, sampler = (np.abs(jax.nn.log_softmax(z) - exact) for z in (learner, sampler))
        if dtype == jnp.float32:
            assert max(learner.max(), sampler.max()) < 2e-5
        else:
            assert sampler.mean() < 1.5 * learner.mean() < 0.15


def test_an_int8_base_is_within_half_a_step_and_as_its_abstract_says():
    params = init_params(CONFIG, jax.random.key(0))
    kept = jax.tree.map(np.array, params)
    base = frozen_base(params, CONFIG, "int8")
    shapes, specs = abstract_base(CONFIG, "int8")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), base) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert jax.tree.structure(jax.tree.map(lambda x: 0, shapes)) == jax.tree.structure(
        jax.tree.map(lambda s: 0, specs, is_leaf=lambda s: not isinstance(s, dict)))
    down, scale = base["layers"]["mlp"]["down"], base["layers"]["mlp"]["down_scale"]
    assert (down.dtype, scale.dtype, base["lm_head"]["kernel"].dtype) == (jnp.int8, jnp.float32, jnp.bfloat16)
    error = np.abs(np.float32(down) * scale[:, None] - kept["layers"]["mlp"]["down"])
    assert (error <= 0.5001 * np.asarray(scale)[:, None]).all()


def test_targets_by_name_and_class():
    names = lambda *targets: [row.path[-1] for row in targeted(CONFIG, targets)]  # noqa: E731
    assert names("all") == "q k v o gate up down".split()
    assert names("attention") == "q k v o".split() and names("mlp", "q") == "q gate up down".split()
    with pytest.raises(ValueError, match="'embed' is no matrix of qwen2's layers; choose among all, attention, mlp, q"):
        targeted(CONFIG, ("q", "embed"))
    shapes, specs = abstract_adapters(CONFIG, LoRA(3, targets=("k",)))
    assert {k: x.shape for k, x in shapes["layers"]["attn"].items()} == {"k_lora_a": (2, 16, 3), "k_lora_b": (2, 3, 16)}
    assert tuple(specs["layers"]["attn"]["k_lora_a"]) == ("layers", "embed", None)
    assert tuple(specs["layers"]["attn"]["k_lora_b"]) == ("layers", None, "kv_heads")


def test_scale():
    assert LoRA(16, 32.0).scale == 2.0 and LoRA(16, 32.0, rslora=True).scale == 8.0


def test_a_fingerprint_tells_weights_apart():
    params = init_params(CONFIG, jax.random.key(0))
    name = fingerprint(params)
    assert name == fingerprint(jax.tree.map(jnp.array, params)) and len(name) == 16
    q = params["layers"]["attn"]["q"]
    for other in (q.at[1, 3, 4].add(1e-6), q[::-1], q.at[0, 0, :2].set(q[0, 0, 1::-1]), q.astype(jnp.bfloat16)):
        attn = params["layers"]["attn"] | {"q": other}
        assert fingerprint(params | {"layers": params["layers"] | {"attn": attn}}) != name


# ---- PEFT's files


@pytest.fixture(scope="module", params=["qwen2_tied", "llama3", "qwen3"])
def model(request, tmp_path_factory):
    """(decoder config, directory, transformers' model)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    hf = CASES[request.param]
    directory = write_model(tmp_path_factory.mktemp("base"), hf, hf_tensors(hf))
    return from_hf(hf), directory, transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.double().numpy()


@pytest.mark.parametrize("lora", [ALL, LoRA(2, 5.0, ("v", "up"), rslora=True)], ids=["all", "some"])
def test_peft_loads_what_we_write(model, lora, tmp_path):
    from peft import PeftModel

    config, directory, theirs = model
    config = dataclasses.replace(config, lora_scale=lora.scale)
    adapters = random_adapters(config, lora)
    save_adapters(tmp_path, adapters, config, lora, str(directory))
    peft = PeftModel.from_pretrained(theirs, str(tmp_path))
    try:
        want = torch_logits(peft)
        got = forward(join(load_params(directory, config), adapters), config)
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
        peft.disable_adapter_layers()
        assert np.abs(torch_logits(peft) - want).max() > 0.1
        peft.enable_adapter_layers()
    finally:
        peft.unload()
    again, read = load_adapters(tmp_path, config)
    assert (again.rank, again.scale) == (lora.rank, lora.scale)
    assert [r.path for r in targeted(config, again.targets)] == [r.path for r in targeted(config, lora.targets)]
    for a, b in zip(*map(jax.tree.leaves, (read, adapters)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], "all-linear"], ids=["some", "all"])
def test_we_load_what_peft_writes(model, modules, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    config, directory, theirs = model
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM"))
    try:
        torch.manual_seed(0)
        for name, p in peft.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.2)
        want = torch_logits(peft)
        peft.save_pretrained(str(tmp_path))
    finally:
        peft.unload()
    lora, adapters = load_adapters(tmp_path, config)
    config = dataclasses.replace(config, lora_scale=lora.scale)
    got = forward(join(load_params(directory, config), adapters), config)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(("change", "message"), [
    ({"use_dora": True}, "key 'use_dora' is True; only False is supported"),
    ({"bias": "all"}, "key 'bias' is 'all'"),
    ({"rank_pattern": {"q_proj": 8}}, "key 'rank_pattern'"),
    ({"modules_to_save": ["lm_head"]}, "key 'modules_to_save'"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "key 'target_modules' .*supported: a list of q_proj, k_proj"),
    ({"r": 0}, "r=0 must be a positive integer"),
    ({"r": 5}, "adapter_model.safetensors: tensor .*lora_A.weight has shape .3, 16., config needs .5, 16."),
    ({"target_modules": ["q_proj"]}, "tensor .* is unexpected"),
])
def test_what_we_would_not_compute_is_refused(change, message, tmp_path):
    save_adapters(tmp_path, random_adapters(CONFIG, ALL), CONFIG, ALL)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        load_adapters(tmp_path, CONFIG)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_the_table_of_adapters_has_names_of_its_own():
    rows = adapter_table(CONFIG, ALL).values()
    assert len({row.hf for row in rows}) == len(rows) == 14
    assert all("{}" in row.hf and row.hf.startswith("base_model.model.model.layers.") for row in rows)
