"""The watchdog in a training run: on unless told otherwise, wound up by every sign of life, and it bites."""

import os
import pathlib
import subprocess
import sys

import pytest

from jaxrl import build, train
from jaxrl.errors import UserError
from jaxrl.runtime.config import base_config, validate
from jaxrl.runtime.rundir import RunDir
from jaxrl.runtime.watchdog import Watchdog
from tests.tiny import tiny

ROOT = pathlib.Path(__file__).parents[1]


def test_it_is_on_unless_told_otherwise(tmp_path):
    config = base_config()
    dog = build.watchdog(config, RunDir(tmp_path))
    assert isinstance(dog, Watchdog) and 0 < dog.remaining() <= config.watchdog.seconds == 3600
    config.watchdog.seconds = 0.0
    with build.watchdog(config, RunDir(tmp_path)) as off:
        off.beat()
        off.beat(3, {})
    assert not isinstance(off, Watchdog)


@pytest.mark.parametrize("key, value", [("seconds", -1.0), ("grace", -1.0), ("heartbeat", 0)])
def test_seconds_are_checked(tmp_path, key, value):
    with pytest.raises(UserError, match=f"config.watchdog.{key}=.* must be an? (number|integer)[ of]* at least"):
        validate(tiny(tmp_path, {f"watchdog.{key}": value}))


def test_every_decode_call_and_every_step_winds_it_up(tmp_path, dial_model, monkeypatch):
    beats = []
    monkeypatch.setattr(Watchdog, "beat", lambda self, step=None, metrics=None: beats.append((step, metrics)))
    monkeypatch.setattr(Watchdog, "__enter__", lambda self: self)
    # Chunks of one token: the evaluation before the first step and each rollout take several decode calls.
    config = tiny(tmp_path, {"steps": 2, "sampling.chunk": 1, "eval.problems": 2}, dial_model)
    assert train.train(config) == 0
    steps = [i for i, (step, _) in enumerate(beats) if step is not None]
    assert [beats[i][0] for i in steps] == [1, 2] and all("loss" in beats[i][1] for i in steps)
    assert steps[0] > 3 and steps[1] - steps[0] > 2


HANG = """
import sys, threading
from jaxrl import train
from jaxrl.runtime import cli

def stuck_in_step(*args):
    threading.Event().wait()

train.make_batches = stuck_in_step
cli.run(train.main)
"""


@pytest.mark.slow
def test_a_run_that_hangs_ends_with_its_own_code(tmp_path, dial_model):
    flags = ["--config=tests/tiny.py", "--config.watchdog.seconds=20", f"--config.run_dir={tmp_path}",
             f"--config.model.path={dial_model}", "--config.sft.steps=0"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", HANG, *flags], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=600)  # fmt: skip
    assert done.returncode == 76, done.stderr[-3000:]
    for text in (done.stderr, (tmp_path / "watchdog.txt").read_text()):
        assert "no progress for 20 s after step 0; exit code 76" in text and "in stuck_in_step" in text
