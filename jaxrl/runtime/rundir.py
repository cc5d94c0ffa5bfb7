"""One directory holds one run, on a disk or an object store: its layout and its one writer.

    config.json          the resolved configuration
    metrics.jsonl        one record a step (metrics.py)
    samples/             a few rollouts a step, step_00000012.jsonl
    tensorboard/         event files
    checkpoints/         checkpoint.py
    .lock                held by the process that writes here (lock.py)

All but checkpoints are written to `local`. On a disk that is the directory itself; on an object store, which can
neither append nor rename, it is a local folder. Its changed files are uploaded before every checkpoint and at the end,
so that a checkpoint never refers to a file that is not there yet.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

from etils import epath

from jaxrl.errors import UserError
from jaxrl.runtime import storage
from jaxrl.runtime.lock import Lease, Lock, lock
from jaxrl.runtime.storage import Mirror, atomic_write

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The paths of a run. `open_run_dir` makes one for writing; `RunDir(path)` is enough to know where things are."""

    root: epath.Path
    lock: Lock | Lease | None = None
    mirror: Mirror | None = None

    @property
    def local(self) -> pathlib.Path:
        return self.mirror.local if self.mirror else pathlib.Path(self.root)

    @property
    def config(self) -> pathlib.Path:
        return self.local / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        return self.local / "metrics.jsonl"

    @property
    def samples(self) -> pathlib.Path:
        return self.local / "samples"

    @property
    def checkpoints(self) -> epath.Path:
        return self.root / "checkpoints"

    def write_config(self, config: Mapping) -> dict[str, tuple]:
        """Stores the resolved configuration (nested mapping, JSON-able).

        Returns {dotted key: (before, now)} for every key that differs from the one stored by an earlier start.
        """
        now = _flat(json.loads(json.dumps(config, default=str)))
        before = _flat(json.loads(self.config.read_text())) if self.config.exists() else now
        atomic_write(self.config, json.dumps(config, indent=2, default=str) + "\n")
        keys = sorted(before.keys() | now.keys())
        return {k: (before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)}

    def write_samples(self, step: int, rows: Iterable[Mapping]) -> None:
        """Stores the rollout sample of a step as jsonl, whole or not at all; the same step again replaces
        it."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(self.samples / f"step_{step:08d}.jsonl", text)

    def drop_samples_after(self, step: int) -> None:
        """On resume at `step`: removes samples of later steps, which will be made again."""
        names = {*storage.children(self.samples), *storage.children(self.root / "samples")}
        late = [n for n in names if (found := re.fullmatch(r"step_(\d+)\.jsonl", n)) and int(found[1]) > step]
        self.mirror.forget([f"samples/{name}" for name in late])

    def publish(self) -> None:
        """Process 0: uploads all changed files, if this process still is the writer. Raises OSError."""
        self.lock.confirm()
        self.mirror.push()

    def close(self) -> None:
        """Uploads a last time and unlocks the directory. A store that stays away is only a warning: everything up to
        the last checkpoint is there."""
        try:
            self.mirror.push()
        except OSError as e:
            log.warning("%s: %s; the newest files are in %s", self.root, e, self.local)
        self.lock.release()


def _flat(tree: Mapping, prefix: str = "") -> dict:
    out = {}
    for k, v in tree.items():
        out.update(_flat(v, f"{prefix}{k}.") if isinstance(v, Mapping) and v else {f"{prefix}{k}": v})
    return out


def open_run_dir(root: str | os.PathLike, resume: bool) -> RunDir:
    """Makes the layout if needed and locks it for this process (call it in process 0 only).

    resume=False on a directory that already holds a run raises UserError: an old run is never overwritten.
    resume=True on an empty or new directory is fine, so that one command serves first start and every
    restart. Raises UserError also if the directory cannot be made or written, or is in use.
    """
    run = RunDir(storage.as_path(root, "config.run_dir"))
    try:
        for path in (run.root, run.root / "samples", run.checkpoints):
            if not storage.is_remote(root):
                path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"config.run_dir: cannot make {e.filename}: {e.strerror}") from e
    owned = lock(run.root)
    try:
        with storage.user_errors("config.run_dir"):
            mirror = Mirror(run.root, pull=("config.json", "metrics.jsonl", "wandb_id"))
            run = dataclasses.replace(run, lock=owned, mirror=mirror)
            run.samples.mkdir(exist_ok=True)
            started = run.metrics.exists() and run.metrics.stat().st_size > 0
            if not resume and (started or storage.children(run.checkpoints)):
                raise UserError(f"config.run_dir: {root} already holds a run; set config.resume=True to continue it, "
                                "or choose another directory")
    except BaseException:
        owned.release()
        raise
    for depth in (".*.tmp-*", "*/.*.tmp-*"):  # what a kill leaves of an atomic write
        for leftover in run.local.glob(depth):
            leftover.unlink()
    return run
