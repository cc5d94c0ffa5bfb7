"""What a cluster has to be told to run a config, as text: JobSet manifests, sbatch scripts, SkyPilot tasks.

Pure functions of a `Job`. All of them start one process a machine; how these find each other is
jaxrl/runtime/cluster.py's part.
"""

from __future__ import annotations

import math
import re
import shlex
from typing import NamedTuple

import yaml

from jaxrl.errors import UserError
from jaxrl.runtime.cluster import PORT
from jaxrl.runtime.gpu_targets import GPUS

# Exit codes (docs/reliability.md) after which the same command goes on; 137 and 143: the machine was taken away.
AGAIN = (74, 75, 76, 134, 137, 143)
RESTARTS = 100

# topology's name -> (what GKE calls it, what SkyPilot calls it); "" where it is not to be had
TPUS = {
    "v5e": ("tpu-v5-lite-podslice", "tpu-v5litepod-{chips}"),
    "v5p": ("tpu-v5p-slice", "tpu-v5p-{cores}"),
    "v6e": ("tpu-v6e-slice", "tpu-v6e-{chips}"),
    "tpu7x": ("tpu7x", ""),
}
CARDS = {
    "a100-40": ("nvidia-tesla-a100", "A100"),
    "a100-80": ("nvidia-a100-80gb", "A100-80GB"),
    "h100": ("nvidia-h100-80gb", "H100"),
    "h200": ("nvidia-h200-141gb", "H200"),
    "b200": ("nvidia-b200", "B200"),
    "a6000": ("", "RTXA6000"),
    "l40s": ("", "L40S"),
    "rtx6000pro": ("nvidia-rtx-pro-6000", "RTXPRO6000"),
}


class Machines(NamedTuple):
    """kind: of chip, as in a topology. tpu: whether it is one. shape: of a slice ("2x4"), "" for GPUs. slices: TPU
    slices, 1 for GPUs. hosts: machines of one slice, or of all GPUs. chips: of one machine."""

    kind: str
    tpu: bool
    shape: str
    slices: int
    hosts: int
    chips: int

    @property
    def processes(self) -> int:
        return self.slices * self.hosts


class Job(NamedTuple):
    """name: of the job, as Kubernetes allows. args: of jaxrl.train, without those that say where it runs. run_dir: of
    the run. grace: seconds that training may take to save when it is told to stop. image: a container's, with jaxrl.
    setup: a shell command before training. spot: on machines that can be taken away. selector: more labels of nodes."""

    name: str
    machines: Machines
    args: list[str]
    run_dir: str
    grace: int
    image: str = ""
    setup: str = ""
    spot: bool = True
    selector: dict[str, str] = {}


def machines(topology: str) -> Machines:
    """The machines of config.topology. Raises UserError for a name that means none."""
    if match := re.fullmatch(rf"(?:([1-9]\d*)x)?({'|'.join(TPUS)}):(\d+(?:x\d+){{1,2}})", topology):
        slices, kind, shape = int(match[1] or 1), match[2], match[3]
        chips = math.prod(map(int, shape.split("x")))
        # as the machines are: v5e and v6e have one of eight chips; everything larger is made of machines of four
        each = chips if chips <= 4 or (chips == 8 and kind in ("v5e", "v6e")) else 4
        return Machines(kind, True, shape, slices, -(-chips // each), each)
    if match := re.fullmatch(rf"(?:([1-9]\d*)x)?({'|'.join(GPUS)})(?::([1-9]\d*))?", topology):
        return Machines(match[2], False, "", 1, int(match[1] or 1), int(match[3] or 1))
    raise UserError(f"config.topology={topology!r}: a launcher needs to know the machines, such as v6e:2x4, "
                    "2xv5e:2x4 (two slices), h100:8 or 2xh100:8 (two machines); pass --config.topology")


def command(job: Job) -> list[str]:
    """The training command of every process."""
    return ["python", "-m", "jaxrl.train", *job.args, "--config.distributed=True",
            f"--config.hosts={job.machines.processes}"]


def _named(job: Job, which: int, cluster: str) -> str:
    name = (TPUS if job.machines.tpu else CARDS)[job.machines.kind][which]
    if not name:
        raise UserError(f"config.topology: {cluster} has no {job.machines.kind}")
    return name


def gke(job: Job) -> str:
    """A JobSet (jobset.x-k8s.io/v1alpha2) for GKE, as YAML: one Job a slice, one pod a machine.

    After the exit codes of `AGAIN`, or when machines are taken away, all pods are made anew; any other failure ends it.
    """
    m = job.machines
    if not job.image:
        raise UserError("--image is missing: the container image, see launchers/Dockerfile")
    env, pool = [], {}
    if m.tpu:
        selector = {"cloud.google.com/gke-tpu-accelerator": _named(job, 0, "GKE"),
                    "cloud.google.com/gke-tpu-topology": m.shape}
        # a slice is a node pool
        pool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    else:
        selector = {"cloud.google.com/gke-accelerator": _named(job, 0, "GKE")}
        env = [{"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"}]  # where GKE puts the driver
        if m.hosts > 1:
            index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
            env += [{"name": "JAX_COORDINATOR_ADDRESS", "value": f"{job.name}-hosts-0-0.{job.name}:{PORT}"},
                   {"name": "JAX_NUM_PROCESSES", "value": str(m.hosts)},
                   {"name": "JAX_PROCESS_ID", "valueFrom": index}]
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    # Kubernetes replaces $(NAME) in a command, and $$ by $
    words = [word.replace("$", "$$") for word in command(job)]
    train = {"name": "train", "image": job.image, "command": words, "env": env,
             "resources": {"limits": {"google.com/tpu" if m.tpu else "nvidia.com/gpu": m.chips}}}
    if not m.tpu:  # NCCL talks through shared memory, of which a container has 64 MB
        train["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": job.grace + 30,
           "nodeSelector": selector | job.selector, "containers": [train]}
    if not m.tpu:
        pod["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    failures = [{"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "NotIn",
                                                      "values": list(AGAIN)}}]
    spec = {"parallelism": m.hosts, "completions": m.hosts, "completionMode": "Indexed", "backoffLimit": 0,
            "podFailurePolicy": {"rules": failures}, "template": {"spec": pod}}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, "annotations": pool},
        "spec": {
            "failurePolicy": {"maxRestarts": RESTARTS,
                              "rules": [{"name": "failed", "action": "FailJobSet",
                                         "onJobFailureReasons": ["PodFailurePolicy"]}]},
            "replicatedJobs": [{"name": "slices" if m.tpu else "hosts", "replicas": m.slices,
                                "template": {"spec": spec}}],
        },
    }
    return yaml.safe_dump(jobset, sort_keys=False)


def slurm(job: Job) -> str:
    """An sbatch script: one task a node with all of its GPUs, queued again after the exit codes of `AGAIN`."""
    m = job.machines
    if m.tpu:
        raise UserError("config.topology: Slurm clusters have GPUs; for TPU there are tpu_scripts, gke and skypilot")
    again = " | ".join(map(str, AGAIN))
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={m.hosts}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={m.chips}
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# So long before the time limit the tasks, not this shell, are told to stop: training saves and ends with 75.
#SBATCH --signal=TERM@{job.grace + 30}
set -uo pipefail
trap : TERM   # a preemption tells this shell, too; it stays to see how the tasks end
codes="$PWD/{job.name}-$SLURM_JOB_ID.codes"
rm -rf "$codes"
mkdir -p "$codes"
export codes
{job.setup or ":"}
# Each task leaves its own exit code, because srun ends with the largest: a task that has lost its peer aborts with 134.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c \\
  'trap : TERM; code=0; "$@" || code=$?; echo "$code" >"$codes/$SLURM_PROCID"; exit "$code"' \\
  task {shlex.join(command(job))}
ended=$?
all="$(cat "$codes"/* 2>/dev/null)"
rm -rf "$codes"
[[ -n "$all" ]] || exit "$ended"   # no task has begun
for code in $all; do
  case "$code" in
    0 | {again}) ;;
    *) echo "a task failed with $code; not queued again" >&2; exit "$code" ;;
  esac
done
if ((ended != 0 && ${{SLURM_RESTART_COUNT:-0}} < {RESTARTS})); then
  scontrol requeue "$SLURM_JOB_ID" || true   # after a preemption Slurm has done so itself
fi
exit "$ended"
"""


def skypilot(job: Job) -> str:
    """A SkyPilot task, as YAML: one process a node; as a managed job (`sky jobs launch`) it goes on after preemptions
    and the exit codes of `AGAIN`."""
    m = job.machines
    if m.slices > 1:
        raise UserError("config.topology: several TPU slices as one job are offered by GKE only")
    name = _named(job, 1, "SkyPilot").format(chips=m.hosts * m.chips, cores=2 * m.hosts * m.chips)
    extra = "tpu" if m.tpu else "cuda"
    install = ("python3 -m pip install -q --user uv\n"
               "[ -d ~/jaxrl_venv ] || python3 -m uv venv -q --python 3.12 ~/jaxrl_venv\n"
               f"python3 -m uv pip install -q --python ~/jaxrl_venv/bin/python -e '.[{extra},gcs,s3]'\n")
    task = {
        "name": job.name,
        "workdir": ".",
        "num_nodes": 1 if m.tpu else m.hosts,  # a slice counts as one node, on whose machines all is run
        "resources": {
            "accelerators": name if m.tpu else f"{name}:{m.chips}",
            "use_spot": job.spot,
            "job_recovery": {"recover_on_exit_codes": list(AGAIN)},
        },
        "setup": install + (f"{job.setup}\n" if job.setup else ""),
        "run": f". ~/jaxrl_venv/bin/activate\n{shlex.join(command(job))}\n",
    }
    return yaml.dump(task, Dumper=_Blocks, sort_keys=False)


class _Blocks(yaml.SafeDumper):
    """Shell commands as blocks of lines."""


def _text(dumper, text):
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _text)
