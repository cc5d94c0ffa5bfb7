"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if asked for.

metrics.jsonl is strict JSON, one object a step, "step" first. NaN and infinities are written as null, and a
last key "_nonfinite" says what each null was ({"loss": "nan"}); `read_metrics` puts them back.

Resume: `state()` goes into the checkpoint and comes back as `state=`; the file is then cut to the position it
had, so that no step is missing or there twice. Everything before that position was on disk before the
checkpoint was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.errors import UserError
from jaxrl.runtime.storage import atomic_write

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends records to the run's files.

    run_dir: where metrics.jsonl and tensorboard/ are. trackers: any of "tensorboard", "wandb".
    state: what `state()` returned at the checkpoint that the run continues from; None starts the files anew.
    config: the resolved configuration, shown by Weights & Biases. wandb: further arguments of wandb.init
        (project, name, ...). rewound: True after a rollback in this process: the trackers then drop their records of
        later steps. enabled: False in every process but 0; all methods are then no-ops.

    A full disk does not stop the run: records wait in memory, with one warning, until they can be written. A
    tracker that fails, also at its start, is switched off with a warning. Raises UserError for a missing package.
    """

    def __init__(self, run_dir: str | os.PathLike, trackers: Sequence[str] = ("tensorboard",), *,
                 state: Mapping | None = None, config: Mapping | None = None, wandb: Mapping | None = None,
                 rewound: bool = False, enabled: bool = True):
        self._enabled = enabled
        self._state = {"position": 0, "step": 0, "wandb_id": None, **(state or {})}
        self._pending = self._state.pop("pending", "").encode()
        self._disk_full = False
        if not enabled:
            return
        root = pathlib.Path(run_dir)
        self._fd = os.open(root / "metrics.jsonl", os.O_RDWR | os.O_CREAT, 0o644)
        size, position = os.fstat(self._fd).st_size, self._state["position"]
        if size < position:
            log.warning("%s has %d bytes, but the checkpoint of step %d knew %d: earlier steps are missing "
                        "from it", root / "metrics.jsonl", size, self._state["step"], position)
            self._state["position"] = size
        os.ftruncate(self._fd, self._state["position"])
        self._sinks: dict[str, Any] = {}
        if "tensorboard" in trackers:
            self._sinks["tensorboard"] = _EventFile(root / "tensorboard", self._state["step"] + 1 if state else 0)
        if "wandb" in trackers:
            self._state["wandb_id"] = self._state["wandb_id"] or _stored_id(root / "wandb_id")
            try:
                after = self._state["step"] if rewound else None
                self._sinks["wandb"] = _wandb(root, self._state["wandb_id"], after, config, dict(wandb or {}))
                self._state["wandb_id"] = _stored_id(root / "wandb_id")
            except UserError:
                raise
            except Exception as e:  # an unattended restart must not fail for lack of a network
                log.warning("wandb cannot be started and is switched off: %r", e)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds the record of a step: scalars (Python, NumPy, jax; 0-d), strings, None, or lists and dicts of
        them."""
        if not self._enabled:
            return
        plain = {"step": int(step), **{k: _plain(v) for k, v in record.items() if k != "step"}}
        self._pending += encode(plain)
        self._state["step"] = int(step)
        self._flush()
        scalars = {k: v for k, v in plain.items() if isinstance(v, int | float) and k != "step"}
        for name, sink in list(self._sinks.items()):
            try:
                sink.log(scalars, step=int(step))
            except Exception as e:
                del self._sinks[name]
                log.warning("%s failed at step %d and is switched off: %r", name, step, e)

    def _flush(self) -> bool:
        """Appends pending records. False, with the file unchanged, if the disk does not take them."""
        data, done = self._pending, self._state["position"]
        try:
            while data:
                n = os.pwrite(self._fd, data, done)
                data, done = data[n:], done + n
        except OSError as e:
            os.ftruncate(self._fd, self._state["position"])  # no half line
            if not self._disk_full:
                log.warning("metrics.jsonl cannot be written (%s); records wait in memory until it can", e)
            self._disk_full = True
            return False
        self._state["position"], self._pending, self._disk_full = done, b"", False
        return True

    def state(self) -> dict:
        """JSON-able; call it when a checkpoint is made, after the record of that step was written.

        When it returns, all records so far are on disk, or, if the disk does not take them, in the state.
        """
        if self._enabled:
            self._flush()
            try:
                os.fsync(self._fd)
            except OSError as e:
                log.warning("metrics.jsonl cannot be flushed: %s", e)
            if "tensorboard" in self._sinks:
                self._sinks["tensorboard"].flush()
        return {**self._state, "pending": self._pending.decode()}

    def close(self) -> None:
        """Flushes and closes everything; the writer cannot be used afterwards."""
        if not self._enabled:
            return
        if not self._flush():
            log.warning("metrics.jsonl: %d bytes of records could not be written", len(self._pending))
        os.close(self._fd)
        for sink in self._sinks.values():
            sink.finish()
        self._enabled = False


class _EventFile:
    """TensorBoard's event file. Not by tensorboardX's SummaryWriter, whose flush leaves out what is in its queue."""

    def __init__(self, folder: pathlib.Path, first_step: int):
        from tensorboardX import event_file_writer, proto, summary  # here, since it takes a while to import

        folder.mkdir(exist_ok=True)
        # The suffix keeps a restart within the same second from overwriting the file of the run before it.
        suffix = f".{os.getpid()}.{time.monotonic_ns()}"
        self._file = event_file_writer.EventsWriter(str(folder / "events"), suffix)
        self._event, self._scalar = proto.event_pb2.Event, summary.scalar
        # Makes TensorBoard forget what a killed run had written beyond the checkpoint.
        start = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
        self._file.write_event(self._event(wall_time=time.time(), step=first_step, session_log=start))
        self._flushed = time.monotonic()

    def log(self, scalars: Mapping, step: int) -> None:
        for name, value in scalars.items():
            summary = self._scalar(name, value)
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > 10:  # so that people can watch
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def finish(self) -> None:
        self._file.close()


def _wandb(root: pathlib.Path, run_id: str, after: int | None, config: Mapping | None, options: dict):
    """Continues the run `run_id`. after: a step, whose later records are dropped; None keeps all."""
    try:
        import wandb
    except ImportError as e:
        raise UserError("config.log.wandb=True needs the package wandb (pip install jaxrl[wandb])") from e
    common = dict(dir=str(root), config=dict(config or {}), **options)
    if after is None:
        # Steps that are logged again after a resume are ignored by W&B: they carry the values that it has already.
        return wandb.init(id=run_id, resume="allow", **common)
    try:
        return wandb.init(resume_from=f"{run_id}?_step={after}", **common)  # W&B drops the later steps
    except Exception as e:  # offline, or a server that cannot
        new = f"{run_id}-after-{after}"
        log.warning("wandb cannot rewind its run %s to step %d (%r); from here on the run is %s", run_id, after, e, new)
        atomic_write(root / "wandb_id", new)
        return wandb.init(id=new, resume="allow", **common)


def _stored_id(path: pathlib.Path) -> str:
    """The tracker id of this run directory: also a run killed before its first checkpoint keeps its id."""
    if not path.exists():
        atomic_write(path, uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _plain(value: Any) -> Any:
    """Python numbers from NumPy and jax ones (float32 keeps its exact value); containers element by
    element."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int | float):
        return float(value) if isinstance(value, float) else value
    return np.asarray(value).tolist()


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of metrics.jsonl. Raises TypeError for values that are not JSON."""
    nonfinite = {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    out = {k: None if k in nonfinite else v for k, v in record.items()}
    if nonfinite:
        out["_nonfinite"] = nonfinite
    return json.dumps(null_for_nan(out), allow_nan=False).encode() + b"\n"


def null_for_nan(value: Any) -> Any:
    """The same tree with None for NaN and infinities, which strict JSON does not have."""
    if isinstance(value, dict):
        return {k: null_for_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [null_for_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, NaN and infinities restored. A torn last line (a run in progress) is
    left out.

    Raises UserError naming file and line if any other line is not JSON.
    """
    records = []
    for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            record.update({k: float(v) for k, v in record.pop("_nonfinite", {}).items()})
        except (ValueError, AttributeError, TypeError) as e:
            raise UserError(f"{path}:{number}: not a metrics record: {e}") from None
        records.append(record)
    return records
