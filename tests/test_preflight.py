"""Preflight: real TPU compilations of small and of shipped configs (slow), and every way to ask wrongly (fast)."""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import math
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jaxrl import build, memory, preflight
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.rollout import replay
from jaxrl.runtime import compilers, gpu_targets, hardware
from jaxrl.runtime import mesh as meshes
from jaxrl.runtime.config import base_config, parse_config, validate
from models.config import LayerKind
from models.decoder import abstract_params

pytestmark = pytest.mark.optimized

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
cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)), reason="no GPU compiler"
)
GPUS = [
    ("l1_r1_distill_1_5b.py:exact", 1),
    ("l1_r1_distill_1_5b.py:max", 1),
    ("lspo_llama32_3b.py", 1),
    ("lspo_qwen25_math_7b.py:gspo", 8),
    ("lspo_qwen25_math_7b_16.py:gspo", 16),
    ("maspo_qwen3_4b.py", 1),
    ("maspo_r1_distill_7b.py", 8),
]


def pod(name, folder="pods"):
    config = parse_config(["preflight", f"--config={ROOT}/configs/{folder}/{name}"])
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


def test_missing_gpu_compiler(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "cuda" in name else find(name, *a))
    version = importlib.metadata.version("jaxlib")
    with pytest.raises(UserError, match=f"pip install --no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt"):
        preflight.preflight(small(), "h100:8")


@libtpu
def test_slots_of_another_number_of_hosts_are_refused():
    """64 hosts, each with 192 slots, start 12,288 answers at once; eight hosts of four chips would need 1,536."""
    config = pod("lspo_qwen25_math_7b_256.py:gspo")
    with pytest.raises(UserError, match="slots=192 is what each of 64 host.*v5p:2x4x4 has 8 hosts"):
        preflight.find_target(config, "v5p:2x4x4")
    config.topology = "v5p:2x4x4"
    assert preflight.find_target(config, "v5p:2x4x4").hosts == 8


@libtpu
@pytest.mark.parametrize(
    ("topology", "devices", "hosts", "slices"),
    [("v5e:2x4", 8, 1, 1), ("v6e:2x4", 8, 1, 1), ("v5e:2x2", 4, 1, 1), ("v5p:2x2x2", 8, 2, 1), ("v5e:4x4", 16, 4, 1),
     ("tpu7x:2x2x1", 8, 1, 1), ("2xv5e:2x4", 16, 2, 2), ("2xtpu7x:2x2x1", 16, 2, 2)],
)
def test_layout_of_hosts_and_slices(topology, devices, hosts, slices):
    """A v5litepod-8 and a v6e-8 are one machine; a chip of tpu7x is two devices."""
    target = compilers.target(topology)
    assert (len(target.devices), target.hosts, target.slices) == (devices, hosts, slices)
    mesh = meshes.make_mesh(slices, -1, 1, target.devices, slices)
    assert preflight.slices_of(mesh) == tuple(i * slices // devices for i in range(devices))
    assert target.chip.clock > 0 and target.chip.network > 0


@libtpu
def test_several_slices_must_be_said():
    with pytest.raises(UserError, match="mesh.slices=1: the 16 devices are on 2 slice"):
        preflight.preflight(small(), "2xv5e:2x4")


@cuda
@pytest.mark.parametrize("card", sorted(gpu_targets.GPUS))
def test_every_card_is_known_to_compiler_and_table(card):
    """Published sizes and peaks of one of them are below."""
    for topology, devices, hosts in ((card, 1, 1), (f"{card}:8", 8, 1), (f"2x{card}:4", 8, 2)):
        target = compilers.target(topology)
        assert (len(target.devices), target.hosts, target.slices) == (devices, hosts, hosts)
        assert target.devices[0].device_kind == gpu_targets.GPUS[card].kind
    assert 0 < target.chip.hbm < hardware.chip(gpu_targets.GPUS[card].kind).hbm


def test_target_description_of_an_a6000():
    text = gpu_targets.target_config("a6000")
    for fact in ("major: 8 minor: 6 feature_extension: NONE", "core_count: 84", "shared_memory_per_block_optin: 101376",
                 "memory_bandwidth: 768000000000", "clock_rate_ghz: 1.8", "threads_per_core_limit: 1536"):
        assert fact in text, fact


@libtpu
def test_the_scripts_default_slice_takes_most_pod_configs():
    default = re.search(r"ACCELERATOR_TYPE:-(\S+?)}", (ROOT / "tpu_scripts/common.sh").read_text())[1]
    assert default == "v6e-8"
    for name in ("l1_r1_distill_1_5b.py", "lspo_llama32_3b.py", "lspo_qwen25_math_7b.py", "maspo_qwen3_4b.py"):
        config = pod(name)
        target = preflight.find_target(config, "v6e:2x4")
        mesh = build.mesh(config, target.devices)
        assert not preflight.sampling_refused(mesh, target.chip)
        found = preflight.programs(config, build.decoder_config(config), mesh)
        assert all(p.resident < target.chip.hbm for p in found), name


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
def test_a_long_prompt_is_compiled_for_in_parts():
    """The last part runs the kernel over all columns before it, and needs less memory than the whole prompt."""
    config, needed = small(), []
    config.sampling.max_prompt, config.sampling.max_tokens = 448, 64
    mesh = slice_mesh(config, "v5e:1x1")
    for config.sampling.prefill_chunk in (0, 128):
        found = {p.name: p for p in preflight.programs(config, build.decoder_config(config), mesh)}
        needed.append(found["prefill"].lower().compile().memory_analysis().temp_size_in_bytes)
        assert found["prefill"].tokens * found["prefill"].calls == 8 * 448
    assert needed[1] < needed[0] / 2


@libtpu
def test_layers_with_a_window_are_compiled_for_with_rings():
    """The TPU's kernel takes them; two layers of three hold 256 of 1,024 tokens."""
    config = small()
    config.sampling.max_prompt, config.sampling.max_tokens, config.batch.row_tokens = 512, 512, 1024
    mesh, decoder = slice_mesh(config, "v5e:1x1"), build.decoder_config(config)
    arguments = []
    for kinds in ((), (LayerKind(1e4, window=128), LayerKind(1e4, window=128), LayerKind(1e4))):
        found = preflight.programs(config, dataclasses.replace(decoder, layer_kinds=kinds), mesh)
        (decode,) = (p for p in found if p.name == "decode")
        arguments.append(decode.lower().compile().memory_analysis().argument_size_in_bytes)
    cache = 16 * 1024 * 3 * 2 * 2 * 128 * 2  # slots, tokens, layers, keys and values, heads, bytes
    assert 0.45 * cache < arguments[0] - arguments[1] < 0.55 * cache


@libtpu
def test_offloaded_moments_take_no_memory_of_the_chip():
    """Each of the two moments is as large as the float32 parameters."""
    config = small()
    mesh = slice_mesh(config, "v5e:2x2")
    decoder = build.decoder_config(config)
    resident = []
    for config.optimizer.offload in (False, True):
        learner = Learner(config, decoder, mesh)
        resident.append(memory.bytes_of(learner.abstract_state()))
        parameters = memory.bytes_of(learner.abstract_state().params)
    assert resident[0] - resident[1] == 2 * parameters


@libtpu
def test_slots_that_do_not_divide():
    config = small()
    config.sampling.slots = 6
    with pytest.raises(UserError, match="config.sampling.slots=6 must be a multiple of 4"):
        list(preflight.programs(config, build.decoder_config(config), slice_mesh(config, "v5e:2x2")))


@libtpu
def test_replayed_experts_are_part_of_the_programs():
    """Decoding returns them, score and update take them: shapes of a small mixture of experts."""
    config = small()
    config.model.shape.update(dict(model_type="qwen3_moe", num_experts=4, experts_per_token=2, expert_size=128))
    config.sampling.router_replay = True
    found = {p.name: p for p in preflight.programs(config, build.decoder_config(config), slice_mesh(config, "v5e:2x2"))}
    assert "tensor<32x16x3x2xui8>" in found["decode"].lower().as_text()
    for name in ("score", "update"):
        assert "x512x3x2xui8>" in found[name].lower().as_text()


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


def test_every_gpu_config_is_listed_here():
    files = {p.name for p in (ROOT / "configs/gpus").glob("*.py")} - {"__init__.py"}
    assert files == {name.split(":")[0] for name, _ in GPUS}


@pytest.mark.parametrize(("name", "devices"), GPUS)
@cuda
def test_gpu_config_is_valid_and_places_on_its_cards(name, devices):
    config = pod(name, "gpus")
    validate(config)
    target = preflight.find_target(config, config.topology)
    found = preflight.programs(config, build.decoder_config(config), build.mesh(config, target.devices))
    assert len(target.devices) == devices and all(p.resident < target.chip.hbm for p in found)


@pytest.mark.parametrize(("name", "parameters"), PODS)
def test_pod_config_is_valid_and_has_the_published_size(name, parameters):
    config = pod(name)
    validate(config)
    decoder = build.decoder_config(config)
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(abstract_params(decoder)[0])) == parameters
    assert config.topology.split(":")[0] in ("v5e", "v5p", "v6e")


def test_the_mixture_of_experts_has_the_published_size():
    config = parse_config(["preflight", f"--config={ROOT}/configs/lspo_qwen3_30b_a3b.py:v5p"])
    config.model.path = ""
    validate(config)
    sizes = jax.tree.leaves(abstract_params(build.decoder_config(config))[0])
    assert sum(math.prod(a.shape) for a in sizes) == 30_532_122_624


@pytest.mark.parametrize("name", ["lspo_qwen3_30b_a3b.py:v5p", "lspo_qwen3_30b_a3b.py:v6e", "lora_r1_distill_14b.py",
                                  "lora_qwen25_math_7b.py:v5e"])
@libtpu
def test_experts_and_adapters_place_on_their_slices(name):
    config = parse_config(["preflight", f"--config={ROOT}/configs/{name}"])
    config.model.path = ""
    validate(config)
    mesh = slice_mesh(config, config.topology)
    found = preflight.programs(config, build.decoder_config(config), mesh)
    assert all(p.resident < hardware.chip(mesh.devices.flat[0].device_kind).hbm for p in found)


@pytest.mark.parametrize("name", [name for name, _ in PODS])
@libtpu
def test_pod_config_places_on_its_slice(name):
    """Everything that preflight does short of compiling: meshes, shardings, shapes of every program."""
    config = pod(name)
    mesh = slice_mesh(config, config.topology)
    chip = hardware.chip(mesh.devices.flat[0].device_kind)
    found = preflight.programs(config, build.decoder_config(config), mesh)
    assert [p.name for p in found] == ["layout", "prefill", "write pages", "decode", "score", "update"]
    assert all(p.resident < chip.hbm for p in found)


def docstring(name, folder="pods"):
    """Of a pod config's file, as one line."""
    path = ROOT / "configs" / folder / name.split(":")[0]
    return " ".join(ast.get_docstring(ast.parse(path.read_text())).split())


def documented(name, folder="pods"):
    """{program: GiB per chip} that a pod config's docstring reports, and the GiB that its chip has."""
    text = docstring(name, folder) + " "
    figures = re.search(r"Preflight on (\S+), GiB of ([0-9.]+) a (?:chip|card): (.*?)[.;] ", text)
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


@pytest.mark.parametrize("name", [name for name, _ in GPUS])
def test_docstring_tells_cards_and_memory(name):
    topology, available, needed = documented(name, "gpus")
    card = topology.split("x")[-1].split(":")[0] if topology[0].isdigit() else topology.split(":")[0]
    memory = hardware.chip(gpu_targets.GPUS[card].kind).hbm * hardware.GPU_MEMORY
    assert topology == pod(name, "gpus").topology and available == round(memory / hardware.GIB, 2)
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
    fits_as_documented(name, "pods")


def fits_as_documented(name, folder):
    config = pod(name, folder)
    lines = []
    assert preflight.preflight(config, config.topology, lines.append), "\n".join(lines)
    found = dict(re.findall(r"^(\w[\w ]*?) +([0-9.]+) of ", "\n".join(lines), re.M))
    for program, figure in documented(name, folder)[2].items():
        assert float(found[program]) == pytest.approx(figure, rel=0.1), program
    assert 0.9 < speed(lines[-1]) / speed(docstring(name, folder)) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if "1_5b" in n else pytest.param(n, marks=pytest.mark.last) for n, _ in GPUS])
@cuda
def test_gpu_config_fits_in_what_its_docstring_says(name):
    """One to three minutes each."""
    fits_as_documented(name, "gpus")


# ------------------------------------------------------------------------------------------------ a small one


def row(name, seconds, arguments, tokens=0.0):
    program = preflight.Program(name, None, 0, 1, tokens, 1)
    return preflight.Row(program, types.SimpleNamespace(arguments=arguments), 0, True, seconds, 0)


def test_one_wave_of_answers_takes_as_long_as_the_longest():
    """64 hosts, each with a slot an answer, a cache that costs nothing: steps of the longest answer, one prefill."""
    config = small()
    config.batch.prompts, config.batch.group_size, config.sampling.slots, config.sampling.max_tokens = 256, 16, 64, 512
    mesh = types.SimpleNamespace(size=64, devices=np.array([types.SimpleNamespace(process_index=i) for i in range(64)]))
    rows = [row("layout", 3, 0), row("prefill", 0.5, 0, 64 * 4 * 32), row("move layer", 0, 0),
            row("decode", config.sampling.chunk, 100)]  # fmt: skip
    seconds, found = preflight.rollout_seconds(rows, config, 1, mesh)
    assert len(found) == 4 and all(f.stats.steps == 512 for f in found)
    assert seconds == 3 + 512 + 0.5 * found[0].stats.prefill_calls
    lengths = replay.log_normal((100, 100), 1000, preflight.MEDIAN, preflight.SIGMA)
    assert lengths.mean() == pytest.approx(500, rel=0.02)


def test_the_steps_time_is_that_of_lengths_that_differ_and_says_what_it_leaves_out(monkeypatch):
    """One host, a slot an answer: the longest of 256 log-normal answers reaches the limit, the mean is half of it."""
    monkeypatch.setattr(build, "cache_sizes", lambda *_: dict(pages=32, cache_tokens=64 * 640))
    config = small()
    config.batch.prompts, config.batch.group_size, config.sampling.slots, config.sampling.max_tokens = 16, 16, 256, 512
    mesh = types.SimpleNamespace(size=1, devices=np.array([types.SimpleNamespace(process_index=0)]))
    rows = [row("layout", 0, 0), row("prefill", 0, 0, 1), row("write pages", 0, 0), row("score", 30, 0),
            row("update", 58, 0), row("decode", config.sampling.chunk, 100)]  # fmt: skip
    config.sampling.slots = 256
    text = preflight.summary(rows, config, types.SimpleNamespace(num_layers=1), mesh)
    rollout, total = (int(re.search(rf"{name} (\d+) s", text)[1]) for name in ("rollout", "tokens in"))
    assert rollout >= 512 and total == rollout + 88 and "score 30 s, update 58 s" in text
    assert "pages for 40,960 tokens" in text and "Not counted: grading" in text
    assert speed(text) == pytest.approx(16 * 16 * 256 / total, rel=0.01)


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
    assert steps * slots * linear <= flops("decode") < 1.6 * steps * slots * linear  # attention is a kernel
    assert rows["decode"].program.passes == steps
    text = [preflight.line(r, chip) for r in rows.values()]
    assert all(len(t) == len(preflight.HEADER) for t in text)


@pytest.mark.slow
@cuda
@pytest.mark.parametrize("attention, seen", [("auto", 512), ("triton", 256)])
def test_small_config_for_gpus_counts_what_the_mathematics_needs(attention, seen):
    """cuDNN computes all of a masked row's scores, so a token costs attention to 512 others; Triton's kernel half."""
    config = small()
    config.model.attention = attention
    target = compilers.target("2xh100:2")
    config.mesh.slices, config.mesh.data, config.mesh.fsdp = 2, 2, 2
    decoder, mesh = build.decoder_config(config), build.mesh(config, target.devices)
    found = preflight.programs(config, decoder, mesh)
    rows = {p.name: preflight.check(p, target.chip, preflight.slices_of(mesh)) for p in found}
    assert all(r.fits and r.compiled.arguments < r.needed and r.seconds > r.roofline for r in rows.values())
    score = rows["score"].compiled.counts
    forward = rows["score"].program.trips * 512 * hardware.model_flops_per_token(decoder, seen)
    assert score.flops + score.kernel_flops == pytest.approx(forward, rel=0.02)
    kernel = "dot_product_attention_fwd" if attention == "auto" else "pallas_call"
    assert score.kernels[kernel] == rows["score"].program.trips * 3
    assert only_gradients_cross(rows["update"], Learner(config, decoder, mesh))
    assert rows["decode"].compiled.counts.far == 0


@pytest.mark.slow
@libtpu
def test_two_slices_send_only_gradients_to_each_other():
    config = small()
    config.mesh.slices, config.mesh.data, config.mesh.fsdp = 2, 2, 4
    target = compilers.target("2xv5e:2x2")
    decoder, mesh = build.decoder_config(config), build.mesh(config, target.devices)
    update = preflight.check(preflight.programs(config, decoder, mesh)[-1], target.chip, preflight.slices_of(mesh))
    assert update.fits and only_gradients_cross(update, Learner(config, decoder, mesh))


def only_gradients_cross(update, learner):
    """Of the layers in bfloat16 and once a micro-batch; the vocabulary's in float32, on TPU once an update."""
    parameters = memory.bytes_of(learner.abstract_state().params)
    return 0.3 * parameters < update.compiled.counts.far < 1.3 * update.program.trips * parameters


@pytest.mark.slow
@libtpu
def test_offloaded_update_compiles_with_moments_outside_the_chips_memory():
    config = small()
    mesh = slice_mesh(config, "v5e:2x2")
    decoder, rows = build.decoder_config(config), []
    chip = hardware.chip(mesh.devices.flat[0].device_kind)
    for config.optimizer.offload in (False, True):
        rows.append(preflight.check(preflight.programs(config, decoder, mesh)[-1], chip).compiled)
    parameters = memory.bytes_of(Learner(config, decoder, mesh).abstract_state().params)
    assert rows[0].arguments - rows[1].arguments == pytest.approx(2 * parameters, rel=0.05)
    assert rows[1].needed <= 1.05 * rows[0].needed  # of a tiny model, whose moments on their way weigh as much


@pytest.mark.slow
@libtpu
def test_too_large_names_buffers_and_a_setting_that_fits():
    config = small()
    config.sampling.slots, config.sampling.pages = 40960, 0
    lines = []
    assert not preflight.preflight(config, "v5e:2x2", lines.append)
    text = "\n".join(lines)
    assert "decode does not fit" in text and "update does not fit" not in text
    assert "attn/dynamic_update_slice" in text  # the cache
    assert "decode fits" in text and "--config.sampling.slots=20480" in text
