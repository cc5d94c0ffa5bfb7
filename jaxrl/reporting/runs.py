"""The records of runs, as a report needs them: grouped so that seeds of one setting belong together."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl.errors import UserError
from jaxrl.evaluation.seeds import t_half_width
from jaxrl.runtime import storage
from jaxrl.runtime.config import base_config
from jaxrl.runtime.metrics import read_metrics

# Settings that do not make a run another method.
_METHOD = ("algorithm.loss", "algorithm.advantage", "algorithm.selection", "length.reward")
_NOT_METHOD = ("run_dir", "seed", "resume", "log.", "watchdog.", "checkpoint.", "compilation_cache", "eval.")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory.

    config: flat {dotted key: value}. records: of metrics.jsonl. evaluations: results of jaxrl.evaluate found in
    it, one row per data set and budget. samples: its files samples/step_*.jsonl in order, if they were asked for.
    """

    path: pathlib.Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[pathlib.Path] = dataclasses.field(default_factory=list)

    @property
    def seed(self) -> Any:
        return self.config.get("seed", 0)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, where it was recorded as a finite number."""
        pairs = [(r["step"], r[key]) for r in self.records if _is_number(r.get(key))]
        steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
        return steps, values


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ by seed only."""

    label: str
    runs: list[Run]

    def band(self, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(steps, mean, half) over the seeds at the steps that all have.

        half: half-width of the 95 % t interval of the mean; 0 for one seed.
        """
        tables = [dict(zip(*run.series(key), strict=True)) for run in self.runs]
        tables = [t for t in tables if t]
        steps = sorted(set.intersection(*map(set, tables))) if tables else []
        values = np.array([[t[s] for s in steps] for t in tables]).reshape(len(tables), len(steps))
        if not len(steps):
            return np.zeros(0), np.zeros(0), np.zeros(0)
        return np.array(steps), values.mean(axis=0), t_half_width(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def majority(result: dict) -> float | None:
    """maj@k of a result of jaxrl.evaluate, k being all its samples of a problem; None where it was not measured."""
    return result.get(f"maj@{result.get('samples')}")


def read_run(path: str | os.PathLike, samples: bool = False) -> Run:
    """Reads a run directory, and lists its samples. Raises UserError if it has no metrics.jsonl or that is damaged."""
    root = storage.local_copy(os.fspath(path), "RUN", lambda names: [n for n in names if _is_read(n, samples)])
    if not (root / "metrics.jsonl").is_file():
        raise UserError(f"{path}: no metrics.jsonl; need a run directory of jaxrl.train")
    config = root / "config.json"
    evaluations = []
    for result in sorted(root.glob("*/result.json")):
        try:
            evaluations += json.loads(result.read_text())["results"]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{result}: not a result file of jaxrl.evaluate; move it out of the run") from None
    sampled = sorted((root / "samples").glob("step_*.jsonl")) if samples else []
    flat = flatten(json.loads(config.read_text())) if config.exists() else {}
    return Run(root, flat, read_metrics(root / "metrics.jsonl"), evaluations, sampled)


def _is_read(name: str, samples: bool) -> bool:
    """Whether a report reads this file of a run."""
    known = name in ("config.json", "metrics.jsonl") or name.endswith("/result.json")
    return known or samples and name.startswith("samples/step_")


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {dotted key: value}."""
    out = {}
    for key, value in tree.items():
        out.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def group_runs(runs: Sequence[Run]) -> list[Setting]:
    """Settings in order of first appearance, labelled by the settings in which they differ.

    A run that is older than a key and does not record it counts as having its default.
    """
    defaults = flatten(base_config().to_dict())
    runs = [dataclasses.replace(run, config=defaults | run.config) for run in runs]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        method = {k: v for k, v in run.config.items() if not k.startswith(_NOT_METHOD)}
        groups.setdefault(json.dumps(method, sort_keys=True, default=str), []).append(run)
    configs = [members[0].config for members in groups.values()]
    keys = sorted({k for c in configs for k in c if not k.startswith(_NOT_METHOD)})
    differing = [k for k in keys if len({json.dumps(c.get(k), default=str) for c in configs}) > 1]
    # constants mostly follow from the method, so they are named only if methods do not tell runs apart
    tries = [[k for k in _METHOD if k in differing], [k for k in differing if "hyper" not in k], differing]
    labels = [[_label(c, keys) for c in configs] for keys in tries]
    labels = next((names for names in labels if len(set(names)) == len(configs)), labels[0])
    settings = [Setting(label, members) for label, members in zip(labels, groups.values(), strict=True)]
    if len(set(labels)) < len(settings) or "" in labels:
        settings = [Setting(f"{s.label} {s.runs[0].path.name}".strip(), s.runs) for s in settings]
    return settings


def _label(config: dict[str, Any], keys: Sequence[str]) -> str:
    """The settings by name; "none" only if that is all there is to say."""
    names = [_name(key, config.get(key)) for key in keys]
    return " · ".join([name for name in names if name != "none"] or names[:1])


def _name(key: str, value: Any) -> str:
    """A setting in a label: names of methods stand alone, numbers come with their key."""
    return str(value) if isinstance(value, str) and value else f"{key.rsplit('.', 1)[-1]} {value}"
