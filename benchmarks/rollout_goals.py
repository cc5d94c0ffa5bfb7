"""What pages are expected to gain in the shipped pod configs, by arithmetic from shapes: no chip, and nothing compiled.

    python benchmarks/rollout_goals.py [--configs=l1_r1_distill_1_5b,maspo_qwen3_4b]

For every config of configs/pods/, log-normal lengths (median a quarter of the limit, and half of it on average, both
cut there) go through the engine's own scheduler with the pages that the chip's memory leaves room for. Printed are
three ratios. 1: the bytes that a decode step reads, to those that it cannot avoid (weights once and the sum of the
contexts). 2: the most responses in flight, to the slots of the earlier dense cache. 3: the expected seconds of the
rollout, to those of the dense cache by the same arithmetic, with preflight's assumptions then: all slots full, answers
of mean length.

These are estimates. A step is taken to read its bytes at 90 % of the bandwidth, or to multiply at 70 % of the peak;
prefill is taken to reach half of the peak. Left out: collectives, moving weights, saves, grading, the host's own work.
"""

from __future__ import annotations

import math
import types
from typing import NamedTuple

from jaxrl import build, memory
from jaxrl.rollout.replay import Rollout, log_normal, replay
from jaxrl.runtime import cli, compilers, hardware, roofline
from jaxrl.runtime.config import parse_config

# Before: slots of a host in the dense cache, and seconds of the rollout by preflight, compiled (the docstrings then).
BEFORE = {
    "l1_r1_distill_1_5b": (128, 445), "lspo_llama32_3b": (96, 3404), "lspo_qwen25_math_7b": (256, 520),
    "lspo_qwen25_math_7b_256": (192, 25), "lspo_qwen3_4b": (64, 4604), "maspo_qwen3_4b": (32, 10795),
    "maspo_r1_distill_7b": (256, 5104), "maspo_r1_distill_14b": (64, 14519),
}  # fmt: skip
LENGTHS = {"median a quarter": (0.25, 0.9), "mean half": (0.43, 0.75)}  # median in parts of the limit, sigma


class Host(NamedTuple):
    """One host's sampler. chip: see hardware. replicas, tensor: of the weights, chips of each. weights: bytes a chip
    that a step reads. token: bytes a chip of one token's keys and values. flops: of a token but for attention."""

    chip: hardware.Chip
    replicas: int
    tensor: int
    weights: float
    token: float
    flops: float

    def step(self, rows: int, columns: float) -> float:
        """Seconds of a decode step of `rows` rows that read `columns` columns of the cache together."""
        bandwidth = roofline.MEMORY_SHARE * self.chip.bandwidth
        products = rows / self.replicas * self.flops / self.tensor / (roofline.PRODUCT_SHARE * self.chip.flops)
        return max(self.weights / bandwidth, products) + columns / self.replicas * self.token / bandwidth

    def prefill(self, tokens: float) -> float:
        """Seconds to prefill so many, padding included."""
        peak = roofline.KERNEL_SHARE * self.chip.flops * self.replicas * self.tensor
        return tokens * self.flops / peak

    def seconds(self, rollout: Rollout) -> float:
        """Seconds of everything that the scheduler called."""
        steps = sum(c.steps * self.step(c.rows, c.read / c.steps) for c in rollout.of("decode"))
        return steps + self.prefill(sum(c.rows * c.columns for c in rollout.of("prefill")))

    def reads(self, rollout: Rollout) -> float:
        """Bytes that decoding reads, divided by those of the weights once a step and of every row's own context."""
        weights = sum(c.steps for c in rollout.of("decode")) * self.weights * self.replicas
        return (weights + rollout.read * self.token) / (weights + rollout.contexts * self.token)


def host_of(config) -> tuple[Host, dict[str, int], int]:
    """(the host, its engine's pages, number of hosts). Raises UserError without the TPU compiler's topologies."""
    devices = compilers.target(config.topology).devices
    mesh, decoder = build.mesh(config, devices), build.decoder_config(config)
    tokenizer = types.SimpleNamespace(eos_ids=(0, 1), vocab_size=decoder.vocab_size, unused_ids=())
    engine = build.sampler(config, decoder, tokenizer, mesh)
    dtype, placement, tensor = engine.spec.dtype, engine.placement, config.sampling.tensor
    weights = memory.of_sampler(decoder, dtype, placement)
    if not decoder.tie_embeddings:  # of the embedding a step reads a few rows
        weights -= decoder.vocab_size * decoder.hidden_size * dtype.itemsize / tensor
    token, flops = memory.of_token(decoder, dtype, placement), hardware.model_flops_per_token(decoder, 0)
    host = Host(hardware.chip(devices[0].device_kind), placement.row_multiple, tensor, weights, token, flops)
    return host, build.cache_sizes(config, decoder, mesh), mesh.size // placement.mesh.size


def sampled(config, host: Host, cache: dict[str, int], hosts: int, median: float, sigma: float) -> list[Rollout]:
    """What some of the hosts call for one generation batch."""
    s, b = config.sampling, config.batch
    shape = math.ceil((b.generation_prompts or b.prompts) / hosts), b.group_size
    sizes = dict(slots=s.slots, chunk=s.chunk, window=s.window, max_prompt=s.max_prompt, max_tokens=s.max_tokens)
    sizes |= dict(multiple=host.replicas, page=cache["pages"], tokens=cache["cache_tokens"])
    prompts = [s.max_prompt // 4] * shape[0]
    return [replay(log_normal(shape, s.max_tokens, median, sigma, i), prompts, **sizes) for i in range(min(hosts, 4))]


def dense(config, host: Host, hosts: int, slots: int) -> float:
    """Seconds of the dense cache: so many slots, all full, each as long as the longest, answers of half the limit."""
    s, b = config.sampling, config.batch
    prompts = (b.generation_prompts or b.prompts) / hosts
    window = -(-(s.max_prompt + s.max_tokens) // s.window) * s.window
    steps = prompts * b.group_size * s.max_tokens / 2 / slots
    return steps * host.step(slots, slots * window) + host.prefill(prompts * s.max_prompt)


def main(argv: list[str]) -> None:
    flags = cli.parse_flags(argv, dict(configs=",".join(BEFORE)), __doc__)
    print(f"{'config':<25}{'slots':>6}{'tokens':>11}  {'lengths':<17}{'read':>6}{'in flight':>10}{'x':>5}{'waits':>7}"
          f"{'rollout s':>10}{'before':>8}{'x':>6}{'compiled':>10}")  # fmt: skip
    for name in flags["configs"].split(","):
        config = parse_config(["", f"--config=configs/pods/{name}.py"])
        config.model.path = ""
        (slots, compiled), (host, cache, hosts) = BEFORE[name], host_of(config)
        before = dense(config, host, hosts, slots)
        for lengths, drawn in LENGTHS.items():
            found = sampled(config, host, cache, hosts, *drawn)
            flight = max(c.active for f in found for c in f.of("decode"))
            seconds, waits = max(map(host.seconds, found)), sum(f.stats.waits for f in found) / len(found)
            print(f"{name:<25}{config.sampling.slots:>6}{cache['cache_tokens']:>11,}  {lengths:<17}"
                  f"{max(map(host.reads, found)):>6.2f}{flight:>10}{flight / slots:>5.1f}{waits:>7.0f}"
                  f"{seconds:>10,.0f}{before:>8,.0f}{seconds / before:>6.2f}{compiled:>10,}", flush=True)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
