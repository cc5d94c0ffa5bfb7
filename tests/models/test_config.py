"""DecoderConfig from and to config.json, and what is refused."""

import dataclasses
import json

import pytest

from models.config import DecoderConfig, from_hf, to_hf
from models.rope import Llama3Scaling
from tests.models.hf_cases import CASES
from tests.shared import shared_path

LLAMA, QWEN2, QWEN3 = CASES["llama2"], CASES["qwen2"], CASES["qwen3"]
LLAMA3_ROPE = CASES["llama3"]["rope_scaling"]


def test_reads_every_field():
    assert from_hf(CASES["llama3"] | {"initializer_range": 0.05}) == DecoderConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=56,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64),
        qkv_bias=False,
        qk_norm=False,
        tie_embeddings=False,
        max_position_embeddings=256,
        model_type="llama",
        init_std=0.05,
    )


def test_family_flags():
    assert [(c.qkv_bias, c.qk_norm) for c in map(from_hf, (LLAMA, QWEN2, QWEN3))] == [
        (False, False),
        (True, False),
        (False, True),
    ]


def test_defaults_of_missing_keys_are_those_of_transformers():
    drop = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    heads = {"num_attention_heads": 32, "hidden_size": 128}
    for hf, kv_heads, head_dim in ((LLAMA, 32, 4), (QWEN2, 32, 4), (QWEN3, 32, 128), (CASES["mistral"], 8, 4)):
        c = from_hf({k: v for k, v in hf.items() if k not in drop} | heads | {"rope_scaling": None})
        assert (c.num_kv_heads, c.head_dim, c.rms_norm_eps, c.rope_theta) == (kv_heads, head_dim, 1e-6, 10000.0)
        assert not c.tie_embeddings


@pytest.mark.parametrize("name", CASES)
def test_transformers_4_and_5_keys_mean_the_same(name):
    old = CASES[name]
    rope = old.get("rope_scaling") or {"rope_type": "default"}
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = rope | {"rope_theta": old["rope_theta"]}
    if name == "gemma3":
        local = {"rope_theta": new.pop("rope_local_base_freq"), "rope_type": "default"}
        new["rope_parameters"] = {"full_attention": new["rope_parameters"], "sliding_attention": local}
    windows = {"qwen2_window": (1, 2), "smollm3": (1,), "gemma3": (0, 2)}.get(name, ())
    new["layer_types"] = ["sliding_attention" if i in windows else "full_attention" for i in range(3)]
    assert from_hf(new) == from_hf(old)


def test_legacy_rope_type_key():
    legacy = {"type" if k == "rope_type" else k: v for k, v in LLAMA3_ROPE.items()}
    assert from_hf(LLAMA | {"rope_scaling": legacy}) == from_hf(LLAMA | {"rope_scaling": LLAMA3_ROPE})


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    config = from_hf(CASES[name])
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_export_and_we_read_theirs(name):
    transformers = pytest.importorskip("transformers")
    config = from_hf(CASES[name])
    hf = to_hf(config)
    theirs = transformers.AutoConfig.for_model(**hf)
    assert theirs.num_key_value_heads == config.num_kv_heads and theirs.head_dim == config.head_dim
    assert theirs.tie_word_embeddings == config.tie_embeddings and theirs.rms_norm_eps == config.rms_norm_eps
    assert from_hf(json.loads(theirs.to_json_string(use_diff=False))) == config


def test_reads_a_directory_and_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3))
    assert from_hf(tmp_path) == from_hf(path) == from_hf(str(path)) == from_hf(QWEN3)


@pytest.mark.parametrize("model", ["stories260K", "digits_llama"])
def test_reads_published_configs(model):
    directory = shared_path("data", "models", model)
    config = from_hf(directory)
    assert config.model_type == "llama" and config.tie_embeddings == (model == "stories260K")
    assert config.hidden_size == {"stories260K": 64, "digits_llama": 128}[model]


REFUSED = {
    "model_type": (LLAMA | {"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3"),
    "model_type ": ({k: v for k, v in LLAMA.items() if k != "model_type"}, "llama, mistral, qwen2, qwen3"),
    "architectures": (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
    "hidden_act": (LLAMA | {"hidden_act": "gelu"}, "silu"),
    "attention_bias": (QWEN2 | {"attention_bias": True}, "need false"),
    "attention_bias ": (LLAMA | {"attention_bias": "no"}, "true or false"),
    "mlp_bias": (QWEN3 | {"mlp_bias": True}, "need false"),
    "quantization_config": (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "unquantised"),
    "use_sliding_window": (QWEN2 | {"use_sliding_window": 1}, "true or false"),
    "sliding_window ": (QWEN2 | {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1}, "positive"),
    "tie_word_embeddings": (LLAMA | {"tie_word_embeddings": "false"}, "true or false"),
    "is_causal": (LLAMA | {"is_causal": False}, "causal"),
    "final_logit_softcapping": (CASES["gemma3"] | {"final_logit_softcapping": 30.0}, "null"),
    "rope_parameters ": (CASES["gemma3"] | {"rope_parameters": {"rope_type": "linear"}}, "full_attention"),
    "no_rope_layers": (CASES["smollm3"] | {"no_rope_layers": [1, 0]}, "each of 3 layers"),
    "sliding_window": (LLAMA | {"sliding_window": 4096}, "need null"),
    "layer_types": (
        QWEN3 | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "use_sliding_window true",
    ),
    "layer_types ": (LLAMA | {"layer_types": ["sliding_attention"] * 3}, "full_attention only"),
    "layer_types  ": (QWEN3 | {"layer_types": ["full_attention"] * 2}, "each of 3 layers"),
    "factor": (LLAMA | {"rope_scaling": {"type": "yarn"}}, "positive number"),
    "rope_scaling ": (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "default, linear, llama3"),
    "rope_scaling  ": (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 2}}, "beta_fast"),
    "rope_scaling   ": (QWEN2 | {"rope_scaling": {"mrope_section": [1, 2]}}, "mrope_section"),
    "rope_scaling    ": (LLAMA | {"rope_scaling": "llama3"}, "object or null"),
    "rope_parameters": (LLAMA | {"rope_parameters": {"rope_type": "longrope"}}, "default, linear"),
    "low_freq_factor": (LLAMA | {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": None}}, "positive"),
    "low_freq_factor ": (LLAMA | {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "<"),
    "rope_theta": (LLAMA | {"rope_theta": "big"}, "positive number"),
    "partial_rotary_factor": (LLAMA | {"partial_rotary_factor": 0.5}, "only 1.0"),
    "num_attention_heads": (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    "hidden_size": (LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads=5"),
    "head_dim": (QWEN3 | {"head_dim": 7}, "even"),
    "vocab_size": (LLAMA | {"vocab_size": "48"}, "positive integer"),
    "num_hidden_layers": (LLAMA | {"num_hidden_layers": 0}, "positive integer"),
    "intermediate_size": ({k: v for k, v in LLAMA.items() if k != "intermediate_size"}, "positive integer"),
    "rms_norm_eps": (LLAMA | {"rms_norm_eps": -1.0}, "positive number"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_in_one_line_naming_file_and_key(key, tmp_path):
    hf, valid = REFUSED[key]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hf))
    with pytest.raises(ValueError) as error:
        from_hf(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and key.strip() in message and valid in message
    assert "\n" not in message and message.count(str(path)) == 1


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "no such file"),
        (b'{"a": 1,\n oops}', ":2: not valid JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "UTF-8"),
    ],
)
def test_unreadable_file(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        from_hf(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_export_refuses_what_no_family_has():
    config = dataclasses.replace(from_hf(LLAMA), qkv_bias=True)
    with pytest.raises(ValueError, match="qkv_bias=True.*llama"):
        to_hf(config)


def test_constructor_checks_sizes():
    with pytest.raises(ValueError, match="num_layers"):
        dataclasses.replace(from_hf(LLAMA), num_layers=0)
    assert hash(from_hf(CASES["llama3"])) == hash(from_hf(dict(CASES["llama3"])))
