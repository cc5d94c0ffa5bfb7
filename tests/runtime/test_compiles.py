"""Compiles are counted once, loads from the cache are not, and named ones are reported."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from jaxrl.errors import UserError
from jaxrl.runtime import cli, compiles
from tests.stores import Store

pytestmark = pytest.mark.optimized


@pytest.fixture
def cache(tmp_path):
    """A persistent cache of its own that keeps everything."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_min_entry_size_bytes", "jax_persistent_cache_enable_xla_caches")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), 0.0), strict=False):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def fresh():
    """A program that no other test compiles; always the same."""
    return jax.jit(lambda x: jnp.cos(x * 0.12345) + 1)


def test_counts_compiles_and_not_loads(cache, monkeypatch):
    monkeypatch.setattr(compiles, "REPORTED", 0.0)
    lines = []
    x = jnp.zeros(7)
    with contextlib.closing(compiles.Compiles(lines.append)) as counter:
        with compiles.program("cosine", 7, None):
            fresh()(x)
        first = counter.take()
        assert first["perf/compiles"] == 1 and first["perf/compile_seconds"] > 0
        assert len(lines) == 1 and lines[0].startswith("compiled cosine 7 None in ")
        with compiles.program("cosine", 7, None):
            fresh()(x)  # another jit of the same program: loaded
        assert counter.take()["perf/compiles"] == 0 and len(lines) == 1
        f = fresh()
        f(x)
        f(jnp.zeros(7, jnp.int32))
        assert counter.take()["perf/compiles"] == len(lines) - 1 >= 1
        assert any("lambda" in line for line in lines[1:])  # by the name of the function
        monkeypatch.setattr(compiles, "REPORTED", 99.0)
        reported = len(lines)
        f(jnp.zeros(9))
        assert counter.take()["perf/compiles"] >= 1 and len(lines) == reported  # too quick to be worth a line
        assert counter.take() == {"perf/compiles": 0, "perf/compile_seconds": 0.0}
    fresh()(jnp.zeros((3, 2)))
    assert counter.take()["perf/compiles"] == 0  # closed


def test_threads_do_not_mix_up_their_loads(cache):
    x = jnp.zeros(6)
    with contextlib.closing(compiles.Compiles()) as counter:
        counter._event("/jax/compilation_cache/cache_hits")  # a load that is still under way on this thread
        other = threading.Thread(target=lambda: fresh()(x))
        other.start()
        other.join()
        assert counter.take()["perf/compiles"] == 1


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_new_machine_finds_the_programs_of_a_run_on_a_store(cache, monkeypatch, scheme):
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[scheme])
    x = jnp.zeros(7)
    program = lambda y: jnp.sin(y * 0.54321) + 2  # noqa: E731
    with Store(scheme) as store, store.found(), contextlib.closing(compiles.Compiles(print)) as counter:
        jax.config.update("jax_compilation_cache_dir", None)
        cli.use_compilation_cache(f"{store.url}/runs/first/")
        for made in (1, 0):  # a second machine loads it
            compilation_cache.reset_cache()
            jax.clear_caches()
            counter.take()
            jax.jit(program)(x).block_until_ready()
            assert counter.take()["perf/compiles"] == made
            assert store.names("runs/xla/")
        assert jax.config.jax_persistent_cache_enable_xla_caches == "none"  # those are written by XLA, not through JAX
        # a store that refuses costs the programs' time, not the run
        store.faults({"match": "xla", "times": -1, "status": 403})
        compilation_cache.reset_cache()
        jax.clear_caches()
        with pytest.warns(UserWarning, match="persistent compilation cache"):
            assert float(jax.jit(program)(x)[0]) == 2.0


def test_what_the_user_says_of_the_cache_stays(cache, tmp_path):
    cli.use_compilation_cache("gs://bucket/runs/first")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_where_the_cache_of_a_run_on_a_store_lies(cache, monkeypatch):
    for run, where in (("gs://bucket/runs/a/", "gs://bucket/runs/xla"), ("gs://bucket", "gs://bucket/xla")):
        jax.config.update("jax_compilation_cache_dir", None)
        cli.use_compilation_cache(run)
        assert jax.config.jax_compilation_cache_dir == where
    jax.config.update("jax_compilation_cache_dir", "gss://bucket")
    with pytest.raises(UserError, match="JAX_COMPILATION_CACHE_DIR=gss://bucket: need a local path"):
        cli.use_compilation_cache()
