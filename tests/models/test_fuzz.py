"""Model directories with any damage: loaded, or one line of ValueError; no other exception."""

import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.config import DecoderConfig, from_hf
from models.tokenizers import load_tokenizer, vocab_tokenizer
from models.weights import load_params, save_params
from tests.models.hf_cases import CASES, hf_tensors, write_model

QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LEAF = st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=5)
JSON = st.recursive(LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))


def loaded(load, *args):
    """What `load` gives, or None after a ValueError of one line."""
    try:
        return load(*args)
    except ValueError as e:
        assert str(e) and "\n" not in str(e), repr(e)
        return None


KEYS = sorted(set().union(*CASES.values()) | {"quantization_config", "layer_types", "rope_parameters", "hidden_act"})


@QUICK
@given(name=st.sampled_from(sorted(CASES)), changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_config(name, changes):
    config = loaded(from_hf, CASES[name] | changes)
    assert config is None or isinstance(config, DecoderConfig)


@QUICK
@given(data=st.binary(max_size=60) | JSON.map(lambda x: json.dumps(x).encode()) | st.just(b"[" * 3000))
def test_any_config_file(data):
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_bytes(data)
        assert loaded(from_hf, folder) is None


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(config, bytes) of a small model.safetensors."""
    hf = CASES["qwen2"]
    directory = write_model(tmp_path_factory.mktemp("weights"), hf, hf_tensors(hf))
    return from_hf(hf), (directory / "model.safetensors").read_bytes()


@QUICK
@given(place=st.integers(0, 3000), value=st.integers(0, 255), cut=st.integers(0, 3) | st.integers(0, 10**5))
def test_damaged_safetensors(weights, place, value, cut):
    config, data = weights
    data = bytearray(data)
    data[place] = value
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "model.safetensors").write_bytes(data[: len(data) - cut])
        params = loaded(load_params, folder, config)
    assert params is None or all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@QUICK
@given(content=JSON)
def test_any_index_of_safetensors(weights, content):
    config, data = weights
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        (root / "part.safetensors").write_bytes(data)
        for index in (content, {"weight_map": content}, {"weight_map": {"model.norm.weight": content}}):
            (root / "model.safetensors.index.json").write_text(json.dumps(index))
            assert loaded(load_params, folder, config) is None


PIECES = ["a", "b", "ab", "<end>", "<pad>"]


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab_tokenizer(PIECES, "<end>", "<pad>").save(folder)
    return {p.name: p.read_text() for p in folder.iterdir()}


FILES = ["vocab.json", "tokenizer_config.json", "generation_config.json", "config.json"]


@QUICK
@given(file=st.sampled_from(FILES), content=JSON, key=st.sampled_from(["", "pieces", "special", "eos_token_id",
       "pad_token_id", "char_ords", "chat_template"]))  # fmt: skip
def test_any_saved_tokenizer(saved_tokenizer, file, content, key):
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, text in saved_tokenizer.items():
            (root / name).write_text(text)
        before = json.loads(saved_tokenizer.get(file, "{}"))
        (root / file).write_text(json.dumps({**before, key: content} if key else content))
        tokenizer = loaded(load_tokenizer, folder)
    assert tokenizer is None or tokenizer.decode(tokenizer.encode("ab")) == "ab"


@settings(QUICK, max_examples=60)
@given(data=st.binary(max_size=80), name=st.sampled_from(["tokenizer.json", "tokenizer.json.gz", "tokenizer.model",
       "tok512.bin", "vocab.json"]))  # fmt: skip
def test_any_tokenizer_file(data, name):
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / name).write_bytes(data)
        assert loaded(load_tokenizer, folder) is None


def test_what_is_saved_can_be_loaded(saved_tokenizer, weights, tmp_path):
    """The files that the tests above damage are good ones."""
    config, data = weights
    (tmp_path / "model.safetensors").write_bytes(data)
    params = load_params(tmp_path, config)
    save_params(tmp_path / "again", params, config)
    for name, text in saved_tokenizer.items():
        (tmp_path / name).write_text(text)
    assert load_tokenizer(tmp_path).encode("ab") == [2]
