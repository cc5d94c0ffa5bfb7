"""tpu_scripts against a stand-in gcloud whose two "workers" really run what is sent to them (stand_in.py)."""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_scripts"
COMMANDS = ["create", "wait", "setup", "launch", "status", "logs", "resume", "delete"]
WHERE = ["--project=p", "--zone=z", "--name=slice"]
RUN = ["--config=configs/pods/x.py", "--run-dir=gs://b/run"]
QUICK = ["--poll-seconds=0.05"]


class Cloud:
    """A stand-in cloud in one folder; `call` runs a script against it."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        (root / "bin").mkdir()
        for i in (0, 1):
            (root / f"home{i}").mkdir()
        program = pathlib.Path(__file__).with_name("stand_in.py")
        for name in ("gcloud", "python3"):
            self._command(name, f'exec {sys.executable} -S {program} {name} "$@"')
        self._command("sudo", "exit 0")
        self.states("ACTIVE")
        self.after_create("ACTIVE")
        self.codes("0")

    def _command(self, name: str, body: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def states(self, *names: str) -> None:
        (self.root / "states").write_text("\n".join(names))

    def after_create(self, *names: str) -> None:
        (self.root / "states_after_create").write_text("\n".join(names))

    def codes(self, *codes: str) -> None:
        (self.root / "codes").write_text("\n".join(codes))

    def call(self, script: str, *args: str, env: dict | None = None, timeout=600) -> subprocess.CompletedProcess:
        base = {k: v for k, v in os.environ.items() if k in ("LANG", "TMPDIR")}
        base |= {"STAND_IN": str(self.root), "HOME": str(self.root), "STOP_SECONDS": "5"}
        base["PATH"] = f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        return subprocess.run(
            ["bash", str(SCRIPTS / f"{script}.sh"), *args],
            env=base | (env or {}), capture_output=True, text=True, timeout=timeout,
        )

    def entries(self, file: str) -> list:
        path = self.root / file
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def calls(self, verb: str) -> list[list[str]]:
        """gcloud calls with this verb, each an argv."""
        return [c for c in self.entries("calls.jsonl") if verb in (c[0], c[3])]

    def verbs(self) -> list[str]:
        return [c[3] for c in self.entries("calls.jsonl") if c[3] != "describe"]

    def wait_for(self, path: str) -> str:
        target = self.root / path
        for _ in range(6000):
            if target.exists() and target.read_text():
                return target.read_text()
            time.sleep(0.02)
        raise AssertionError(f"{path} never appeared")


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    for pid in tmp_path.glob("home*/jaxrl_job/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    files = map(str, sorted(SCRIPTS.glob("*.sh")))
    result = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", COMMANDS)
def test_help_runs_nothing_and_needs_no_settings(cloud, script):
    result = cloud.call(script, "--help")
    assert result.returncode == 0
    assert f"tpu_scripts/{script}.sh --project" in result.stdout and "--dry-run" in result.stdout
    assert not cloud.entries("calls.jsonl")


@pytest.mark.parametrize("script", COMMANDS)
def test_dry_run_prints_commands_and_runs_none(cloud, script):
    result = cloud.call(script, *WHERE, *RUN, "--fetch=gs://b/model", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not cloud.entries("calls.jsonl")
    lines = (result.stdout + result.stderr).splitlines()
    gcloud = [shlex.split(line) for line in lines if line.startswith("gcloud ")]
    assert gcloud and all("--project=p" in g and "--zone=z" in g for g in gcloud)
    assert all("slice" in " ".join(g) for g in gcloud)


def test_dry_run_of_resume_shows_a_whole_round(cloud):
    result = cloud.call("resume", *WHERE, *RUN, "--dry-run", "--config.seed=3")
    verbs = [shlex.split(line)[4] for line in result.stdout.splitlines() if line.startswith("gcloud ")]
    assert verbs == ["create", "scp", "ssh", "ssh", "ssh", "delete"]
    assert "--config.seed=3" in result.stdout


@pytest.mark.parametrize(
    ("accelerator", "flags", "version", "spot"),
    [
        ("v5litepod-16", [], "v2-alpha-tpuv5-lite", True),
        ("v5p-16", ["--on-demand"], "v2-alpha-tpuv5", False),
        ("v6e-256", ["--spot"], "v2-alpha-tpuv6e", True),
        ("v4-8", ["--runtime-version=mine"], "mine", True),
    ],
)
def test_create(cloud, accelerator, flags, version, spot):
    result = cloud.call("create", *WHERE, f"--accelerator-type={accelerator}", *flags)
    assert result.returncode == 0, result.stderr
    (call,) = cloud.calls("create")
    assert call[:5] == ["compute", "tpus", "queued-resources", "create", "slice"]
    assert f"--accelerator-type={accelerator}" in call and f"--runtime-version={version}" in call
    assert "--node-id=slice" in call and ("--spot" in call) == spot


def test_settings_from_environment_and_flags_win(cloud):
    env = {"PROJECT": "envp", "ZONE": "envz", "NAME": "envn", "SPOT": "0", "SERVICE_ACCOUNT": "me@x",
           "CREATE_FLAGS": "--internal-ips --tags=a"}
    cloud.call("create", "--zone", "flagz", env=env)
    (call,) = cloud.calls("create")
    assert {"--project=envp", "--zone=flagz", "envn", "--service-account=me@x"} <= set(call)
    assert "--internal-ips" in call and "--tags=a" in call
    assert "--spot" not in call


@pytest.mark.parametrize(
    ("script", "flags", "needle"),
    [
        ("create", ["--zone=z"], "--project"),
        ("create", ["--project=p"], "--zone"),
        ("create", [*WHERE, "--acelerator-type=v6e-8"], "unknown flag '--acelerator-type=v6e-8'"),
        ("create", [*WHERE, "--accelerator-type=h100"], "--runtime-version"),
        ("create", [*WHERE, "stray"], "'stray'"),
        ("create", [*WHERE, "--name"], "needs a value"),
        ("launch", [*WHERE, "--run-dir=gs://b/r"], "--config=FILE"),
        ("launch", [*WHERE, "--config=c.py", "--run-dir=/tmp/r"], "gs://"),
        ("launch", [*WHERE, *RUN, "--config.run_dir=x"], "--run-dir"),
        ("resume", [*WHERE, "--config=c.py"], "gs://"),
        ("setup", [*WHERE, "--env-file=/nowhere"], "/nowhere"),
        ("logs", [*WHERE, "--lines-back=1; rm"], "--lines-back"),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(cloud, script, flags, needle):
    result = cloud.call(script, *flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert needle in line
    assert not cloud.entries("calls.jsonl")


def test_wait_until_active_through_a_network_failure(cloud):
    cloud.states("WAITING_FOR_RESOURCES", "OFFLINE", "PROVISIONING", "ACTIVE")
    result = cloud.call("wait", *WHERE, *QUICK)
    assert result.returncode == 0 and len(cloud.calls("describe")) == 4


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "MISSING"])
def test_wait_ends_when_it_never_will_be(cloud, state):
    cloud.states("PROVISIONING", state)
    result = cloud.call("wait", *WHERE, *QUICK)
    assert result.returncode == 2 and state in result.stderr.splitlines()[-1]


def test_wait_gives_up(cloud):
    cloud.states("WAITING_FOR_RESOURCES")
    result = cloud.call("wait", *WHERE, *QUICK, "--wait-minutes=0")
    assert result.returncode == 2 and "after 0 minutes" in result.stderr


def test_setup_installs_this_checkout_on_all_workers(cloud, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("WANDB_API_KEY='a b'\n")
    result = cloud.call("setup", *WHERE, f"--env-file={keys}", "--fetch=gs://b/model gs://b/data")
    assert result.returncode == 0, result.stderr
    for home in (tmp_path / "home0", tmp_path / "home1"):
        assert (home / "jaxrl_current/setup.py").read_text() == (ROOT / "setup.py").read_text()
        assert (home / "jaxrl.env").stat().st_mode & 0o077 == 0
        assert (home / "data/model").is_dir() and (home / "data/data").is_dir()
    installs = [e for e in cloud.entries("python.jsonl") if "install" in e and "--editable" in e]
    folders = [(tmp_path / f"home{i}/jaxrl_current").resolve() for i in (0, 1)]
    assert [e[-1] for e in installs] == [f"{folder}[tpu]" for folder in folders]
    assert all(folder.name.startswith("jaxrl-") for folder in folders)
    assert [c[3] for c in cloud.calls("storage")] == ["gs://b/model", "gs://b/data"] * 2


def test_the_file_with_keys_stays_out_of_the_archive(cloud, tmp_path):
    """A file of this checkout that git knows stands for it."""
    assert cloud.call("setup", *WHERE, f"--env-file={ROOT / 'ruff.toml'}").returncode == 0
    assert (tmp_path / "home0/jaxrl_current/setup.py").exists()
    assert not (tmp_path / "home0/jaxrl_current/ruff.toml").exists()


def test_launch_runs_the_same_command_everywhere_detached(cloud, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("WANDB_API_KEY='a b'\n# $none\nPASSWORD=$none`exit`it's")
    assert cloud.call("setup", *WHERE, f"--env-file={keys}").returncode == 0
    odd = "--config.tasks.prompt=it's \"$HOME\" & more"
    result = cloud.call("launch", *WHERE, *RUN, "--config.steps=5", odd)
    assert result.returncode == 0, result.stderr
    for i in (0, 1):
        assert cloud.wait_for(f"home{i}/jaxrl_job/exit_code") == "0\n"
    runs = cloud.entries("train.jsonl")
    assert sorted(r["cwd"] for r in runs) == [str((tmp_path / f"home{i}/jaxrl_current").resolve()) for i in (0, 1)]
    expected = ["--config=configs/pods/x.py", "--config.run_dir=gs://b/run",
                "--config.distributed=True", "--config.steps=5", odd]
    assert [r["argv"] for r in runs] == [expected] * 2
    assert all((r["key"], r["password"]) == ("a b", "$none`exit`it's") for r in runs)
    log = (tmp_path / "home0/jaxrl_job/train.log").read_text()
    assert "training step 1" in log and "ended with exit code 0" in log
    status = cloud.call("status", *WHERE).stdout
    assert status.startswith("slice slice: ACTIVE") and status.count(" 0\n") == 2


def test_setup_deletes_nothing(cloud, tmp_path):
    for folder in ("jaxrl/runs/first", "jaxrl_runs"):
        (tmp_path / "home0" / folder).mkdir(parents=True)
        (tmp_path / "home0" / folder / "kept").write_text("mine")
    for _ in range(2):
        assert cloud.call("setup", *WHERE).returncode == 0
        (tmp_path / "home0/jaxrl_current/kept").write_text("mine")
    found = [p.relative_to(tmp_path / "home0").parts for p in (tmp_path / "home0").rglob("kept") if not p.is_symlink()]
    assert len([parts for parts in found if parts[0].startswith("jaxrl-")]) >= 1
    assert {("jaxrl", "runs", "first", "kept"), ("jaxrl_runs", "kept")} <= set(found)


def test_launch_stops_the_job_that_is_running(cloud, tmp_path):
    cloud.call("setup", *WHERE)
    cloud.codes("forever", "0")
    cloud.call("launch", *WHERE, *RUN)
    for worker in (0, 1):  # a start that is stopped before it counts would leave "forever" to the next one
        cloud.wait_for(f"started-home{worker}")
    first = (tmp_path / "home0/jaxrl_job/pid").read_text()
    assert cloud.call("status", *WHERE).stdout.count("running") == 2
    assert cloud.call("launch", *WHERE, *RUN).returncode == 0
    assert cloud.wait_for("home0/jaxrl_job/exit_code") == "0\n"
    with pytest.raises(ProcessLookupError):
        os.killpg(int(first), 0)


def test_status_tells_lost_and_absent_apart(cloud, tmp_path):
    cloud.call("setup", *WHERE)
    assert cloud.call("status", *WHERE).stdout.count("absent") == 2
    for i in (0, 1):
        (tmp_path / f"home{i}/jaxrl_job").mkdir()
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / "home0/jaxrl_job/pid").write_text(str(process.pid))
    text = cloud.call("status", *WHERE).stdout
    assert text.count("lost") == 1 and text.count("absent") == 1


def resume(cloud: Cloud, *more: str) -> subprocess.CompletedProcess:
    return cloud.call("resume", *WHERE, *RUN, *QUICK, *more)


ROUND = ["scp", "ssh", "ssh"]  # set up (copy, install) and launch


def without_status(cloud: Cloud) -> list[str]:
    calls = cloud.entries("calls.jsonl")
    return [c[3] for c in calls if c[3] != "describe" and not c[-1].endswith("worker.sh status")]


def test_resume_from_nothing_to_done(cloud):
    cloud.states("MISSING")
    cloud.after_create("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    result = resume(cloud, "--accelerator-type=v6e-16", "--on-demand", "--config.seed=3")
    assert result.returncode == 0, result.stderr
    assert without_status(cloud) == ["create", *ROUND, "delete"]
    (create,) = cloud.calls("create")
    assert "--accelerator-type=v6e-16" in create and "--spot" not in create
    assert "--config.seed=3" in cloud.entries("train.jsonl")[0]["argv"]


def test_resume_after_preemption_recreates_and_relaunches_the_same_run(cloud):
    cloud.states("MISSING")
    cloud.codes("75@1", "75@1", "0")  # worker 1 is told to stop, its peer aborts with another code
    result = resume(cloud)
    assert result.returncode == 0, result.stderr
    assert without_status(cloud) == ["create", *ROUND, *["delete", "create", *ROUND] * 2, "delete"]
    runs = [r["argv"] for r in cloud.entries("train.jsonl")]
    assert len(runs) == 6 and all(r == runs[0] for r in runs)


def test_resume_when_the_slice_is_taken_away_while_training(cloud):
    cloud.codes("forever", "0")
    cloud.states(*["ACTIVE"] * 4, "BEGINNING", "SUSPENDING")
    result = resume(cloud)
    assert result.returncode == 0, result.stderr
    assert without_status(cloud) == [*ROUND, "delete", "create", *ROUND, "delete"]


def test_resume_replaces_a_suspended_slice(cloud):
    cloud.states("SUSPENDED")
    assert resume(cloud).returncode == 0
    assert without_status(cloud) == ["delete", "create", *ROUND, "delete"]


@pytest.mark.parametrize("code", ["74", "76", "134"])  # no last save; the watchdog; a host that fell silent
def test_resume_after_a_hang_keeps_the_slice_once_then_replaces_it(cloud, code):
    cloud.codes(code, code, "0")
    assert resume(cloud).returncode == 0
    assert without_status(cloud) == [*ROUND, *ROUND, "delete", "create", *ROUND, "delete"]


@pytest.mark.parametrize("code", ["3", "3@1"])  # on all workers; on one, and its peer aborts
def test_resume_ends_with_the_code_of_a_real_failure_and_keeps_the_slice(cloud, code):
    cloud.codes(code)
    result = resume(cloud)
    assert result.returncode == 3
    assert "delete" not in cloud.verbs()
    assert "training step 1" in result.stdout  # the end of the log is shown


@pytest.mark.parametrize("first", [[], ["OFFLINE"]], ids=["", "while Google cannot be asked"])
def test_resume_watches_a_job_that_already_runs(cloud, tmp_path, first):
    cloud.call("setup", *WHERE)
    cloud.call("launch", *WHERE, *RUN)
    for i in (0, 1):
        cloud.wait_for(f"home{i}/jaxrl_job/exit_code")
    (tmp_path / "calls.jsonl").unlink()
    cloud.states(*first, "ACTIVE")
    assert resume(cloud).returncode == 0
    assert without_status(cloud) == ["delete"]


def test_resume_gives_up(cloud):
    cloud.codes("75")
    result = resume(cloud, "--max-restarts=1")
    assert result.returncode == 2 and "after 1 restarts" in result.stderr
    assert len(cloud.calls("create")) == 1


def test_delete_asks_unless_told(cloud):
    cloud.call("delete", *WHERE)
    cloud.call("delete", *WHERE, "--yes")
    asks, quiet = cloud.calls("delete")
    assert "--force" in asks and "--quiet" not in asks and "--quiet" in quiet


def test_logs_follow_the_asked_workers(cloud):
    result = cloud.call("logs", *WHERE, "--worker=all", "--lines-back=7", "--dry-run")
    assert "--worker=all" in result.stdout and r"worker.sh\ logs\ 7" in result.stdout
