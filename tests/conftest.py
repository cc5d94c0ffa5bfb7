"""One compilation cache for the whole session, subprocesses included: what one test compiles, the others load."""

import os
import shutil
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

# Hypothesis tries the same examples every time: a red test is red again.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


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


@pytest.fixture(scope="module")
def fast_compiles():
    """Programs compiled without most optimizations, in half the time: for tests of arithmetic, not of speed or bits."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
