"""docs/metrics.md names every metric that a run writes, and none that no run writes."""

import pathlib
import re

import pytest

from jaxrl import train
from jaxrl.runtime.metrics import read_metrics
from tests.tiny import tiny

ROOT = pathlib.Path(__file__).parents[1]
# Not on a CPU, not when all is well.
NOT_HERE = {"perf/mfu", "perf/hbm_peak_gib", "perf/hbm_peak_share", "nonfinite/updates",
            "moe/balance_loss", "moe/load_max"}  # fmt: skip


def documented() -> list[str]:
    """The names of the tables' first column, each once."""
    names = []
    for line in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            assert len(re.split(r"(?<!\\)\|", line)) == 5 and all(c.strip() for c in line.split("|")[1:4]), line
            names += re.findall(r"`([^`]+)`", line.split("|")[1])
    assert len(names) == len(set(names)) > 60
    return names


def row_of(key: str, names: list[str]) -> str | None:
    """The documented name of a key: itself, or one with NAME in place of what may vary."""
    return next((n for n in names if re.fullmatch(re.escape(n).replace("NAME", ".+"), key)), None)


def test_every_metric_of_a_run_is_explained_and_every_explained_one_is_written(tmp_path, dial_model):
    changes = {"steps": 1, "checkpoint.every": 1, "algorithm.kl_coef": 0.01, "algorithm.correction": "token_tis",
               "algorithm.selection": "lspo", "batch.generation_prompts": 8, "length.mode": "exact",
               "task.dial.max_budget": 12, "algorithm.loss": "maspo", "length.reward": "leash",
               "length.control.target": "length", "length.control.value": 6.0}  # fmt: skip
    assert train.train(tiny(tmp_path, changes, dial_model)) == 0
    assert train.train(tiny(tmp_path, changes | {"steps": 2}, dial_model)) == 0  # shows the time of the first save
    keys = {key for record in read_metrics(tmp_path / "metrics.jsonl") for key in record}
    names = documented()
    assert not {key for key in keys if row_of(key, names) is None}
    assert {row_of(key, names) for key in keys} == set(names) - NOT_HERE


@pytest.mark.parametrize("key, name", [("outcome/wrong", "outcome/NAME"), ("loss", "loss"), ("losses", None),
                                       ("selection/dropped/lspo/middle", "selection/dropped/NAME")])  # fmt: skip
def test_rows_are_found(key, name):
    assert row_of(key, documented()) == name
