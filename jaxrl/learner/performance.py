"""What one step's updates cost: padding, tokens per second, utilisation of the chips, memory."""

from __future__ import annotations

import numpy as np

from jaxrl.learner.packing import Packing
from jaxrl.runtime import hardware


def needed_flops(decoder, packing: Packing) -> float:
    """Matrix FLOPs of one forward pass: the decoder on all tokens, each attending to those before it in its own
    sequence and itself, the head on response tokens. Padding and recomputation are not counted."""
    head = 2.0 * decoder.hidden_size * decoder.vocab_size
    body = hardware.model_flops_per_token(decoder, packing.context) - head
    return float(packing.tokens * body + packing.num_tokens * head)


def performance(packings: list[Packing], learner, seconds: float) -> dict[str, float]:
    """The perf/ metrics of a step's updates, which took `seconds` in all (compiling included, if they did).

    padding_waste and padding_waste_unpacked: share of the computed positions that held padding, and that share
    with one sequence per row. update_tokens_per_second: prompt and response tokens. mfu: needed FLOPs (three
    forward passes for an update, one for a scoring pass) over the chips' bf16 peak; left out where the peak is
    unknown, as on a CPU. learner_compiles: since the start. See `hardware.peak_memory` for the rest.
    """
    if not packings:
        return {}
    out = {
        "perf/padding_waste": float(np.mean([p.waste for p in packings])),
        "perf/padding_waste_unpacked": float(np.mean([p.waste_to_longest for p in packings])),
        "perf/update_tokens_per_second": sum(p.tokens for p in packings) / seconds,
        "perf/learner_compiles": float(learner.compiles),
    }
    devices = list(learner.mesh.devices.flat)
    chip = hardware.chip(devices[0].device_kind)
    if chip is not None:
        passes = 3 + (not learner.objective.on_policy) + learner.objective.scores_reference
        flops = passes * sum(needed_flops(learner.decoder, p) for p in packings)
        out["perf/mfu"] = flops / (seconds * len(devices) * chip.flops)
    return out | hardware.peak_memory(devices)
