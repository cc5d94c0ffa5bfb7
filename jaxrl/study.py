"""A grid of methods and seeds, run one after the other, and the table that compares them.

    python -m jaxrl.study --config=configs/studies/core.py      run what is missing, then print the table
        --print_commands    only print the commands of what is missing
        --table             only the table of what is there
        --images=DIR        with the table, its figures as SVG
        --in_process        run here instead of in one process per run: saves start-up time, but a crash ends the study
        --only=a,b --seeds=0,1      a part of the grid
        --out=DIR           in place of the study's own directory; gs:// and s3://, too

Finished runs are skipped and unfinished runs are continued, so the same command resumes a study, and commands printed
with --print_commands can be spread over machines that share the directory. A run that is there with other settings is
refused. The table and its numbers are written there as NAME.md and NAME.json, where NAME is the name of the study file.
Studies may share a directory; a label then means the same run in all of them.

A study file has get_study(), which returns a dict:

    config    training config that everything starts from        out       directory of the runs
    methods   {label: {dotted config key: value}}                seeds     list of integers
    baseline  the label that others are compared with            common    overrides of every run
    metrics   held-out metrics to tabulate                       stages    as methods, but not in the table
    sweeps    {label: {"run": a method, flag of jaxrl.evaluate: value}}: its runs evaluated over budgets
    sweep     flags of all sweeps; the results are averaged over seeds
    curves    methods to draw over generated tokens (--images)
    pools     {name: methods}: tabulated as their mean, seed by seed, and compared with the first pool

Two special keys of a method or stage: "start" names a stage (or method) whose run of the same seed it starts
from, instead of doing its own warm start; "entry": "sft" makes a stage that only does the warm start.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxrl.errors import UserError, located
from jaxrl.evaluation.seeds import average_sweeps, mean_and_half, plus_minus, sweep_tables
from jaxrl.evaluation.tables import markdown
from jaxrl.reporting.comparison import draw
from jaxrl.reporting.runs import Run, Setting, read_run
from jaxrl.runtime import cli, storage
from jaxrl.runtime.manifest import list_checkpoints, step_paths
from jaxrl.runtime.storage import atomic_write

FLAGS = dict(config=str, out="", only="", seeds="", images="", print_commands=False, table=False, in_process=False)
DEFAULTS = {"common": {}, "stages": {}, "baseline": "", "metrics": ["eval/accuracy"], "sweeps": {}}
DEFAULTS |= {"sweep": {}, "curves": [], "pools": {}}
ENTRIES = ("train", "sft")
REQUIRED = {"config": str, "out": str, "seeds": list, "methods": dict}


def main(argv: list[str]) -> int:
    """The command line above; returns the exit code. Raises UserError for a bad study."""
    flags = cli.parse_flags(argv, FLAGS, __doc__)
    study = load_study(flags["config"])
    study["out"] = flags["out"] or study["out"]
    if flags["seeds"]:
        if not re.fullmatch(r"\d+(,\d+)*", flags["seeds"]):
            raise UserError(f"--seeds={flags['seeds']}: not whole numbers as in 0,1,2")
        study["seeds"] = [int(s) for s in flags["seeds"].split(",")]
    wanted = flags["only"].split(",") if flags["only"] else list(study["methods"])
    if unknown := [label for label in wanted if label not in study["methods"]]:
        raise UserError(f"--only: {unknown[0]!r} is not a method; there are {', '.join(study['methods'])}")
    failed = []
    if not flags["table"]:
        sweeps = [label for label in study["sweeps"] if study["sweeps"][label]["run"] in wanted]
        for label, seed in plan(study, wanted) + [(label, seed) for seed in study["seeds"] for label in sweeps]:
            if is_finished(study, label, seed):
                continue
            line = sweep_command(study, label, seed) if label in sweeps else command(study, label, seed)
            print(shlex.join(line), flush=True)
            if flags["print_commands"]:
                continue
            before = source(study, label)
            if before and not is_finished(study, before, seed):  # its newest checkpoint is not its last
                print(f"not started: {before} seed {seed} is not finished", file=sys.stderr)
                failed.append(f"{label} seed {seed}")
            elif (run_here if flags["in_process"] else run_apart)(line):
                failed.append(f"{label} seed {seed}")
    if not flags["print_commands"]:
        print(write_table(study))
        if flags["images"]:
            print("\n".join(map(str, write_images(study, pathlib.Path(flags["images"])))))
    if failed:
        print(f"not finished: {', '.join(failed)}; the same command continues", file=sys.stderr)
    return 1 if failed else 0


def load_study(path: str) -> dict[str, Any]:
    """The study of a file, with defaults filled in. Raises UserError naming the key that is wrong."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config: no such file: {path}")
    try:
        module = runpy.run_path(path)
        if "get_study" not in module:
            raise UserError(f"{path}: a study file needs a function get_study()")
        given = module["get_study"]()
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{path}: {located(e, path)}") from e
    if not isinstance(given, dict):
        raise UserError(f"{path}: get_study() must return a dict, not {given!r}")
    study = DEFAULTS | given | {"name": pathlib.Path(path).stem}
    if unknown := sorted(set(study) - set(DEFAULTS) - set(REQUIRED) - {"name"}):
        valid = ", ".join([*REQUIRED, *DEFAULTS])
        raise UserError(f"{path}: {unknown[0]!r} is not a key of a study; there are {valid}")
    for key, kind in REQUIRED.items():
        if not isinstance(study.get(key), kind) or not study[key]:
            raise UserError(f"{path}: key {key!r} is missing or not a {kind.__name__}")
    for key, default in DEFAULTS.items():
        if not isinstance(study[key], type(default)):
            raise UserError(f"{path}: key {key!r} must be a {type(default).__name__}, not {study[key]!r}")
    for key, kind in {"methods": dict, "stages": dict, "sweeps": dict, "pools": list}.items():
        if wrong := [label for label, value in study[key].items() if not isinstance(value, kind)]:
            raise UserError(f"{path}: {key}[{wrong[0]!r}] must be a {kind.__name__}, not {study[key][wrong[0]]!r}")
    for key, named in {"curves": study["curves"], "pools": sum(study["pools"].values(), [])}.items():
        if unknown := [label for label in named if label not in study["methods"]]:
            raise UserError(f"{path}: {key!r} names {unknown[0]!r}, which is not one of the methods")
    if study["baseline"] and study["baseline"] not in study["methods"]:
        raise UserError(f"{path}: baseline {study['baseline']!r} is not one of the methods")
    everything = study["stages"] | study["methods"]
    for label, overrides in everything.items():
        if overrides.get("start", label) not in everything:
            raise UserError(
                f"{path}: {label!r} starts from {overrides['start']!r}, which is not in the study"
            )
        if overrides.get("entry", "train") not in ENTRIES:
            raise UserError(f"{path}: {label!r}: entry {overrides['entry']!r} must be one of {', '.join(ENTRIES)}")
        chain = [label]
        while start := everything[chain[-1]].get("start"):
            if start in chain:
                raise UserError(f"{path}: {label!r} starts from itself: {' <- '.join([*chain, start])}")
            chain.append(start)
    for label, flags in study["sweeps"].items():
        if flags.get("run") not in study["methods"] or label in everything:
            raise UserError(f"{path}: sweep {label!r} needs a name of its own and the key 'run', naming a method")
    places: dict[tuple, str] = {}
    for label in [*everything, *study["sweeps"]]:
        place = study["sweeps"].get(label, {}).get("run"), _slug(label)
        if place in places:
            raise UserError(f"{path}: {label!r} and {places[place]!r} would share the directory {place[1]!r}")
        places[place] = label
    return study


def source(study: dict, label: str) -> str | None:
    """The label whose run of the same seed must come first: a run starts from it, or a sweep evaluates it."""
    if label in study["sweeps"]:
        return study["sweeps"][label]["run"]
    return (study["stages"] | study["methods"])[label].get("start")


def plan(study: dict, wanted: Sequence[str]) -> list[tuple[str, int]]:
    """(label, seed) of every run that `wanted` needs, each after the one that it starts from.

    Seed by seed, so that an unfinished study compares all methods on the seeds that it has.
    """
    order: list[tuple[str, int]] = []
    for seed in study["seeds"]:
        for label in wanted:
            chain = [label]
            while start := source(study, chain[-1]):
                chain.append(start)
            order += [(link, seed) for link in reversed(chain) if (link, seed) not in order]
    return order


def run_dir(study: dict, label: str, seed: int) -> epath.Path:
    """The directory of a run, local or on an object store."""
    return storage.as_path(study["out"], "--out") / _slug(label) / f"seed{seed}"


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in label)


def command(study: dict, label: str, seed: int) -> list[str]:
    """The command line of one run."""
    everything = study["stages"] | study["methods"]
    overrides = {**study["common"], **everything[label]}
    entry, start = overrides.pop("entry", "train"), overrides.pop("start", None)
    if start:
        source = run_dir(study, start, seed)
        source = source / "model" if everything[start].get("entry") == "sft" else source
        overrides |= {"model.path": str(source), "sft.steps": 0}  # even if `common` sets a warm start
    overrides |= {"run_dir": str(run_dir(study, label, seed)), "seed": seed}
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "-m", f"jaxrl.{entry}", f"--config={study['config']}", *flags]


def sweep_dir(study: dict, label: str, seed: int) -> epath.Path:
    """The directory of a sweep, inside the run that it evaluates."""
    return run_dir(study, study["sweeps"][label]["run"], seed) / f"sweep-{_slug(label)}"


def sweep_command(study: dict, label: str, seed: int) -> list[str]:
    """The command line of one sweep."""
    flags = {**study["sweep"], **study["sweeps"][label]}
    flags |= {"model": run_dir(study, flags.pop("run"), seed), "out": sweep_dir(study, label, seed)}
    return [sys.executable, "-m", "jaxrl.evaluate", *(f"--{key}={value}" for key, value in flags.items())]


def run_apart(line: list[str]) -> int:
    """Runs a command as a process; returns its exit code. Ctrl-C reaches the process, too; it has time to save."""
    with subprocess.Popen(line) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.wait()
            raise


def run_here(line: list[str]) -> int:
    """The same in this process; `line` is [python, "-m", module, flag, ...]."""
    try:
        return importlib.import_module(line[2]).main(line[2:]) or 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


@storage.user_errors("--out")
def is_finished(study: dict, label: str, seed: int) -> bool:
    """Whether a run has the record and the checkpoint of the last step, a warm start its weights, a sweep its result.

    Raises UserError for a store that does not answer, and for a run with other settings than the study's.
    """
    if label in study["sweeps"]:
        return (sweep_dir(study, label, seed) / "result.json").exists()
    path, overrides = run_dir(study, label, seed), study["common"] | (study["stages"] | study["methods"])[label]
    if overrides.get("entry") == "sft":
        return (path / "model" / "config.json").exists()  # written last
    if not (path / "config.json").exists() or not (path / "metrics.jsonl").exists():
        return False
    run = read_run(path)
    for key, asked in overrides.items():
        if key != "steps" and key in run.config and not _same(run.config[key], asked):
            raise UserError(f"{path} is a run with config.{key}={run.config[key]!r}, but {label!r} has {asked!r}: "
                            "rename the method, or remove the run")
    steps, saved = overrides.get("steps", run.config["steps"]), step_paths(path / "checkpoints")
    whole = [checkpoint.step for checkpoint in list_checkpoints(path / "checkpoints")]
    kept = not saved or (whole and whole[-1] >= steps)  # whoever needs the room removes all checkpoints of a run
    return bool(run.records and run.records[-1]["step"] >= steps and kept)


def _same(stored: Any, asked: Any) -> bool:
    """Whether a setting of a stored configuration (JSON) is what a study asks for."""
    if isinstance(asked, str) and ("/" in asked or not isinstance(stored, str)):
        return True  # a path may be written in several ways, other text is for the command line to read
    return stored == (list(asked) if isinstance(asked, tuple) else asked)


def at_step(run: Run, metric: str, step: float) -> float:
    """The metric at its last record up to `step`; NaN if there is none."""
    steps, values = run.series(metric)
    seen = values[steps <= step]
    return float(seen[-1]) if len(seen) else float("nan")


def at_tokens(run: Run, metric: str, tokens: float) -> float:
    """The metric when `tokens` had been generated, discarded completions included; linear in between."""
    spent, points = 0.0, []
    for record in run.records:
        spent += record.get("generated_tokens") or 0
        if record.get(metric) is not None:
            points.append((spent, record[metric]))
    return float(np.interp(tokens, *np.array(points).T)) if points else float("nan")


def tokens_spent(run: Run) -> float:
    """Tokens generated up to the last record."""
    return float(sum(record.get("generated_tokens") or 0 for record in run.records))


def compare(study: dict, metric: str) -> dict[str, Any]:
    """One metric of all finished runs at equal updates and at equal generated tokens.

    Equal updates: the last step that every run has evaluated. Equal tokens: what the cheapest run of the same
    seed spent in all. Differences to the baseline are paired by seed. Half-widths are 95 % t intervals over seeds.
    """
    runs = {}
    for label in study["methods"]:
        seeds = [seed for seed in study["seeds"] if is_finished(study, label, seed)]
        found = {seed: read_run(run_dir(study, label, seed)) for seed in seeds}
        found = {seed: run for seed, run in found.items() if len(run.series(metric)[0])}
        if found:
            runs[label] = found
    every = [run for found in runs.values() for run in found.values()]
    if not every:
        return {"metric": metric, "rows": [], "pools": []}
    step = min(run.series(metric)[0][-1] for run in every)
    spent = {label: {seed: tokens_spent(run) for seed, run in found.items()} for label, found in runs.items()}
    seeds = sorted({seed for found in spent.values() for seed in found})
    tokens = {seed: min(found[seed] for found in spent.values() if seed in found) for seed in seeds}
    values = {
        label: {
            seed: (at_step(run, metric, step), at_tokens(run, metric, tokens[seed])) for seed, run in found.items()
        }
        for label, found in runs.items()
    }
    costs = {
        label: {
            seed: (spent[label][seed], at_step(run, "eval/mean_tokens", step)) for seed, run in found.items()
        }
        for label, found in runs.items()
    }
    pools = {name: _pool(values, labels) for name, labels in study["pools"].items()}
    pooled_costs = {name: _pool(costs, labels) for name, labels in study["pools"].items()}
    first = next(iter(pools), "")
    return {
        "metric": metric,
        "step": step,
        "tokens": tokens,
        "rows": _rows(values, costs, study["baseline"]),
        "pools": _rows(pools, pooled_costs, first),
    }


def _pool(values: dict[str, dict[int, Any]], labels: Sequence[str]) -> dict[int, list[float]]:
    """{seed: means over the labels}, for the seeds that all labels have."""
    seeds = set.intersection(*(set(values.get(label, {})) for label in labels))
    return {seed: np.mean([values[label][seed] for label in labels], axis=0).tolist() for seed in sorted(seeds)}


def _rows(values: dict, costs: dict, baseline: str) -> list[dict[str, Any]]:
    base, rows = values.get(baseline, {}), []
    for label, found in values.items():
        if not found:
            continue
        row: dict[str, Any] = {"method": label, "seeds": sorted(found)}
        for i, name in enumerate(("updates", "tokens")):
            row[name] = mean_and_half([v[i] for v in found.values()])
            paired = [found[seed][i] - base[seed][i] for seed in found if seed in base]
            row[f"difference_{name}"] = mean_and_half(paired) if paired and label != baseline else None
        row["spent"], row["length"] = np.mean(list(costs[label].values()), axis=0).tolist()
        row["values"] = {seed: list(v) for seed, v in found.items()}
        rows.append(row)
    return rows


def read_sweeps(study: dict) -> dict[str, dict]:
    """{label: evaluation.seeds.average_sweeps} of the seeds that are finished."""
    found = {}
    for label in study["sweeps"]:
        paths = [sweep_dir(study, label, s) for s in study["seeds"] if is_finished(study, label, s)]
        if paths:
            found[label] = average_sweeps([json.loads((p / "result.json").read_text()) for p in paths])
    return found


@storage.user_errors("--out")
def write_table(study: dict) -> str:
    """NAME.md and NAME.json in the study's directory; returns the table."""
    results = [compare(study, metric) for metric in study["metrics"]]
    sweeps = read_sweeps(study)
    text = "\n".join(table(study, result) for result in results) + sweep_tables(sweeps)
    out = storage.as_path(study["out"], "--out")
    if not storage.is_remote(out):
        out.mkdir(parents=True, exist_ok=True)
    content = {"study": study, "results": results, "sweeps": sweeps}
    atomic_write(out / f"{study['name']}.json", json.dumps(content, indent=1) + "\n")
    atomic_write(out / f"{study['name']}.md", text)
    return text


def write_images(study: dict, where: pathlib.Path) -> list[pathlib.Path]:
    """Writes NAME.svg and the other figures of the study to the directory `where`; returns the files."""
    settings = []
    for label in study["curves"]:
        paths = [run_dir(study, label, seed) for seed in study["seeds"] if is_finished(study, label, seed)]
        settings += [Setting(label, [read_run(path) for path in paths])] if paths else []
    where.mkdir(parents=True, exist_ok=True)
    return draw(compare(study, study["metrics"][0]), settings, read_sweeps(study), where / study["name"])


def table(study: dict, result: dict) -> str:
    """Markdown: mean with 95 % interval and paired difference to the baseline, in percent or tokens."""
    if not result["rows"]:
        return f"{result['metric']}: no finished run yet\n"
    unit, factor = ("tokens", 1) if result["metric"].endswith("_tokens") else ("percent", 100)
    text = _markdown("method", result["rows"], study["baseline"], factor) + "\n"
    if result["pools"]:
        text += _markdown("mean over methods", result["pools"], result["pools"][0]["method"], factor) + "\n"
    return text + (
        f"{result['metric']} in {unit}, mean ± 95 % t interval over seeds; differences are paired by seed, "
        "and * marks an interval that excludes 0 (not corrected for the number of comparisons). Equal "
        f"updates: step {result['step']:.0f}. Equal tokens: what the cheapest run of the seed generated in all, "
        f"{min(result['tokens'].values()) / 1e3:,.0f} to {max(result['tokens'].values()) / 1e3:,.0f} k.\n"
    )


def _markdown(name: str, rows: Sequence[dict], baseline: str, factor: float) -> str:
    vs = f"vs {baseline}" if baseline else "difference"
    header = [name, "seeds", "equal updates", vs, "equal tokens", vs, "held-out tokens", "generated"]
    lines = [
        [
            row["method"],
            len(row["seeds"]),
            plus_minus(row["updates"], factor),
            plus_minus(row["difference_updates"], factor, signed=True, star=True),
            plus_minus(row["tokens"], factor),
            plus_minus(row["difference_tokens"], factor, signed=True, star=True),
            f"{row['length']:.1f}",
            f"{row['spent'] / 1e3:,.0f} k",
        ]
        for row in rows
    ]
    return markdown(header, lines)


if __name__ == "__main__":
    cli.run(main)
