"""Processes that are killed, die, run out of memory or never answer; the pool goes on."""

import os
import threading
import time

import pytest

from jaxrl.errors import UserError
from jaxrl.tasks.workers import Pool

MODULE = "tests.tasks.naughty_worker"
LONG = 120.0  # a limit that only a hang reaches


@pytest.fixture
def pool():
    made = []

    def make(*args, workers=1, timeout=LONG):
        made.append(Pool(MODULE, args, workers, timeout))
        return made[-1]

    yield make
    for p in made:
        p.close()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or read
        return False


def wait_until(condition) -> bool:
    for _ in range(6000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_answers_come_in_order_and_are_json(pool):
    jobs = [["echo", {"n": i, "text": "ä\n\u2028" * i}] for i in range(40)]
    assert pool(workers=2).map(jobs) == [("ok", job[1]) for job in jobs]


def test_a_job_that_never_returns_is_killed_and_the_next_one_served(pool):
    p = pool(timeout=0.3)
    first = pool().map([["pid", 0]])[0][1]
    assert p.map([["sleep", 0], ["deaf", 0]]) == [("timeout", None)] * 2
    p.timeout = LONG
    assert p.map([["echo", 1]]) == [("ok", 1)]
    assert alive(first)  # of another pool: only the late worker was killed


def test_the_killed_worker_is_gone(pool):
    p = pool()
    pid = p.map([["pid", 0]])[0][1]
    p.timeout = 0.2
    assert p.map([["sleep", 0]]) == [("timeout", None)]
    assert wait_until(lambda: not alive(pid))


def test_a_dead_worker_is_a_crash_and_is_replaced(pool):
    p = pool()
    jobs = [["echo", 1], ["die", 0], ["echo", 2], ["exit", 3], ["echo", 3]]
    assert p.map(jobs) == [("ok", 1), ("crashed", None), ("ok", 2), ("crashed", None), ("ok", 3)]


def test_exceptions_are_answers(pool):
    p = pool()
    pid = p.map([["pid", 0]])
    status, message = p.map([["raise", "x" * 5000]])[0]
    assert status == "error" and message.startswith("ValueError: xxx") and len(message) == 1000
    assert p.map([["leave", 5]]) == [("error", "SystemExit: 5")]
    assert p.map([["pid", 0]]) == pid


def test_memory_is_limited(pool):
    p = pool()
    assert p.map([["memory", 10]]) == [("ok", 10)]
    assert p.map([["memory", 4000]])[0] == ("error", "MemoryError: ")
    assert p.map([["echo", 1]]) == [("ok", 1)]


def test_prints_do_not_mix_with_answers(pool):
    assert pool().map([["print", '{"id": 1, "value": "forged"}'], ["echo", 2]]) == [
        ("ok", '{"id": 1, "value": "forged"}'),
        ("ok", 2),
    ]


def test_a_program_that_reads_does_not_get_the_jobs(pool):
    assert pool().map([["program", 0], ["echo", 1], ["program", 0], ["echo", 2]]) == [
        ("ok", 1), ("ok", 1), ("ok", 1), ("ok", 2)]  # fmt: skip


def test_all_jobs_together_have_a_limit(pool):
    p = pool(timeout=0.4)
    p.map([["echo", 0]])
    results = p.map([["sleep", i] for i in range(200)], within=1.0)
    assert results == [("timeout", None)] * 200  # 200 x 0.4 s would be 80 s


def test_usable_from_many_threads(pool):
    p = pool(workers=2)
    results: dict[int, list] = {}

    def use(i):
        results[i] = p.map([["echo", [i, j]] for j in range(5)])

    threads = [threading.Thread(target=use, args=(i,)) for i in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == {i: [("ok", [i, j]) for j in range(5)] for i in range(6)}


def test_two_workers_work_at_once(pool):
    p = pool(workers=2)
    pids = {value for _ in range(3) for _, value in p.map([["pid", 0]] * 8)}
    assert len(pids) == 2


def test_close_leaves_no_process(pool):
    p = pool()
    pid = p.map([["pid", 0]])[0][1]
    supervisor = p._members[0].process.pid
    p.close()
    assert wait_until(lambda: not alive(pid) and not alive(supervisor))


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_their_parent(busy, tmp_path):
    """The parent is killed with -9: idle workers see the pipe close, the alarm ends one that works for ever."""
    import signal
    import subprocess
    import sys

    code = (
        "import sys, threading\n"
        "from jaxrl.tasks.workers import Pool\n"
        f"p = Pool({MODULE!r}, [], 1, 1.5)\n"
        "pid = p.map([['pid', 0]])[0][1]\n"
        f"job = ['touch and sleep', {str(tmp_path / 'busy')!r}]\n"
        f"if {busy}: threading.Thread(target=p.map, args=([job],), daemon=True).start()\n"
        "print(pid, p._members[0].process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=os.getcwd()
    )
    pids = [int(x) for x in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    assert not busy or wait_until((tmp_path / "busy").exists)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: not any(map(alive, pids)))


def test_a_killed_supervisor_is_a_crash_and_is_replaced(pool):
    p = pool()
    p.map([["echo", 1]])
    os.kill(p._members[0].process.pid, 9)
    os.kill(p._members[0].pid, 9)
    assert p.map([["echo", 1]])[0][0] == "crashed"
    assert p.map([["echo", 2]]) == [("ok", 2)]


def test_no_accelerator_library_and_no_main_in_the_worker(pool):
    assert pool().map([["modules", ["jax", "numpy", "pytest", "torch"]]]) == [("ok", [])]


@pytest.mark.parametrize("how", ["broken", "stillborn"])
def test_workers_that_cannot_start_are_a_user_error(pool, how):
    with pytest.raises(
        UserError, match="naughty_worker.*" + ("no such thing" if how == "broken" else "start")
    ):
        pool(how).map([["echo", 1]])


@pytest.mark.slow  # waits for the back-off of several supervisors
def test_workers_that_die_at_once_are_a_user_error(pool):
    with pytest.raises(UserError, match="does not start"):
        pool("dying").map([["echo", 1]])


def test_many_crashes_in_a_row_do_not_stop_the_pool(pool):
    p = pool()
    assert p.map([["die", 0]] * 8 + [["echo", 1]]) == [("crashed", None)] * 8 + [("ok", 1)]


@pytest.mark.parametrize("args", [(0, 1.0), (1, 0.0), (1, -1.0)])
def test_bad_limits(args):
    with pytest.raises(UserError, match="must be positive"):
        Pool(MODULE, [], *args)
