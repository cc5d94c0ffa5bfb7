"""One row of a data set as a Problem, whatever its publishers call the fields.

Plain rows have problem and answer; a number, LaTeX, GSM8K's "working #### 42" and a solution whose last box holds
the answer are read as well, and a list of several answers means all of them. Rows with choices (a list, {"A": ...},
columns A, B, ..., ARC's text and label, GPQA's correct and incorrect answers) become a question with lettered
options and the letter as the answer, task "choice". verl's rows keep their chat messages.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl.tasks.answers import boxed, reference
from jaxrl.tasks.equality import decide
from jaxrl.tasks.readers import BadRow
from jaxrl.types import Problem

FIELDS = ("problem", "answer", "id", "choices")
# Looked for in this order and in any case of letters, where no name is given.
ALIASES = {
    "problem": ("problem", "question", "query", "prompt", "input"),
    "answer": (
        "answer", "final_answer", "expected_answer", "reference_answer", "correct_answer", "ground_truth", "target",
    ),
    "id": ("id", "unique_id", "problem_id", "question_id", "record id"),
    "choices": ("choices", "options"),
}  # fmt: skip
OF_CHOICES = ("label", "gold", "answerkey", "answer_key")  # answers only beside choices: else they may be anything
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def problem_of(
    row: dict, fields: Mapping[str, str], place: str, task: str, *, allow_empty_answer: bool, default_id: str,
    need_answer: bool = True,
) -> Problem:
    """The problem of one row. fields: {one of FIELDS: its name in the row}, where it is not to be guessed. need_answer:
    a row without the field is bad; else its answer is "".

    Raises BadRow, naming the place, for a row that has no problem or no usable answer.
    """
    if isinstance(row.get("prompt"), list) and isinstance(row.get("reward_model"), dict):
        return _verl(row, place, task, allow_empty_answer, default_id)
    row = _with_gpqa_choices(row)
    names = {key: fields.get(key) or _find(row, ALIASES[key]) or key for key in FIELDS}
    choices, labels = _choices(row, names["choices"])
    if choices and not fields.get("answer") and row.get(names["answer"]) is None:
        names["answer"] = _find(row, OF_CHOICES) or names["answer"]
    prompt, raw = _text(row, names["problem"], place), row.get(names["answer"])
    info = {k: v for k, v in row.items() if k not in (names["problem"], names["answer"], names["id"])}
    if len(choices) > len(LETTERS):
        raise BadRow(f"{place}: {names['choices']} holds {len(choices)} choices; at most {len(LETTERS)} have letters")
    if choices:
        passage = row.get("passage")
        if isinstance(passage, str) and passage.strip() not in prompt:
            prompt = f"{passage.strip()}\n\n{prompt}"
        answer = _letter(labels.index(raw) if raw in labels else raw, choices, place, names["answer"])
        prompt, task = format_choices(prompt, choices), "choice"
    else:
        if isinstance(raw, str) and "####" in raw:  # GSM8K
            info["solution"], raw = raw, raw.rsplit("####", 1)[1].strip()
        if raw is None and not fields.get("answer") and isinstance(row.get("solution"), str):
            raw = boxed(row["solution"])
        raw = "" if raw is None and not need_answer else raw
        answer = _answer(raw, place, names["answer"], row, allow_empty_answer or not need_answer)
    id = row.get(names["id"])
    return Problem(default_id if id in (None, "") else str(id), prompt, answer, task, info=info)


def _find(row: dict, names: Sequence[str]) -> str | None:
    """The row's own spelling of the first of these fields that is not null."""
    spelled = {str(key).lower(): key for key in reversed(row) if row[key] is not None}
    return next((spelled[name] for name in names if name in spelled), None)


def _with_gpqa_choices(row: dict) -> dict:
    """Puts GPQA's right choice among the wrong ones, at a place that only depends on the question."""
    if "Correct Answer" not in row or "Incorrect Answer 1" not in row:
        return row
    choices = [row.get(f"Incorrect Answer {i}") for i in (1, 2, 3)]
    place = hashlib.sha256(str(row.get("Question")).encode()).digest()[0] % 4
    choices.insert(place, row["Correct Answer"])
    return {**row, "choices": [str(c).strip() for c in choices], "answer": place}


def _choices(row: dict, field: str) -> tuple[list, list]:
    """(choices, what they are called where that is said); ([], []) for a row without."""
    value = row.get(field)
    if value is None and "A" in row and "B" in row:
        letters = [x for x in LETTERS if row.get(x) is not None]
        value = {x: row[x] for x in letters} if letters == list(LETTERS[: len(letters)]) else None
    if isinstance(value, Mapping):
        texts = value.get("text", list(value.values()))
        return list(texts), list(value.get("label", value))
    several = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 1
    return (list(value), []) if several else ([], [])


def format_choices(question: str, choices: Sequence[Any]) -> str:
    """A question with its options, one a line: "A. ...". Options that the question already lists are not repeated."""
    options = [(x, str(c).strip()) for x, c in zip(LETTERS, choices, strict=False)]
    if all(re.search(rf"\b{x}[).:] ?{re.escape(_bare(o, x))}", question) for x, o in options):
        return question
    lettered = (f"{x}. {o}" if _bare(o, x) == o else o for x, o in options)
    return question.rstrip() + "\n\n" + "\n".join(lettered)


def _bare(option: str, letter: str) -> str:
    """The option without its own letter: "(A) red", "A. red" -> "red"."""
    return re.sub(rf"^(?:\({letter}\)|{letter}[.):]) ?", "", option)


def _letter(raw: Any, choices: Sequence[Any], place: str, field: str) -> str:
    """The letter of the right choice, given as index, list of one index, letter or text."""
    if isinstance(raw, Sequence) and not isinstance(raw, str) and len(raw) == 1:
        raw = raw[0]
    options = [str(c).strip() for c in choices]
    if isinstance(raw, numbers.Integral) and not isinstance(raw, bool) and 0 <= raw < len(choices):
        return LETTERS[raw]
    text = raw.strip() if isinstance(raw, str) else ""
    if len(text.strip("().")) == 1 and text.strip("().").upper() in LETTERS[: len(choices)]:
        return text.strip("().").upper()
    if text in options:
        return LETTERS[options.index(text)]
    if text.isdigit() and int(text) < len(choices):
        return LETTERS[int(text)]
    raise BadRow(f"{place}: {field}={raw!r} names none of the {len(choices)} choices; valid: an index, letter or text")


def _verl(row: dict, place: str, task: str, allow_empty_answer: bool, default_id: str) -> Problem:
    """verl's schema: chat messages, reward_model.ground_truth, data_source, extra_info."""
    messages = row["prompt"]
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        raise BadRow(f"{place}: prompt must be a list of messages with role and content")
    user = [m["content"] for m in messages if m.get("role") == "user"]
    if not user or not user[-1].strip():
        raise BadRow(f"{place}: prompt has no message of the user")
    answer = _answer(
        row["reward_model"].get("ground_truth"), place, "reward_model.ground_truth", row, allow_empty_answer
    )
    extra = row.get("extra_info") if isinstance(row.get("extra_info"), dict) else {}
    source = str(row.get("data_source") or "")
    parts = [source, extra.get("split"), extra.get("index")]
    id = "/".join(str(p) for p in parts if p not in (None, "")) if extra.get("index") is not None else default_id
    messages = [{"role": str(m.get("role", "user")), "content": m["content"]} for m in messages]
    return Problem(id, user[-1], answer, task, info={**extra, "data_source": source, "messages": messages})


def _text(row: dict, field: str, place: str) -> str:
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        return value
    if field in row:
        raise BadRow(f"{place}: field {field!r} is {'empty' if not value else f'not text but {type(value).__name__}'}")
    raise BadRow(f"{place}: no field {field!r}; {_there(row, 'problem')}")


def _there(row: dict, key: str) -> str:
    fields = ", ".join(map(str, row)) or "none"
    return f"the row has {fields}; name it (--{key}_field, config.task.{key}_field)"


def _json_list(text: str) -> list | str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, list) and all(isinstance(x, str) for x in value) else text


def _different(golds: Sequence[str]) -> list[str]:
    """The golds without those that say an earlier one's value again: 1/2 and 0.5."""
    kept: list[str] = []
    for gold in golds:
        if not any(decide(reference(earlier), reference(gold)) for earlier in kept):
            kept.append(gold)
    return kept


def _answer(value: Any, place: str, field: str, row: dict, allow_empty: bool) -> str:
    """The reference answer as text; numbers are written out, of a list all are asked for: "1, 2".

    A list may be JSON in text, '["1", "2"]'; golds that are one value in several notations count once.
    """
    if isinstance(value, str) and re.match(r'\s*\[\s*"', value):
        value = _json_list(value)
    if isinstance(value, list | tuple) and value:
        golds = [_answer(x, place, field, row, allow_empty and len(value) == 1) for x in value]
        return ", ".join(_different(golds))
    if isinstance(value, bool) or (value is not None and not isinstance(value, str | numbers.Real)):
        raise BadRow(f"{place}: answer field {field!r} is {type(value).__name__}, not text or a number")
    if value is None:
        raise BadRow(f"{place}: no answer field {field!r}; {_there(row, 'answer')}")
    if isinstance(value, float) and not math.isfinite(value):  # how some tools write "no value"
        raise BadRow(f"{place}: answer field {field!r} is {value}, not a number")
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if not text.strip() and not allow_empty:
        raise BadRow(f"{place}: answer field {field!r} is empty")
    return text
