"""metrics.jsonl, TensorBoard and W&B: what is written, and what is left of it after a kill."""

import json
import os
import signal
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.errors import UserError
from jaxrl.runtime import metrics
from jaxrl.runtime.metrics import MetricsWriter, encode, read_metrics


def lines(path):
    return (path / "metrics.jsonl").read_bytes().decode().splitlines()


def test_records_are_strict_json_and_exact(tmp_path):
    writer = MetricsWriter(tmp_path, ())
    x = np.float32(0.1)
    writer.write(1, {"loss": x, "accuracy": jnp.bfloat16(0.5), "n": np.int64(3), "flag": np.bool_(True),
                     "text": "ü", "none": None, "nested": {"a": [np.float32(2), np.nan]}, "step": 99})
    writer.write(np.int32(2), {"loss": float("nan"), "kl": np.float32(-np.inf), "lr": 1e-30})
    writer.close()
    strict = [json.loads(x, parse_constant=lambda c: pytest.fail(c)) for x in lines(tmp_path)]
    assert strict[0] == {"step": 1, "loss": float(x), "accuracy": 0.5, "n": 3, "flag": True, "text": "ü",
                         "none": None, "nested": {"a": [2.0, None]}}
    assert np.float32(strict[0]["loss"]) == x and list(strict[0])[0] == "step"
    assert strict[1] == {"step": 2, "loss": None, "kl": None, "lr": 1e-30,
                         "_nonfinite": {"loss": "nan", "kl": "-inf"}}
    back = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert np.isnan(back["loss"]) and back["kl"] == -np.inf and "_nonfinite" not in back


@given(st.dictionaries(st.text(min_size=1).filter(lambda k: k not in ("step", "_nonfinite")), st.floats()))
def test_floats_round_trip(record):
    line = json.loads(encode(record))
    line.update({k: float(v) for k, v in line.pop("_nonfinite", {}).items()})
    assert {k: repr(v) for k, v in line.items()} == {k: repr(v) for k, v in record.items()}


def test_resume_cuts_what_the_checkpoint_did_not_know(tmp_path):
    writer = MetricsWriter(tmp_path, ())
    for step in (1, 2):
        writer.write(step, {"x": step})
    state = json.loads(json.dumps(writer.state()))  # as it comes back from a checkpoint
    for step in (3, 4):
        writer.write(step, {"x": -1})
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "x"')  # killed in the middle of a line
    writer = MetricsWriter(tmp_path, (), state=state)
    writer.write(3, {"x": 3})
    writer.close()
    assert [json.loads(x) for x in lines(tmp_path)] == [{"step": s, "x": s} for s in (1, 2, 3)]
    MetricsWriter(tmp_path, ()).close()  # killed before the first checkpoint: from the beginning
    assert lines(tmp_path) == []


def test_file_shorter_than_the_checkpoint_knew(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, ())
    writer.write(1, {})
    state = writer.state()
    writer.close()
    os.truncate(tmp_path / "metrics.jsonl", 0)
    writer = MetricsWriter(tmp_path, (), state=state)
    writer.write(2, {})
    writer.close()
    assert "earlier steps are missing" in caplog.text and lines(tmp_path) == ['{"step": 2}']


KILLED = """
import json, sys
from jaxrl.runtime.metrics import MetricsWriter
w = MetricsWriter(sys.argv[1], ("tensorboard",))
for step in range(1, 6):
    w.write(step, {"x": step / 3})
    if step == 3:
        print(json.dumps(w.state()), flush=True)
print("ready", flush=True)
sys.stdin.read()
"""


def events(directory):
    """(step, tag, value) and ("purge", step) of all event files, in the order in which TensorBoard reads
    them."""
    from tensorboardX.proto.event_pb2 import Event

    out = []
    for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while len(data) >= 12:  # TFRecord: length, its crc, data, its crc
            n = int.from_bytes(data[:8], "little")
            if len(data) < n + 16:
                break
            event = Event.FromString(data[12:12 + n])
            data = data[n + 16:]
            if event.HasField("session_log"):
                out.append(("purge", event.step))
            out += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return out


def test_what_a_checkpoint_knows_is_in_the_event_file(tmp_path):
    writer = MetricsWriter(tmp_path, ("tensorboard",))
    for step in range(1, 301):
        writer.write(step, {"x": step / 3})
    writer.state()
    found = events(tmp_path / "tensorboard")
    assert [e[0] for e in found[1:]] == list(range(1, 301)) and found[0] == ("purge", 0)
    writer.close()
    assert events(tmp_path / "tensorboard") == found


def test_kill_9_and_resume(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    state = json.loads(child.stdout.readline())
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    written = events(tmp_path / "tensorboard")
    assert [e[:2] for e in written][:4] == [("purge", 0), (1, "x"), (2, "x"), (3, "x")]
    writer = MetricsWriter(tmp_path, ("tensorboard",), state=state)
    for step in (4, 5):
        writer.write(step, {"x": step / 3, "text": "no scalar", "nan": np.nan})
    writer.close()
    assert [json.loads(x)["step"] for x in lines(tmp_path)] == [1, 2, 3, 4, 5]
    now = events(tmp_path / "tensorboard")[len(written):]
    assert [e[:2] for e in now] == [("purge", 4), (4, "x"), (4, "nan"), (5, "x"), (5, "nan")]


def test_full_disk_keeps_records_until_there_is_room(tmp_path, monkeypatch, caplog):
    writer = MetricsWriter(tmp_path, ())
    writer.write(1, {})
    real, room = os.pwrite, [5]

    def pwrite(fd, data, at):
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        n = real(fd, data[:room[0]], at)
        room[0] -= n
        return n

    monkeypatch.setattr(metrics.os, "pwrite", pwrite)
    writer.write(2, {})
    writer.write(3, {})
    assert caplog.text.count("cannot be written") == 1
    assert lines(tmp_path) == ['{"step": 1}']  # no half line
    state = writer.state()  # a checkpoint on another disk may still work, and then holds the records
    room[0] = 10**6
    writer.write(4, {})
    assert [json.loads(x)["step"] for x in lines(tmp_path)] == [1, 2, 3, 4]
    writer.close()
    writer = MetricsWriter(tmp_path, (), state=state)
    writer.write(4, {})
    writer.close()
    assert [json.loads(x)["step"] for x in lines(tmp_path)] == [1, 2, 3, 4]


def test_reading(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": oops}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a metrics record"):
        read_metrics(path)
    path.write_text('{"step": 1, "_nonfinite": {"a": null}}\n')
    with pytest.raises(UserError, match=r":1: not a metrics record"):
        read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match=r":1: not a metrics record"):
        read_metrics(path)


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, ("tensorboard",), enabled=False)
    writer.write(1, {"x": 1})
    assert writer.state()["position"] == 0
    writer.close()
    assert os.listdir(tmp_path) == []


def test_trackers_are_checked_and_do_not_stop_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="config.log.wandb=True needs the package wandb"):
        MetricsWriter(tmp_path, ("wandb",))

    def no_network(**_):
        raise TimeoutError("no answer")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=no_network))
    MetricsWriter(tmp_path, ("wandb",)).close()
    assert "wandb cannot be started and is switched off: TimeoutError('no answer')" in caplog.text

    class Broken:
        def log(self, scalars, step):
            raise ConnectionError("no route")

    monkeypatch.setattr(metrics, "_EventFile", lambda *_: Broken())
    writer = MetricsWriter(tmp_path, ("tensorboard",))
    writer.write(1, {"x": 1})
    writer.write(2, {"x": 1})
    assert caplog.text.count("tensorboard failed at step 1 and is switched off") == 1
    assert len(lines(tmp_path)) == 2


def diverged_and_back(path, trackers, **wandb):
    """Ten steps, of which those after the sixth were of a run that diverged, then four others after a rollback to 6."""
    writer = MetricsWriter(path, trackers, **wandb)
    for step in range(1, 11):
        writer.write(step, {"x": -99.0 if step > 6 else step})
        if step == 6:
            state = writer.state()
    writer.close()
    writer = MetricsWriter(path, trackers, state=state, rewound=True, **wandb)
    for step in (7, 8):
        writer.write(step, {"x": step})
    writer.state()
    return writer


def test_after_a_rollback_tensorboard_shows_nothing_of_the_run_that_diverged(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    diverged_and_back(tmp_path, ("tensorboard",)).close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("x")
    assert [(e.step, e.value) for e in found] == [(s, s) for s in range(1, 9)]


@pytest.mark.parametrize("rewinds", [True, False])
def test_after_a_rollback_wandb_drops_the_later_steps_or_gets_another_run(tmp_path, monkeypatch, caplog, rewinds):
    class Run(dict):
        def log(self, scalars, step):
            self.setdefault(step, scalars["x"])  # as W&B does: a step that is there is not changed

        def finish(self):
            pass

    runs = {}

    def init(id=None, resume=None, resume_from=None, **_):
        if resume_from and not rewinds:
            raise ValueError("cannot rewind offline")
        if resume_from:
            id, step = resume_from.split("?_step=")
            for late in [s for s in runs[id] if s > int(step)]:
                del runs[id][late]
        return runs.setdefault(id, Run())

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    writer = diverged_and_back(tmp_path, ("wandb",))
    newest = runs[writer.state()["wandb_id"]]
    assert newest == {s: s for s in (range(1, 9) if rewinds else (7, 8))}
    assert ("cannot rewind" in caplog.text) != rewinds and len(runs) == (1 if rewinds else 2)
    writer.close()


@pytest.mark.slow
def test_wandb_offline_keeps_its_run_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = MetricsWriter(tmp_path, ("wandb",), config={"seed": 1}, wandb={"project": "test"})
    writer.write(1, {"x": 1.0})
    state = writer.state()
    writer.close()
    (tmp_path / "wandb_id").unlink()  # the checkpoint alone is enough
    MetricsWriter(tmp_path, ("wandb",), state=state, wandb={"project": "test"}).close()
    runs = sorted(p.name for p in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and {r.split("-")[-1] for r in runs} == {state["wandb_id"]}
    # Killed before the first checkpoint: the id comes from the run directory.
    first = MetricsWriter(tmp_path / "..", ("wandb",), enabled=False).state()["wandb_id"]
    assert first is None
    assert metrics._stored_id(tmp_path / "wandb_id") == metrics._stored_id(tmp_path / "wandb_id")
