"""What known chips can do: one table, for FLOPs utilisation in the metrics and for preflight's rooflines.

Figures are the makers' published peaks for dense bf16 (fp32 accumulation), per chip.
"""

from __future__ import annotations

import dataclasses
import resource

import jax

from models.table import matrix_elements

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one jax device. flops: peak bf16 FLOP/s. hbm: usable bytes of memory. bandwidth: of that memory, bytes/s.
    link: bytes/s that it can send to its peers in all. network: bytes/s that it can send to another slice (TPU) or
    host (GPU), its share of what the host has. clock: cycles/s of the matrix units, which turns the TPU compiler's
    cycle estimates into seconds (0 where there are none)."""

    name: str
    flops: float
    hbm: float
    bandwidth: float
    link: float
    network: float
    clock: float = 0.0


# Part of `device.device_kind`, lower case -> chip. The first key that occurs wins, so longer keys come first.
# Networks: Google's figures for the data-centre network, a chip; for GPU servers one port a card of 400 Gbit/s (from
# Hopper on) or 200 (A100), for workstations 100 Gbit/s.
CHIPS = {
    "tpu v4": Chip("v4", 275e12, 31.5 * GIB, 1228e9, 270e9, 6.25e9, 1.05e9),
    "tpu v5 lite": Chip("v5e", 197e12, 15.75 * GIB, 819e9, 180e9, 3.125e9, 1.5e9),
    "tpu v5e": Chip("v5e", 197e12, 15.75 * GIB, 819e9, 180e9, 3.125e9, 1.5e9),
    "tpu v5": Chip("v5p", 459e12, 95.73 * GIB, 2765e9, 540e9, 6.25e9, 1.75e9),
    "tpu v6": Chip("v6e", 918e12, 31.24 * GIB, 1640e9, 360e9, 12.5e9, 1.75e9),
    "tpu7x": Chip("tpu7x", 1153.5e12, 94.75 * GIB, 3690e9, 300e9, 6.25e9, 2.2e9),  # a device is half a chip
    "b200": Chip("B200", 2250e12, 178 * GIB, 7672e9, 900e9, 50e9),
    "h200": Chip("H200", 989e12, 139 * GIB, 4800e9, 450e9, 50e9),
    "h100 pcie": Chip("H100 PCIe", 756e12, 79 * GIB, 2000e9, 64e9, 50e9),
    "h100": Chip("H100", 989e12, 79 * GIB, 3350e9, 450e9, 50e9),
    "a100-sxm4-80gb": Chip("A100 80GB", 312e12, 79 * GIB, 2039e9, 300e9, 25e9),
    "a100 80gb": Chip("A100 80GB PCIe", 312e12, 79 * GIB, 1935e9, 64e9, 25e9),
    "a100": Chip("A100 40GB", 312e12, 39 * GIB, 1555e9, 300e9, 25e9),
    "rtx a6000": Chip("RTX A6000", 154.8e12, 47.4 * GIB, 768e9, 32e9, 12.5e9),
    "rtx pro 6000": Chip("RTX PRO 6000", 503.8e12, 94.9 * GIB, 1792e9, 64e9, 12.5e9),
    "l40s": Chip("L40S", 362e12, 44 * GIB, 864e9, 32e9, 12.5e9),
    "l4": Chip("L4", 121e12, 22 * GIB, 300e9, 32e9, 12.5e9),
    "4090": Chip("RTX 4090", 165e12, 24 * GIB, 1008e9, 32e9, 12.5e9),
}
GPU_MEMORY = 0.92  # share of a card's that the program takes at its start; the rest is for CUDA, NCCL and cuDNN


def chip(device_kind: str) -> Chip | None:
    """The chip behind `jax.Device.device_kind`; None for a CPU and for what the table does not know."""
    kind = device_kind.lower()
    return next((c for key, c in CHIPS.items() if key in kind), None)


def memory(device) -> float | None:
    """Bytes of a device's memory that a run may use, None if unknown. Of a GPU: what a run takes at its start. Of a
    chip that the table lacks: what the device reports."""
    if known := chip(device.device_kind):
        return known.hbm * (GPU_MEMORY if device.platform in ("gpu", "cuda") else 1)
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is only compiled for
        return None


def peak_memory(devices) -> dict[str, float]:
    """perf/hbm_peak_gib of the fullest of this process's devices, and perf/hbm_peak_share, its share of what a run may
    use; for devices without memory statistics (a CPU), perf/host_peak_gib of the process."""
    own = [d for d in devices if d.process_index == jax.process_index()]
    stats = [s for d in own if (s := d.memory_stats()) and "peak_bytes_in_use" in s]
    if not stats:
        return {"perf/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    fullest = max(stats, key=lambda s: s["peak_bytes_in_use"])
    out = {"perf/hbm_peak_gib": fullest["peak_bytes_in_use"] / GIB}
    if limit := fullest.get("bytes_limit"):
        out["perf/hbm_peak_share"] = fullest["peak_bytes_in_use"] / limit
    return out


def model_flops_per_token(config, context: float) -> float:
    """Matrix FLOPs of a forward pass per token; a training token costs three times that.

    Args:
      config: models.config.DecoderConfig. context: mean number of tokens that a token attends to.

    Recomputation (remat) is not counted: MFU compares the work that the mathematics needs with the peak.
    """
    layers, head = matrix_elements(config)
    seen = sum(min(context, config.kinds[kind].window or context) for kind in config.kind_of_layer)
    return 2.0 * (layers + 2 * seen * config.num_heads * config.head_dim + head)
