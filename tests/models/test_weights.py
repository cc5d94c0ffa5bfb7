"""Safetensors in and out: names, layout, laziness, bitwise round trips, and damaged checkpoints."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models import table, weights
from models.config import from_hf
from models.decoder import abstract_params
from models.tokenizers import vocab_tokenizer
from models.weights import load_params, save_params
from tests.models.hf_cases import CASES, hf_tensors, write_model


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """(config, Hugging Face tensors, directory) of a qwen2 model."""
    hf = CASES["qwen2"]
    tensors = hf_tensors(hf)
    return from_hf(hf), tensors, write_model(tmp_path_factory.mktemp("qwen2"), hf, tensors)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("name", CASES)
def test_tree_is_the_decoders(name, tmp_path):
    hf = CASES[name]
    config = from_hf(hf)
    params = load_params(write_model(tmp_path, hf, hf_tensors(hf)), config)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract_params(config)[0]
    )


def test_layout(qwen2):
    config, hf, directory = qwen2
    params = load_params(directory, config)
    layer = "model.layers.2."
    np.testing.assert_array_equal(params["embed"]["embedding"], hf["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], hf["lm_head.weight"].T)
    np.testing.assert_array_equal(params["final_norm"]["scale"], hf["model.norm.weight"])
    layers = params["layers"]
    for n in "qkv":
        np.testing.assert_array_equal(layers["attn"][n][2], hf[f"{layer}self_attn.{n}_proj.weight"].T)
        np.testing.assert_array_equal(layers["attn"][f"{n}_bias"][2], hf[f"{layer}self_attn.{n}_proj.bias"])
    np.testing.assert_array_equal(layers["attn"]["o"][2], hf[f"{layer}self_attn.o_proj.weight"].T)
    for n in ("gate", "up", "down"):
        np.testing.assert_array_equal(layers["mlp"][n][2], hf[f"{layer}mlp.{n}_proj.weight"].T)
    np.testing.assert_array_equal(layers["attn_norm"]["scale"][2], hf[f"{layer}input_layernorm.weight"])
    np.testing.assert_array_equal(
        layers["mlp_norm"]["scale"][2], hf[f"{layer}post_attention_layernorm.weight"]
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_export_import_is_bitwise(name, max_shard_bytes, tmp_path):
    hf, tensors = CASES[name], hf_tensors(CASES[name])
    config = from_hf(hf)
    params = load_params(write_model(tmp_path / "a", hf, tensors), config)
    save_params(tmp_path / "b", params, config, max_shard_bytes=max_shard_bytes)
    assert from_hf(tmp_path / "b") == config
    assert_same(load_params(tmp_path / "b", config), params)
    written = {}
    for file in (tmp_path / "b").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[k], tensors[k]) for k in tensors)


def test_bfloat16(qwen2, tmp_path):
    config, hf, directory = qwen2
    bf16 = load_params(directory, config, dtype=jnp.bfloat16)
    expected = hf["lm_head.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(bf16["lm_head"]["kernel"]), expected)
    save_params(tmp_path, bf16, config)
    with safe_open(tmp_path / "model.safetensors", "numpy") as f:
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}
        assert f.metadata() == {"format": "pt"}  # transformers refuses files without it
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(load_params(tmp_path, config, dtype=jnp.bfloat16), bf16)
    # and widening is exact
    assert_same(load_params(tmp_path, config), jax.tree.map(lambda a: a.astype(jnp.float32), bf16))


def test_sharded_export(qwen2, tmp_path):
    config, hf, directory = qwen2
    params = load_params(directory, config)
    save_params(tmp_path, params, config, max_shard_bytes=20_000)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == hf.keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in hf.values())
    for file in files:
        held = load_file(tmp_path / file)
        assert sum(t.nbytes for t in held.values()) <= 20_000 or len(held) == 1
    # a smaller export into the same directory leaves nothing stale behind
    save_params(tmp_path, params, config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_export_with_tokenizer(qwen2, tmp_path):
    config, _, directory = qwen2
    tokenizer = vocab_tokenizer([".", "_", *"abc"], eos=".", pad="_")
    save_params(tmp_path, load_params(directory, config), config, tokenizer)
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / file).read_text())
        assert (content["eos_token_id"], content["pad_token_id"]) == (0, 1)
    assert (tmp_path / "vocab.json").exists()


def test_export_refuses_another_models_parameters(qwen2, tmp_path):
    config, _, directory = qwen2
    params = load_params(directory, config)
    with pytest.raises(ValueError, match=r"layers/attn/q_norm is missing"):
        save_params(tmp_path / "new", params, from_hf(CASES["qwen3"] | {"head_dim": 8}))
    with pytest.raises(ValueError, match=r"embed/embedding is of shape \[48, 32\], config needs \[49, 32\]"):
        save_params(tmp_path / "new", params, from_hf(CASES["qwen2"] | {"vocab_size": 49}))
    assert not (tmp_path / "new").exists()


def test_tied_model_may_carry_a_head_and_rotary_tables(tmp_path):
    hf = CASES["llama3_tied"]
    config, tensors = from_hf(hf), hf_tensors(hf)
    plain = load_params(write_model(tmp_path / "a", hf, tensors), config)
    more = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert_same(load_params(write_model(tmp_path / "b", hf, more), config), plain)
    more["lm_head.weight"][7, 3] += 1
    with pytest.raises(ValueError, match="lm_head.weight differs.*tie_word_embeddings"):
        load_params(write_model(tmp_path / "c", hf, more), config)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_slice_is_read_as_if_from_the_whole(qwen2, data):
    config, _, directory = qwen2
    rows = table.weights(config)
    row = rows[data.draw(st.sampled_from(sorted(rows)))]
    shape = table.whole_shape(row, config)
    with weights.contextlib.ExitStack() as stack:
        where = weights._open_tensors(directory, stack)
        dtype = np.dtype(np.float32)
        whole = weights._read(where, row, (slice(None),) * len(shape), shape, dtype)
        bounds = [min(n, 40) for n in shape]
        index = tuple(
            slice(a := data.draw(st.integers(0, n - 1)), data.draw(st.integers(a + 1, n))) for n in bounds
        )
        np.testing.assert_array_equal(weights._read(where, row, index, shape, dtype), whole[index])


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from models import table, weights
from models.config import from_hf

directory = sys.argv[1]
config = from_hf(directory)
plain = weights.load_params(directory, config)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
specs = {1: P("fsdp"), 2: P("fsdp", "tensor"), 3: P(None, "fsdp", "tensor")}
shardings = jax.tree.map(lambda a: NamedSharding(mesh, specs[a.ndim] if all(
    n % 2 == 0 for n in a.shape[-2:]) else P()), plain)
shardings["layers"]["mlp"]["down"] = NamedSharding(mesh, P(None, "fsdp"))  # two copies of each half
sizes, read_tensor = [], weights._read_tensor
def spy(*args):
    part = read_tensor(*args)
    sizes.append((args[1], part.size))
    return part
weights._read_tensor = spy
sharded = weights.load_params(directory, config, shardings)
for x, y, s in zip(*map(jax.tree.leaves, (sharded, plain, shardings))):
    assert x.sharding == s, (x.sharding, s)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
q = [n for name, n in sizes if name == "model.layers.1.self_attn.q_proj.weight"]
assert q == [32 * 32 // 4] * 4, q  # every device read its own quarter, nobody the whole
halves = [n for name, n in sizes if name == "model.layers.1.mlp.down_proj.weight"]
assert halves == [plain["layers"]["mlp"]["down"][1].size // 2] * 2, halves  # copies are read once
weights.save_params(sys.argv[2], sharded, config, max_shard_bytes=20_000)
for x, y in zip(*map(jax.tree.leaves, (weights.load_params(sys.argv[2], config), plain))):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
print("sharded ok")
"""


def test_each_device_reads_its_own_part(qwen2, tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(weights.__file__)))
    command = [sys.executable, "-c", SHARDED, str(qwen2[2]), str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert "sharded ok" in done.stdout, done.stderr[-2000:]


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[3], 2, int(sys.argv[4]))
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from models import table, weights
from models.config import from_hf
from models.decoder import abstract_params

config = from_hf(sys.argv[1])
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
abstract = abstract_params(config)[0]
shardings = jax.tree.map(
    lambda a: NamedSharding(mesh, P(None, "fsdp", "tensor") if a.ndim == 3 else P()), abstract)
sizes, read_tensor = [], weights._read_tensor
def spy(*args):
    part = read_tensor(*args)
    sizes.append(part.size if ".mlp." in args[1] else 0)
    return part
weights._read_tensor = spy
params = weights.load_params(sys.argv[1], config, shardings)
assert sum(sizes) * 2 == sum(a.size for a in jax.tree.leaves(abstract["layers"]["mlp"]))
weights.save_params(sys.argv[2], params, config, max_shard_bytes=20_000)
multihost_utils.sync_global_devices("written")
print("process ok")
"""


@pytest.mark.slow
def test_two_processes_read_half_each_and_write_one_checkpoint(qwen2, tmp_path):
    config, hf, directory = qwen2
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    root = os.path.dirname(os.path.dirname(os.path.abspath(weights.__file__)))
    command = [sys.executable, "-c", TWO_PROCESSES, str(directory), str(tmp_path), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    workers = [subprocess.Popen([*command, str(i)], env=env, cwd=root, **pipes) for i in range(2)]
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=300)
            assert "process ok" in out, err[-2000:]
    finally:
        for worker in workers:
            worker.kill()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load_params(tmp_path, config), load_params(directory, config))


# --- damaged or foreign checkpoints: one line naming file and tensor


def refused(directory, config, *parts, **options):
    with pytest.raises(ValueError) as error:
        load_params(directory, config, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(directory), *parts):
        assert part in message, message


def edited(qwen2, tmp_path, **changes):
    """Copy of the qwen2 model with tensors replaced (or dropped, when None)."""
    _, tensors, _ = qwen2
    tensors = {k: v for k, v in (tensors | changes).items() if v is not None}
    return write_model(tmp_path, CASES["qwen2"], tensors)


NAME = "model.layers.1.mlp.up_proj.weight"


def test_missing_tensor(qwen2, tmp_path):
    refused(edited(qwen2, tmp_path, **{NAME: None}), qwen2[0], NAME, "missing", "qwen2 of 3 layers")


def test_unexpected_tensor(qwen2, tmp_path):
    extra = {"model.layers.3.mlp.up_proj.weight": np.ones((56, 32), np.float32)}
    refused(edited(qwen2, tmp_path, **extra), qwen2[0], *extra, "model.safetensors", "unexpected")


def test_misshapen_tensor(qwen2, tmp_path):
    wrong = {NAME: np.ones((32, 56), np.float32)}  # transposed
    refused(edited(qwen2, tmp_path, **wrong), qwen2[0], NAME, "model.safetensors", "[32, 56]", "[56, 32]")


def test_integer_tensor(qwen2, tmp_path):
    wrong = {NAME: np.ones((56, 32), np.int8)}  # as quantised checkpoints have
    refused(edited(qwen2, tmp_path, **wrong), qwen2[0], NAME, "I8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_not_finite(qwen2, tmp_path, value, dtype):
    bad = qwen2[1][NAME].astype(dtype)
    bad[7, 3] = value
    refused(edited(qwen2, tmp_path, **{NAME: bad}), qwen2[0], NAME, "[7, 3]", str(value), "finite")


def test_overflow_of_the_cast(qwen2, tmp_path):
    bad = qwen2[1][NAME].copy()
    bad[7, 3] = 1e30
    directory = edited(qwen2, tmp_path, **{NAME: bad})
    load_params(directory, qwen2[0])
    refused(directory, qwen2[0], NAME, "[7, 3]", "float16", dtype=jnp.float16)


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_file(qwen2, tmp_path, keep):
    file = edited(qwen2, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, qwen2[0], "model.safetensors", "truncated")


def test_another_architecture(qwen2):
    config, _, directory = qwen2
    refused(directory, from_hf(CASES["llama3"]), "k_proj.bias", "unexpected", "expected a llama of 3 layers")
    refused(directory, from_hf(CASES["qwen3"]), "q_norm", "missing", "expected a qwen3")
    refused(directory, from_hf(CASES["qwen2"] | {"num_hidden_layers": 4}), "layers.3.", "missing", "4 layers")


def test_no_weights(qwen2, tmp_path):
    refused(tmp_path, qwen2[0], "no model.safetensors")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    refused(tmp_path, qwen2[0], "convert it to safetensors")


def test_index_errors(qwen2, tmp_path):
    config, tensors, directory = qwen2
    save_params(tmp_path, load_params(directory, config), config, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    victim = tmp_path / content["weight_map"][NAME]
    bytes_ = victim.read_bytes()
    victim.unlink()
    refused(tmp_path, config, victim.name, "no such file", index.name)
    victim.write_bytes(bytes_[: len(bytes_) // 2])
    refused(tmp_path, config, victim.name, "truncated")
    save_file({k: v for k, v in load_bytes(bytes_).items() if k != NAME}, victim)
    refused(tmp_path, config, victim.name, NAME, "does not hold")
    index.write_text("{}")
    refused(tmp_path, config, index.name, "weight_map")
    index.write_text('{"weight_map":\n')
    refused(tmp_path, config, f"{index.name}:2")


def load_bytes(content):
    from safetensors.numpy import load

    return load(content)
