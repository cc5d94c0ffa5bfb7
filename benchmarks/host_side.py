"""The host side of a step alone, at the size of a pod: what each host does between sampling and the update.

    python benchmarks/host_side.py [--config=configs/pods/lspo_qwen25_math_7b_256.py] [--hosts=64] [--tokens=1024]

One process plays one host; the shares of the others are made up beforehand, as bytes, so that the network is not in the
times (its bytes are printed). Medians of --rounds.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from unittest import mock

import jax
import numpy as np

from jaxrl import collect
from jaxrl import rollouts as records
from jaxrl.algorithms.selection import select
from jaxrl.batch import fill_in, make_batches, with_advantages
from jaxrl.runtime import cli, distributed
from jaxrl.runtime.config import parse_config
from jaxrl.runtime.distributed import bytes_of
from jaxrl.shaping import shape_rewards
from jaxrl.types import Problem


def made_up(config, tokens: int) -> records.Rollouts:
    """A generation batch: lengths uniform from half to one and a half `tokens`, graded at random."""
    rng, group = np.random.default_rng(0), config.batch.group_size
    count = config.batch.generation_prompts or config.batch.prompts
    prompts = tuple(records.Prompt(Problem(str(i), "", ""), rng.integers(0, 1000, 128).astype(np.int32), group, i)
                    for i in range(count))  # fmt: skip
    n = count * group
    offsets = np.cumsum([0, *rng.integers(tokens // 2, tokens * 3 // 2 + 1, n)])
    correct = (rng.random(n) < np.repeat(rng.random(count), group)).astype(np.float32)
    whole = records.begin(prompts)
    total = int(offsets[-1])
    return whole.replace(
        offsets=offsets, tokens=rng.integers(0, 150000, total, dtype=np.int32),
        logprobs=-rng.random(total, dtype=np.float32), sampled=np.ones(total, bool), version=np.ones(total, np.int32),
        correct=correct, reward=correct, valid=np.ones(n, bool), finish=np.full(n, "eos", object),
        outcome=np.where(correct > 0, "correct", "wrong").astype(object),
    )  # fmt: skip


def rounds(config, whole: records.Rollouts, hosts: int, repeat: int):
    """Yields {part: (seconds, seconds of CPU)} of one round after the other, the bytes sent and received with it."""
    # fmt: off
    shares = [whole.take_groups(list(range(h, whole.num_groups, hosts))) for h in range(hosts)]
    sent = [bytes_of(s.to_arrays(prompts=False)) for s in shares]
    for _ in range(repeat):
        seconds = {}

        @contextlib.contextmanager
        def timed(part, seconds=seconds):
            begin, cpu = time.perf_counter(), time.process_time()
            yield
            seconds[part] = time.perf_counter() - begin, time.process_time() - cpu

        def everybody(data, sent=sent):
            return [data, *sent[1:]]

        with timed("gather"), mock.patch.object(jax, "process_count", lambda: hosts), \
                mock.patch.object(distributed, "allgather_bytes", everybody):
            found = collect.gather(shares[0], whole)
        with timed("rewards, selection"):
            found = shape_rewards(found, config)
            a = config.algorithm
            hyper = {name: dict(a.selection_hyper[name]) for name in a.selection.split("+")}
            chosen, _ = found.where(select(found, a.selection, hyper)[0]).split_groups(config.batch.prompts)
        with timed("advantages, packing"):
            shards = hosts  # as in the config: data x fsdp is the number of hosts, tensor inside of one
            batches = fill_in(make_batches(chosen, config, 1, shards, [0]), with_advantages(chosen, config))
        with timed("placement of its own rows"):
            moved = 0
            for data, *_ in batches:
                for x in jax.tree.leaves(data):
                    own = np.asarray(x)
                    for _device in range(4):  # a host's chips hold the same rows: tensor
                        moved += own.nbytes
                        jax.device_put(own).block_until_ready()
        yield seconds, len(sent[0]), sum(map(len, sent)), moved
    # fmt: on


def main(argv):
    given = [a for a in argv[1:] if a.startswith("--config")]
    rest = ["host_side", *(a for a in argv[1:] if not a.startswith("--config"))]
    flags = cli.parse_flags(rest, dict(hosts=64, tokens=1024, rounds=3), __doc__)
    if not any(a.startswith("--config=") for a in given):
        given = ["--config=configs/pods/lspo_qwen25_math_7b_256.py", *given]
    config = parse_config(["host_side", *given])
    whole = made_up(config, flags["tokens"])
    print(f"{len(whole):,} responses, {len(whole.tokens):,} tokens, {flags['hosts']} hosts")
    found = list(rounds(config, whole, flags["hosts"], flags["rounds"]))
    print(f"{'':28} {'seconds':>8} {'of CPU':>8}")
    for part in found[0][0]:
        show(part, [f[0][part] for f in found])
    show("together", [np.sum(list(f[0].values()), axis=0) for f in found])
    _, sent, received, moved = found[0]
    print(f"a host sends {sent / 2**20:.1f} MiB, receives {received / 2**20:.1f} MiB "
          f"({received / len(whole.tokens):.2f} bytes a token), places {moved / 2**20:.1f} MiB")


def show(part: str, times) -> None:
    """Medians of the rounds."""
    wall, cpu = (statistics.median(x) for x in zip(*times, strict=True))
    print(f"{part:28} {wall:8.3f} {cpu:8.3f}")


if __name__ == "__main__":
    cli.run(main)
