"""Data sets as lists of problems: local files, directories, and names known here or to the Hugging Face hub.

    load_problems("train.jsonl")                                      fields problem, answer, id
    load_problems("train.parquet", fields={"problem": "question"})    other field names
    load_problems("verl.parquet")                                     verl's schema is recognised
    load_problems("math500", data_dir="data")                         data/math500.jsonl, else the hub
    load_problems("openai/gsm8k:main", split="test", fields={"problem": "question"})   a set of the hub, its config
    load_problems("words:split=test:count=256")                       made here, see jaxrl/tasks/words.py

Names: see NAMES. How a row becomes a problem, whatever its fields are called: jaxrl/tasks/rows.py.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl.errors import UserError
from jaxrl.runtime import storage
from jaxrl.tasks import words
from jaxrl.tasks.readers import SUFFIXES, BadRow, plain, read_rows
from jaxrl.tasks.rows import FIELDS, problem_of
from jaxrl.types import Problem

DUPLICATES = ("drop", "error", "keep")


class Loaded(NamedTuple):
    """problems: in file order. skipped: one message per bad row left out. duplicates: how many rows were
    left out because their id was used before."""

    problems: list[Problem]
    skipped: list[str]
    duplicates: int


class Source(NamedTuple):
    """Where a named data set lives on the hub."""

    hub: str
    config: str | None = None
    split: str = "test"


NAMES: dict[str, Source] = {
    "gsm8k": Source("openai/gsm8k", "main"),
    "math500": Source("HuggingFaceH4/MATH-500"),
    "aime24": Source("HuggingFaceH4/aime_2024", split="train"),
    "aime25": Source("math-ai/aime25"),
    "amc23": Source("math-ai/amc23"),
    "minerva": Source("math-ai/minervamath"),
    "olympiadbench": Source("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
    "deepscaler": Source("agentica-org/DeepScaleR-Preview-Dataset", split="train"),
    "dapo_math_17k": Source("BytedTsinghua-SIA/DAPO-Math-17k", split="train"),
    "gpqa_diamond": Source("Idavidrein/gpqa", "gpqa_diamond", "train"),
    "lsat": Source("hails/agieval-lsat-lr"),
    "lsat_ar": Source("hails/agieval-lsat-ar"),
    "lsat_rc": Source("hails/agieval-lsat-rc"),
    "mmlu": Source("cais/mmlu", "all"),
}
_SPELLINGS = {"aime2024": "aime24", "aime2025": "aime25", "gpqa": "gpqa_diamond", "minervamath": "minerva"}
_SPELLINGS |= {name.replace("_", ""): name for name in NAMES}


def known_name(spec: str) -> str:
    """The name in NAMES that a spelling means ("MATH-500", "AIME 2024"); the spelling itself if none."""
    return _SPELLINGS.get(re.sub(r"[-_ ]", "", spec.lower()), spec)


def load_problems(
    spec: str,
    *,
    data_dir: str = "",
    split: str | None = None,
    fields: Mapping[str, str] | None = None,
    task: str = "math",
    skip_bad_rows: bool = False,
    duplicates: str = "error",
    allow_empty_answer: bool = False,
    need_answer: bool = True,
    limit: int | None = None,
) -> Loaded:
    """Reads a data set: a file, a directory of files, a name of NAMES, or "owner/name[:config]" of the hub.

    data_dir: where names are looked up first, as NAME.jsonl, NAME_test.jsonl.gz, ... split: of a hub data set;
    it also picks files of a directory by their names. fields: {"problem" | "answer" | "id" | "choices": field name
    in the rows}; without it common names are found (rows.ALIASES). Rows without an id get "NAME/ROW". All other fields
    end up in Problem.info. task: of the problems that are not multiple choice. skip_bad_rows: leave out rows that
    cannot be used, and say which. duplicates of an id: "error", "drop" all but the first, or "keep" all (the later ones
    as ID#2, ID#3, ...). need_answer: False for demonstrations, which may come without. limit: rows to keep at most.

    Raises UserError, naming file and line, for: an unreadable or truncated file, a row that is not UTF-8 or not a JSON
    object, a missing or empty problem or answer, a repeated id, nothing left; and for an unknown data set.
    """
    if duplicates not in DUPLICATES:
        raise UserError(f"duplicates={duplicates!r}; valid: {', '.join(DUPLICATES)}")
    unknown = set(fields or {}) - set(FIELDS)
    if unknown:
        raise UserError(f"fields: no such key: {', '.join(sorted(unknown))}; valid: {', '.join(FIELDS)}")
    name, rows = _open(spec, data_dir, split)
    problems, skipped, repeated = [], [], 0
    seen: dict[str, str] = {}
    copies: collections.Counter[str] = collections.Counter()
    for place, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            default_id = f"{name}/{len(seen) + len(skipped)}"
            problem = problem_of(
                row, fields or {}, place, task, allow_empty_answer=allow_empty_answer, default_id=default_id,
                need_answer=need_answer,
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


def digest(problems: Sequence[Problem]) -> str:
    """A digest of ids, prompts and answers in order: tells whether a resumed run reads the rows it began with."""
    found = hashlib.sha256()
    for p in problems:
        found.update(json.dumps([p.id, p.prompt, p.answer, p.task]).encode())
    return found.hexdigest()[:16]


def check_prompt_lengths(
    problems: Sequence[Problem], tokens: Sequence[Sequence[int]], max_prompt: int, on_long: str = "error"
) -> list[int]:
    """Indices of the problems whose prompts (token lists, same order) fit max_prompt tokens.

    on_long: "error" (UserError naming the first one that does not fit) or "drop". UserError too if none is left.
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


def _open(spec: str, data_dir: str, split: str | None) -> tuple[str, Iterator[tuple[str, Any]]]:
    """(name for ids, rows with their places) of a data set."""
    if spec.split(":")[0] == "words":
        return "words", ((f"{spec}: row {i}", row) for i, row in enumerate(words.rows(spec)))
    path = storage.local_copy(spec, "data")
    known = known_name(spec)
    if spec.endswith(SUFFIXES) or path.is_file():
        if not path.is_file():
            raise UserError(f"{spec}: no such file")
        return _stem(path), read_rows(path)
    if path.is_dir() and known not in NAMES:
        return path.name, _directory(path, split)
    names = dict.fromkeys([spec, known])
    wanted = [f"{name}{part}{suffix}" for name in names for part in _parts(split) for suffix in SUFFIXES]
    for file in wanted if "/" not in spec else []:
        if data_dir and (pathlib.Path(data_dir) / file).is_file():
            return known, read_rows(pathlib.Path(data_dir) / file)
    if known not in NAMES and "/" not in spec:
        looked = f" (no {wanted[0]}, ... in {data_dir})" if data_dir else ""
        raise UserError(
            f"data set {spec!r} is unknown{looked}; valid: a {', '.join(SUFFIXES)} file, a directory, "
            f"owner/name[:config] on the Hugging Face hub, or one of {', '.join(NAMES)}"
        )
    hub, _, config = spec.partition(":")
    source = NAMES.get(known, Source(hub, config or None))
    return (known if known in NAMES else hub).rsplit("/", 1)[-1], _hub(spec, source, split, data_dir)


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
        raise UserError(f"{path}: {found}" + (f" for split {split!r}" if split else "") + "; name one file or split")
    return (row for file in files for row in read_rows(file))


def _datasets():
    try:
        import datasets
    except ImportError:
        raise UserError("data sets of the Hugging Face hub need the datasets library: pip install datasets") from None
    return datasets


def _saved(path: pathlib.Path, split: str | None) -> Iterator[tuple[str, Any]]:
    try:
        data = _datasets().load_from_disk(str(path))
        data = data[split or next(iter(data))] if isinstance(data, dict) else data
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: cannot be read as a saved data set ({str(e).splitlines()[0][:200]})") from None
    return ((f"{path}: row {i}", plain(row)) for i, row in enumerate(data))


def _hub(spec: str, source: Source, split: str | None, data_dir: str) -> Iterator[tuple[str, Any]]:
    datasets = _datasets()
    try:
        data = datasets.load_dataset(source.hub, source.config, split=split or source.split)
    except Exception as e:  # the library raises whatever its storage, network and parsers raise
        reason = (str(e) or type(e).__name__).splitlines()[0][:200]
        looked = f"not in {data_dir or 'data_dir (not set)'}; " if "/" not in spec else ""
        raise UserError(f"data set {spec!r}: {looked}{source.hub} from the Hugging Face hub: {reason}") from None
    return ((f"{spec}: row {i}", plain(row)) for i, row in enumerate(data))
