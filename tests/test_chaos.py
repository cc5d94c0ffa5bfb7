"""Kill -9 at random moments, also inside saves, never changes a run: same metrics, same parameters, bit for
bit."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.runtime import toy
from tests.stores import Store

ROOT = pathlib.Path(__file__).parents[1]


def chaos(directory, kills, seed, *command, run=None, **env):
    """Runs the harness in a process of its own: it forks, which a process that has used a device must not."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
             "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.chaos", run or directory / "run", directory / "undisturbed",
         str(kills), str(seed), "--", *command], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **cache, **env})


@pytest.fixture(scope="module", params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def store(request):
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[request.param])
    with Store(request.param) as store:
        yield store


@pytest.mark.slow
def test_kills_of_a_toy_trainer_on_a_store(tmp_path, store):
    run = f"{store.url}/toy"
    done = chaos(tmp_path, 6, 1, "tests.runtime.toy", run, "24", "2", run=run, **store.env)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "bit for bit" in done.stdout


def test_harness_on_a_toy_trainer(tmp_path):
    done = chaos(tmp_path, 5, 1, "tests.runtime.toy", str(tmp_path / "run"), "24", "2")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "bit for bit" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("old, new, complaint", [
    ('data.bit_generator.state = found.host["data"]', "pass", "step "),
    ('found.host["pending"]', "pending", "step "),
    ("found.arrays, ", "{**found.arrays, 'key': state['key']}, ", "step "),
    ("found.arrays, ", "{**found.arrays, 'opt': state['opt']}, ", "step "),
    ('state=found and found.host["metrics"]', "state=None", "steps differ"),
    ('state=found and found.host["metrics"]', 'state={"position": run.metrics.exists() and run.metrics.stat().st_size}',
     "steps differ"),
], ids=["data position", "pending", "key", "optimizer", "metrics lost", "metrics kept"])
def test_harness_notices_what_a_trainer_forgets(tmp_path, old, new, complaint):
    source = pathlib.Path(toy.__file__).read_text()
    assert old in source
    (tmp_path / "forgetful_toy.py").write_text(source.replace(old, new))
    done = chaos(tmp_path, "4:step", 1, "forgetful_toy", str(tmp_path / "run"), "60", "3",
                 PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1 and f"AssertionError: {complaint}" in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("kills, steps", [(25, 80), (200, 600)])
def test_training_survives_kills(tmp_path, dial_model, kills, steps):
    done = chaos(tmp_path, kills, 0, "jaxrl.train", "--config=tests/chaos_config.py", f"--config.steps={steps}",
                 f"--config.run_dir={tmp_path / 'run'}", f"--config.model.path={dial_model}",
                 "--config.compilation_cache=False")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.last
@pytest.mark.slow
@pytest.mark.parametrize("kills, steps", [(25, 80), (200, 600)])
def test_training_on_an_object_store_survives_kills(tmp_path, dial_model, kills, steps):
    pytest.importorskip("gcp_storage_emulator")
    with Store("gs") as store:
        done = chaos(tmp_path, kills, 0, "jaxrl.train", "--config=tests/chaos_config.py", f"--config.steps={steps}",
                     f"--config.run_dir={store.url}/run", f"--config.model.path={dial_model}",
                     "--config.compilation_cache=False", run=f"{store.url}/run", **store.env)
        print(done.stdout, store.counts())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
