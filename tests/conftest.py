"""One compilation cache for the whole session, subprocesses included: what one test compiles, the others load."""

import os
import shutil
import subprocess
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
# Most optimizations of the compiler are off but where a test is about the programs that users run: of memory, of
# compiled text (marked `optimized`), and of whole runs (`slow`).
_QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ[_QUICK] = "1"
# What tests compile is small, and compiling is most of their time. XLA's older emitter of fused loops takes half of it.
_OLDER_EMITTER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_FLAGS = "JAXRL_TESTS_XLA_FLAGS"  # the XLA_FLAGS of this session, also while `optimized` tests run without them

# Hypothesis tries the same examples every time: a red test is red again.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_configure(config):
    """Chooses the compiler's emitter for a session of fast tests, if this version of XLA knows the choice; it ends a
    process with an option that it does not know. Slow tests compile as users do."""
    if _WORKER or "not slow" not in config.option.markexpr:
        return
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_OLDER_EMITTER}".strip()
    program = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    if subprocess.run(program, env=env, capture_output=True).returncode == 0:
        os.environ |= {"XLA_FLAGS": flags, _FLAGS: flags}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    quick = "0" if item.get_closest_marker("slow") or item.get_closest_marker("optimized") else "1"
    if quick == os.environ[_QUICK]:
        return
    import jax

    jax.jit(abs)(0.0)  # XLA reads XLA_FLAGS now, and never again
    os.environ[_QUICK] = quick  # for subprocesses
    jax.config.update("jax_disable_most_optimizations", quick == "1")
    jax.clear_caches()  # compiled programs are found again by their shapes, whatever the option was
    if _FLAGS in os.environ:  # the compilers for TPU and GPU, which these tests load, do not know the CPU's options
        os.environ["XLA_FLAGS"] = os.environ[_FLAGS] if quick == "1" else ""


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
