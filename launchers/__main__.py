"""Runs a config on a cluster: renders what the cluster reads, from config.topology, and hands it over.

    python -m launchers gke --config=FILE --config.run_dir=gs://BUCKET/runs/NAME --image=IMAGE [--dry-run]
    python -m launchers slurm --config=FILE --config.run_dir=DIR [--setup='. venv/bin/activate'] [--dry-run]
    python -m launchers skypilot --config=FILE --config.run_dir=s3://BUCKET/runs/NAME [--dry-run]

--config.KEY=VALUE    handed to jaxrl.train as it is; config.topology says which machines, and how many
--name                of the job (default: the last part of run_dir)
--image               gke: the container image (launchers/Dockerfile)
--setup               slurm, skypilot: a shell command before training
--spot=false          machines that cannot be taken away
--flags               more flags of sbatch, kubectl apply or sky jobs launch: --flags='--partition=gpu --time=24:00:00'
--selector            gke: more node labels, KEY=VALUE,KEY=VALUE (a reservation, a node pool)
--dry-run             print it, run nothing

See docs/clusters.md. Google Cloud TPU without Kubernetes: tpu_scripts/.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import tempfile

from jaxrl.errors import UserError
from jaxrl.runtime import cli, storage
from jaxrl.runtime.config import parse_config
from launchers import render

# cluster -> (renderer, the command that reads the file it is put in)
CLUSTERS = {
    "gke": (render.gke, "kubectl apply {flags} -f {file}"),
    "slurm": (render.slurm, "sbatch {flags} {file}"),
    "skypilot": (render.skypilot, "sky jobs launch --yes --detach-run {flags} {file}"),
}
FLAGS = {"name": "", "image": "", "setup": "", "spot": True, "selector": "", "flags": "", "dry-run": False}


def read(argv: list[str]) -> tuple[str, render.Job, dict]:
    """(cluster, job, flags) of a command line. Raises UserError, one line, for what cannot be run there."""
    given = [a for a in argv[1:] if a.startswith("--config")]
    given.sort(key=lambda a: not a.startswith("--config="))  # the file comes before what changes it
    ours = [a.replace("--dry_run", "--dry-run") for a in argv[1:] if not a.startswith("--config")]
    flags = cli.parse_flags(["launchers", *ours], FLAGS, __doc__)
    if len(flags["positional"]) != 1 or flags["positional"][0] not in CLUSTERS:
        raise UserError(f"name one cluster of {', '.join(CLUSTERS)}: python -m launchers gke --config=FILE ...")
    cluster = flags["positional"][0]
    config = parse_config(["launchers", *given])
    if taken := [a for a in given if re.match("--config.(distributed|hosts)\\b", a)]:
        raise UserError(f"{taken[0]}: the launcher sets it")
    run_dir = str(config.run_dir).rstrip("/")
    if cluster != "slurm" and not storage.is_remote(run_dir):
        raise UserError(f"config.run_dir={run_dir}: need gs://bucket/... or s3://bucket/..., which outlives "
                        "the machines")
    name = flags["name"] or re.sub("[^a-z0-9]+", "-", run_dir.rpartition("/")[2].lower()).strip("-")
    if not re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise UserError(f"--name={name}: need at most 40 lower-case letters, digits and '-', beginning with a letter")
    pairs = [pair.partition("=") for pair in flags["selector"].split(",") if pair]
    if not all(key and value for key, _, value in pairs):
        raise UserError(f"--selector={flags['selector']}: need KEY=VALUE, separated by commas")
    job = render.Job(name, render.machines(config.topology), given, run_dir, int(config.watchdog.grace), flags["image"],
                     flags["setup"], flags["spot"], {key: value for key, _, value in pairs})
    return cluster, job, flags


def main(argv: list[str]) -> int:
    """Renders and hands over; the exit code of the cluster's own command."""
    cluster, job, flags = read(argv)
    renderer, command = CLUSTERS[cluster]
    text = renderer(job)
    if flags["dry-run"]:
        print(text, end="")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / f"{job.name}.{'sh' if cluster == 'slurm' else 'yaml'}"
        file.write_text(text)
        try:
            words = shlex.split(command.format(flags=flags["flags"], file=shlex.quote(str(file))))
        except ValueError as e:
            raise UserError(f"--flags={flags['flags']}: {e}") from None
        try:
            return subprocess.run(words, check=False).returncode
        except FileNotFoundError:
            raise UserError(f"{words[0]} is not installed here; --dry-run prints what it would read") from None


if __name__ == "__main__":
    cli.run(main)
