"""From selected groups to the mini-batches of one step: advantages, the split into updates, packing."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import multihost_utils

from jaxrl.algorithms.advantages import group_advantages
from jaxrl.algorithms.kl import kl_estimate
from jaxrl.collect import Collected
from jaxrl.learner.packing import PackedBatch, Packing, pack
from jaxrl.runtime.mesh import num_batch_shards
from jaxrl.types import Group


class MiniBatch(NamedTuple):
    """One optimizer update's data and where its sequences went in the packed rows."""

    data: PackedBatch
    packing: Packing


class Trained(NamedTuple):
    """One completion that is trained on: its group, its index there, and its advantage."""

    group: Group
    index: int
    advantage: float


def trained_completions(groups: list[Group], config) -> list[Trained]:
    """The graded completions of the selected groups with their advantages, in order."""
    name = config.algorithm.advantage
    advantages = group_advantages(groups, name, dict(config.algorithm.advantage_hyper[name]))
    return [
        Trained(g, i, float(a[i]))
        for g, a in zip(groups, advantages, strict=True)
        for i in range(len(g.completions))
        if g.valid[i]
    ]


def row_lengths(config) -> tuple[int, ...]:
    """The packed row length(s) of config.batch.row_tokens; 0 stands for the longest prompt plus response."""
    longest = config.sampling.max_prompt + config.sampling.max_tokens
    return (config.batch.row_tokens or -(-longest // 128) * 128,)


def most_rows(config, sequences: int) -> int:
    """Rows that first-fit-decreasing needs at most: all but the last hold as many sequences as the longest would."""
    longest = config.sampling.max_prompt + config.sampling.max_tokens
    return -(-sequences // (row_lengths(config)[0] // longest))


def make_batches(groups: list[Group], config, step: int, shards: int = 1) -> list[MiniBatch]:
    """The mini-batches of one step, in the order of their updates.

    Each epoch visits every completion once, in an order fixed by (seed, step, epoch), in batch.updates parts
    of nearly equal numbers of completions. shards: data x fsdp of the mesh.

    Returns [] when nothing was selected.
    """
    b = config.batch
    trained = trained_completions(groups, config)
    out = []
    for epoch in range(b.epochs):
        order = np.random.default_rng([config.seed, 3, step, epoch]).permutation(len(trained))
        for part in np.array_split(order, b.updates):
            if len(part):
                rows = [trained[i] for i in part]
                out.append(MiniBatch(*_pack(rows, config, shards)))
    return out


def _pack(rows: list[Trained], config, shards: int):
    completions = [t.group.completions[t.index] for t in rows]
    return pack(
        [t.group.prompt_tokens for t in rows],
        [c.tokens for c in completions],
        [t.advantage for t in rows],
        [c.logprobs for c in completions],
        row_lengths(config),
        config.batch.micro_tokens,
        shards,
        [c.stale for c in completions],
        most_rows(config, -(-config.batch.prompts * config.batch.group_size // config.batch.updates)),
    )


def sample_rows(collected: Collected, groups: list[Group], config, tokenizer, most: int) -> list[dict[str, Any]]:
    """What samples/step_*.jsonl shows of a step: all completions of the first `most` kept groups and as many dropped
    ones, with their tokens, log-probs, rewards and advantages. "reason" says why selection dropped the group
    ("lspo/middle"), or is empty.

    groups: those that make_batches got; "advantage" is None for completions that are not trained on.
    """
    advantages = {id(t.group.completions[t.index]): round(t.advantage, 4) for t in trained_completions(groups, config)}
    rows = list(zip(collected.sampled, collected.reasons, strict=True))
    shown = [r for r in rows if not r[1]][:most] + [r for r in rows if r[1]][:most]
    return [
        {
            "id": g.problem.id,
            "prompt": tokenizer.decode(g.prompt_tokens),
            "answer": g.problem.answer,
            "budget": g.problem.budget,
            "text": g.texts[i],
            "tokens": [tokenizer.decode([t], False) for t in c.tokens.tolist()],
            "logprobs": [round(float(x), 4) for x in c.logprobs],
            "advantage": advantages.get(id(c)),
            "reward": float(g.rewards[i]),
            "correct": float(g.correct[i]),
            "outcome": g.outcomes[i],
            "length": c.length,
            "finish": c.finish,
            "stale": c.stale,
            "selected": not reason,
            "reason": reason,
        }
        for g, reason in shown
        for i, c in enumerate(g.completions)
    ]


def kl_in_reward(config, groups, learner, params, reference):
    """Groups whose rewards have kl_coef x sum_t KL(policy || reference) subtracted, if the config says so."""
    a = config.algorithm
    if not (a.kl_in_reward and a.kl_coef) or not groups:
        return groups
    flat = [(g, c) for g in groups for c in g.completions]
    ones = [np.zeros(c.length, np.float32) for _, c in flat]
    data, packing = pack(
        [g.prompt_tokens for g, _ in flat],
        [c.tokens for _, c in flat],
        np.zeros(len(flat)),
        ones,
        row_lengths(config),
        config.batch.micro_tokens,
        num_batch_shards(learner.mesh),
        most_rows=most_rows(config, config.batch.prompts * config.batch.group_size),
    )
    scores = (learner.score(p, data) for p in (params, reference))
    kl = kl_estimate(*scores, a.kl_kind) * data.response_mask
    kl = packing.collect(multihost_utils.process_allgather(kl, tiled=True))
    sums = iter([float(x.sum()) for x in kl])
    return [
        dataclasses.replace(
            g, rewards=g.rewards - a.kl_coef * np.array([next(sums) for _ in g.completions], np.float32)
        )
        for g in groups
    ]
