"""What the update costs, in time and memory, against what the machine allows and against TRL.

    python benchmarks/learner.py                                    # update step, small model
    python benchmarks/learner.py --model=large --micro_tokens=768,6144 --remat=none,dots
    python benchmarks/learner.py --task=memory                      # fused log-probs: bytes, compiled only
    python benchmarks/learner.py --task=logprobs                    # fused log-probs: time against the plain form
    python benchmarks/learner.py --model=large --peers --rounds=2   # TRL's whole step beside the update

The work: one GRPO update on 32 sequences of 64 prompt and 128 response tokens, float32, AdamW with clipping.
--cores=1 pins everything to one core and compares CPU seconds, which hold up under other load; --cores=0 leaves
threads alone and compares wall time, which needs a quiet machine.

--peers runs TRL's `trl_step.py` in turn with the update, each as its own process. It needs BENCH_TORCH_PY (an
interpreter with torch, transformers and trl), BENCH_MODEL_DIR (the checkpoints that `make_models.py` wrote) and
BENCH_DIR (the folder with both scripts; default ../shared/bench). TRL's rollout is subtracted: what is compared
is its log-probs, loss, backward and optimizer with our update.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time

DEFAULTS = dict(task="update", model="small", micro_tokens="768", remat="none", rounds=3, cores=1, peers=False)
SHAPES = {
    "small": dict(vocab_size=8192, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=768),
    "large": dict(
        vocab_size=32768, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, intermediate_size=3072),
}
BATCH, PROMPT, RESPONSE = 32, 64, 128


def clock(flags) -> float:
    """CPU seconds of this process on one core, else wall seconds."""
    return time.process_time() if flags["cores"] == 1 else time.perf_counter()


def best(flags, f, *args) -> float:
    """Seconds of the fastest of `rounds` calls, after one that warms up."""
    import jax

    jax.block_until_ready(f(*args))
    times = []
    for _ in range(flags["rounds"]):
        start = clock(flags)
        jax.block_until_ready(f(*args))
        times.append(clock(flags) - start)
    return min(times)


def emit(**row):
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


# ------------------------------------------------------------------------------------------------ the update step


def decoder_config(name: str):
    from models.config import DecoderConfig

    return DecoderConfig(
        **SHAPES[name], head_dim=64, qk_norm=True, tie_embeddings=True, model_type="qwen3", rope_theta=1e6)


def needed_flops(config) -> float:
    """Matrix FLOPs that the mathematics needs: decoder on all tokens, head on response tokens, three times the
    forward pass (causal attention counted over the half that is seen)."""
    from jaxrl.runtime.hardware import model_flops_per_token

    head = 2.0 * config.hidden_size * config.vocab_size
    decoder = model_flops_per_token(config, (PROMPT + RESPONSE) / 2) - head
    return 3 * BATCH * ((PROMPT + RESPONSE) * decoder + RESPONSE * head)


def run_update(flags):
    """One line per (micro_tokens, remat): seconds, share of the machine's matrix rate, memory."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxrl.learner.packing import pack
    from jaxrl.learner.state import build_optimizer, init_state
    from jaxrl.learner.update import Objective, build_programs, place_batch
    from jaxrl.runtime.mesh import make_mesh

    config, rng = decoder_config(flags["model"]), np.random.default_rng(0)
    ones = jnp.ones((1024, 1024))
    rate = 2 * 1024**3 / best(flags, jax.jit(jnp.matmul), ones, ones)
    sequences = rng.integers(2, config.vocab_size, (BATCH, PROMPT + RESPONSE))
    advantages, mesh = rng.standard_normal(BATCH), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for micro_tokens in map(int, flags["micro_tokens"].split(",")):
        for remat in flags["remat"].split(","):
            optimizer = build_optimizer(1e-5, grad_clip=1.0)
            programs = build_programs(config, mesh, optimizer, Objective(on_policy=True), remat=remat)
            batch, packing = pack(
                list(sequences[:, :PROMPT]), list(sequences[:, PROMPT:]), advantages,
                [np.zeros(RESPONSE)] * BATCH, (PROMPT + RESPONSE,), micro_tokens)
            held = [init_state(config, optimizer, mesh, jax.random.key(0))]
            batch = place_batch(batch, mesh)
            start = time.perf_counter()
            program = programs.update.lower(held[0], batch).compile()
            compiling = time.perf_counter() - start

            def step(program=program, held=held, batch=batch):
                held[0], metrics = program(held[0], batch)
                return metrics

            seconds = best(flags, step)
            emit(
                engine="jaxrl", model=flags["model"], micro_tokens=micro_tokens, remat=remat, shape=packing.shape,
                seconds=seconds, limit_seconds=needed_flops(config) / rate,
                share_of_limit=needed_flops(config) / rate / seconds, gflops=rate / 1e9, compile_wall=compiling,
                temp_mib=program.memory_analysis().temp_size_in_bytes / 2**20, peak_rss_mib=peak_rss_mib())


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -------------------------------------------------------------------------------------------------- fused log-probs


def plain(h, w, y):
    """The textbook form: (logp, entropy) through the whole softmax."""
    import jax
    import jax.numpy as jnp

    log_p = jax.nn.log_softmax(jnp.matmul(h, w, preferred_element_type=jnp.float32))
    return jnp.take_along_axis(log_p, y[:, None], 1)[:, 0], -jnp.sum(jnp.exp(log_p) * log_p, 1)


def gradient_program(form, tokens, width, vocab, dtype):
    """Compiled: gradient to hidden and head of a loss on logp, with entropy as a metric; and its arguments."""
    import jax
    import jax.numpy as jnp

    def run(h, w, y, g):
        def loss(h, w):
            logp, entropy = form(h, w, y)
            return jnp.sum(g * logp), jnp.sum(entropy)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(h, w)

    shape = jax.ShapeDtypeStruct
    shapes = shape((tokens, width), dtype), shape((width, vocab), dtype), shape((tokens,), "int32")
    return jax.jit(run).lower(*shapes, shape((tokens,), "float32")).compile()


def fused(chunk, tokens, saved_bytes=0):
    import jax.numpy as jnp

    from jaxrl.learner.logprobs import HeadSettings, logprobs_and_entropy

    settings = HeadSettings(chunk=chunk, saved_bytes=saved_bytes)
    return lambda h, w, y: logprobs_and_entropy(h, w, y, jnp.ones(tokens), tokens, settings)


def run_memory(flags):
    """Temporaries at 16 384 tokens, width 1024, vocabulary 151 936, bf16: what the compiler allots."""
    import jax.numpy as jnp

    tokens, width, vocab = 16384, 1024, 151936
    forms = {"plain log_softmax": plain} | {f"fused, chunk {c}": fused(c, tokens) for c in (512, 1024, 2048)}
    for name, form in forms.items():
        memory = gradient_program(form, tokens, width, vocab, jnp.bfloat16).memory_analysis()
        emit(form=name, temp_gib=memory.temp_size_in_bytes / 2**30, output_gib=memory.output_size_in_bytes / 2**30)


def run_logprobs(flags):
    """Time of forward and backward where the plain form fits too, both in this process, in turn."""
    import jax
    import jax.numpy as jnp

    for tokens, width, vocab in ((512, 256, 8192), (512, 512, 32768), (1024, 1024, 32768)):
        keys = jax.random.split(jax.random.key(0), 4)
        h, w = jax.random.normal(keys[0], (tokens, width)), 0.05 * jax.random.normal(keys[1], (width, vocab))
        arguments = h, w, jax.random.randint(keys[2], (tokens,), 0, vocab), jax.random.normal(keys[3], (tokens,))
        base = None
        forms = {  # the learner's settings on CPU are the second
            "plain": plain,
            "fused, up to 256 MiB of logits kept": fused(512, tokens, 2**28),
            "fused, all recomputed": fused(512, tokens),
        }
        for name, form in forms.items():
            program = gradient_program(form, tokens, width, vocab, jnp.float32)
            seconds = best(flags, program, *arguments)
            base = base or seconds
            emit(form=name, tokens=tokens, width=width, vocab=vocab, seconds=seconds, of_plain=seconds / base,
                 temp_mib=program.memory_analysis().temp_size_in_bytes / 2**20)


# ------------------------------------------------------------------------------------------------------------ peers


def compare(flags, argv):
    """Update and TRL step in turn; medians, and the ratio of each round."""
    missing = [name for name in ("BENCH_TORCH_PY", "BENCH_MODEL_DIR") if name not in os.environ]
    if missing:
        sys.exit(f"--peers needs {' and '.join(missing)} in the environment; see the top of this file")
    own, trl = [], []
    directory = os.environ.get("BENCH_DIR", os.path.join("..", "shared", "bench"))
    one_core = {"BENCH_ONE_CORE": "1"} if flags["cores"] == 1 else {}
    peer = [os.environ["BENCH_TORCH_PY"], os.path.join(directory, "trl_step.py"), "--model", flags["model"]]
    for _ in range(flags["rounds"]):
        row = last_line([sys.executable, __file__, *argv, "--peers=no"], {})
        own.append((row["seconds"], row["peak_rss_mib"]))
        row = last_line([*peer, "--repeats", "1"], one_core)
        rollout = row["phases"]["_generate_and_score_completions"]
        share = 1 - rollout / row["seconds"]
        trl.append((share * (row["cpu_s"] if one_core else row["seconds"]), row["peak_rss_mib"]))
    ratios = [round(t[0] / o[0], 2) for o, t in zip(own, trl, strict=True)]
    for name, rows in (("jaxrl", own), ("trl", trl)):
        print(f"{flags['model']} {name:6} update {statistics.median(r[0] for r in rows):7.2f} s   peak RSS "
              f"{max(r[1] for r in rows):7.0f} MiB")
    print(f"jaxrl is {statistics.median(ratios):.2f} x  {ratios}   (TRL's memory includes its rollout)")


def last_line(command, environment):
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    print(rows[-1], flush=True)
    return json.loads(rows[-1])


def main(argv: list[str]):
    flags = dict(DEFAULTS)
    for arg in argv:
        name, _, value = arg.removeprefix("--").partition("=")
        if name not in flags or not arg.startswith("--"):
            sys.exit(f"{__doc__}\nunknown flag {arg}; valid: {', '.join('--' + k for k in flags)}")
        flags[name] = value != "no" if name == "peers" else type(DEFAULTS[name])(value)
    if flags["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-flags["cores"]:])
        os.environ["OMP_NUM_THREADS"] = str(flags["cores"])
    tasks = {"update": run_update, "memory": run_memory, "logprobs": run_logprobs}
    if flags["peers"]:
        return compare(flags, argv)
    if flags["task"] not in tasks:
        sys.exit(f"--task={flags['task']}: choose one of {', '.join(tasks)}")
    tasks[flags["task"]](flags)


if __name__ == "__main__":
    main(sys.argv[1:])
