"""How this process finds the others, read from the environment variables of its launcher. Pure functions.

The launcher nearest to the process counts, in this order: JAX's own three variables, TPU (only libtpu knows a slice),
torchrun (also inside of Slurm), Open MPI, Slurm, SkyPilot, Kubernetes.
"""

from __future__ import annotations

import glob
import importlib.util
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxrl.errors import UserError

THREE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PORT = 8476  # of process 0, where a launcher names only machines
Env = Mapping[str, str]


class Machine(NamedTuple):
    """tpu: it has chips and libtpu, and is meant to use them. gpus: cards that this process may see. kubernetes: JAX
    can ask Kubernetes (the package is installed)."""

    tpu: bool = False
    gpus: int = 0
    kubernetes: bool = False


class Start(NamedTuple):
    """count: processes of the job, 1: alone, 0: only JAX can find out. address (host:port of process 0) and index are
    None where JAX finds them. gpus: indices of this process's cards, None: all, or there are none. said: the variable,
    with its value, that this was read from."""

    count: int = 1
    address: str | None = None
    index: int | None = None
    gpus: list[int] | None = None
    said: str = ""


def machine(env: Env) -> Machine:
    """This machine, without starting any device."""
    # Chips, not an installed libtpu alone: that is also used to compile for a pod from a laptop.
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    platforms = env.get("JAX_PLATFORMS") or "tpu,cuda"
    tpu = bool(chips) and importlib.util.find_spec("libtpu") is not None and "tpu" in platforms
    cards = len(glob.glob("/dev/nvidia[0-9]*"))
    if (visible := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        cards = 0 if visible.startswith(("-1", "NoDev")) else len([c for c in visible.split(",") if c.strip()])
    gpus = cards if re.search("cuda|gpu", platforms) else 0
    return Machine(tpu, gpus, importlib.util.find_spec("kubernetes") is not None)


def plan(env: Env, here: Machine, hosts: int = 0) -> Start:
    """The start that the environment describes. hosts: config.hosts; 1 settles it where a process may be alone.

    Raises UserError, naming variables, if the environment announces several processes but lacks what is needed to find
    them.
    """
    if any(name in env for name in THREE):
        return _three(env, here)
    return _found(env, here) or _alone(env, here, hosts)


def _three(env: Env, here: Machine) -> Start:
    address, count, index = env.get(THREE[0]), _int(env, THREE[1]), _int(env, THREE[2])
    if count is not None and count < 1:
        raise UserError(f"{THREE[1]}={count}: need 1 or more")
    if address is not None:
        _port(THREE[0], address)
    if address is not None and count is not None and index is not None:
        return Start(count, address, _index(THREE[2], index, count), None, f"{THREE[1]}={count}")
    found = _found(env, here)  # the launcher has what the variables lack, or JAX finds it
    if found is None:
        raise UserError("multi-process start needs all of JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and "
                        f"JAX_PROCESS_ID; got {address}, {count}, {index}")
    count, index = count or found.count, found.index if index is None else index
    if count and index is not None:
        _index(THREE[2], index, count)
    return found._replace(address=address or found.address, count=count, index=index)


def _found(env: Env, here: Machine) -> Start | None:
    """The start that a launcher describes completely; None if none does."""
    if here.tpu:
        return _tpu(env)
    return _torchrun(env, here) or _open_mpi(env, here) or _slurm(env, here) or _skypilot(env) or _kubernetes(env, here)


def _tpu(env: Env) -> Start | None:
    # GKE names the workers and keeps libtpu from asking the metadata server. A TPU VM has only that server; whether it
    # is one host or a slice of several need not be known here, since JAX takes one host for a cluster of one.
    names = "TPU_PROCESS_ADDRESSES" if "TPU_PROCESS_ADDRESSES" in env else "TPU_WORKER_HOSTNAMES"
    if workers := [w for w in env.get(names, "").split(",") if w]:
        slices = _int(env, "MEGASCALE_NUM_SLICES") or 1
        count = len(workers) * slices
        said = f"{names} of {len(workers)}" + (f", MEGASCALE_NUM_SLICES={slices}" if slices > 1 else "")
        return Start(count, said=said) if count > 1 else None
    return None if "TPU_SKIP_MDS_QUERY" in env else Start(0, said="the TPU VM's metadata")


def _torchrun(env: Env, here: Machine) -> Start | None:
    count, index, address = _int(env, "WORLD_SIZE"), _int(env, "RANK"), env.get("MASTER_ADDR")
    port = _int(env, "MASTER_PORT")
    if count is None or count < 2 or None in (index, address, port):
        return None
    port += env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then torchrun itself listens there
    gpus = _share(here.gpus, _int(env, "LOCAL_RANK"), _int(env, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE")
    return Start(count, f"{address}:{port}", _index("RANK", index, count), gpus, f"WORLD_SIZE={count}")


def _open_mpi(env: Env, here: Machine) -> Start | None:
    count, index = _int(env, "OMPI_COMM_WORLD_SIZE"), _int(env, "OMPI_COMM_WORLD_RANK")
    if count is None or count < 2:
        return None
    said = f"OMPI_COMM_WORLD_SIZE={count}"
    local = "OMPI_COMM_WORLD_LOCAL_SIZE"
    gpus = _share(here.gpus, _int(env, "OMPI_COMM_WORLD_LOCAL_RANK"), _int(env, local), local)
    if "OMPI_MCA_orte_hnp_uri" in env:
        return Start(count, gpus=gpus, said=said)
    if THREE[0] in env:
        return Start(count, env[THREE[0]], index, gpus, said)
    raise UserError(f"{said}: this version of Open MPI does not say where process 0 is; pass "
                    "-x JAX_COORDINATOR_ADDRESS=host:port of it to mpirun")


def _slurm(env: Env, here: Machine) -> Start | None:
    count = _int(env, "SLURM_STEP_NUM_TASKS")
    if count is None or count < 2:
        return None
    # A task sees only the cards that Slurm has bound to it; without binding, all tasks of a machine see the same cards.
    bound = "SLURM_GPUS_PER_TASK" in env or "gpu" in env.get("SLURM_TRES_PER_TASK", "") or re.search(
        "single|per_task|map_gpu|mask_gpu", env.get("SLURM_GPU_BIND", ""))
    sizes = [int(n) for size, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
             for n in [size] * int(times or 1)]
    node = _int(env, "SLURM_NODEID") or 0
    size = 1 if bound else sizes[node] if node < len(sizes) else None
    gpus = _share(here.gpus, _int(env, "SLURM_LOCALID"), size, "SLURM_STEP_TASKS_PER_NODE")
    return Start(count, gpus=gpus, said=f"SLURM_STEP_NUM_TASKS={count}")


def _skypilot(env: Env) -> Start | None:
    count, index = _int(env, "SKYPILOT_NUM_NODES"), _int(env, "SKYPILOT_NODE_RANK")
    ips = env.get("SKYPILOT_NODE_IPS", "").split()
    if index is None or not ips or (count or len(ips)) < 2:
        return None
    count = count or len(ips)
    return Start(count, f"{ips[0]}:{PORT}", _index("SKYPILOT_NODE_RANK", index, count), None,
                 f"SKYPILOT_NUM_NODES={count}")


def _kubernetes(env: Env, here: Machine) -> Start | None:
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and here.kubernetes:
        return Start(0, said=f"JOB_COMPLETION_INDEX={env['JOB_COMPLETION_INDEX']}")
    return None


# variable -> what is missing if it says "several" and no launcher above was recognised
_HINTS = {
    "WORLD_SIZE": "MASTER_ADDR, MASTER_PORT and RANK are needed, too",
    "SLURM_NTASKS": "only tasks that srun started find each other: srun python -m jaxrl.train ...",
    "SKYPILOT_NUM_NODES": "SKYPILOT_NODE_IPS and SKYPILOT_NODE_RANK are needed, too",
    "PMI_SIZE": "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID from it",
}


def _alone(env: Env, here: Machine, hosts: int) -> Start:
    if hosts == 1:
        return Start()
    inside = _int(env, "SLURM_STEP_NUM_TASKS")  # of a step: what it says of the whole job is not this process's
    for name, hint in _HINTS.items():
        count = _int(env, name)
        if count is not None and count > 1 and not (name == "SLURM_NTASKS" and inside):
            raise UserError(f"{name}={count}, and this process finds itself alone: {hint} (config.hosts=1 if it is to "
                            "be)")
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and not here.tpu:
        raise UserError(f"JOB_COMPLETION_INDEX={env['JOB_COMPLETION_INDEX']}, and this process finds itself alone: "
                        "pip install 'jax[k8s]', or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID "
                        "(config.hosts=1 if it is to be)")
    return Start()


def _share(gpus: int, rank: int | None, size: int | None, name: str) -> list[int] | None:
    """The cards, of `gpus` that all processes of a machine see, that are the `rank`-th of `size` processes'."""
    if not gpus:
        return None
    if rank is None or size is None or size < 2 or gpus < size:  # fewer cards than processes: each sees its own
        return list(range(gpus))
    if gpus % size:
        raise UserError(f"{name}: {size} processes cannot share the {gpus} GPUs of this machine evenly; start one "
                        "process a machine, or set CUDA_VISIBLE_DEVICES for each")
    each = gpus // size
    return list(range(rank * each, (rank + 1) * each))


def _int(env: Env, name: str) -> int | None:
    """The number in a variable; None if it is not set. Raises UserError if it is none."""
    text = env.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r}: need a whole number") from None


def _index(name: str, index: int, count: int) -> int:
    if not 0 <= index < count:
        raise UserError(f"{name}={index}: need 0 to {count - 1}, as there are {count} processes")
    return index


def _port(name: str, address: str) -> None:
    if not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"{name}={address}: need host:port of process 0")
