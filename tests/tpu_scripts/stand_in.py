"""Stand-ins for gcloud and the workers' Python: they record every call and play a slice of two workers.

A folder $STAND_IN holds all state: calls.jsonl (argv of each gcloud call), states (the queued resource's next
states, one a line, the last one stays; BEGINNING is ACTIVE until both workers train), home0 and home1 (the workers'
home directories), codes (exit codes of the next training runs, one a line for both workers) and train.jsonl (argv and
environment of each run).
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(os.environ["STAND_IN"])
HOMES = [ROOT / "home0", ROOT / "home1"]


def record(file: str, entry) -> None:
    with open(ROOT / file, "a") as out:
        out.write(json.dumps(entry) + "\n")


def next_state() -> str:
    states = (ROOT / "states").read_text().split()
    if states[0] == "BEGINNING":
        if not all((ROOT / f"started-{home.name}").exists() for home in HOMES):
            return "ACTIVE"
        states[0] = "ACTIVE"
    if len(states) > 1:
        (ROOT / "states").write_text("\n".join(states[1:]))
    return states[0]


def flag(args: list[str], name: str) -> str:
    return next(a.split("=", 1)[1] for a in args if a.startswith(f"--{name}="))


def gcloud(args: list[str]) -> int:
    record("calls.jsonl", args)
    verb = args[3] if args[:2] == ["compute", "tpus"] else args[0]
    if verb == "create":
        (ROOT / "states").write_text((ROOT / "states_after_create").read_text())
    elif verb == "describe":
        state = next_state()
        if state == "MISSING":
            print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
            return 1
        if state == "OFFLINE":
            print("ERROR: network is unreachable", file=sys.stderr)
            return 1
        print(state)
    elif verb == "delete":
        (ROOT / "states").write_text("MISSING")
        for home in HOMES:
            for pid in home.glob("jaxrl_job/pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(pid.read_text()), signal.SIGKILL)
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
    elif verb == "scp":
        for home in HOMES:
            (home / args[5].split(":")[1]).write_bytes(pathlib.Path(args[4]).read_bytes())
    elif verb == "ssh":
        wanted = flag(args, "worker")
        for i, home in enumerate(HOMES):
            if wanted in ("all", str(i)):
                env = os.environ | {"HOME": str(home)}
                code = subprocess.run(["bash", "-c", flag(args, "command")], env=env, cwd=home).returncode
                if code:
                    return code
    return 0


def train(args: list[str], worker: int, count: int) -> None:
    """The real command, as one of two processes that share nothing but the store of tests/stores.py.

    PREEMPT=N: the first start of worker 0 is killed before its N-th request that changes something, and the slice is
    gone.
    """
    os.environ |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{int(os.environ['REAL_TRAINING']) + count}",
                   "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(worker)}  # fmt: skip
    if worker == 0 and count == 0 and "PREEMPT" in os.environ:
        fault = {"match": "^(POST|PUT)", "skip": int(os.environ["PREEMPT"]), "kill": os.getpgid(0)}
        fault["write"] = [str(ROOT / "states"), "SUSPENDED"]
        urllib.request.urlopen(os.environ["STORAGE_EMULATOR_HOST"] + "/_faults", json.dumps([fault]).encode()).read()
    os.execv(sys.executable, [sys.executable, "-W", "ignore", *args])


def python3(args: list[str]) -> int:
    """The workers' system Python; `-m uv venv PATH` makes an environment with this same stand-in."""
    if args[:3] == ["-m", "uv", "venv"]:
        target = pathlib.Path(args[-1]) / "bin"
        target.mkdir(parents=True)
        shutil.copy(ROOT / "bin" / "python3", target / "python")
    if args[:2] == ["-m", "jaxrl.train"]:
        home = pathlib.Path(os.environ["HOME"])
        keys = {"key": os.environ.get("WANDB_API_KEY"), "password": os.environ.get("PASSWORD")}
        record("train.jsonl", {"argv": args[2:], "cwd": os.getcwd(), **keys})
        # `codes` names how the n-th start ends; the count is kept outside the home, which delete empties.
        started = ROOT / f"started-{home.name}"
        count = int(started.read_text()) if started.exists() else 0
        started.write_text(str(count + 1))
        if "REAL_TRAINING" in os.environ:
            train(args, HOMES.index(home), count)
        codes = (ROOT / "codes").read_text().split()
        code = codes[min(count, len(codes) - 1)]
        print("training step 1")
        sys.stdout.flush()
        if code == "forever":
            time.sleep(60)
        if code.endswith("@1"):  # this code on worker 1, a peer-lost abort on the others
            time.sleep(0.4 * (home.name == "home1"))  # it saves first; its peers have noticed by then
            code = code[:-2] if home.name == "home1" else "134"
        return int(code)
    record("python.jsonl", args)
    return 0


if __name__ == "__main__":
    sys.exit({"gcloud": gcloud, "python3": python3}[sys.argv[1]](sys.argv[2:]))
