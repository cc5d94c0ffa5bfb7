"""Preflight: real TPU compilations of small and of shipped configs (slow), and every way to ask wrongly (fast)."""

import ast
import importlib.util
import math
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest

from jaxrl import build, preflight
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.runtime import compilers, hardware
from jaxrl.runtime.config import base_config, parse_config, validate
from models.decoder import abstract_params

ROOT = pathlib.Path(__file__).parents[1]
PODS = [
    ("l1_r1_distill_1_5b.py:exact", 1_777_088_000),
    ("l1_r1_distill_1_5b.py:max", 1_777_088_000),
    ("lspo_qwen25_math_7b.py:gspo", 7_615_616_512),
    ("lspo_qwen25_math_7b.py:grpo", 7_615_616_512),
    ("lspo_qwen25_math_7b.py:dapo", 7_615_616_512),
    ("lspo_qwen25_math_7b_256.py:gspo", 7_615_616_512),
    ("lspo_qwen3_4b.py", 4_022_468_096),
    ("lspo_llama32_3b.py", 3_212_749_824),
    ("maspo_qwen3_4b.py", 4_022_468_096),
    ("maspo_r1_distill_7b.py", 7_615_616_512),
    ("maspo_r1_distill_14b.py", 14_770_033_664),
]
libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def pod(name):
    config = parse_config(["preflight", f"--config={ROOT}/configs/pods/{name}"])
    config.model.path = ""
    return config


def small():
    config = base_config()
    config.task.name, config.task.data = "math", "x.jsonl"
    config.model.dtype, config.model.remat = "bfloat16", "full"
    config.model.shape.update(
        dict(vocab_size=8192, hidden_size=256, intermediate_size=512, num_layers=3, num_heads=4, num_kv_heads=2,
             head_dim=128, max_position_embeddings=1024)
    )
    config.batch.prompts, config.batch.group_size, config.batch.updates = 8, 4, 2
    config.batch.micro_tokens = config.batch.row_tokens = 512
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.sampling.max_prompt, config.sampling.max_tokens = 128, 384
    config.sampling.slots, config.sampling.chunk, config.sampling.window = 16, 32, 128
    return config


# --------------------------------------------------------------------------------------------- asked wrongly


@pytest.mark.parametrize("topology", ["v5e", "v9x:4x4", "4x4", "v5e:4by4", "h100:2x4", "h9000:8", "0xh100:8"])
def test_topology_that_is_none(topology):
    with pytest.raises(UserError, match="v5e:4x4, v5p:2x2x2 or v6e:4x4"):
        preflight.preflight(small(), topology)


@libtpu
def test_shape_that_libtpu_refuses():
    with pytest.raises(UserError, match="v5e:3x5.*libtpu"):
        preflight.preflight(small(), "v5e:3x5")


def test_no_topology():
    with pytest.raises(UserError, match="--topology=v5e:4x4"):
        preflight.preflight(small(), "")


def test_missing_libtpu(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a))
    with pytest.raises(UserError, match="pip install"):
        preflight.preflight(small(), "v5e:2x2")


@libtpu
def test_mesh_that_does_not_match_the_chips():
    config = small()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 3, 1, 1
    with pytest.raises(UserError, match="mesh.data=3.*4, the number of devices"):
        preflight.preflight(config, "v5e:2x2")


@libtpu
@pytest.mark.parametrize(("topology", "refused"), [("v5e:4x4", True), ("v6e:2x4", False), ("v5p:4x4x4", False)])
def test_slices_on_which_a_host_cannot_sample_are_known_without_trying(topology, refused):
    mesh = slice_mesh(small(), topology)
    reason = preflight.sampling_refused(mesh, hardware.chip(mesh.devices.flat[0].device_kind))
    assert bool(reason) == refused and (not refused or "v5p" in reason)


@libtpu
def test_one_chip_is_compiled_for_as_a_tpu():
    """Not as the machine that compiles: a CPU samples with other matrices and another cache layout."""
    config = small()
    mesh = slice_mesh(config, "v5e:1x1")
    decoder = build.decoder_config(config)
    tokenizer = types.SimpleNamespace(eos_ids=(0, 1), vocab_size=decoder.vocab_size, unused_ids=())
    sampler = build.sampler(config, decoder, tokenizer, mesh)
    assert sampler.placement.platform == "tpu"
    config.model.shape.tie_embeddings = True  # a CPU would get an untied head
    found = {p.name: p for p in preflight.programs(config, build.decoder_config(config), mesh)}
    out = found["layout"].lower().out_info
    assert "lm_head" not in out


@libtpu
def test_offloaded_moments_take_no_memory_of_the_chip():
    """Each of the two moments is as large as the float32 parameters."""
    config = small()
    mesh = slice_mesh(config, "v5e:2x2")
    decoder = build.decoder_config(config)
    resident = []
    for config.optimizer.offload in (False, True):
        learner = Learner(config, decoder, mesh)
        resident.append(preflight._bytes(learner.abstract_state()))
        parameters = preflight._bytes(learner.abstract_state().params)
    assert resident[0] - resident[1] == 2 * parameters


@libtpu
def test_slots_that_do_not_divide():
    config = small()
    config.sampling.slots = 6
    with pytest.raises(UserError, match="config.sampling.slots=6 must be a multiple of 4"):
        list(preflight.programs(config, build.decoder_config(config), slice_mesh(config, "v5e:2x2")))


@libtpu
def test_command_line_errors_are_one_line():
    command = [sys.executable, "-m", "jaxrl.preflight", "--config=configs/pods/lspo_llama32_3b.py", "--topology=v5e:7"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: topology 'v5e:7'")


# ------------------------------------------------------------------------------------------ the shipped configs


def slice_mesh(config, topology):
    return build.mesh(config, compilers.target(topology).devices)


def test_every_pod_config_is_listed_here():
    files = {p.name for p in (ROOT / "configs/pods").glob("*.py")} - {"__init__.py", "shapes.py", "recipes.py"}
    assert files == {name.split(":")[0] for name, _ in PODS}


@pytest.mark.parametrize(("name", "parameters"), PODS)
def test_pod_config_is_valid_and_has_the_published_size(name, parameters):
    config = pod(name)
    validate(config)
    decoder = build.decoder_config(config)
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(abstract_params(decoder)[0])) == parameters
    assert config.topology.split(":")[0] in ("v5e", "v5p", "v6e")


@pytest.mark.parametrize("name", [name for name, _ in PODS])
@libtpu
def test_pod_config_places_on_its_slice(name):
    """Everything that preflight does short of compiling: meshes, shardings, shapes of every program."""
    config = pod(name)
    mesh = slice_mesh(config, config.topology)
    chip = hardware.chip(mesh.devices.flat[0].device_kind)
    found = preflight.programs(config, build.decoder_config(config), mesh)
    assert [p.name for p in found] == ["layout", "prefill", "move layer", "decode", "score", "update"]
    assert all(p.resident < chip.hbm for p in found)


def docstring(name):
    """Of a pod config's file, as one line."""
    return " ".join(ast.get_docstring(ast.parse((ROOT / "configs/pods" / name.split(":")[0]).read_text())).split())


def documented(name):
    """{program: GiB per chip} that a pod config's docstring reports, and the GiB that its chip has."""
    figures = re.search(r"Preflight on (\S+), GiB of ([0-9.]+) a chip: (.*?)[.;] ", docstring(name) + " ")
    assert figures, f"{name} reports no preflight"
    needed = re.findall(r"(\w[\w ]*?) ([0-9.]+)(?:,|$)", figures[3])
    return figures[1], float(figures[2]), {program: float(value) for program, value in needed}


@pytest.mark.parametrize("name", [name for name, _ in PODS])
def test_docstring_tells_slice_and_memory(name):
    topology, available, needed = documented(name)
    config = pod(name)
    assert topology == config.topology
    kinds = {"v5e": "tpu v5 lite", "v5p": "tpu v5", "v6e": "tpu v6 lite"}
    assert available == round(hardware.chip(kinds[topology.split(":")[0]]).hbm / hardware.GIB, 2)
    assert "update" in needed and len(needed) > 1 and max(needed.values()) <= available


def speed(text):
    """Tokens per second of a step, as preflight's last line and the docstrings tell them."""
    return float(re.search(r"([0-9,]+)\s+tokens/s", text)[1].replace(",", ""))


FIRST = ["l1_r1_distill_1_5b.py:exact", "lspo_llama32_3b.py", "lspo_qwen25_math_7b.py:gspo"]
ONE_OF_EACH = {name.split(":")[0]: name for name, _ in reversed(PODS)}.values()
LATER = [pytest.param(name, marks=pytest.mark.last) for name in ONE_OF_EACH if name not in FIRST]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST + LATER)
@libtpu
def test_pod_config_fits_in_what_its_docstring_says(name):
    """One to four minutes each."""
    config = pod(name)
    lines = []
    assert preflight.preflight(config, config.topology, lines.append), "\n".join(lines)
    found = dict(re.findall(r"^(\w[\w ]*?) +([0-9.]+) of ", "\n".join(lines), re.M))
    for program, figure in documented(name)[2].items():
        assert float(found[program]) == pytest.approx(figure, rel=0.1), program
    assert speed(lines[-1]) == pytest.approx(speed(docstring(name)), rel=0.1)


# ------------------------------------------------------------------------------------------------ a small one


@pytest.mark.slow
@libtpu
def test_small_config_compiles_and_counts_every_loop():
    config = small()
    mesh = slice_mesh(config, "v5e:2x2")
    decoder = build.decoder_config(config)
    chip = hardware.chip(mesh.devices.flat[0].device_kind)
    rows = {p.name: preflight.check(p, chip) for p in preflight.programs(config, decoder, mesh)}
    assert all(r.fits and r.compiled.arguments < r.needed and r.seconds for r in rows.values())

    def flops(name):
        counts = rows[name].compiled.counts
        return counts.flops + counts.kernel_flops

    # a row of 512 on each of four chips; attention is causal, so a token sees 256 others on average
    score = rows["score"].program
    forward = score.trips * 512 * hardware.model_flops_per_token(decoder, 256)
    assert score.tokens == score.trips * 4 * 512
    assert flops("score") == pytest.approx(forward, rel=0.02)
    # forward, backward, and the forward again (remat); the head is not computed a third time for free
    assert flops("update") == pytest.approx(4 * forward, rel=0.1)
    steps, slots = config.sampling.chunk, config.sampling.slots / 4
    linear = hardware.model_flops_per_token(decoder, 0)
    assert steps * slots * linear < flops("decode") < 1.6 * steps * slots * linear
    assert rows["decode"].program.passes == steps
    text = [preflight.line(r, chip) for r in rows.values()]
    assert all(len(t) == len(preflight.HEADER) for t in text)


@pytest.mark.slow
@libtpu
def test_offloaded_update_compiles_with_moments_outside_the_chips_memory():
    config = small()
    mesh = slice_mesh(config, "v5e:2x2")
    decoder, rows = build.decoder_config(config), []
    chip = hardware.chip(mesh.devices.flat[0].device_kind)
    for config.optimizer.offload in (False, True):
        rows.append(preflight.check(preflight.programs(config, decoder, mesh)[-1], chip).compiled)
    parameters = preflight._bytes(Learner(config, decoder, mesh).abstract_state().params)
    assert rows[0].arguments - rows[1].arguments == pytest.approx(2 * parameters, rel=0.05)
    assert rows[1].needed <= rows[0].needed


@pytest.mark.slow
@libtpu
def test_too_large_names_buffers_and_a_setting_that_fits():
    config = small()
    config.sampling.slots = 40960
    lines = []
    assert not preflight.preflight(config, "v5e:2x2", lines.append)
    text = "\n".join(lines)
    assert "decode does not fit" in text and "update does not fit" not in text
    assert "attn/dynamic_update_slice" in text  # the cache
    assert "decode fits" in text and "--config.sampling.slots=20480" in text
