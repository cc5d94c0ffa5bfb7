"""Shared by the loss tests: one compiled function per loss and dtype, batches to feed it, groups to select
from.

Everything runs at one padded shape and with the constants as traced arguments, so that the whole folder
compiles each loss once per dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.algorithms.aggregation import AGGREGATIONS, aggregate
from jaxrl.algorithms.hyper import resolve
from jaxrl.algorithms.inputs import LossInputs
from jaxrl.algorithms.losses import LOSSES
from jaxrl.rollouts import Prompt, from_sequences
from jaxrl.types import Problem

ROWS, WIDTH = 16, 64


@functools.cache
def _compiled(fn, static: tuple):
    def value(logp, rest, numbers, pick, tokens, sequences, norm):
        x = rest._replace(logp=logp)
        per_token, stats = fn(x, {**numbers, **dict(static)})
        counts = (tokens, sequences, norm)
        modes = jnp.stack([aggregate(per_token, x.mask, x.segment_ids, m, *counts) for m in AGGREGATIONS])
        return jnp.sum(jnp.where(pick, modes, 0)), (per_token, stats)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def padded(x, fill=0):
    """[r, t] -> [ROWS * i, WIDTH * j], filled on the right and below; one shape for everything that fits."""
    x = np.asarray(x)
    rows, width = -(-x.shape[0] // ROWS) * ROWS, -(-x.shape[1] // WIDTH) * WIDTH
    out = np.full((rows, width), fill, x.dtype)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def padded_inputs(batch, dtype):
    """LossInputs of a batch (see `run_loss`) at the padded shape."""
    mask, ids = padded(batch["response_mask"].astype(np.int32)), padded(batch["sequence_ids"], -1)
    fills = {"logp": -1.0, "old_logp": -2.0, "advantages": 3.0, "ref_logp": -3.0, "entropy": 0.5}
    floats = {k: jnp.asarray(padded(batch[k], fill)).astype(dtype) for k, fill in fills.items() if k in batch}
    return LossInputs(**floats, mask=mask, segment_ids=ids)


def run_loss(name, batch, aggregation=None, overrides=None, counts=None, norm_length=1.0, dtype=np.float64,
             whole=None):
    """(loss, grad [r, t], token loss [r, t], stats) of a named loss on a batch, at its own shape, as
    float64 NumPy.

    batch: dict of logp, old_logp, advantages, response_mask, sequence_ids [r, t]. counts: (tokens,
    sequences); by default those of the batch, fully masked sequences left out. dtype bfloat16 casts the
    float inputs. whole: the mini-batch that the batch is a part of, for losses that look at it first.
    """
    entry, hyper = resolve(LOSSES, "loss", name, overrides)
    with jax.enable_x64(dtype == np.float64):
        inputs = padded_inputs(batch, dtype)
        if counts is None:
            counts = count(batch)
        if entry.prepare is not None:
            hyper = prepared(name, inputs if whole is None else padded_inputs(whole, dtype), hyper)
        static = tuple((k, v) for k, v in hyper.items() if isinstance(v, bool | str))
        numbers = {k: v for k, v in hyper.items() if not isinstance(v, bool | str)}
        pick = np.array([m == (aggregation or entry.aggregation) for m in AGGREGATIONS])
        assert pick.sum() == 1, aggregation
        (loss, (per_token, stats)), grad = _compiled(entry.fn, static)(
            inputs.logp, inputs, numbers, pick, float(counts[0]), float(counts[1]), float(norm_length)
        )
        r, t = batch["logp"].shape
        assert not np.any(np.asarray(grad, np.float64)[r:]) and not np.any(
            np.asarray(grad, np.float64)[:, t:]
        )
        assert per_token.dtype == (jnp.float64 if dtype == np.float64 else jnp.float32)
        return (
            float(loss),
            np.asarray(grad, np.float64)[:r, :t],
            np.asarray(per_token, np.float64)[:r, :t],
            {k: float(v) for k, v in stats.items()},
        )


@functools.cache
def _prepare(name, static):
    return jax.jit(lambda inputs: LOSSES[name].prepare(inputs, dict(static)))


def prepared(name, inputs, hyper):
    """hyper after the loss's `prepare`, its bounds as arrays (the schedule needs plain numbers, so not
    traced).
    """
    fn = _prepare(name, tuple(hyper.items()))
    return {k: np.asarray(v)[()] for k, v in fn(inputs).items()}


def count(batch):
    """(response tokens, sequences with at least one) of a batch, by walking over it."""
    sequences = 0
    for ids, mask in zip(batch["sequence_ids"], batch["response_mask"], strict=True):
        starts = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1]), len(ids)]
        sequences += sum(bool(mask[a:b].any()) for a, b in zip(starts, starts[1:], strict=False))
    return int((np.asarray(batch["response_mask"]) != 0).sum()), sequences


def random_sequences(rng, lengths, spread=0.5, advantage=None):
    """A list of dicts logp, old_logp, advantages [n] (one advantage per sequence), away from the clip
    bounds.
    """
    out = []
    for n in lengths:
        old = -rng.exponential(1.0, n) - 0.01
        new = np.minimum(old + rng.normal(0, spread, n), -1e-4)
        adv = np.full(n, rng.normal() if advantage is None else advantage)
        out.append({"logp": new, "old_logp": old, "advantages": adv})
    return out


def pack(sequences, rows, rng=None, width=WIDTH, prompts=True):
    """Pack sequences into rows: row r gets sequences[i] for i in rows[r], in that order.

    With rng, each sequence starts with a masked prompt of 0-3 tokens, ids are arbitrary and masked
    positions hold junk. Returns (batch, places), places[i] = (row, slice of the response tokens of sequence
    i).
    """
    shape = (len(rows), width)
    junk = (lambda: rng.normal(size=shape)) if rng is not None else (lambda: np.zeros(shape))
    batch = {k: junk() for k in ("logp", "old_logp", "advantages")}
    batch["response_mask"] = np.zeros(shape, np.int32)
    batch["sequence_ids"] = np.zeros(shape, np.int32)
    places = {}
    for r, members in enumerate(rows):
        at, last = 0, 0
        for i in members:
            n = len(sequences[i]["logp"])
            lead = int(rng.integers(0, 4)) if rng is not None and prompts else 0
            last = last + 1 if rng is None else last + int(rng.integers(1, 5))
            batch["sequence_ids"][r, at : at + lead + n] = last
            where = slice(at + lead, at + lead + n)
            for k in ("logp", "old_logp", "advantages"):
                batch[k][r, where] = sequences[i][k]
            batch["response_mask"][r, where] = 1
            places[i] = (r, where)
            at += lead + n
            assert at <= width, "row too full"
    return batch, places


def make_group(lengths, correct, rewards=None, valid=None, truncated=None, name="p"):
    """Rollouts of one group with the given response lengths and grades; `jaxrl.rollouts.concat` joins several."""
    n = len(lengths)
    truncated = np.zeros(n, bool) if truncated is None else np.asarray(truncated, bool)
    correct = np.asarray(correct, np.float32)
    group = from_sequences(
        [np.arange(3)],
        [np.zeros(k, np.int32) for k in lengths],
        group=[0] * n,
        correct=correct,
        reward=correct if rewards is None else np.asarray(rewards, np.float32),
        valid=np.ones(n, bool) if valid is None else np.asarray(valid, bool),
        finish=np.where(truncated, "length", "eos").astype(object),
        outcome=np.where(correct > 0, "correct", "wrong").astype(object),
    )
    return group.replace(prompts=(Prompt(Problem(name, "", ""), np.arange(3, dtype=np.int32), n),))
