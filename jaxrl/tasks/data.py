"""Data sets as lists of problems: local files, directories, and names known here or to the Hugging Face hub.

    load_problems("train.jsonl")                                      fields problem, answer, id
    load_problems("train.parquet", fields={"problem": "question"})    other field names
    load_problems("verl.parquet")                                     verl's schema is recognised
    load_problems("math500", data_dir="data")                         data/math500.jsonl, else the hub
    load_problems("openai/gsm8k", split="test", config="main", fields={"problem": "question"})

Names: see NAMES. Multiple-choice rows (a list of choices and which is right) become a question with
lettered options and the letter as the answer, task "choice".
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import numbers
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl.errors import UserError
from jaxrl.tasks.readers import SUFFIXES, BadRow, read_rows
from jaxrl.types import Problem

FIELDS = {"problem": "problem", "answer": "answer", "id": "id", "choices": "choices"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DUPLICATES = ("drop", "error", "keep")


class Loaded(NamedTuple):
    """problems: in file order. skipped: one message per bad row left out. duplicates: how many rows were
    left out because their id was used before."""

    problems: list[Problem]
    skipped: list[str]
    duplicates: int


class Source(NamedTuple):
    """Where a named data set lives on the hub and what its fields are called; convert changes rows
    beforehand."""

    hub: str
    config: str | None = None
    split: str = "test"
    fields: Mapping[str, str] = {}
    convert: Callable[[dict], dict] | None = None


def _after_hashes(row: dict) -> dict:
    """GSM8K's answer is a worked solution that ends in "#### 42"."""
    if isinstance(row.get("answer"), str) and "####" in row["answer"]:
        return {**row, "solution": row["answer"], "answer": row["answer"].rsplit("####", 1)[1].strip()}
    return row


def _gpqa(row: dict) -> dict:
    """Puts the right choice among the wrong ones, at a place that only depends on the question."""
    choices = [row.get(f"Incorrect Answer {i}") for i in (1, 2, 3)]
    place = hashlib.sha256(str(row.get("Question")).encode()).digest()[0] % 4
    choices.insert(place, row.get("Correct Answer"))
    return {**row, "choices": [str(c).strip() for c in choices], "answer": place}


_AGIEVAL = {"problem": "query", "answer": "gold"}
NAMES: dict[str, Source] = {
    "gsm8k": Source("openai/gsm8k", "main", fields={"problem": "question"}, convert=_after_hashes),
    "math500": Source("HuggingFaceH4/MATH-500", fields={"id": "unique_id"}),
    "aime24": Source("HuggingFaceH4/aime_2024", split="train"),
    "aime25": Source("math-ai/aime25"),
    "amc23": Source("math-ai/amc23", fields={"problem": "question"}),
    "minerva": Source("math-ai/minervamath", fields={"problem": "question"}),
    "olympiadbench": Source(
        "Hothan/OlympiadBench",
        "OE_TO_maths_en_COMP",
        "train",
        {"problem": "question", "answer": "final_answer"},
    ),
    "deepscaler": Source("agentica-org/DeepScaleR-Preview-Dataset", split="train"),
    "dapo_math_17k": Source("BytedTsinghua-SIA/DAPO-Math-17k", split="train"),
    "gpqa_diamond": Source(
        "Idavidrein/gpqa", "gpqa_diamond", "train", {"problem": "Question", "id": "Record ID"}, _gpqa
    ),
    "lsat": Source("hails/agieval-lsat-lr", fields=_AGIEVAL),
    "lsat_ar": Source("hails/agieval-lsat-ar", fields=_AGIEVAL),
    "lsat_rc": Source("hails/agieval-lsat-rc", fields=_AGIEVAL),
    "mmlu": Source("cais/mmlu", "all", fields={"problem": "question"}),
}


def load_problems(
    spec: str,
    *,
    data_dir: str = "",
    split: str | None = None,
    config: str | None = None,
    fields: Mapping[str, str] | None = None,
    task: str = "math",
    skip_bad_rows: bool = False,
    duplicates: str = "error",
    allow_empty_answer: bool = False,
    limit: int | None = None,
) -> Loaded:
    """Reads a data set: a file, a directory of files, a name of NAMES, or "owner/name" on the Hugging Face
    hub.

    data_dir: where names are looked up first, as NAME.jsonl, NAME_test.jsonl.gz, ... split, config: of a
    hub data set; split also picks files of a directory by their names. fields: {"problem" | "answer" | "id"
    | "choices": field name in the rows}. Rows without an id get "NAME/ROW". All other fields end up in
    Problem.info. task: of the problems that are not multiple choice. skip_bad_rows: leave out rows that
    cannot be used, and say which. duplicates of an id: "error", "drop" all but the first, or "keep" all (the
    later ones as ID#2, ID#3, ...). limit: rows to keep at most.

    Raises UserError, naming file and line, for: an unreadable or truncated file, a row that is not UTF-8 or
    not a JSON object, a missing or empty problem or answer, a repeated id, nothing left; and for an unknown
    data set.
    """
    if duplicates not in DUPLICATES:
        raise UserError(f"duplicates={duplicates!r}; valid: {', '.join(DUPLICATES)}")
    unknown = set(fields or {}) - set(FIELDS)
    if unknown:
        raise UserError(f"fields: no such key: {', '.join(sorted(unknown))}; valid: {', '.join(FIELDS)}")
    name, rows, source = _open(spec, data_dir, split, config)
    problems, skipped, repeated = [], [], 0
    seen: dict[str, str] = {}
    copies: collections.Counter[str] = collections.Counter()
    for place, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            row = source.convert(row) if source and source.convert else row
            # a local copy of a named set may have been renamed to the plain field names already
            theirs = {k: v for k, v in (source.fields if source else {}).items() if v in row}
            names = {**FIELDS, **theirs, **(fields or {})}
            problem = _problem(
                row, names, place, task, allow_empty_answer, f"{name}/{len(seen) + len(skipped)}"
            )
        except BadRow as e:
            if not skip_bad_rows:
                raise UserError(f"{e} (skip_bad_rows leaves such rows out)") from None
            skipped.append(str(e))
            continue
        if problem.id in seen:
            if duplicates == "error":
                first = seen[problem.id]
                raise UserError(
                    f"{place}: id {problem.id!r} already used at {first}; duplicates=drop keeps the first, "
                    "duplicates=keep all"
                )
            if duplicates == "drop":
                repeated += 1
                continue
            original = problem.id
            while problem.id in seen:
                copies[original] += 1
                problem = dataclasses.replace(problem, id=f"{original}#{copies[original] + 1}")
        seen[problem.id] = place
        problems.append(problem)
        if limit is not None and len(problems) >= limit:
            break
    if not problems:
        left_out = f": all {len(skipped)} rows are bad, the first: {skipped[0]}" if skipped else ""
        raise UserError(f"{spec}: empty data set{left_out}")
    return Loaded(problems, skipped, repeated)


def check_prompt_lengths(
    problems: Sequence[Problem], tokens: Sequence[Sequence[int]], max_prompt: int, on_long: str = "error"
) -> list[int]:
    """Indices of the problems whose prompts (token lists, same order) fit max_prompt tokens.

    on_long: "error" (UserError naming the first one that does not fit) or "drop". UserError too if none is
    left.
    """
    if on_long not in ("error", "drop"):
        raise UserError(f"long_prompts={on_long!r}; valid: error, drop")
    kept = [i for i, t in enumerate(tokens) if len(t) <= max_prompt]
    if len(kept) < len(problems) and (on_long == "error" or not kept):
        first = next(i for i, t in enumerate(tokens) if len(t) > max_prompt)
        raise UserError(
            f"problem {problems[first].id!r}: its prompt has {len(tokens[first])} tokens, {max_prompt} fit "
            f"({len(problems) - len(kept)} of {len(problems)} are too long); raise the limit or drop them"
        )
    return kept


def _open(
    spec: str, data_dir: str, split: str | None, config: str | None
) -> tuple[str, Iterator[tuple[str, Any]], Source | None]:
    """(name for ids, rows with their places, source) of a data set."""
    path = pathlib.Path(spec)
    source = NAMES.get(spec)
    if spec.endswith(SUFFIXES) or path.is_file():
        if not path.is_file():
            raise UserError(f"{spec}: no such file")
        return (
            _stem(path),
            read_rows(path),
            NAMES.get(_stem(path).removesuffix("_test").removesuffix("_train")),
        )
    if path.is_dir() and not source:
        return path.name, _directory(path, split), None
    wanted = (
        [f"{spec}{part}{suffix}" for part in _parts(split) for suffix in SUFFIXES] if "/" not in spec else []
    )
    for file in wanted:
        if data_dir and (pathlib.Path(data_dir) / file).is_file():
            return spec, read_rows(pathlib.Path(data_dir) / file), source
    if source is None and "/" not in spec:
        looked = f" (no {wanted[0]}, ... in {data_dir})" if data_dir else ""
        raise UserError(
            f"data set {spec!r} is unknown{looked}; valid: a {', '.join(SUFFIXES)} file, a directory, "
            f"owner/name on the Hugging Face hub, or one of {', '.join(NAMES)}"
        )
    rows = _hub(spec, source or Source(spec), split, config, data_dir)
    return spec.rsplit("/", 1)[-1], rows, source


def _parts(split: str | None) -> tuple[str, ...]:
    return (f"_{split}", "") if split else ("", "_test")


def _stem(path: pathlib.Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def _directory(path: pathlib.Path, split: str | None) -> Iterator[tuple[str, Any]]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, split)
    files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    if split:
        files = [p for p in files if split in p.name] or [p for p in files if split in p.parent.name]
    stems = {_stem(p).split("-0")[0] for p in files}  # train-00000-of-00002.parquet: shards of one set
    if len(stems) != 1:
        found = ", ".join(sorted(stems)) or f"no {', '.join(SUFFIXES)} file"
        raise UserError(
            f"{path}: {found}" + (f" for split {split!r}" if split else "") + "; name one file or split"
        )
    return (row for file in files for row in read_rows(file))


def _datasets():
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data sets of the Hugging Face hub need the datasets library: pip install datasets"
        ) from None
    return datasets


def _saved(path: pathlib.Path, split: str | None) -> Iterator[tuple[str, Any]]:
    try:
        data = _datasets().load_from_disk(str(path))
        data = data[split or next(iter(data))] if isinstance(data, dict) else data
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"{path}: cannot be read as a saved data set ({str(e).splitlines()[0][:200]})"
        ) from None
    return ((f"{path}: row {i}", row) for i, row in enumerate(data))


def _hub(
    spec: str, source: Source, split: str | None, config: str | None, data_dir: str
) -> Iterator[tuple[str, Any]]:
    datasets = _datasets()
    try:
        data = datasets.load_dataset(source.hub, config or source.config, split=split or source.split)
    except Exception as e:  # the library raises whatever its storage, network and parsers raise
        reason = (str(e) or type(e).__name__).splitlines()[0][:200]
        looked = f"not in {data_dir or 'data_dir (not set)'}; " if "/" not in spec else ""
        raise UserError(
            f"data set {spec!r}: {looked}{source.hub} from the Hugging Face hub: {reason}"
        ) from None
    return ((f"{spec}: row {i}", row) for i, row in enumerate(data))


def _problem(
    row: dict, names: Mapping[str, str], place: str, task: str, allow_empty_answer: bool, default_id: str
) -> Problem:
    """The problem of one row; BadRow if it has none."""
    if isinstance(row.get("prompt"), list) and isinstance(row.get("reward_model"), dict):
        return _verl(row, place, task, allow_empty_answer, default_id)
    prompt = _text(row, names["problem"], place)
    raw = row.get(names["answer"], row.get("label") if "label" in row and "choices" in row else None)
    info = {k: v for k, v in row.items() if k not in (names["problem"], names["answer"], names["id"])}
    choices = row.get(names["choices"])
    if isinstance(choices, Mapping):  # ARC: {"text": [...], "label": [...]}
        choices = choices.get("text")
    if isinstance(choices, Sequence) and not isinstance(choices, str) and len(choices) > 1:
        letter = _letter(raw, choices, place, names["answer"])
        prompt, task, answer = format_choices(prompt, choices), "choice", letter
    else:
        answer = _answer(raw, place, names["answer"], row, allow_empty_answer)
    id = row.get(names["id"])
    return Problem(default_id if id in (None, "") else str(id), prompt, answer, task, info=info)


def format_choices(question: str, choices: Sequence[Any]) -> str:
    """A question with its options, one a line: "A. ...". Options that the question already lists are not
    repeated."""
    options = [str(c).strip() for c in choices]
    if all(option in question for option in options):
        return question
    lettered = (
        o if o[:3] in (f"({x})", f"{x}. ", f"{x}) ") else f"{x}. {o}"
        for x, o in zip(LETTERS, options, strict=False)
    )
    return question.rstrip() + "\n\n" + "\n".join(lettered)


def _letter(raw: Any, choices: Sequence[Any], place: str, field: str) -> str:
    """The letter of the right choice, given as index, list of one index, letter or text."""
    if isinstance(raw, Sequence) and not isinstance(raw, str) and len(raw) == 1:
        raw = raw[0]
    options = [str(c).strip() for c in choices]
    if isinstance(raw, numbers.Integral) and not isinstance(raw, bool) and 0 <= raw < len(choices):
        return LETTERS[raw]
    text = str(raw).strip() if isinstance(raw, str) else ""
    if len(text.strip("()")) == 1 and text.strip("()").upper() in LETTERS[: len(choices)]:
        return text.strip("()").upper()
    if text in options:
        return LETTERS[options.index(text)]
    if text.isdigit() and int(text) < len(choices):
        return LETTERS[int(text)]
    raise BadRow(
        f"{place}: {field}={raw!r} names none of the {len(choices)} choices; valid: an index, letter or text"
    )


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
    id = (
        "/".join(str(p) for p in parts if p not in (None, ""))
        if extra.get("index") is not None
        else default_id
    )
    messages = [{"role": str(m.get("role", "user")), "content": m["content"]} for m in messages]
    return Problem(id, user[-1], answer, task, info={**extra, "data_source": source, "messages": messages})


def _text(row: dict, field: str, place: str) -> str:
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        return value
    if field in row:
        raise BadRow(
            f"{place}: field {field!r} is {'empty' if not value else f'not text but {type(value).__name__}'}"
        )
    raise BadRow(
        f"{place}: no field {field!r}; the row has {', '.join(map(str, row)) or 'none'}; map it with fields"
    )


def _answer(value: Any, place: str, field: str, row: dict, allow_empty: bool) -> str:
    """The reference answer as text; numbers are written out, a list of one is that one."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or (value is not None and not isinstance(value, str | numbers.Real)):
        raise BadRow(f"{place}: answer field {field!r} is {type(value).__name__}, not text or a number")
    if value is None:
        there = f"the row has {', '.join(map(str, row)) or 'none'}"
        raise BadRow(f"{place}: no answer field {field!r}; {there}; map it with fields")
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if not text.strip() and not allow_empty:
        raise BadRow(f"{place}: answer field {field!r} is empty")
    return text
