"""From selected rollouts to the mini-batches of one step: split into updates, packing, KL in the reward, advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl.algorithms.advantages import advantages
from jaxrl.algorithms.kl import kl_estimate
from jaxrl.learner.packing import PackedBatch, Packing, PackSettings, fill, plan, sizes
from jaxrl.learner.update import own_rows
from jaxrl.rollouts import Rollouts
from jaxrl.runtime import distributed


class MiniBatch(NamedTuple):
    """The data of one optimizer update, as far as it lies in this host's rows. packing: where the tokens are in them.
    index: int64, the responses in these rows, as indices into the rollouts of the step."""

    data: PackedBatch
    packing: Packing
    index: np.ndarray


def row_length(config) -> int:
    """Tokens of a packed row: config.batch.row_tokens; 0 stands for the longest prompt plus response."""
    longest = config.sampling.max_prompt + config.sampling.max_tokens
    return config.batch.row_tokens or -(-longest // 128) * 128


def most_rows(config, sequences: int) -> int:
    """Most rows that first-fit-decreasing can need: every row but the last holds at least as many sequences as fit
    when all have the greatest length."""
    longest = config.sampling.max_prompt + config.sampling.max_tokens
    return -(-sequences // (row_length(config) // longest))


def pack_settings(config, sequences: int, shards: int) -> PackSettings:
    """How mini-batches of at most `sequences` sequences are packed. shards: data x fsdp x expert of the mesh."""
    sizes = (row_length(config), config.batch.micro_tokens, shards, most_rows(config, sequences))
    s = config.sampling
    return PackSettings(
        *sizes, share_prompts=config.batch.share_prompts, replay=s.replay, experts=s.router_replay)


def make_batches(
    rollouts: Rollouts, config, step: int, shards: int = 1, own: Sequence[int] | None = None
) -> list[MiniBatch]:
    """The mini-batches of one step, in the order of their updates, with advantages 0 (`with_advantages` fills them in).

    own: the batch shards whose rows are packed (`runtime.mesh.own_shards`); None: all.

    Each epoch visits every graded response once, in an order fixed by (seed, step, epoch), in batch.updates parts of
    nearly equal numbers of responses. Returns [] when nothing was selected.
    """
    b = config.batch
    settings = pack_settings(config, -(-b.prompts * b.group_size // b.updates), shards)
    graded, count, out = np.flatnonzero(rollouts.valid), sizes(rollouts), []
    for epoch in range(b.epochs):
        order = np.random.default_rng([config.seed, 3, step, epoch]).permutation(len(graded))
        for part in np.array_split(graded[order], b.updates):
            if len(part):
                packing = plan(count.take(part), settings, own)
                index = part[packing.responses]
                data = fill(packing, rollouts.take(index), np.zeros(len(index)), settings, step)
                out.append(MiniBatch(data, packing, index))
    return out


def with_kl_penalty(
    rollouts: Rollouts, batches: list[MiniBatch], config, learner, *, params, reference
) -> Rollouts:
    """The rollouts with rewards reduced by kl_coef x sum_t KL(policy || reference), if
    config.algorithm.kl_in_reward is set.

    Scores the packed mini-batches of the first epoch, which hold every graded response once. Each host sums over the
    responses in its own rows; the hosts then exchange one number per response.
    """
    a = config.algorithm
    if not (a.kl_in_reward and a.kl_coef):
        return rollouts
    mine, penalty = [], np.zeros_like(rollouts.reward)
    for data, packing, index in batches[: config.batch.updates]:
        scores = [own_rows(learner.score(params, data)), own_rows(learner.score(reference, data, reference=True))]
        kl = kl_estimate(*scores, a.kl_kind, a.kl_value_clamp) * data.response_mask
        mine.append(np.add.reduceat(packing.collect(kl), packing.offsets[:-1]) if len(index) else np.zeros(0))
    index = np.concatenate([np.zeros(0, np.int64), *(batch.index for batch in batches[: config.batch.updates])])
    for found in distributed.allgather_arrays({"index": index, "kl": np.concatenate([np.zeros(0), *mine])}):
        penalty[found["index"]] = found["kl"]
    return rollouts.replace(reward=rollouts.reward - a.kl_coef * penalty)


def with_advantages(rollouts: Rollouts, config) -> Rollouts:
    """The rollouts with the advantages of config.algorithm as column "advantage": [N], or [total] from a method that
    gives one per token."""
    name = config.algorithm.advantage
    values = advantages(rollouts, name, dict(config.algorithm.advantage_hyper[name]))
    if len(values) == len(rollouts):
        return rollouts.replace(columns=rollouts.columns | {"advantage": values})
    return rollouts.replace(token_columns=rollouts.token_columns | {"advantage": values})


def fill_in(batches: list[MiniBatch], rollouts: Rollouts) -> list[MiniBatch]:
    """The mini-batches with the column "advantage" of the rollouts they were made of."""
    out = []
    for data, packing, index in batches:
        values = packing.spread(rollouts.take(index).column("advantage"))
        out.append(MiniBatch(data.replace(advantages=values), packing, index))
    return out
