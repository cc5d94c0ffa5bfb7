"""Every key of every family's config.json, changed: read as transformers reads it, or refused; never ignored.

A changed config that from_hf takes must give transformers' logits: those of the unchanged model where from_hf reads
the same DecoderConfig, else those of our decoder with transformers' weights.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import FAMILIES, from_hf
from models.decoder import Decoder, logits
from models.weights import load_params
from tests.models.hf_cases import CASES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS, VOCAB, WIDTH = 2, 48, 24
TOKENS = np.random.RandomState(0).randint(VOCAB, size=(1, WIDTH))
CASE = {"llama": "llama3", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
ABSENT = object()
ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 2.0, "rope_theta": 500.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.3},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "beta_slow": 2, "attention_factor": 2},
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "default", "rope_theta": 300.0},
    {"rope_theta": 300.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
    {"full_attention": {"rope_type": "default", "rope_theta": 300.0}},
    {"sliding_attention": {"rope_type": "linear", "factor": 3.0}, "full_attention": None},
]
TYPES = [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"], ["full_attention"]]
SPECIAL = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": [20.0, 20],
    "rope_local_base_freq": [20.0],
    "layer_types": TYPES,
    "no_rope_layers": [[1, 1], [0, 0], [0, 1, 1]],
    "mlp_only_layers": [[], [0]],
    "num_experts": [6, 4],
    "num_local_experts": [6, 4],
    "decoder_sparse_step": [1],
    "hidden_act": ["gelu_pytorch_tanh", "relu", "swish"],
    "hidden_activation": ["silu", "gelu_pytorch_tanh", "relu"],
    "original_max_position_embeddings": [16, 64],
    "head_dim": [4, 6, 8],
    "num_key_value_heads": [4],
    "intermediate_size": [40],
    "vocab_size": [50],
    "query_pre_attn_scalar": [100],
    "tie_word_embeddings": ["false"],
    "sliding_window": [3],
    "max_window_layers": [0],
    "architectures": [["GPT2LMHeadModel"]],
}
ELSEWHERE = {  # keys that some other family or version has
    "attention_bias", "mlp_bias", "clip_qkv", "logit_scale", "embedding_multiplier", "attention_multiplier",
    "residual_multiplier", "partial_rotary_factor", "pretraining_tp", "is_causal", "use_bidirectional_attention",
    "attn_logit_softcapping", "final_logit_softcapping", "no_rope_layers", "no_rope_layer_interval", "sliding_window",
    "use_sliding_window", "max_window_layers", "sliding_window_pattern", "attention_chunk_size", "qkv_bias",
    "scale_embedding", "use_qk_norm", "norm_topk_prob", "activation_function", "rotary_pct", "layer_norm_eps",
}  # fmt: skip
# what these do is not arithmetic: dropout acts in torch's training mode only, the rest is bookkeeping
NO_ARITHMETIC = {"attention_dropout", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache",
                 "id2label", "label2id", "problem_type", "_name_or_path", "return_dict", "output_hidden_states",
                 "pad_token_id", "output_attentions", "chunk_size_feed_forward", "eos_token_id",
                 "bos_token_id"}  # fmt: skip


def base(family: str) -> dict:
    hf = {k: v for k, v in CASES[CASE.get(family, family)].items() if k != "max_position_embeddings"}
    small = {"num_hidden_layers": LAYERS, "max_position_embeddings": 32, "hidden_size": 16, "head_dim": 4}
    ends = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    return hf | small | {"intermediate_size": 24, "vocab_size": VOCAB} | ends


def mutations(family: str):
    """(key, value) of every change."""
    hf = base(family)
    own = set(transformers.AutoConfig.for_model(**hf).to_dict()) | set(hf)
    for key in sorted((own | ELSEWHERE | set(SPECIAL)) - NO_ARITHMETIC):
        usual = [ABSENT, None, True, False, 2, 0.5, "gelu"] if key in own else [True, 2]
        for value in [*usual, *SPECIAL.get(key, [])]:
            if key not in ("hidden_size", "num_hidden_layers") or value is ABSENT or isinstance(value, str):
                yield key, value


def changed(hf: dict, key: str, value) -> dict:
    return {k: v for k, v in hf.items() if k != key} if value is ABSENT else hf | {key: value}


def filled(model):
    """The model with weights that depend on name and shape only."""
    for name, parameter in model.named_parameters():
        x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
        x = 1 + 0.3 * x if name.endswith("norm.weight") else x / parameter.shape[-1] ** 0.5
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.float32(x)))
    return model


def theirs(hf: dict):
    """transformers' model of a config; None if it refuses it."""
    try:
        config = transformers.CONFIG_MAPPING[hf["model_type"]].from_dict(json.loads(json.dumps(hf)))
        config._attn_implementation = "eager"
        model = filled(transformers.AutoModelForCausalLM.from_config(config).eval())
        with torch.no_grad():
            return model, model(torch.from_numpy(TOKENS)).logits.numpy()
    except Exception:  # whatever it is, that config has no right answer
        return None


def ours(config, model, folder):
    model.save_pretrained(folder)
    params = load_params(folder, config)
    positions = jnp.arange(WIDTH)[None]

    @jax.jit
    def run(params, tokens):
        return logits(params, Decoder(config).apply({"params": params}, tokens, positions)[0])

    return run(params, jnp.asarray(TOKENS, jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_honoured_or_refused(family, tmp_path):
    transformers.logging.set_verbosity(50)
    hf, known = base(family), {}
    config = from_hf(hf)
    model, expected = theirs(hf)
    np.testing.assert_allclose(ours(config, model, tmp_path), expected, atol=1e-4)
    counts = dict.fromkeys(("refused", "refused by transformers", "the same", "honoured"), 0)
    wrong = []
    for key, value in mutations(family):
        mutated = changed(hf, key, value)
        try:
            read = from_hf(mutated)
        except ValueError:
            counts["refused"] += 1
            continue
        if (answer := theirs(mutated)) is None:
            counts["refused by transformers"] += 1
            continue
        try:
            if read == config:
                kind, got = "the same", expected
            else:
                if read not in known:
                    known[read] = ours(read, answer[0], tmp_path)
                kind, got = "honoured", known[read]
        except ValueError as e:  # the weights do not fit, which is said before anything is computed
            assert "tensor" in str(e)
            counts["refused"] += 1
            continue
        counts[kind] += 1
        if got.shape != answer[1].shape or np.abs(got - answer[1]).max() > 1e-4:
            wrong.append((key, "absent" if value is ABSENT else value, kind))
    assert not wrong and min(counts.values()) > 2, (wrong, counts)
