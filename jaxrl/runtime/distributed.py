"""Several processes that act as one: start-up, process 0, and decisions made from gathered values.

Every function here but `initialize` must be called by all processes in the same order, from the main thread
(they run device collectives).
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl.errors import UserError
from jaxrl.runtime import cluster


def initialize(heartbeat_seconds: int = 100, hosts: int = 0) -> None:
    """Joins this process to the others. Call it before anything touches a device.

    Who they are stands in the environment, see `cluster.plan`; a lone process needs nothing. hosts: config.hosts,
    how many processes there must be; 0: as many as the environment says.
    heartbeat_seconds: when a process is silent for so long (it was killed, or its machine is gone), the
    coordination service ends the others by SIGABRT (exit code 134 in a shell), whatever they are doing; when
    process 0 dies they end at once. A process that ends with an error takes the others along in three times as
    long.
    Raises UserError if the environment announces others without saying where they are, if this process is then alone
    all the same, or if their number is not `hosts`.
    """
    start = cluster.plan(os.environ, cluster.machine(os.environ), hosts)
    _check_hosts(start.count, hosts, start.said)
    if start.count == 1 or jax.distributed.is_initialized():
        return
    known = {}
    if start.gpus and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        known["local_device_ids"] = start.gpus
    if None not in (start.address, start.index):
        known["cluster_detection_method"] = "deactivate"  # JAX would give each Slurm task one GPU
    jax.distributed.initialize(start.address, start.count or None, start.index, **known,
                               heartbeat_timeout_seconds=heartbeat_seconds,
                               shutdown_timeout_seconds=3 * heartbeat_seconds)
    found = jax.process_count()
    if start.count and found != start.count:
        raise UserError(f"{start.said}, but this process found itself as one of {found}")
    _check_hosts(found, hosts, start.said)


def refuse_alone(hosts: int = 0) -> None:
    """For commands that run in a single process: raises UserError if this one was started as one of several, which
    would all do the same (config.hosts=1 allows that)."""
    if hosts == 1:
        return
    start = cluster.plan(os.environ, cluster.machine(os.environ), hosts)
    if start.count > 1:
        raise UserError(f"{start.said}, but config.distributed is False: each of them would train by itself; pass "
                        "--config.distributed=True (or --config.hosts=1 if they are to)")
    _check_hosts(1, hosts, "config.distributed=False")


def _check_hosts(count: int, hosts: int, said: str) -> None:
    if hosts and count and count != hosts:
        raise UserError(f"config.hosts={hosts}, but there {'is' if count == 1 else 'are'} {count} process"
                        f"{'' if count == 1 else 'es'} ({said or 'nothing in the environment names others'})")


def is_main() -> bool:
    """True in process 0, the only one that writes the run directory and talks to the console."""
    return jax.process_index() == 0


def allgather_bytes(data: bytes) -> list[bytes | memoryview]:
    """The bytes of every process (lengths may differ), in process order, on every process."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.int32(len(data))).reshape(-1)
    # The padded width is a multiple of an eighth of a power of two, so that only a few shapes are ever compiled.
    unit = 1 << max(7, int(sizes.max() - 1).bit_length() - 4)
    padded = np.zeros(-(-int(sizes.max()) // unit) * unit, np.uint8)
    padded[:len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].data for row, n in zip(rows, sizes, strict=True)]


def allgather(value: Any) -> list:
    """The JSON-able value of every process, in process order. With one process too, tuples become lists."""
    return [json.loads(bytes(x)) for x in allgather_bytes(json.dumps(value).encode())]


def allgather_arrays(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The NumPy arrays of every process, by name, in process order; shapes may differ. Read only: they share memory."""
    return [arrays_of(data) for data in allgather_bytes(bytes_of(arrays))]


def bytes_of(arrays: dict[str, np.ndarray]) -> bytes:
    """The arrays in C order, after a table of names, dtypes and shapes. An .npz archive would add checksums, which took
    longer to compute than all the rest. Each array begins at a multiple of 8 bytes."""
    arrays = {k: np.asarray(v, order="C") for k, v in arrays.items()}
    table = json.dumps([[k, v.dtype.str, v.shape] for k, v in arrays.items()]).encode()
    parts = [len(table).to_bytes(8, "little"), table, *(v.reshape(-1).view(np.uint8).data for v in arrays.values())]
    return b"".join(x for part in parts for x in (part, b"\0" * (-len(part) % 8)))


def arrays_of(data) -> dict[str, np.ndarray]:
    """Inverse of `bytes_of`; the arrays are views of the data."""
    at, out = 8 + int.from_bytes(bytes(data[:8]), "little"), {}
    for name, dtype, shape in json.loads(bytes(data[8:at])):
        at += -at % 8
        count = math.prod(shape)
        out[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += count * out[name].itemsize
    return out


def broadcast(value: Any) -> Any:
    """The JSON-able value of process 0, on every process; the others' argument is ignored."""
    return allgather(value if is_main() else None)[0]


def barrier(name: str) -> None:
    """Returns when every process has come here with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
