"""One compilation cache for the whole session, subprocesses included: what one test compiles, the others load."""

import os
import shutil
import sys
import tempfile

import pytest
from hypothesis import settings

_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # it shares the directory of the process that started it
_CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] if _WORKER else tempfile.mkdtemp(prefix="jaxrl-tests-xla-")
# Before anything imports jax, which reads these once.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks a service of Google that the emulator does not have
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": _CACHE,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# Most optimizations of the compiler are off but where a test is about the programs that users run: of speed, of
# compiled text, of bits between programs of different shapes (marked `optimized`), and of whole runs (`slow`).
_QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ[_QUICK] = "1"

# Hypothesis tries the same examples every time: a red test is red again.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    quick = "0" if item.get_closest_marker("slow") or item.get_closest_marker("optimized") else "1"
    if quick == os.environ[_QUICK]:
        return
    os.environ[_QUICK] = quick  # for subprocesses, and for jax where nothing has imported it yet
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_disable_most_optimizations", quick == "1")
        jax.clear_caches()  # compiled programs are found again by their shapes, whatever the option was


def pytest_unconfigure():
    if not _WORKER:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def dial_model(tmp_path_factory):
    """A Hugging Face directory with the model of tests/tiny.py, warm-started: right in about a third of its answers."""
    from jaxrl import sft

    root = tmp_path_factory.mktemp("dial")
    sft.main(["sft", "--config=tests/tiny.py", f"--config.run_dir={root}"])
    return root / "model"
