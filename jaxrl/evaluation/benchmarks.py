"""What can be evaluated: the embedded task, data files, and benchmarks by name with the papers' protocols."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl.errors import UserError
from jaxrl.evaluation.identity import reward_identity
from jaxrl.rollout.budget_forcing import Delimiters
from jaxrl.rollout.requests import first_stop
from jaxrl.runtime.model_source import run_settings
from jaxrl.tasks import dial
from jaxrl.tasks.answers import extract
from jaxrl.tasks.choices import choice_letter
from jaxrl.tasks.data import load_problems
from jaxrl.tasks.equality import normal_form
from jaxrl.tasks.grader import Grader
from jaxrl.tasks.readers import SUFFIXES
from jaxrl.tasks.rewards import UserReward, grade_group
from jaxrl.tasks.task import Grade
from jaxrl.tasks.templates import encode_prompt, messages, opening, prompt_options, prompt_text
from jaxrl.types import Problem

log = logging.getLogger(__name__)
S1_PIECES = ("\nFinal Answer:", "Wait", "\n")  # closes, prolongs, ends a line (s1's evaluation code)
MAX_TOKENS = 8192  # L1's limit; the model's context may end earlier


class EvalSet(NamedTuple):
    """Problems ready to be asked. spec: as given. encode, grade: as in Task. text: the prompt as text, or as messages
    for a chat template. shown: a prompt, in either form, as text. vote: the answer in a normal form, or None.
    max_tokens: response limit when none is given. delimiters, answer_tokens: for budget forcing."""

    spec: str
    name: str
    problems: list[Problem]
    encode: Callable[[Problem], list[int]]
    text: Callable[[Problem], str | list[dict]]
    shown: Callable[[Any], str]
    grade: Callable[[Sequence[Problem], Sequence[str]], list[Grade]]
    vote: Callable[[Problem, str], Hashable | None]
    template: str
    grader_version: str
    max_tokens: int
    delimiters: Callable[[], Delimiters]
    answer_tokens: int


def load_dial(spec: str, tokenizer, limit: int) -> EvalSet:
    """The embedded task's held-out problems: "dial", or "dial:n_max=12:seed=7:mode=exact".

    Settings: count, seed, n_min, n_max, mode (none, exact, max: problems with a feasible budget each),
    max_budget. The default seed 1 gives other problems than those that training evaluates on (seed 0).
    """
    settings = dict(count=512, seed=1, n_min=2, n_max=8, mode="none", max_budget=22)
    for part in spec.split(":")[1:]:
        key, _, value = part.partition("=")
        try:
            settings[key] = type(settings[key])(value)
        except (KeyError, ValueError):
            valid = ", ".join(settings)
            raise UserError(f"--data={spec}: {part!r}: need one of {valid}, and a value") from None
    if settings["count"] < 1 or settings["seed"] < 0:
        raise UserError(f"--data={spec}: count must be at least 1, seed at least 0")
    settings["count"] = min(settings["count"], limit or settings["count"])
    problems = dial.problems("heldout", **settings)
    return EvalSet(
        spec=spec,
        name=spec,
        problems=problems,
        encode=lambda problem: tokenizer.encode(dial.prompt_text(problem)),
        text=dial.prompt_text,
        shown=lambda prompt: _shown(prompt, tokenizer),
        grade=_grade_dial,
        vote=lambda problem, text: text.split("=>")[-1].strip() if "=>" in text else None,
        template="dial",
        grader_version="dial 1",
        max_tokens=2 * settings["n_max"] + 8,
        delimiters=lambda: Delimiters(tuple(tokenizer.encode(dial.ARROW)), wait=tuple(tokenizer.encode(dial.FILLER))),
        answer_tokens=2,
    )


def _grade_dial(problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
    outcomes = [dial.grade(problem, text) for problem, text in zip(problems, texts, strict=True)]
    return [Grade(float(o == "correct"), float(o == "correct"), True, o) for o in outcomes]


def load_text(spec: str, tokenizer, flags: dict, grader: Grader, reward: UserReward | None) -> EvalSet:
    """A data file or a named benchmark, asked and graded as in training.

    Names and their fields: jaxrl/tasks/data.py. Multiple choice is asked and graded by letter. With a
    reward function of the user, correct means a reward of at least 1.
    """
    fields = {k: flags[f"{k}_field"] for k in ("problem", "answer", "id") if flags[f"{k}_field"]}
    loaded = load_problems(
        spec,
        data_dir=flags["data_dir"],
        split=flags["split"] or None,
        fields=fields,
        task="user" if reward else "math",
        skip_bad_rows=flags["skip_bad_rows"],
        duplicates="keep",
        allow_empty_answer=True,
        limit=flags["limit"] or None,
    )
    if loaded.skipped:
        log.warning("%s: %d rows left out, the first: %s", spec, len(loaded.skipped), loaded.skipped[0])
    asked = asked_as(flags, tokenizer)
    template = asked["template"]
    opened = ""
    if tokenizer and template == "chat":
        opened = opening(_encode(loaded.problems[0], tokenizer, asked), tokenizer)
    file = pathlib.Path(spec).name
    return EvalSet(
        spec=spec,
        name=next((file.removesuffix(end) for end in SUFFIXES if file.endswith(end)), file),
        problems=loaded.problems,
        encode=lambda problem: _encode(problem, tokenizer, asked),
        text=lambda p: messages(p, asked["system"]) if template == "chat" else prompt_text(p, template),
        shown=lambda prompt: _shown(prompt, tokenizer),
        grade=lambda problems, texts: grade_text(problems, texts, grader, reward, opened),
        vote=lambda problem, text: _vote(problem, opened + text, grader),
        template=template,
        grader_version=f"{grader.version} {reward_identity(reward.spec)}" if reward else grader.version,
        max_tokens=MAX_TOKENS,
        delimiters=lambda: text_delimiters(tokenizer, flags["end_thinking"]),
        answer_tokens=64,
    )


@functools.cache
def text_delimiters(tokenizer, end_thinking: str) -> Delimiters:
    """s1's delimiters. Warns, once, of a tokenizer that writes the end of thinking with other tokens in some places."""
    pieces = Delimiters(*(tuple(tokenizer.encode(s)) for s in (end_thinking, *S1_PIECES)))
    for before, after in itertools.product(("a", "a.", "a ", "a\n"), ("", "\n", "\n\n", " ")):
        text = before + end_thinking + after
        tokens = np.array(tokenizer.encode(text))
        if first_stop(tokens, len(tokens), [pieces.end_thinking]) is None:
            log.warning("--end_thinking=%s: the tokenizer merges it with its neighbours, as in %r: where a response "
                        "closes its thinking so, this is not seen, and at its budget it is closed again",
                        end_thinking, text)
            break
    return pieces


def _shown(prompt: str | list, tokenizer) -> str:
    """A prompt as text: as it is, messages as JSON, token ids decoded."""
    if isinstance(prompt, str):
        return prompt
    chat = any(isinstance(part, dict) for part in prompt)
    return json.dumps(prompt, ensure_ascii=False) if chat else tokenizer.decode(prompt)


def _encode(problem: Problem, tokenizer, asked: dict) -> list[int]:
    """The prompt's tokens; [] if the tokenizer cannot encode its text, which happens with toy models."""
    try:
        return encode_prompt(problem, tokenizer, **asked)
    except UserError:
        raise
    except ValueError:
        return []


def asked_as(flags: dict, tokenizer) -> dict[str, Any]:
    """The options of encode_prompt: what the flags say, else what a run was trained with.

    Without either, template is "chat" if the tokenizer has a chat template, or "boxed". Raises UserError for a system
    prompt or --enable_thinking without template "chat".
    """
    trained = run_settings(flags["model"]).get("task", {})
    template = flags["template"] or trained.get("template") or ("chat" if tokenizer.chat_template else "boxed")
    given = {key: flags[key] for key in ("system_prompt", "enable_thinking") if flags[key]}
    if given and template != "chat":
        raise UserError(f"--{next(iter(given))} needs --template=chat, not {template}")
    return {"template": template, **prompt_options(trained | given)}


def grade_text(
    problems: Sequence[Problem],
    texts: Sequence[str],
    grader: Grader,
    reward: UserReward | None = None,
    opening: str = "",
) -> list[Grade]:
    """As in training (grade_group), but an empty reference answer is matched by an empty response."""
    asked = [(p, t) for p, t in zip(problems, texts, strict=True) if p.answer or p.task == "user"]
    grades = iter(grade_group([p for p, _ in asked], [t for _, t in asked], grader, reward, opening))
    out = []
    for problem, text in zip(problems, texts, strict=True):
        if problem.answer or problem.task == "user":
            out.append(next(grades))
        else:
            right = float(not text.strip())
            out.append(Grade(right, right, True, "correct" if right else "wrong"))
    return out


def _vote(problem: Problem, text: str, grader: Grader) -> str | None:
    if problem.task == "choice":
        return choice_letter(text, **grader.reading)
    answer = extract(text, **grader.reading)
    return None if answer is None else normal_form(answer)


def load_sets(
    specs: str, tokenizer, flags: dict, grader: Grader, reward: UserReward | None = None
) -> list[EvalSet]:
    """The data sets of --data, each with a unique name.

    Raises UserError for what is neither a file nor a known name, for a set that is listed twice, and for a reward
    function beside the embedded task, which has its own.
    """
    sets: list[EvalSet] = []
    for spec in specs.split(","):
        if spec in [data.spec for data in sets]:
            raise UserError(f"--data lists {spec!r} twice")
        if spec.split(":")[0] == "dial":
            if reward:
                raise UserError(f"--reward={reward.spec}: {spec!r} of --data has its own reward; evaluate it alone")
            data = load_dial(spec, tokenizer, flags["limit"])
        else:
            data = load_text(spec, tokenizer, flags, grader, reward)
        taken = data.name in [other.name for other in sets]  # files of one name in two folders
        sets.append(data._replace(name=spec) if taken else data)
    return sets
