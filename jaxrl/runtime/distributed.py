"""Several processes that act as one: start-up, process 0, and decisions made from gathered values.

Every function here but `initialize` must be called by all processes in the same order, from the main thread
(they run device collectives).
"""

from __future__ import annotations

import glob
import importlib.util
import io
import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl.errors import UserError


def initialize(heartbeat_seconds: int = 100) -> None:
    """Joins this process to the others. Call it before anything touches a device; a lone process needs
    nothing.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say which; on TPU pods,
    Slurm and Open MPI jobs with more than one task, JAX finds all three by itself.
    heartbeat_seconds: when a process is silent for so long (it was killed, or its machine is gone), the
    coordination service ends the others by SIGABRT (exit code 134 in a shell), whatever they are doing; when
    process 0 dies they end at once. A process that ends with an error takes the others along in three times as
    long.
    Raises UserError if only some of the three are known.
    """
    env = os.environ
    coordinator = env.get("JAX_COORDINATOR_ADDRESS")
    num_processes, process_id = (int(env[k]) if k in env else None for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if jax.distributed.is_initialized() or not (any(given) or _in_cluster(env)):
        return
    if any(given) and not all(given) and not _in_cluster(env):
        raise UserError("multi-process start needs all of JAX_COORDINATOR_ADDRESS=host:port, "
                        "JAX_NUM_PROCESSES and JAX_PROCESS_ID; "
                        f"got {coordinator}, {num_processes}, {process_id}")
    jax.distributed.initialize(coordinator, num_processes, process_id,
                               heartbeat_timeout_seconds=heartbeat_seconds,
                               shutdown_timeout_seconds=3 * heartbeat_seconds)


def _in_cluster(env) -> bool:
    # Chips in this machine, not an installed libtpu: that is also used to compile for a pod from a laptop.
    # A TPU VM of one host is a cluster of one to JAX, so there is no need to tell the two apart.
    tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    on_tpu = bool(tpu) and importlib.util.find_spec("libtpu") and "tpu" in env.get("JAX_PLATFORMS", "tpu")
    tasks = max(int(env.get(k, "1")) for k in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return (on_tpu and "TPU_SKIP_MDS_QUERY" not in env) or tasks > 1


def is_main() -> bool:
    """True in process 0, the only one that writes the run directory and talks to the console."""
    return jax.process_index() == 0


def allgather_bytes(data: bytes) -> list[bytes]:
    """The bytes of every process (lengths may differ), in process order, on every process."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.int32(len(data))).reshape(-1)
    # The padded width is a multiple of an eighth of a power of two, so that only a few shapes are ever compiled.
    unit = 1 << max(7, int(sizes.max() - 1).bit_length() - 4)
    padded = np.zeros(-(-int(sizes.max()) // unit) * unit, np.uint8)
    padded[:len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes() for row, n in zip(rows, sizes, strict=True)]


def allgather(value: Any) -> list:
    """The JSON-able value of every process, in process order. With one process too, tuples become lists."""
    return [json.loads(x) for x in allgather_bytes(json.dumps(value).encode())]


def allgather_arrays(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The NumPy arrays of every process, by name, in process order; shapes may differ."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return [dict(np.load(io.BytesIO(data))) for data in allgather_bytes(buffer.getvalue())]


def broadcast(value: Any) -> Any:
    """The JSON-able value of process 0, on every process; the others' argument is ignored."""
    return allgather(value if is_main() else None)[0]


def barrier(name: str) -> None:
    """Returns when every process has come here with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
