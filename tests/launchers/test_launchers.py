"""What the launchers render, checked by structure; the Slurm script also runs, against a stand-in srun."""

import pathlib
import shutil
import subprocess

import pytest
import yaml

from jaxrl.errors import UserError
from jaxrl.runtime.cluster import Machine, plan
from launchers import __main__ as launch
from launchers import render

ROOT = pathlib.Path(__file__).parents[2]
POD = "--config=configs/pods/lspo_qwen25_math_7b.py"
GPUS = "--config=configs/gpus/lspo_qwen25_math_7b_16.py"
STORE = "--config.run_dir=gs://bucket/runs/LSPO 7b"


def rendered(monkeypatch, *args):
    monkeypatch.chdir(ROOT)
    cluster, job, _ = launch.read(["launchers", *args])
    return launch.CLUSTERS[cluster][0](job)


@pytest.mark.parametrize(("topology", "slices", "hosts", "chips"), [
    ("v5e:1x1", 1, 1, 1), ("v5e:2x2", 1, 1, 4), ("v6e:2x4", 1, 1, 8), ("v5e:4x4", 1, 4, 4), ("v5p:2x2x1", 1, 1, 4),
    ("v5p:4x8x8", 1, 64, 4), ("2xv5e:2x4", 2, 1, 8), ("tpu7x:2x2x2", 1, 2, 4), ("h100", 1, 1, 1), ("h100:8", 1, 1, 8),
    ("2xh100:8", 1, 2, 8)])  # fmt: skip
def test_machines_of_a_topology(topology, slices, hosts, chips):
    assert render.machines(topology)[3:] == (slices, hosts, chips)


# The fields of jobset.x-k8s.io/v1alpha2 (with batch/v1 and core/v1 inside) that a manifest of ours may have, by the
# published custom resource definition. A dict: an object. A list of one: a list of such. `str: T`: any key.
ANY = {str: str}
JOBSET = {
    "apiVersion": str, "kind": str, "metadata": {"name": str, "annotations": ANY},
    "spec": {
        "failurePolicy": {"maxRestarts": int,
                          "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": {
            "parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int,
            "podFailurePolicy": {"rules": [{
                "action": str, "onPodConditions": [{"type": str, "status": str}],
                "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}]},
            "template": {"spec": {
                "restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": ANY,
                "volumes": [{"name": str, "emptyDir": {"medium": str}}],
                "containers": [{
                    "name": str, "image": str, "command": [str],
                    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
                    "resources": {"limits": {str: int}}, "volumeMounts": [{"name": str, "mountPath": str}]}]}}}}}],
    }}  # fmt: skip


def check(value, schema, where="jobset"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, inner in value.items():
            assert key in schema or str in schema, f"{where}.{key} is not in the API"
            check(inner, schema.get(key, schema.get(str)), f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for i, inner in enumerate(value):
            check(inner, schema[0], f"{where}[{i}]")
    else:
        assert type(value) is schema, where


def jobset(monkeypatch, *args):
    found = yaml.safe_load(rendered(monkeypatch, "gke", "--image=repo/jaxrl:1", STORE, *args))
    check(found, JOBSET)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [job] = found["spec"]["replicatedJobs"]
    return found, job, job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


def test_jobset_of_two_slices(monkeypatch):
    more = ("--config.topology=2xv5p:2x2x4", "--config.mesh.slices=2", "--spot=false", "--selector=a.b/c=d")
    found, job, spec, pod = jobset(monkeypatch, POD, *more)
    assert found["metadata"]["name"] == "lspo-7b"
    assert found["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}  # fmt: skip
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (2, 4, 4, 0)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                                   "cloud.google.com/gke-tpu-topology": "2x2x4", "a.b/c": "d"}
    [train] = pod["containers"]
    assert train["resources"]["limits"] == {"google.com/tpu": 4} and not train["env"]
    assert train["command"] == ["python", "-m", "jaxrl.train", POD, STORE, *more[:2], "--config.distributed=True",
                                "--config.hosts=8"]
    assert pod["terminationGracePeriodSeconds"] == 330  # config.watchdog.grace, and a margin


def test_jobset_tells_a_machine_that_went_away_from_a_failure(monkeypatch):
    found, _, spec, _ = jobset(monkeypatch, POD)
    lost, failed = spec["podFailurePolicy"]["rules"]  # in this order: a pod that is evicted may end with any code
    assert lost["action"] == "Count" and lost["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert failed["action"] == "FailJob" and failed["onExitCodes"]["operator"] == "NotIn"
    goes_on = set(failed["onExitCodes"]["values"])
    assert {74, 75, 76, 134} <= goes_on and not {0, 1, 2, 130} & goes_on
    [rule] = found["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_pods_with_gpus_find_each_other(monkeypatch):
    found, job, spec, pod = jobset(monkeypatch, GPUS)
    [train] = pod["containers"]
    env = {e["name"]: e.get("value", "1") for e in train["env"]}  # of the second pod
    start = plan(env | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, Machine(gpus=8))
    assert (start.count, start.index, start.gpus) == (2, 1, None)
    # what JobSet calls the first pod: <jobset>-<replicatedJob>-<job>-<pod>.<jobset>
    assert start.address == f"{found['metadata']['name']}-{job['name']}-0-0.{found['metadata']['name']}:8476"
    assert spec["parallelism"] == 2 and train["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"]["cloud.google.com/gke-accelerator"] == "nvidia-h100-80gb"
    assert env["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"


def test_kubernetes_hands_over_dollars_as_they_are(monkeypatch):
    """What Kubernetes makes of a command: $$ is $, and $(NAME) a variable's value."""
    argument = "--config.task.system_prompt=$x $(HOME) $$"
    _, _, _, pod = jobset(monkeypatch, POD, argument)
    words = [word.replace("$$", "\0") for word in pod["containers"][0]["command"]]
    assert not any("$(" in word for word in words)
    assert argument in [word.replace("\0", "$") for word in words]


def test_skypilot_task(monkeypatch):
    task = yaml.safe_load(rendered(monkeypatch, "skypilot", GPUS, STORE))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:8")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == list(render.AGAIN)
    assert f"'{STORE}'" in task["run"] and "--config.hosts=2" in task["run"]
    assert "[cuda,gcs,s3]" in task["setup"]
    for script in (task["run"], task["setup"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    tpu = yaml.safe_load(rendered(monkeypatch, "skypilot", POD, STORE, "--config.topology=v5p:2x2x2"))
    assert (tpu["num_nodes"], tpu["resources"]["accelerators"]) == (1, "tpu-v5p-16")
    assert "--config.hosts=2" in tpu["run"]


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Runs the rendered script with a stand-in srun of two tasks; code: what each ends with."""
    script = tmp_path / "job.sh"
    run_dir = "--config.run_dir=/shared/runs/it's mine"
    script.write_text(rendered(monkeypatch, "slurm", GPUS, run_dir, "--setup=echo set up"))
    (tmp_path / "bin").mkdir()
    programs = {
        "python": 'printf "%s\\n" "$*" >>"$TRIED"; exit "$(cut -d " " -f $((SLURM_PROCID + 1)) <<<"$CODES")"',
        "scontrol": 'echo "$*" >>"$TRIED.scontrol"',
        # as srun: the flags are its own, the rest runs once a task, the largest code is the result
        "srun": '[[ "$1" == --kill-on-bad-exit=0 ]] || exit 99; shift; worst=0; for SLURM_PROCID in 0 1; do '
                'export SLURM_PROCID; "$@"; code=$?; ((code > worst)) && worst=$code; done; exit $worst',
    }  # fmt: skip
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(codes, restarts="0"):
        env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "TRIED": str(tmp_path / "tried"), "CODES": codes,
               "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}  # fmt: skip
        done = subprocess.run(["bash", str(script)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.stdout.startswith("set up\n") and not list(tmp_path.glob("*.codes"))
        requeued = tmp_path / "tried.scontrol"
        again = requeued.exists() and requeued.read_text() == "requeue 7\n"
        return done.returncode, again

    run.tried = tmp_path / "tried"
    run.script = script
    return run


@pytest.mark.parametrize(("codes", "ended", "again"), [
    ("0 0", 0, False), ("75 75", 75, True), ("75 134", 134, True), ("76 134", 134, True), ("74 0", 74, True),
    ("2 134", 2, False), ("134 1", 1, False), ("127 127", 127, False), ("130 134", 130, False)])
def test_slurm_queues_again_what_goes_on_and_nothing_else(slurm, codes, ended, again):
    assert slurm(codes) == (ended, again)
    assert slurm.tried.read_text().splitlines() == 2 * [
        f"-m jaxrl.train {GPUS} --config.run_dir=/shared/runs/it's mine --config.distributed=True --config.hosts=2"]


def test_slurm_gives_up(slurm):
    assert slurm("75 75", restarts="100") == (75, False)


def test_slurm_script_is_clean(slurm):
    text = slurm.script.read_text()
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8", "#SBATCH --requeue",
            "#SBATCH --signal=TERM@330"} <= set(lines)
    assert text.index("#SBATCH --signal") < text.index("set -uo")  # sbatch reads them up to the first command
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(slurm.script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("args", "error"), [
    (["gke", POD, STORE], "--image is missing"),
    (["gke", POD, "--image=i"], "config.run_dir=runs/.*: need gs://"),
    (["slurm", POD, STORE], "Slurm clusters have GPUs"),
    (["skypilot", POD, STORE, "--config.topology=2xv5e:2x4"], "offered by GKE only"),
    (["skypilot", POD, STORE, "--config.topology=tpu7x:2x2x1"], "SkyPilot has no tpu7x"),
    (["gke", GPUS, STORE, "--image=i", "--config.topology=a6000"], "GKE has no a6000"),
    (["slurm", "--config=configs/quickstart.py"], "config.topology='': a launcher needs to know the machines"),
    (["lsf", POD, STORE], "name one cluster of gke, slurm, skypilot"),
    (["slurm", GPUS, "--config.hosts=3"], "--config.hosts=3: the launcher sets it"),
    (["slurm", GPUS, "--config.step=3"], "config.step is not a setting"),
    (["slurm", GPUS, "--name=A b"], "--name=A b: need"),
    (["gke", GPUS, STORE, "--image=i", "--selector=a"], "--selector=a: need KEY=VALUE"),
])  # fmt: skip
def test_what_cannot_be_run_is_one_line(monkeypatch, args, error):
    with pytest.raises(UserError, match=error):
        rendered(monkeypatch, *args)


def test_hands_over_what_a_dry_run_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\necho "$1 $2" >{tmp_path}/flags; /bin/cat "$3" >{tmp_path}/job; exit 5\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))  # alone: a machine may have the real ones
    args = ["launchers", "slurm", GPUS, "--flags=--partition=gpu --time=1:00:00"]
    assert launch.main([*args, "--dry-run"]) == 0 and not (tmp_path / "job").exists()
    printed = capsys.readouterr().out
    assert launch.main(args) == 5 and (tmp_path / "job").read_text() == printed
    assert (tmp_path / "flags").read_text() == "--partition=gpu --time=1:00:00\n"
    with pytest.raises(UserError, match="--flags=--comment='x: No closing quotation"):
        launch.main(["launchers", "slurm", GPUS, "--flags=--comment='x"])
    with pytest.raises(UserError, match="kubectl is not installed here; --dry-run"):
        launch.main(["launchers", "gke", GPUS, STORE, "--image=i"])


def test_image_takes_the_checkout_without_what_git_ignores():
    lines = (ROOT / "launchers" / "Dockerfile").read_text().splitlines()
    commands = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert commands == ["FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "CMD"]
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    assert ignored <= {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()}
