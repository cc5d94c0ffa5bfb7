"""What one step's updates cost: padding, tokens per second, utilisation of the chips, memory."""

from __future__ import annotations

import numpy as np

from jaxrl.learner.packing import PackedBatch, Packing
from jaxrl.runtime import hardware


def needed_flops(decoder, batch: PackedBatch) -> float:
    """Matrix FLOPs of one forward pass: the decoder on all tokens, each attending to those before it in its own
    sequence and itself, the head on response tokens. Padding and recomputation are not work."""
    live = np.asarray(batch.segment_ids) > 0
    tokens, context = live.sum(), (np.asarray(batch.positions)[live] + 1.0).mean()
    head = 2.0 * decoder.hidden_size * decoder.vocab_size
    body = hardware.model_flops_per_token(decoder, context) - head
    return float(tokens * body + batch.num_tokens * head)


def performance(batches: list[tuple[PackedBatch, Packing]], learner, seconds: float) -> dict[str, float]:
    """The perf/ metrics of a step's updates, which took `seconds` in all (compiling included, if they did).

    padding_waste and padding_waste_unpacked: share of the computed positions that held padding, and what it would
    have been with one sequence a row. update_tokens_per_second: prompt and response tokens. mfu: needed FLOPs (three
    forward passes for an update, one for a scoring pass) over the chips' bf16 peak; left out where the peak is
    unknown, as on a CPU. learner_compiles: since the start. See `hardware.peak_memory` for the rest.
    """
    if not batches:
        return {}
    out = {
        "perf/padding_waste": float(np.mean([packing.waste for _, packing, *_ in batches])),
        "perf/padding_waste_unpacked": float(np.mean([packing.waste_to_longest for _, packing, *_ in batches])),
        "perf/update_tokens_per_second": sum(float((b.segment_ids > 0).sum()) for b, *_ in batches) / seconds,
        "perf/learner_compiles": float(learner.compiles),
    }
    devices = list(learner.mesh.devices.flat)
    chip = hardware.chip(devices[0].device_kind)
    if chip is not None:
        passes = 3 + (not learner.objective.on_policy) + learner.objective.scores_reference
        flops = passes * sum(needed_flops(learner.decoder, b) for b, *_ in batches)
        out["perf/mfu"] = flops / (seconds * len(devices) * chip.flops)
    return out | hardware.peak_memory(devices)
