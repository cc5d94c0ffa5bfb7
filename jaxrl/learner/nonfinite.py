"""What happens after updates that were skipped because loss, gradient or step were not finite.

The update itself leaves the state as it was (jaxrl/learner/update.py). The training loop then stores the mini-batch
with `store_batches`. When too many in a row were skipped, it goes back to the last checkpoint once and continues with
other problems: with the same problems a deterministic run would fail again.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrl.errors import UserError
from jaxrl.learner.packing import PackedBatch
from jaxrl.runtime import distributed
from jaxrl.runtime.mesh import num_batch_shards, own_shards
from jaxrl.runtime.storage import atomic_write

MOST_FILES = 16  # a run that skips now and then must not fill the disk


def store_batches(run_dir: str | os.PathLike, step: int, batches: Mapping[int, PackedBatch]) -> pathlib.Path | None:
    """Writes the skipped mini-batches of a step, {number of the update: batch}, to nonfinite/step_00000012.npz.

    Arrays are named "update0/tokens", ... (see PackedBatch; old_logprobs and ref_logprobs are scored on the
    devices and not stored). Returns the path, or None once MOST_FILES are there.
    """
    folder = pathlib.Path(run_dir) / "nonfinite"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:08d}.npz"
    if not path.exists() and len(list(folder.glob("step_*.npz"))) >= MOST_FILES:
        return None
    scored = ("old_logprobs", "ref_logprobs", "capacity")
    arrays = {
        f"update{i}/{name}": np.asarray(value)
        for i, batch in batches.items()
        for name, value in vars(batch).items()
        if name not in scored and value is not None
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    atomic_write(path, buffer.getvalue())
    return path


def whole_batch(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """The batch with the rows of all processes, from the own rows of each. All processes must call it."""
    if jax.process_count() == 1:
        return batch
    shards, rows = num_batch_shards(mesh), {k: v for k, v in vars(batch).items() if np.ndim(v) >= 3}
    found, out = distributed.allgather_arrays(rows | {"own": own_shards(mesh)}), {}
    for name, (micro, count, *rest) in ((k, v.shape) for k, v in rows.items()):
        depth = count // len(own_shards(mesh))
        whole = np.zeros((micro, shards, depth, *rest), rows[name].dtype)
        for part in found:
            whole[:, part["own"]] = part[name].reshape(micro, -1, depth, *rest)
        out[name] = whole.reshape(micro, -1, *rest)
    return batch.replace(**out)


def must_roll_back(in_a_row: int, limit: int, rollbacks: int, step: int, run_dir: str | os.PathLike) -> bool:
    """Whether the run should go back to its last checkpoint after `in_a_row` skipped updates.

    limit: config.nonfinite.max_in_a_row, 0 = never. rollbacks: how often this run has gone back already.
    Raises UserError where the run would have to go back a second time.
    """
    if not 0 < limit <= in_a_row:
        return False
    if rollbacks:
        raise UserError(
            f"step {step}: loss, gradient or step were not finite in {in_a_row} updates in a row, again after "
            f"going back to a checkpoint; the mini-batches are in {pathlib.Path(run_dir) / 'nonfinite'}. Lower "
            "config.optimizer.learning_rate, or set config.nonfinite.max_in_a_row=0 to skip such updates for ever"
        )
    return True
