"""Any mesh gives the same update, and moves only what it has to."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.learner.update import abstract_batch
from jaxrl.runtime.config import base_config
from jaxrl.runtime.mesh import RULES, logical_rules, make_mesh, shardings, split_slices, to_spec
from models.config import DecoderConfig

LAYERS, V, D = 3, 208, 32  # of mesh_worker.CONFIG


def run_worker(out, *meshes):
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.learner.mesh_worker", str(out), *meshes]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    arrays = np.load(out)
    info = {name: json.loads(str(arrays[name])) for name in meshes}
    gradients = {name: {k.split("|")[1]: arrays[k] for k in arrays if k.startswith(name + "|")} for name in meshes}
    return info, gradients


def agree(info, gradients, names):
    """All to float32 rounding with the first: relative to the norm of the whole gradient."""
    first = names[0]
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in gradients[first].values()))
    assert norm > 1e-3 and info[first]["metrics"]["nonfinite"] == 0
    for name in names[1:]:
        for key, want in gradients[first].items():
            assert np.abs(gradients[name][key] - want).max() < 1e-5 * norm, (name, key)
        for key, want in info[first]["metrics"].items():
            assert info[name]["metrics"][key] == pytest.approx(want, rel=2e-5, abs=1e-6), (name, key)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_worker(tmp_path_factory.mktemp("mesh") / "out.npz", "1,1,1", "2,2,2@2")


def test_all_three_axes_together_agree_with_one_device(two):
    agree(*two, ["1,1,1", "2,2,2@2"])


def test_parameters_are_split_over_fsdp_and_tensor(two):
    shards = two[0]["2,2,2@2"]["shards"]
    assert shards["['layers']['attn']['q']"] == [3, 16, 32]
    assert shards["['layers']['mlp']['down']"] == [3, 40, 16]
    assert shards["['embed']['embedding']"] == [104, 16]
    assert shards["['lm_head']['kernel']"] == [16, 104]
    assert shards["['layers']['attn_norm']['scale']"] == [3, 32]


def test_collectives_of_the_update(two):
    """Parameters are gathered inside the layer loops, one layer at a time; logits never travel; counts are pinned."""
    info, _ = two
    assert info["1,1,1"]["found"] == []
    found, counts = info["2,2,2@2"]["found"], info["2,2,2@2"]["counts"]
    gathers = [(where, s) for where, kind, shapes in found if kind == "all-gather" for s in shapes]
    one_layer, head = 32 * 40, V // 2 * D  # the largest matrix of a layer, of the tensor-sharded vocabulary
    for where, shape in gathers:
        assert np.prod(shape) <= max(one_layer, head, 8 * 48 * D // 2), (where, shape)
        assert LAYERS not in shape[:1], f"stacked layers are gathered at once: {shape}"
    in_loops = [s for where, s in gathers if where != "entry" and np.prod(s) in (32 * 32, 32 * 8, 32 * 40)]
    assert len(in_loops) == 2 * 7  # q, k, v, o, gate, up, down; forward and backward
    for _, kind, shapes in found:
        for shape in shapes:
            assert not (shape[-1:] == [V] or shape[-1:] == [V // 2] and len(shape) > 1 and shape[0] > D), (kind, shape)
    # 3 layers x 2 x 7 + head, embedding, token ids, hidden; a newer compiler may do with fewer
    pinned = {"all-gather": 46, "all-reduce": 34, "reduce-scatter": 1, "all-to-all": 2, "collective-permute": 1}
    assert counts.keys() <= pinned.keys() and all(n <= pinned[kind] for kind, n in counts.items()), counts
    assert counts["reduce-scatter"] == 1 and counts["all-to-all"] == 2  # head gradient; embedding there and back


def test_between_slices_only_the_gradient_travels(two):
    """Each chip sends its part of it (float32), and a few scalars."""
    found = two[0]["2,2,2@2"]
    part = 4 * sum(np.prod(shape) for shape in found["shards"].values())
    assert 0.95 * part < found["far"] <= part  # norms are whole on several chips, which share the sending


@pytest.mark.slow
def test_every_mesh_agrees(tmp_path):
    """(8,1,1) data, (1,8,1) fsdp, (1,1,8) tensor (with replicated key-value heads), and sequence parallelism."""
    names = ["1,1,1", "8,1,1", "1,8,1", "1,1,8", "2,2,2", "1,1,8+sp", "2,2,2+sp", "4,2,1@2"]
    agree(*run_worker(tmp_path / "out.npz", *names), names)


@pytest.mark.slow
def test_every_mesh_agrees_on_a_mixture_of_experts(tmp_path):
    """Experts on fsdp or on an axis of their own, their width on tensor; load-balancing loss included."""
    names = ["1,1,1+moe", "2,2,2+moe", "1,8,1+moe", "4,1,2+moe", "2,2,1+moe2", "1,2,2+moe2", "1,1,1+moe8"]
    info, gradients = run_worker(tmp_path / "out.npz", *names)
    agree(info, gradients, names)
    assert info["2,2,2+moe"]["shards"]["['layers']['mlp']['experts_up']"] == [3, 4, 32, 12]
    assert info["1,2,2+moe2"]["shards"]["['layers']['mlp']['experts_up']"] == [3, 4, 16, 12]  # D on fsdp, too
    assert info["1,2,2+moe2"]["shards"]["['layers']['attn']['q']"] == [3, 8, 32]  # dense ones on fsdp and expert
    assert info["1,1,1+moe"]["metrics"]["moe/balance_loss"] > 2 > info["1,1,1+moe"]["metrics"]["moe/load_max"] / 4
    assert all("['experts" not in k or np.abs(g).max() > 0 for k, g in gradients["1,8,1+moe"].items())


@pytest.mark.slow
def test_every_mesh_agrees_on_adapters(tmp_path):
    """Beside an int8 base, split like the matrices that they belong to."""
    names = ["1,1,1+lora", "2,2,2+lora", "1,1,8+lora"]
    info, gradients = run_worker(tmp_path / "out.npz", *names)
    agree(info, gradients, names)
    shards = info["2,2,2+lora"]["shards"]
    assert set(shards) == set(gradients[names[0]]) and shards["['layers']['attn']['q_lora_a']"] == [3, 16, 4]
    assert shards["['layers']['attn']['q_lora_b']"] == [3, 4, 32]
    assert shards["['layers']['mlp']['down_lora_a']"] == [3, 40, 4]
    # the base has no gradient: nothing of a head's size is scattered back
    assert info["2,2,2+lora"]["counts"].get("reduce-scatter", 0) == 0


def test_sequence_parallelism_splits_the_tokens_of_what_lies_between_blocks():
    """[R, T, D] has its rows on data and fsdp, and with the option its tokens on tensor."""
    config, mesh, found = base_config(), make_mesh(1, 1, 1, devices=jax.devices()[:1]), []
    config.batch.row_tokens = 16
    for config.mesh.sequence_parallel in (False, True):
        learner = Learner(config, DecoderConfig(11, 8, 12, 2, 2, 1, 4, model_type="llama"), mesh)
        traced = learner.programs.update.trace(learner.abstract_state(), abstract_batch(mesh, (2, 3, 16), 48))
        found.append(set(re.findall(r"P\(\('data', 'fsdp', 'expert'\), ('tensor'|None), None\)", str(traced.jaxpr))))
    assert found == [{"None"}, {"'tensor'"}]


def test_make_mesh_fills_and_refuses():
    devices = jax.devices()[:1] * 8
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    for sizes, message in [
        ((2, 2, 1), "mesh.data=2, mesh.fsdp=2, mesh.expert=1, mesh.tensor=1: the product must be 8"),
        ((3, -1, 1), "must be a divisor of 8"),
        ((-1, -1, 1), "at most one may be -1"),
        ((0, 1, 8), "sizes must be positive"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            make_mesh(*sizes, devices=devices)
        assert "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as far as a mesh's order looks at it."""

    id: int
    platform: str = "cpu"
    process_index: int = 0
    slice_index: int | None = None


def test_slices_are_what_the_devices_say():
    tpus = [Chip(i, "tpu", i // 2, i % 2) for i in range(8)]  # listed in turn
    assert [[d.id for d in s] for s in split_slices(tpus, 2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for slices in (1, 4):  # a run that does not say so would send everything over the network
        with pytest.raises(UserError, match=rf"mesh.slices={slices}: the 8 devices are on 2 slice"):
            split_slices(tpus, slices)
    gpus = [Chip(i, "gpu", process_index=1 - i // 4) for i in range(8)]
    assert [[d.id for d in s] for s in split_slices(gpus, 2)] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    with pytest.raises(UserError, match="mesh.slices=3: 8 devices"):
        split_slices(gpus, 3)
    with pytest.raises(UserError, match="mesh.data=1 must be a multiple of mesh.slices=2"):
        make_mesh(1, 8, 1, devices=jax.devices()[:1] * 8, slices=2)


class FakeMesh:
    """A mesh as far as the rules look at it: its sizes. Real ones of these sizes need as many devices."""

    def __init__(self, **shape):
        self.shape = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | shape


def test_rules_fit_the_model():
    assert logical_rules(FakeMesh(tensor=4), num_kv_heads=4, vocab_size=100) == RULES
    assert logical_rules(FakeMesh(tensor=8), num_kv_heads=4)["kv_heads"] is None
    assert logical_rules(FakeMesh(tensor=8), vocab_size=100)["vocab"] is None
    assert logical_rules(FakeMesh(tensor=2), sequence_parallel=True)["seq"] == "tensor"
    assert to_spec(P("layers", "embed", "heads"), RULES) == P(None, ("fsdp", "expert"), "tensor")
    with pytest.raises(KeyError):
        to_spec(P("breadth"), RULES)


def test_a_dimension_that_does_not_divide_is_named():
    mesh = jax.sharding.AbstractMesh((1, 4, 1, 2), ("data", "fsdp", "expert", "tensor"))
    shape = {"attn": {"q": jax.ShapeDtypeStruct((3, 30, 64), np.float32)}}
    specs = {"attn": {"q": P("layers", "embed", "heads")}}
    with pytest.raises(UserError, match=r"mesh.fsdp=4 does not divide dimension 30 of parameter attn/q \(3, 30, 64\)"):
        shardings(mesh, specs, abstract=shape)
    assert shardings(mesh, specs)["attn"]["q"].spec == P(None, ("fsdp", "expert"), "tensor")
