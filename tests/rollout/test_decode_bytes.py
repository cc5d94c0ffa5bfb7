"""What one decode step of the shipped pod configs moves through a chip's memory, by the TPU compiler."""

import math
import re

import pytest

from jaxrl import build, preflight
from jaxrl.errors import UserError
from jaxrl.runtime import compilers, hlo
from jaxrl.runtime.config import validate
from tests.test_preflight import pod

pytestmark = pytest.mark.optimized


def decoder_matrices(decoder) -> int:
    """Entries of the matrices that a decode step multiplies by, the head's too."""
    D, H, N, K = decoder.hidden_size, decoder.head_dim, decoder.num_heads, decoder.num_kv_heads
    layer = D * (2 * N + 2 * K) * H + 3 * D * decoder.intermediate_size
    return decoder.num_layers * layer + decoder.vocab_size * D


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "cache"),
    [
        ("l1_r1_distill_1_5b.py:exact", "same", "bf16[64,1,6144,128]"),
        ("l1_r1_distill_1_5b.py:exact", "int8", "s8[64,1,6144,128]"),
        ("lspo_qwen25_math_7b.py:gspo", "same", "bf16[128,1,5120,128]"),
    ],
)
def test_a_decode_step_reads_weights_and_cache_once(name, form, cache):
    config = pod(name)
    config.sampling.weights = config.sampling.cache = form
    config.sampling.pages, config.sampling.slots = 0, 2 * int(cache.partition("[")[2].split(",")[0])  # two replicas
    validate(config)
    try:
        devices = compilers.target(config.topology).devices
    except UserError as e:
        pytest.skip(str(e))
    decoder = build.decoder_config(config)
    mesh = build.mesh(config, devices)
    program = next(p for p in preflight.programs(config, decoder, mesh) if p.name == "decode")
    compiled = compilers.compile_program(program.lower(), program.trips)
    unread = 0 if decoder.tie_embeddings else 2 * decoder.vocab_size * decoder.hidden_size
    least = compiled.arguments - unread / config.sampling.tensor  # of the embedding it needs a few rows only
    step = compiled.counts.bytes / program.trips
    assert 0.95 * least < step < 1.1 * least, (step, least, step / least)
    size = 1 if form == "int8" else 2
    held = decoder.num_layers * 2 * size * math.prod(map(int, re.findall(r"[0-9]+", cache.partition("[")[2])))
    weights = size * decoder_matrices(decoder) / config.sampling.tensor
    assert compiled.arguments == pytest.approx(held + weights + unread / config.sampling.tensor, rel=0.03)

    bodies, entry = hlo.parse(compiled.text)
    ops = [op for body in bodies.values() for op in body.values()]
    dims = lambda op: op.shape.lstrip("(").split("{")[0]  # noqa: E731
    assert {dims(op) for op in ops if op.opcode == "dynamic-update-slice" and dims(op).count(",") == 3} == {cache}
    moves = ("copy", "copy-start", "transpose", "convert")
    fused = set(re.findall(r"calls=%?([\w.\-]+)", compiled.text))
    inside = [op for name in bodies.keys() - fused - {entry} for op in bodies[name].values()]
    copies = [op.name for op in inside if dims(op) == cache and op.opcode in moves]
    assert len(copies) <= 3, copies  # the compiler carries one layer's keys through vector memory
    # nor is a wider copy written out: what a fusion does inside does not reach memory
    outside = [op for body in bodies.keys() - fused for op in bodies[body].values()]
    wide = cache.replace("s8", "")
    assert form == "same" or [op.name for op in outside if dims(op).endswith(wide) and dims(op) != cache] == []
    # nor does any chip hold the logits of the whole vocabulary
    rows = int(cache.partition("[")[2].split(",")[0])
    gathered = [op.shape for op in ops if op.opcode.startswith("all-gather")]
    assert all(hlo.shape_bytes(shape) < rows * decoder.vocab_size for shape in gathered), gathered


@pytest.mark.slow
def test_a_decode_step_hands_its_pages_to_the_kernel_and_copies_none():
    config = pod("l1_r1_distill_1_5b.py:exact")
    config.sampling.slots, config.sampling.pages = 128, 64
    config.sampling.cache_tokens = 2 * 1408 * 64  # two replicas of 64 rows
    validate(config)
    try:
        devices = compilers.target(config.topology).devices
    except UserError as e:
        pytest.skip(str(e))
    decoder = build.decoder_config(config)
    program = next(p for p in preflight.programs(config, decoder, build.mesh(config, devices)) if p.name == "decode")
    compiled = compilers.compile_program(program.lower(), program.trips)
    assert compiled.counts.kernels == {"ragged_paged_attention_kernel": decoder.num_layers * program.trips}
    unread = 0 if decoder.tie_embeddings else decoder.vocab_size * decoder.hidden_size  # of each chip's half
    step = compiled.counts.bytes / program.trips
    assert 0.95 < step / (compiled.arguments - unread) < 1.1
    pages = decoder.num_layers * 2 * 2 * 1409 * 64 * decoder.head_dim  # one key-value head a chip
    assert compiled.counts.kernel_bytes / program.trips == pytest.approx(pages, rel=0.02)  # has no cycles, but a time
    pool, moves = "bf16[1409,64,2,128]", ("copy", "copy-start", "transpose", "convert")
    ops = [op for body in hlo.parse(compiled.text)[0].values() for op in body.values()]
    assert [op.opcode for op in ops if op.shape.startswith(pool) and op.opcode == "scatter"]
    assert [op.name for op in ops if pool in op.shape and op.opcode in moves] == []
