"""One writer: the lease on an object store. (The lock on a disk is tested with the run directory.)"""

import json
import os
import subprocess
import sys
import threading

import pytest

from jaxrl.errors import UserError
from jaxrl.runtime import lock, storage
from jaxrl.runtime.lock import Lease
from tests.stores import Store


@pytest.fixture(scope="module")
def store():
    pytest.importorskip("gcp_storage_emulator")
    with Store("gs") as store, store.found():
        yield store


@pytest.fixture
def run(store, request):
    return f"{store.url}/{request.node.name}"


HOLDER = """
import sys, time
from jaxrl.runtime.lock import Lease
Lease(sys.argv[1], 600)
print("held", flush=True)
time.sleep(600)
"""


def test_the_error_names_the_owner_and_kill_9_frees_it(run, store):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, **store.env})
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"^config.run_dir: {run} is in use by pid {child.pid} on \S+ since 20"):
            Lease(run)
    finally:
        child.kill()
        child.wait()
    lease = Lease(run)  # at once, though it was held for ten minutes: this machine knows that its owner is gone
    with pytest.raises(UserError, match=f"in use by pid {os.getpid()} "):
        Lease(run)  # also within one process
    lease.release()
    lease.release()
    Lease(run).release()
    assert len(store.names(run.removeprefix(store.url + "/") + "/.lock/")) == 2  # older claims are removed


def elsewhere(monkeypatch, machine="another"):
    """From now on claims are made, and looked at, as on another machine."""
    me = lock._me
    monkeypatch.setattr(lock, "_me", lambda: {**me(), "machine": machine, "host": machine})


def test_a_dead_owner_on_another_machine_loses_it_by_itself(run, monkeypatch, caplog):
    with monkeypatch.context() as there:
        elsewhere(there)
        there.setattr(Lease, "_keep", lambda self: None)  # it died: no more signs of life
        Lease(run, seconds=0.4)
    Lease(run).release()
    assert "waiting up to 0 s for a sign of life" in caplog.text


def test_what_others_put_beside_the_lease_stays(run, store):
    storage.atomic_write(f"{run}/.lock/README", b"?")
    Lease(run).release()
    assert f"{run.removeprefix(store.url + '/')}/.lock/README" in store.names()


def test_a_living_owner_on_another_machine_keeps_it(run, monkeypatch):
    with monkeypatch.context() as there:
        elsewhere(there)
        lease = Lease(run, seconds=4)
    with pytest.raises(UserError, match=rf"{run} is in use by pid {os.getpid()} on another"):
        Lease(run)
    lease.release()
    Lease(run).release()


def test_of_several_at_once_one_wins(run, monkeypatch):
    won, lost, ready = [], [], threading.Barrier(4)
    monkeypatch.setattr(Lease, "_lives", lambda self, term: ready.wait(30) is None)  # all have seen the same dead owner
    storage.atomic_write(f"{run}/.lock/00000007", json.dumps({"pid": 1}))

    def claim():
        try:
            won.append(Lease(run))
        except UserError as e:
            lost.append(str(e))

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1 and len(lost) == 3 and all(f"in use by pid {os.getpid()}" in e for e in lost)
    won[0].release()


def test_an_owner_that_lost_it_ends_before_it_writes(run, monkeypatch, capfd):
    """Suspended for longer than its lease, say: the next heartbeat, or the next save, finds the new owner."""
    with monkeypatch.context() as there:
        elsewhere(there)
        there.setattr(Lease, "_keep", lambda self: None)
        old = Lease(run, seconds=0.2)
    new = Lease(run)

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(lock.os, "_exit", end)
    with pytest.raises(Ended, match="2"):
        old.confirm()
    assert f"in use by pid {os.getpid()} on " in capfd.readouterr().err
    new.confirm()
    new.release()


def test_a_lease_that_cannot_be_renewed_is_a_warning(run, store, monkeypatch, caplog):
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    lease = Lease(run, seconds=0.2)
    store.faults({"status": 403, "times": -1})
    try:
        while "cannot be renewed" not in caplog.text:
            assert lease._stop.wait(0.01) is False
    finally:
        store.faults()
    lease.confirm()
    lease.release()
