"""Supervised warm start: maximise the log-probability of demonstrations.

    python -m jaxrl.sft --config=configs/quickstart.py --config.run_dir=runs/sft

The same learner as RL, with the loss -log pi and advantage 1 on every token. `jaxrl.train` runs it before step
0 when config.sft.steps > 0; by itself it writes a Hugging Face directory to run_dir/model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import build
from jaxrl.batch import pack_settings
from jaxrl.errors import UserError
from jaxrl.learner.learner import combine
from jaxrl.learner.packing import pack
from jaxrl.learner.state import build_optimizer, init_state
from jaxrl.learner.update import Objective, build_programs, place_batch
from jaxrl.rollouts import from_sequences
from jaxrl.runtime import cli, storage
from jaxrl.runtime.config import parse_config, validate
from jaxrl.runtime.mesh import num_batch_shards
from jaxrl.tasks import dial
from jaxrl.tasks.load import load_rows
from jaxrl.tasks.templates import encode_prompt, prompt_options
from jaxrl.types import Problem
from models.weights import save_params

log = logging.getLogger(__name__)

Pair = tuple[Sequence[int], Sequence[int]]  # prompt tokens, response tokens


def demonstrations(config, tokenizer) -> tuple[list[Pair], list[Pair]]:
    """Demonstrations as (prompt, response) tokens, end token included: (first phase, second phase).

    The dial task has two phases: fully worked demonstrations, then sloppy ones. A jsonl file (config.sft.data, fields
    problem and solution) is used in both. Raises UserError naming the file for missing solutions, and for rows that do
    not fit unless config.task.long_prompts drops them.
    """
    eos = [tokenizer.eos_ids[0]]
    if config.task.name == "dial" and not config.sft.data:
        d, s = config.task.dial, config.sft

        def phase(name, steps):
            rows = dial.demonstrations(
                name,
                config.seed,
                min(20000, steps * s.batch),
                d.n_min,
                d.n_max,
                modes=tuple(s.modes),
                max_tokens=config.sampling.max_tokens,
                max_budget=d.max_budget,
            )
            return [(tokenizer.encode(prompt), tokenizer.encode(text) + eos) for prompt, text in rows]

        return phase("full", s.full_steps), phase("sloppy", s.steps - s.full_steps)
    t, where = config.task, f"config.sft.data={config.sft.data}"
    problems = load_rows(config, config.sft.data, None, need_answer=False)
    rows, rng = [], np.random.default_rng([config.seed, 9])
    for problem in problems:
        solution = problem.info.get("solution")
        if not isinstance(solution, str) or not solution:
            raise UserError(f"{where}: problem {problem.id!r} needs text in the field 'solution', not {solution!r}")
        response = _with_length(problem.info["solution"], problem.info.get("length_as"), tokenizer) + eos
        problem = _asked_for(problem, len(response), config.sft, rng)
        rows.append((encode_prompt(problem, tokenizer, t.template, **prompt_options(t)), response))
    fits = [r for r in rows if len(r[0]) <= config.sampling.max_prompt and len(r[1]) <= config.sampling.max_tokens]
    text = f"{len(rows) - len(fits)} of {len(rows)} demonstrations are longer than sampling.max_prompt or max_tokens"
    if not fits or (len(fits) < len(rows) and t.long_prompts == "error"):
        raise UserError(f"{where}: {text} (config.task.long_prompts=drop leaves such rows out)")
    if len(fits) < len(rows):
        log.warning("%s: %s and left out", where, text)
    return fits, fits


def _with_length(text: str, mark: str | None, tokenizer) -> list[int]:
    """The tokens of a solution. If `mark` is given (field "length_as" of a row), it is replaced in the text by the
    number of these tokens, the end token included."""
    if not mark:
        return tokenizer.encode(text)
    number = 0
    for _ in range(8):  # a number with more digits may need more tokens
        tokens = tokenizer.encode(text.replace(mark, str(number)))
        if number == len(tokens) + 1:
            break
        number = len(tokens) + 1
    return tokens


def _asked_for(problem: Problem, length: int, sft, rng: np.random.Generator) -> Problem:
    """The problem of a demonstration; for a share sft.budget_share, with a budget of about the response's length.

    Only for rows that have a budget mode (field "mode"). Such examples, even inexact ones (sft.budget_error), let RL
    with a length reward learn to follow budgets; without any, lengths first collapse to the mean of the budgets.
    """
    mode, most = problem.info.get("mode", "none"), 1 + sft.budget_error
    if mode == "none" or rng.random() < 1 - sft.budget_share:
        return problem
    asked = length * rng.uniform(round(1 / most, 2), most)  # 0.75 to 1.33 by default
    return dataclasses.replace(problem, budget=max(1, round(asked)), mode=mode)


def batches(phases: Sequence[list[Pair]], config, shards: int) -> Iterable[Any]:
    """config.sft.steps packed mini-batches: full_steps from the first phase, the rest from the second."""
    s, settings = config.sft, pack_settings(config, config.sft.batch, shards)
    for rows, steps, phase in zip(phases, (s.full_steps, s.steps - s.full_steps), (0, 1), strict=True):
        rng = np.random.default_rng([config.seed, 5, phase])
        passes = -(-steps * s.batch // max(len(rows), 1))
        order = np.concatenate([rng.permutation(len(rows)) for _ in range(passes)]) if steps else []
        for i in range(steps):
            chosen = [rows[j] for j in order[i * s.batch : (i + 1) * s.batch]]
            prompts, responses = ([np.array(r[k], np.int32) for r in chosen] for k in (0, 1))
            yield pack(from_sequences(prompts, responses), np.ones(len(chosen)), settings)[0]


def warm_start(config, decoder, mesh, params, tokenizer, *, note=print):
    """Parameters after config.sft.steps updates on demonstrations (the same object when there are none)."""
    s = config.sft
    if s.steps < 1:
        return params
    phases = demonstrations(config, tokenizer)
    optimizer = build_optimizer(
        s.learning_rate, warmup_steps=s.warmup_steps, schedule="cosine", total_steps=s.steps, b2=0.95, grad_clip=1.0
    )
    programs = build_programs(
        decoder,
        mesh,
        optimizer,
        Objective(loss="gpg", on_policy=True),
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        attention=config.model.attention,
    )
    state = init_state(decoder, optimizer, mesh, params=params, param_dtype=jnp.dtype(config.model.param_dtype))
    records = []
    every = max(1, s.steps // 7)
    for i, batch in enumerate(batches(phases, config, num_batch_shards(mesh)), 1):
        state, metrics = programs.update(state, place_batch(batch, mesh))
        records.append(metrics)
        if i % every == 0:
            loss = combine(jax.device_get(records))["loss"]
            note(f"warm start {i}/{s.steps}  loss {loss:.3f} nats/token")
            records = []
    if skipped := int(state.skipped):
        note(f"warm start: {skipped} of {s.steps} updates were not finite and not applied")
    return state.params


def main(argv: list[str]) -> int:
    """The warm start alone, as a command; returns the exit code. Raises UserError for a bad configuration."""
    config = parse_config(argv)
    validate(config)
    if config.sft.steps < 1:
        raise UserError("config.sft.steps is 0: nothing to train")
    for name in ("checkpoints", "metrics.jsonl"):
        if (storage.as_path(config.run_dir, "config.run_dir") / name).exists():
            raise UserError(f"config.run_dir={config.run_dir} is a training run ({name}); name another directory")
    build.start_backend(config)
    mesh, tokenizer = build.mesh(config), build.tokenizer(config)
    decoder = build.decoder_config(config, tokenizer)
    params = build.params_maker(config, decoder, mesh)()
    params = warm_start(config, decoder, mesh, params, tokenizer)
    out = f"{config.run_dir}/model"
    written = storage.output(out, "config.run_dir")
    save_params(written.local, params, decoder, tokenizer)
    with storage.user_errors("config.run_dir"):
        written.close()
    print(f"written to {out}; train from it with --config.model.path={out} --config.sft.steps=0")
    return 0


if __name__ == "__main__":
    cli.run(main)
