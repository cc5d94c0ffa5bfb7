"""What launchers leave in the environment, and what follows from it."""

import pytest
from jax._src import clusters

from jaxrl.errors import UserError
from jaxrl.runtime import cluster, distributed
from jaxrl.runtime.cluster import Machine, Start, plan

THREE = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
TORCHRUN = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
# what Slurm 23 sets for the second task of `srun --nodes=2 --ntasks-per-node=1`
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
         "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NUM_GPUS_PER_NODE": "8"}  # fmt: skip
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.1.0.1", "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "job-0-1"}
# GKE keeps libtpu away from the metadata server of the machine, which knows nothing of the job
GKE = {**KUBERNETES, "TPU_WORKER_HOSTNAMES": "w-0.job,w-1.job", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0", "MEGASCALE_COORDINATOR_ADDRESS": "w-0.job"}
CPU, GPUS, TPU, K8S = Machine(), Machine(gpus=8), Machine(tpu=True), Machine(gpus=8, kubernetes=True)
ALL = list(range(8))

STARTS = [
    ("nothing", {}, GPUS, Start()),
    ("a laptop with libtpu", {"TPU_SKIP_MDS_QUERY": "1"}, CPU, Start()),
    ("three variables", THREE, GPUS, Start(2, "10.0.0.1:1234", 1, None, "JAX_NUM_PROCESSES=2")),
    ("three, in Slurm", THREE | SLURM, GPUS, Start(2, "10.0.0.1:1234", 1, None, "JAX_NUM_PROCESSES=2")),
    ("address, in Slurm", {"JAX_COORDINATOR_ADDRESS": "a:1"} | SLURM, GPUS,
     Start(2, "a:1", None, ALL, "SLURM_STEP_NUM_TASKS=2")),
    ("torchrun", TORCHRUN, GPUS, Start(4, "node1:29500", 3, [4, 5, 6, 7], "WORLD_SIZE=4")),
    ("torchrun, CPU", TORCHRUN, CPU, Start(4, "node1:29500", 3, None, "WORLD_SIZE=4")),
    ("torchrun keeps the port", TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, CPU,
     Start(4, "node1:29501", 3, None, "WORLD_SIZE=4")),
    ("torchrun in Slurm", TORCHRUN | SLURM, CPU, Start(4, "node1:29500", 3, None, "WORLD_SIZE=4")),
    ("torchrun of one", TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, GPUS, Start()),
    ("variables of a script, in Slurm", {"MASTER_ADDR": "x", "WORLD_SIZE": "2"} | SLURM, CPU,
     Start(2, said="SLURM_STEP_NUM_TASKS=2")),
    ("Slurm", SLURM, GPUS, Start(2, gpus=ALL, said="SLURM_STEP_NUM_TASKS=2")),
    ("Slurm, two a machine", SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"},
     GPUS, Start(2, gpus=[4, 5, 6, 7], said="SLURM_STEP_NUM_TASKS=2")),
    ("Slurm, uneven", SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1,2", "SLURM_NODEID": "3"}, GPUS,
     Start(2, gpus=ALL, said="SLURM_STEP_NUM_TASKS=2")),
    ("Slurm bound them", SLURM | {"SLURM_GPUS_PER_TASK": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1",
                                  "SLURM_NODEID": "0"}, Machine(gpus=2),
     Start(2, gpus=[0, 1], said="SLURM_STEP_NUM_TASKS=2")),
    ("Slurm step of one in a job of two", BATCH | {"SLURM_STEP_NUM_TASKS": "1"}, GPUS, Start()),
    ("Open MPI 4", OPEN_MPI | ORTE, GPUS, Start(4, gpus=[2, 3], said="OMPI_COMM_WORLD_SIZE=4")),
    ("Open MPI 5, told", OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "a:1"}, CPU,
     Start(4, "a:1", 1, None, "OMPI_COMM_WORLD_SIZE=4")),
    ("SkyPilot", SKYPILOT, GPUS, Start(2, "10.0.0.1:8476", 1, None, "SKYPILOT_NUM_NODES=2")),
    ("SkyPilot of one", {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, GPUS,
     Start()),
    ("Kubernetes", KUBERNETES, K8S, Start(0, said="JOB_COMPLETION_INDEX=1")),
    ("a pod of no job", {"KUBERNETES_SERVICE_HOST": "10.1.0.1"}, K8S, Start()),
    ("TPU VM", {}, TPU, Start(0, said="the TPU VM's metadata")),
    ("GKE, one slice", GKE, TPU, Start(2, said="TPU_WORKER_HOSTNAMES of 2")),
    ("GKE, two slices", GKE | SLICES, TPU, Start(4, said="TPU_WORKER_HOSTNAMES of 2, MEGASCALE_NUM_SLICES=2")),
    ("GKE, one host", GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "JOB_COMPLETION_INDEX": "0"}, TPU, Start()),
]  # fmt: skip


@pytest.mark.parametrize(("env", "here", "start"), [s[1:] for s in STARTS], ids=[s[0] for s in STARTS])
def test_start(env, here, start):
    assert plan(env, here) == start
    if start.address is None and start.count != 1 and not here.tpu and not here.kubernetes:  # left to jax: it must know
        assert any(all(name in env for name in names) for names in (
            ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"), tuple(ORTE)))


@pytest.mark.parametrize(("env", "kind", "address"), [
    (SLURM, clusters.SlurmCluster, "gpu07:62055"), (OPEN_MPI | ORTE, clusters.OmpiCluster, "10.96.0.1:62624")])
def test_jax_finds_what_is_left_to_it(monkeypatch, env, kind, address):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert kind.is_env_present() and kind.get_process_count() == plan(env, CPU).count
    assert kind.get_coordinator_address(timeout_secs=1, override_coordinator_port=None) == address


ALONE = [
    (BATCH, CPU, "SLURM_NTASKS=2, and this process finds itself alone: only tasks that srun started"),
    ({"WORLD_SIZE": "8"}, CPU, "WORLD_SIZE=8, .* MASTER_ADDR, MASTER_PORT and RANK"),
    ({"SKYPILOT_NUM_NODES": "2"}, CPU, "SKYPILOT_NUM_NODES=2, .* SKYPILOT_NODE_IPS"),
    ({"PMI_SIZE": "2", "PMI_RANK": "0"}, CPU, "PMI_SIZE=2, .* JAX_COORDINATOR_ADDRESS"),
    (KUBERNETES, GPUS, r"JOB_COMPLETION_INDEX=1, .*jax\[k8s\]"),
]


@pytest.mark.parametrize(("env", "here", "error"), ALONE, ids=[next(iter(e)) for e, *_ in ALONE])
def test_one_of_several_that_is_alone_stops_unless_told_that_it_is_to_be(env, here, error):
    with pytest.raises(UserError, match=error):
        plan(env, here)
    assert plan(env, here, hosts=1) == Start()


@pytest.mark.parametrize("env", [{"WORLD_SIZE": "2", "RANK": "1"}, {"PMI_SIZE": "4"}, {"SKYPILOT_NUM_NODES": "2"}])
def test_without_distributed_too(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="finds itself alone"):
        distributed.refuse_alone()
    distributed.refuse_alone(hosts=1)


@pytest.mark.parametrize(("env", "here", "error"), [
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, CPU, "needs all of JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES"),
    (THREE | {"JAX_COORDINATOR_ADDRESS": "a"}, CPU, "JAX_COORDINATOR_ADDRESS=a: need host:port"),
    (THREE | {"JAX_PROCESS_ID": "2"}, CPU, "JAX_PROCESS_ID=2: need 0 to 1"),
    (THREE | {"JAX_NUM_PROCESSES": "two"}, CPU, "JAX_NUM_PROCESSES='two': need a whole number"),
    (THREE | {"JAX_NUM_PROCESSES": "0"}, CPU, "JAX_NUM_PROCESSES=0: need 1 or more"),
    (TORCHRUN | {"JAX_PROCESS_ID": "7"}, CPU, "JAX_PROCESS_ID=7: need 0 to 3"),
    (TORCHRUN | {"JAX_COORDINATOR_ADDRESS": "host"}, CPU, "JAX_COORDINATOR_ADDRESS=host: need host:port"),
    (TORCHRUN | {"RANK": "4"}, CPU, "RANK=4: need 0 to 3"),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, GPUS, "LOCAL_WORLD_SIZE: 3 processes cannot share the 8 GPUs"),
    (OPEN_MPI, CPU, "-x JAX_COORDINATOR_ADDRESS"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(env, here, error):
    with pytest.raises(UserError, match=error) as e:
        plan(env, here)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("env", "gpus"), [
    ({"CUDA_VISIBLE_DEVICES": "3,5"}, 2), ({"CUDA_VISIBLE_DEVICES": ""}, 0), ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}, 0), ({"CUDA_VISIBLE_DEVICES": "GPU-8f,MIG-1"}, 2)])
def test_cards_that_this_process_may_see(env, gpus):
    assert cluster.machine(env).gpus == gpus
