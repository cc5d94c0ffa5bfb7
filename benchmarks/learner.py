"""What the learner costs, in time and memory, against what the machine allows and against TRL.

    python benchmarks/learner.py                                    # update step, small model
    python benchmarks/learner.py --model=large --micro_tokens=384,1536 --remat=none,dots
    python benchmarks/learner.py --task=memory                      # fused log-probs: bytes, compiled only
    python benchmarks/learner.py --task=logprobs                    # fused log-probs: time against the plain form
    python benchmarks/learner.py --task=shared                      # prompts computed once a group, or once a response
    python benchmarks/learner.py --task=step --model=large          # a whole RL step: sample, grade, update
    python benchmarks/learner.py --task=step --model=large --peers=trl --torch_python=PYTHON_WITH_TRL

The work: one GRPO update on 32 sequences (4 prompts x 8) of 64 prompt and 128 response tokens, float32, AdamW with
clipping; a whole step samples the responses first and grades their texts. --cores=1 pins everything to one core and
compares CPU seconds, which hold up under other load; --cores=0 leaves threads alone and compares wall time, which
needs a quiet machine. --peers=trl runs TRL's GRPOTrainer on the same work (benchmarks/trl_step.py) in turn with the
whole step, each as its own process, --rounds times.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time

DEFAULTS = dict(
    task="update", model="small", micro_tokens="1536", remat="dots", rounds=3, cores=1, peers="", torch_python="python")
SHAPES = {
    "small": dict(vocab_size=8192, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=768),
    "large": dict(
        vocab_size=32768, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, intermediate_size=3072),
}
BATCH, GROUP, PROMPT, RESPONSE = 32, 8, 64, 128


def reward(text: str) -> float:
    """Share of even words: differs between answers, so that there is something to learn."""
    return sum(word.isdigit() and int(word) % 2 == 0 for word in text.split()) / RESPONSE


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

    from jaxrl.learner.packing import PackSettings, pack
    from jaxrl.learner.state import build_optimizer, init_state
    from jaxrl.learner.update import Objective, build_programs, place_batch
    from jaxrl.rollouts import from_sequences
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
            rollouts = from_sequences(sequences[:, :PROMPT], sequences[:, PROMPT:])
            batch, packing = pack(rollouts, advantages, PackSettings(PROMPT + RESPONSE, micro_tokens))
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
    return lambda h, w, y: logprobs_and_entropy(h, w, y, jnp.ones(tokens), tokens, settings=settings)


def run_shared(flags):
    """One line per prompt:response ratio: seconds of an update with shared prompts and without, in turn."""
    import jax
    import numpy as np

    from jaxrl.learner.packing import PackSettings, pack
    from jaxrl.learner.state import build_optimizer, init_state
    from jaxrl.learner.update import Objective, build_programs, place_batch
    from jaxrl.rollouts import from_sequences
    from jaxrl.runtime.mesh import make_mesh

    config, rng = decoder_config(flags["model"]), np.random.default_rng(0)
    mesh, optimizer = make_mesh(1, 1, 1, devices=jax.devices()[:1]), build_optimizer(1e-5, grad_clip=1.0)
    micro_tokens = int(flags["micro_tokens"].split(",")[0])
    for prompt, response in ((256, 64), (64, 64), (32, 256)):
        row, group = 3 * (prompt + response) // 2, np.repeat(np.arange(BATCH // GROUP), GROUP)
        prompts = rng.integers(2, config.vocab_size, (BATCH // GROUP, prompt))
        lengths = rng.integers(response // 2, response * 3 // 2, BATCH)
        rollouts = from_sequences(
            list(prompts), [rng.integers(2, config.vocab_size, n) for n in lengths], group=group)
        steps, positions = [], []
        for share in (False, True):
            programs = build_programs(config, mesh, optimizer, Objective(on_policy=True))
            settings = PackSettings(row, micro_tokens, share_prompts=share)
            batch = place_batch(pack(rollouts, rng.standard_normal(BATCH), settings)[0], mesh)
            held = [init_state(config, optimizer, mesh, jax.random.key(0))]

            def step(programs=programs, held=held, batch=batch):
                held[0], metrics = programs.update(held[0], batch)
                return metrics

            steps.append(step)
            positions.append(int(batch.num_micro) * batch.tokens.shape[1] * row)
        times = [[best(flags | {"rounds": 1}, step) for step in steps] for _ in range(flags["rounds"])]
        emit(
            model=flags["model"], prompt=prompt, response=response, plain_seconds=min(t[0] for t in times),
            shared_seconds=min(t[1] for t in times), ratio=statistics.median(t[0] / t[1] for t in times),
            plain_positions=positions[0], shared_positions=positions[1])


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


# -------------------------------------------------------------------------------------------------------- whole step


def step_config(flags):
    from jaxrl.runtime.config import base_config

    config = base_config()
    config.batch.prompts, config.batch.group_size = BATCH // GROUP, GROUP
    config.batch.row_tokens, config.batch.micro_tokens = PROMPT + RESPONSE, int(flags["micro_tokens"])
    config.sampling.max_prompt, config.sampling.max_tokens, config.sampling.slots = PROMPT, RESPONSE, BATCH
    config.model.remat, config.optimizer.learning_rate = flags["remat"], 1e-5
    return config


def sampled_rollouts(sampler, params, prompts, seed: int):
    """Graded rollouts, as the collector would hand them on."""
    import numpy as np

    from jaxrl import rollouts as records
    from jaxrl.rollout.engine import Request
    from jaxrl.types import Problem

    requests = [Request(p, GROUP, RESPONSE, i) for i, p in enumerate(prompts)]
    found = sum(sampler.generate(params, requests, seed=seed), [])
    begun = records.begin(records.Prompt(Problem("", "", ""), p, GROUP, i) for i, p in enumerate(prompts))
    rollouts = begun.extend(found, 0, RESPONSE)
    rewards = np.array([reward(" ".join(map(str, c.tokens))) for c in found], np.float32)
    return rollouts.replace(correct=rewards, reward=rewards, valid=np.ones(len(rewards), bool))


def run_step(flags):
    """One line: seconds of whole steps, of their rollouts, peak memory of the process."""
    import jax
    import numpy as np

    from jaxrl.batch import fill_in, make_batches, with_advantages
    from jaxrl.learner.learner import Learner
    from jaxrl.rollout.engine import Engine
    from jaxrl.runtime.mesh import make_mesh
    from models.decoder import init_params

    config, decoder = step_config(flags), decoder_config(flags["model"])
    learner = Learner(config, decoder, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    # the end token is no token of the vocabulary: all answers have full length, as the peer's are made to have
    sampler = Engine(decoder, (-1,), max_prompt=PROMPT, max_tokens=RESPONSE, slots=BATCH, chunk=config.sampling.chunk)
    state = learner.init(init_params(decoder, jax.random.key(0)))
    rng, seconds, rollout = np.random.default_rng(0), [], []
    for step in range(flags["rounds"] + 1):
        prompts = rng.integers(2, decoder.vocab_size, (BATCH // GROUP, PROMPT)).astype(np.int32)
        begin = clock(flags)
        rollouts = sampled_rollouts(sampler, sampler.layout(state.params), prompts, step)
        rollout.append(clock(flags) - begin)
        batches = fill_in(make_batches(rollouts, config, step), with_advantages(rollouts, config))
        state, metrics = learner.update(state, [b.data for b in batches])
        seconds.append(clock(flags) - begin)
        assert metrics["nonfinite"] == 0
    emit(engine="jaxrl", model=flags["model"], micro_tokens=flags["micro_tokens"], remat=flags["remat"],
         seconds=seconds[1:], rollout=rollout[1:], peak_rss_mib=round(peak_rss_mib()))


def compare(flags, argv):
    """Own step and TRL's in turn; medians, and the ratio of each round."""
    steps = "2"
    own = [sys.executable, __file__, *argv, "--peers=", "--task=step", f"--rounds={steps}"]
    peer = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trl_step.py")
    commands = {"jaxrl": own, "trl": [flags["torch_python"], peer, flags["model"], steps, str(flags["cores"])]}
    rows = {name: [] for name in commands}
    for _ in range(flags["rounds"]):
        for name, command in commands.items():
            rows[name].append(last_line(command))
    whole = {name: [statistics.median(r["seconds"]) for r in found] for name, found in rows.items()}
    rollout = {name: [statistics.median(r["rollout"]) for r in found] for name, found in rows.items()}
    for name, found in rows.items():
        peak = max(r["peak_rss_mib"] for r in found)
        rest = statistics.median(a - b for a, b in zip(whole[name], rollout[name], strict=True))
        print(f"{flags['model']} {name:6} step {statistics.median(whole[name]):7.2f} s = rollout "
              f"{statistics.median(rollout[name]):6.2f} + update {rest:6.2f}   peak RSS {peak:7.0f} MiB")
    ratios = [round(t / o, 2) for o, t in zip(whole["jaxrl"], whole["trl"], strict=True)]
    print(f"jaxrl is {statistics.median(ratios):.2f} x  {ratios}")


def last_line(command):
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    print(rows[-1], flush=True)
    return json.loads(rows[-1])


def main(argv: list[str]):
    from jaxrl.runtime import cli

    flags = cli.parse_flags(argv, DEFAULTS, __doc__)
    if flags["positional"]:
        sys.exit(f"unexpected argument {flags['positional'][0]!r}; settings are --name=value")
    if flags["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-flags["cores"]:])
        os.environ["OMP_NUM_THREADS"] = str(flags["cores"])
    tasks = {"update": run_update, "memory": run_memory, "logprobs": run_logprobs, "shared": run_shared}
    tasks["step"] = run_step
    if flags["peers"] not in ("", "trl"):
        sys.exit(f"--peers={flags['peers']}: only trl")
    if flags["peers"]:
        return compare(flags, argv[1:])
    if flags["task"] not in tasks:
        sys.exit(f"--task={flags['task']}: choose one of {', '.join(tasks)}")
    tasks[flags["task"]](flags)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from jaxrl.runtime import cli

    cli.run(main)
