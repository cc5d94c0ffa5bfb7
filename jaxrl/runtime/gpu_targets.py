"""What the GPU compiler has to know of a card that this machine lacks: public facts, as a target description in text.

XLA's GPU compiler takes a GpuTargetConfigProto in place of a device. What is the same on every card since Ampere (32
threads a warp, 65,536 registers, grid limits) is in the renderer; the rest is from NVIDIA's data sheets, its white
papers on architectures and the table of compute capabilities in the CUDA programming guide. Memory and its speed are
those of `jaxrl.runtime.hardware`, so that compiler and roofline assume the same card.
"""

from __future__ import annotations

import dataclasses

from jaxrl.runtime import hardware

CUDNN = (9, 10)  # the version to compile for; the card's own may be newer


@dataclasses.dataclass(frozen=True)
class Gpu:
    """kind: what `jax.Device.device_kind` says on such a card. capability: compute capability. cores: streaming
    multiprocessors. clock: boost, GHz. l2: bytes. shared: KiB of shared memory of a multiprocessor; a block may
    have all but one of them. threads: most a multiprocessor holds."""

    kind: str
    capability: tuple[int, int]
    cores: int
    clock: float
    l2: int
    shared: int
    threads: int = 2048


_A100 = dict(capability=(8, 0), cores=108, clock=1.41, l2=40 << 20, shared=164)
_HOPPER = dict(capability=(9, 0), cores=132, clock=1.98, l2=50 << 20, shared=228)
GPUS = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", **_A100),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", **_A100),
    "h100": Gpu("NVIDIA H100 80GB HBM3", **_HOPPER),
    "h200": Gpu("NVIDIA H200", **_HOPPER),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 1.965, 126 << 20, 228),
    "a6000": Gpu("NVIDIA RTX A6000", (8, 6), 84, 1.8, 6 << 20, 100, 1536),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 2.52, 96 << 20, 100, 1536),
    "rtx6000pro": Gpu("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 2.6, 128 << 20, 100, 1536),
}

_TEXT = """
gpu_device_info {{
  name: "{kind}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  core_count: {cores}
  fpus_per_core: {fpus}
  clock_rate_ghz: {clock}
  l2_cache_size: {l2}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  shared_memory_per_core: {shared_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_block}
  threads_per_core_limit: {threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_address_bits: 64
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "{dnn[0]}.{dnn[1]}.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{kind}"
"""


def target_config(name: str) -> str:
    """The text of a GpuTargetConfigProto for a key of GPUS. Raises KeyError for another name."""
    gpu = GPUS[name]
    chip = hardware.chip(gpu.kind)
    major, minor = gpu.capability
    return _TEXT.format(
        kind=gpu.kind, major=major, minor=minor, cores=gpu.cores, clock=gpu.clock, l2=gpu.l2, threads=gpu.threads,
        features="ACCELERATED_FEATURES" if (major, minor) in ((9, 0), (10, 0)) else "NONE",  # sm_90a, sm_100a
        fpus=64 if (major, minor) == (8, 0) else 128, memory=int(chip.hbm), bandwidth=int(chip.bandwidth),
        shared_core=gpu.shared << 10, shared_block=(gpu.shared - 1) << 10, dnn=CUDNN,
    )
