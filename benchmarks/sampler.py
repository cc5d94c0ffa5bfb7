"""What the sampler reaches, against what the machine allows and against other samplers.

    python benchmarks/sampler.py                                   # uniform and ragged, small model
    python benchmarks/sampler.py --model=large --workload=uniform
    python benchmarks/sampler.py --peers=hf,tunix --checkpoint=DIR --tunix_python=PYTHON --rounds=3
    python benchmarks/sampler.py --peers=int8-weights,int8-cache,int8        # this sampler with rounded parts

Workloads: `uniform`, 32 prompts of 64 tokens, 256 new tokens each; `ragged`, 16 prompts x 8 samples, lengths
log-normal (median 64, sigma 0.9) and cut at 256; `backlog`, the same with 32 prompts, so 8 requests a slot. All are
sampled at temperature 1 in float32; no engine is told the ragged lengths in advance: each ends its rows when they
are reached. `--workload=all` is uniform and ragged.

The shares (prefill, decode, cache moves, host) come from a second, synchronous pass, because dispatch is asynchronous
in the timed one; a share of the host there is time in which the device would idle. The limit is what the weights cost
at the rate measured for 32-row matrix products, plus the cache at the copy rate.

Each engine is its own process; with --peers they run in turn, --rounds times, and the ratios are of the same
round. --cores=1 pins everything to one core and compares CPU seconds, which hold up under other load; --cores=0
leaves threads alone and compares wall time, which needs a quiet machine. Peers get the ragged work in the form that
suits them best without knowing lengths: static batches of 32 in request order, each ending with its longest row.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

DEFAULTS = dict(
    model="small",
    workload="all",
    peers="",
    checkpoint="",
    tunix_python="",
    rounds=3,
    cores=1,
    slots=32,
    chunk=64,
    engine="",
)
SHAPES = {
    "small": dict(
        vocab_size=8192, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=768
    ),
    "large": dict(
        vocab_size=32768, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, intermediate_size=3072
    ),
}
OWN = {
    "jaxrl": {},
    "int8-weights": dict(weights="int8"),
    "int8-cache": dict(cache="int8"),
    "int8": dict(weights="int8", cache="int8"),
}
PROMPT, NEW, BATCH, GROUP, GROUPS = 64, 256, 32, 8, 16


def workload(name: str, vocab: int):
    """(prompts [P, 64], samples per prompt, lengths [P, samples])."""
    import numpy as np

    rng, groups = np.random.default_rng(0), GROUPS * (2 if name == "backlog" else 1)
    if name == "uniform":
        return rng.integers(2, vocab, (BATCH, PROMPT)), 1, np.full((BATCH, 1), NEW)
    lengths = np.exp(rng.normal(np.log(64), 0.9, (groups, GROUP))).astype(int).clip(1, NEW)
    return rng.integers(2, vocab, (groups, PROMPT)), GROUP, lengths


class Timer:
    """Wall and CPU seconds of a with-block, and the cores that others used meanwhile."""

    def __enter__(self):
        self.start = time.perf_counter(), time.process_time(), _busy()
        return self

    def __exit__(self, *_):
        wall, cpu, busy = self.start
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.others = max(0.0, (_busy() - busy - self.cpu) / max(self.wall, 1e-3))


def _busy() -> float:
    """CPU seconds all processes have used."""
    with open("/proc/stat", encoding="ascii") as f:
        v = [int(x) for x in f.readline().split()[1:9]]
    return (sum(v) - v[3] - v[4]) / os.sysconf("SC_CLK_TCK")


def report(engine: str, flags: dict, name: str, timer: Timer, tokens: int, **extra):
    row = dict(engine=engine, model=flags["model"], workload=name, tokens=tokens, wall_s=round(timer.wall, 3))
    row |= dict(cpu_s=round(timer.cpu, 3), other_cores=round(timer.others, 2))
    row["tokens_per_s"] = round(tokens / (timer.cpu if flags["cores"] == 1 else timer.wall), 1)
    print(json.dumps(row | extra), flush=True)


def names(flags: dict) -> list[str]:
    return ["uniform", "ragged"] if flags["workload"] == "all" else [flags["workload"]]


# ---------------------------------------------------------------------------------------------------- this sampler


def run_own(flags: dict):
    import jax
    import numpy as np

    from jaxrl.rollout.engine import Engine, Request
    from models.config import DecoderConfig, from_hf
    from models.decoder import init_params
    from models.weights import load_params

    if flags["checkpoint"]:
        config = from_hf(os.path.join(flags["checkpoint"], flags["model"]))
        params = load_params(os.path.join(flags["checkpoint"], flags["model"]), config)
    else:
        shape = SHAPES[flags["model"]]
        config = DecoderConfig(
            **shape, head_dim=64, qk_norm=True, tie_embeddings=True, model_type="qwen3", rope_theta=1e6
        )
        params = init_params(config, jax.random.key(0))
    # the end token is no token of the vocabulary, so lengths are the workload's alone
    engine = flags["engine"] or "jaxrl"
    sizes = dict(max_prompt=PROMPT, max_tokens=NEW, slots=flags["slots"], chunk=flags["chunk"])
    sampler = Engine(config, (-1,), **sizes, **OWN[engine])
    params = sampler.layout(params)
    limits = machine_limits(config, time.process_time if flags["cores"] == 1 else time.perf_counter)
    for name in names(flags):
        prompts, samples, lengths = workload(name, config.vocab_size)
        requests = [
            Request(p.astype(np.int32), samples, n.tolist(), i)
            for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
        ]
        sampler.generate(params, requests, seed=0)  # compiles
        for _ in range(1 if flags["engine"] else flags["rounds"]):
            with Timer() as t:
                sampler.generate(params, requests, seed=1)
            s, steps = sampler.stats, sampler.stats.slot_steps / flags["slots"]
            mean = PROMPT + (NEW / 2 if name == "uniform" else 64)
            floor = limit_seconds(config, limits, steps, mean)
            spent = t.cpu if flags["cores"] == 1 else t.wall
            extra = dict(utilisation=round(s.utilisation, 3), decode_calls=s.decode_calls)
            extra |= dict(limit_tokens_per_s=round(s.tokens / floor, 1), of_limit=round(floor / spent, 3))
            report(engine, flags, name, t, s.tokens, **extra)
        parts = synchronous(sampler, lambda work=requests: sampler.generate(params, work, seed=1))
        parts["sampling_share"] = round(limits["draw_s"] * steps / spent, 3)
        parts["decode_of_limit"] = round(floor / (spent * parts["decode_share"]), 3)
        print(json.dumps(dict(workload=name, **parts)), flush=True)


def synchronous(sampler, generate) -> dict:
    """Shares of a run in which every program is waited for: prefill, decode, moving caches, and the host's own."""
    import jax

    seconds, call = dict(prefill=0.0, decode=0.0, moves=0.0), sampler.runner.call

    def timed(name, *args, **kwargs):
        begin = time.perf_counter()
        out = jax.block_until_ready(call(name, *args, **kwargs))
        seconds[name if name in seconds else "moves"] += time.perf_counter() - begin
        return out

    sampler.runner.call = timed
    begin = time.perf_counter()
    generate()
    total = time.perf_counter() - begin
    sampler.runner.call = call
    seconds["host"] = total - sum(seconds.values())
    return {f"{name}_share": round(value / total, 3) for name, value in seconds.items()}


def machine_limits(config, clock) -> dict:
    """Seconds by `clock` of the pieces a decode step of 32 rows cannot do without, measured now on these cores."""
    import jax
    import jax.numpy as jnp

    from jaxrl.rollout.sampling import draw
    from models.cpu import LARGE, transposed_product

    D, F, V, H = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    x = lambda n: jnp.ones((BATCH, n), jnp.float32)  # noqa: E731
    w = lambda m, n: jnp.full((m, n), 0.01, jnp.float32)  # noqa: E731
    product, transposed, copy = jax.jit(jnp.matmul), jax.jit(transposed_product), jax.jit(lambda a: a + 1.0)

    def seconds(f, *args):
        jax.block_until_ready(f(*args))
        best, n = float("inf"), 20
        for _ in range(5):
            begin = clock()
            for _ in range(n):
                jax.block_until_ready(f(*args))
            best = min(best, (clock() - begin) / n)
        return best

    def matmul(m, n):  # in the form of the sampler's own layout
        return seconds(transposed, x(m), w(n, m)) if m * n >= LARGE else seconds(product, x(m), w(m, n))

    layer = sum(matmul(m, n) for m, n in ((D, (N + 2 * K) * H), (N * H, D), (D, 2 * F), (F, D)))
    block = jnp.ones((1 << 22,), jnp.float32)
    return dict(
        matmul_s=config.num_layers * layer + matmul(D, V),
        read_bytes_per_s=2 * block.nbytes / seconds(copy, block),  # a copy reads and writes
        draw_s=seconds(
            jax.jit(lambda z, u: draw(z, u, jnp.ones(BATCH))), w(BATCH, V), jnp.full((BATCH, 2), 0.5)
        ),
    )


def limit_seconds(config, limits: dict, steps: float, mean_length: float) -> float:
    """Seconds of `steps` decode steps: weights at the 32-row matmul rate, cache at the copy rate."""
    cache = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * mean_length * BATCH
    return steps * (limits["matmul_s"] + cache / limits["read_bytes_per_s"])


# ---------------------------------------------------------------------------------------------------- the others


def batches(name: str, vocab: int):
    """(prompts [<= 32, 64], lengths) static batches in request order."""
    import numpy as np

    prompts, samples, lengths = workload(name, vocab)
    rows, flat = np.repeat(prompts, samples, axis=0), lengths.reshape(-1)
    for first in range(0, len(rows), BATCH):
        yield rows[first : first + BATCH], flat[first : first + BATCH]


def run_hf(flags: dict):
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Lengths(StoppingCriteria):
        def __init__(self, lengths):
            self.lengths = torch.as_tensor(lengths)

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] - PROMPT >= self.lengths

    torch.set_num_threads(flags["cores"] or os.cpu_count())
    model = AutoModelForCausalLM.from_pretrained(
        os.path.join(flags["checkpoint"], flags["model"]), dtype=torch.float32
    ).eval()

    @torch.no_grad()
    def generate(rows, lengths):
        ids, n = torch.from_numpy(rows), int(lengths.max())
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=n,
            min_new_tokens=n,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Lengths(lengths)]),
        )

    for name in names(flags):
        work = list(batches(name, SHAPES[flags["model"]]["vocab_size"]))
        generate(work[0][0], work[0][1].clip(max=8))
        with Timer() as t:
            for rows, lengths in work:
                generate(rows, lengths)
        report("hf", flags, name, t, int(sum(n.sum() for _, n in work)))


def run_tunix(flags: dict):
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType
    from transformers import AutoTokenizer
    from tunix.generate import sampler as lib
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params as qwen3_params

    m, path = SHAPES[flags["model"]], os.path.join(flags["checkpoint"], flags["model"])
    config = qwen3.ModelConfig(
        num_layers=m["num_layers"],
        vocab_size=m["vocab_size"],
        embed_dim=m["hidden_size"],
        head_dim=64,
        hidden_dim=m["intermediate_size"],
        num_heads=m["num_heads"],
        num_kv_heads=m["num_kv_heads"],
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    model = qwen3_params.create_model_from_safe_tensors(path, config, mesh, jnp.float32)
    cache = lib.CacheConfig(
        cache_size=PROMPT + NEW, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=64
    )
    sampler = lib.Sampler(model, AutoTokenizer.from_pretrained(path), cache)

    def generate(rows, n):
        texts = [" ".join(f"w{i}" for i in row) for row in rows]
        sampler(
            texts,
            max_generation_steps=n,
            max_prompt_length=PROMPT,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[config.vocab_size],
            seed=0,
        )

    for name in names(flags):
        work = list(batches(name, m["vocab_size"]))
        for rows, lengths in work:
            generate(rows, int(lengths.max()))  # compiles each length
        with Timer() as t:
            for rows, lengths in work:
                generate(rows, int(lengths.max()))
        report("tunix", flags, name, t, int(sum(n.sum() for _, n in work)))


# ---------------------------------------------------------------------------------------------------- in turn


def compare(flags: dict, argv: list[str]):
    """Run the engines in turn and print medians and the ratios of each round."""
    engines, rows = ["jaxrl", *flags["peers"].split(",")], {}
    for _ in range(flags["rounds"]):
        for engine in engines:
            python = flags["tunix_python"] if engine == "tunix" else sys.executable
            command = [python, __file__, *argv, f"--engine={engine}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{engine} failed:\n{done.stderr[-2000:]}")
            for line in (x for x in done.stdout.splitlines() if x.startswith("{")):
                print(line, flush=True)
                row = json.loads(line)
                if "engine" not in row:
                    continue
                rows.setdefault((row["workload"], engine), []).append(row["tokens_per_s"])
    for name in names(flags):
        own = rows[name, "jaxrl"]
        for engine in engines:
            got = rows[name, engine]
            ratios = [round(a / b, 2) for a, b in zip(own, got, strict=True)]
            print(
                f"{flags['model']} {name:8} {engine:12} {statistics.median(got):9.1f} tokens/s   "
                f"jaxrl is {statistics.median(ratios):.2f} x  {ratios}",
                flush=True,
            )


def main(argv: list[str]):
    from jaxrl.runtime import cli

    flags = cli.parse_flags(argv, DEFAULTS, __doc__)
    if flags["positional"]:
        sys.exit(f"unexpected argument {flags['positional'][0]!r}; settings are --name=value")
    if unknown := [p for p in flags["peers"].split(",") if p and p not in (*OWN, "hf", "tunix")]:
        sys.exit(f"--peers: {unknown[0]!r} is none of {', '.join((*OWN, 'hf', 'tunix'))}")
    if set(flags["peers"].split(",")) & {"hf", "tunix"} and not flags["checkpoint"]:
        sys.exit("--peers=hf,tunix needs --checkpoint=DIR with the Hugging Face models DIR/small and DIR/large")
    if flags["cores"] and not flags["engine"]:
        chosen = sorted(os.sched_getaffinity(0))[-flags["cores"] :]
        os.sched_setaffinity(0, chosen)
        os.environ["OMP_NUM_THREADS"] = str(flags["cores"])
    if flags["peers"] and not flags["engine"]:
        return compare(flags, argv[1:])
    {"hf": run_hf, "tunix": run_tunix}.get(flags["engine"], run_own)(flags)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from jaxrl.runtime import cli

    cli.run(main)
