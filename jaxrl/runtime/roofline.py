"""How long a compiled program takes: from the compiler's cycles where there are any, else from its work and traffic.

A TPU's compiler estimates the cycles of every operation. A GPU's does not. There, the time of a kernel is the longest
of three: its matrix products at a share of the peak, its memory traffic, and its start. The shares are assumptions
about well-tuned libraries, not measurements.
"""

from __future__ import annotations

from jaxrl.runtime.hardware import Chip
from jaxrl.runtime.hlo import Counts

KERNEL_SHARE = 0.5  # of the peak, that attention kernels are taken to reach
PRODUCT_SHARE = 0.7  # of the peak, that other matrix products reach (GPU)
MEMORY_SHARE = 0.9  # of the memory's bandwidth, that a kernel reaches (GPU, and a TPU's of unknown FLOPs)
START = 2e-6  # seconds from one kernel to the next (GPU)
MEETING = 1e-5  # seconds that a collective takes without any payload (GPU)


def seconds(counts: Counts, chip: Chip) -> float:
    """Expected seconds of one run of the program behind `counts` on `chip`.

    Collectives that the compiler made asynchronous hide behind the rest, the others do not.
    """
    if chip.clock:
        kernels = counts.kernel_flops / (KERNEL_SHARE * chip.flops)
        kernels += counts.kernel_bytes / (MEMORY_SHARE * chip.bandwidth)  # those of unknown FLOPs: attention over pages
        compute, meeting = counts.cycles / chip.clock + kernels, 0.0
    else:
        compute, meeting = sum(_kernel(chip, *work) for work in counts.work), MEETING
    times, payload = counts.blocking
    waiting = times * meeting + payload / chip.link + counts.far_blocking / chip.network
    near = counts.collective_bytes - counts.far
    return max(compute + waiting, near / chip.link, counts.far / chip.network)


def _kernel(chip: Chip, times: float, flops: float, kernel_flops: float, traffic: float) -> float:
    products = (flops - kernel_flops) / (PRODUCT_SHARE * chip.flops) + kernel_flops / (KERNEL_SHARE * chip.flops)
    return max(products, traffic / (MEMORY_SHARE * chip.bandwidth), times * START)


def best(counts: Counts, chip: Chip, read: float) -> float:
    """The fewest seconds that the chip could take: all FLOPs at the peak, or `read` bytes, whichever is longer."""
    return max((counts.flops + counts.kernel_flops) / chip.flops, read / chip.bandwidth)
