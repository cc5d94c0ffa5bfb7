"""From config.task to a Task: problems read and checked, graders started."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

from jaxrl.errors import UserError
from jaxrl.tasks import dial
from jaxrl.tasks.budgets import with_widest_budget
from jaxrl.tasks.data import check_prompt_lengths, load_problems
from jaxrl.tasks.grader import Grader
from jaxrl.tasks.rewards import UserReward, grade_group
from jaxrl.tasks.task import Task
from jaxrl.tasks.templates import encode_prompt, opening, prompt_options
from jaxrl.types import Problem

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_task(config, tokenizer) -> Iterator[Task]:
    """The task of config.task, its grader processes alive inside the context.

    Raises UserError, naming file and line or key, for data that cannot be used.
    """
    t = config.task
    with contextlib.ExitStack() as stack:
        if t.name == "dial":
            train, held_out = _dial_problems(config)
            grader, template = None, "dial"
        else:
            train = load_rows(config, t.data, "train")
            held_out = load_rows(config, t.eval_data, "test") if t.eval_data else []
            reading = {"need_marker": t.need_marker, "unfinished": t.unfinished_thinking}
            grader = stack.enter_context(Grader(t.grader_workers, t.grader_timeout, **reading))
            template = t.template
        reward = None
        if t.reward:
            limits = (t.grader_workers, t.grader_timeout, t.max_failures)
            reward = stack.enter_context(UserReward(t.reward, *limits))

        def encode(problem):
            return encode_prompt(problem, tokenizer, template, **prompt_options(t))

        train = _fitting(train, encode, config, "task.data")
        held_out = _fitting(held_out, encode, config, "task.eval_data") if held_out else []
        opened = opening(encode(train[0]), tokenizer) if template == "chat" else ""

        def grade(problems, texts):
            return grade_group(problems, texts, grader, reward, opened)

        yield Task(train, held_out, encode, grade)


def _dial_problems(config):
    d, seed, mode = config.task.dial, config.seed, config.length.mode
    make = functools.partial(dial.problems, n_min=d.n_min, n_max=d.n_max, mode=mode, max_budget=d.max_budget)
    return make("train", seed, d.train), make("heldout", 0, config.eval.problems)


def load_rows(config, spec: str, split: str | None, *, need_answer: bool = True) -> list[Problem]:
    """The rows of a data set as config.task says they are named and what is done with bad and repeated ones; what is
    left out is counted in a warning. Raises UserError as load_problems does."""
    t = config.task
    fields = {"problem": t.problem_field, "answer": t.answer_field, "id": t.id_field}
    loaded = load_problems(
        spec,
        data_dir=t.data_dir,
        split=split,
        fields={k: v for k, v in fields.items() if v != k},  # the defaults leave it to guessing
        task=t.name,
        skip_bad_rows=t.skip_bad_rows,
        duplicates=t.duplicates,
        need_answer=need_answer,
    )
    if loaded.skipped:
        log.warning("%s: %d rows left out, the first: %s", spec, len(loaded.skipped), loaded.skipped[0])
    if loaded.duplicates:
        log.warning("%s: %d rows left out, their ids were used before (task.duplicates)", spec, loaded.duplicates)
    return loaded.problems


def _fitting(problems, encode, config, key: str) -> list[Problem]:
    """The problems whose prompts fit; with budgets, the longest suffix a budget can have is assumed."""
    widest = [with_widest_budget(p, config) for p in problems]
    tokens = [encode(p) for p in widest]
    try:
        kept = check_prompt_lengths(problems, tokens, config.sampling.max_prompt, config.task.long_prompts)
    except UserError as e:
        raise UserError(f"config.{key}: {e}; config.sampling.max_prompt, config.task.long_prompts") from None
    if len(kept) < len(problems):
        log.warning("%s: %d of %d prompts are too long and left out", key, len(problems) - len(kept), len(problems))
    return [problems[i] for i in kept]
