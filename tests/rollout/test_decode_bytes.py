"""What one decode step of the shipped pod configs moves through a chip's memory, by the TPU compiler."""

import pytest

from jaxrl import build, preflight
from jaxrl.errors import UserError
from jaxrl.runtime import hlo, tpu_compiler
from jaxrl.runtime.config import validate
from tests.test_preflight import pod


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l1_r1_distill_1_5b.py:exact", "lspo_qwen25_math_7b.py:gspo"])
def test_a_decode_step_reads_weights_and_cache_once(name):
    config = pod(name)
    validate(config)
    try:
        devices, _ = tpu_compiler.slice_devices(config.topology)
    except UserError as e:
        pytest.skip(str(e))
    decoder = build.decoder_config(config)
    mesh = preflight.make_mesh(config, devices)
    program = next(p for p in preflight.programs(config, decoder, mesh) if p.name == "decode")
    compiled = tpu_compiler.compile_program(program.lower(), program.trips)
    unread = 0 if decoder.tie_embeddings else 2 * decoder.vocab_size * decoder.hidden_size
    least = compiled.arguments - unread / config.sampling.tensor  # of the embedding it needs a few rows only
    step = compiled.counts.bytes / program.trips
    assert 0.95 * least < step < 1.25 * least, (step, least, step / least)

    ops = [op for body in hlo.parse(compiled.text)[0].values() for op in body.values()]
    dims = lambda op: op.shape.lstrip("(").split("{")[0]  # noqa: E731
    cache = {dims(op) for op in ops if op.opcode == "dynamic-update-slice" and dims(op).count(",") == 3}
    assert len(cache) == 1, cache
    moves = ("copy", "copy-start", "transpose", "convert")
    copies = [op.name for op in ops if dims(op) in cache and op.opcode in moves]
    assert copies == []
    # nor does any chip hold the logits of the whole vocabulary
    gathered = [op.shape for op in ops if op.opcode.startswith("all-gather")]
    assert all(hlo.shape_bytes(shape) < 4 * decoder.vocab_size for shape in gathered), gathered
