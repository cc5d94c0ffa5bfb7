"""Data sets: real files, other schemas, and every kind of damage with file and line in the message."""

import contextlib
import datetime
import decimal
import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from jaxrl.errors import UserError
from jaxrl.runtime.config import base_config
from jaxrl.tasks.data import NAMES, check_prompt_lengths, digest, known_name, load_problems
from jaxrl.tasks.load import open_task
from jaxrl.tasks.rows import format_choices
from jaxrl.types import Problem
from models.tokenizers import vocab_tokenizer
from tests.shared import shared_path

GOOD = {"id": "a", "problem": "1+1?", "answer": "2", "level": 3}


@pytest.fixture
def write(tmp_path):
    def make(name, *rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        else:
            lines = [row if isinstance(row, bytes) else (json.dumps(row) + "\n").encode() for row in rows]
            data = b"".join(lines)
            path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return make


def error(*args, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        load_problems(*args, **kwargs)
    message = str(e.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "count"), [("gsm8k", 1319), ("math500", 500), ("aime24", 30), ("aime25", 30), ("amc23", 40)]
)
def test_real_sets_by_name(name, count):
    loaded = load_problems(name, data_dir=str(shared_path("data")))
    assert len(loaded.problems) == count and not loaded.skipped and not loaded.duplicates
    assert all(p.prompt and p.answer and p.task == "math" for p in loaded.problems)


def test_real_training_set():
    loaded = load_problems(str(shared_path("data", "gsm8k_train.jsonl.gz")))
    assert len(loaded.problems) == 7473
    first = loaded.problems[0]
    assert (first.id, first.answer) == ("gsm8k_train/0", "72")
    assert first.info["solution"].endswith("#### 72")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_formats_agree(write, name):
    rows = [GOOD, {**GOOD, "id": "b", "answer": "3"}]
    assert load_problems(write(name, *rows)).problems == [
        Problem("a", "1+1?", "2", "math", info={"level": 3}),
        Problem("b", "1+1?", "3", "math", info={"level": 3}),
    ]


def test_json_list(write, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([GOOD]))
    assert load_problems(str(tmp_path / "x.json")).problems[0].answer == "2"


def test_fields_are_mapped_and_values_written_out(write):
    rows = [{"q": "a?", "gold": 5, "key": 7}, {"q": "b?", "gold": 27.0}, {"q": "c?", "gold": ["x+1"]}]
    fields = {"problem": "q", "answer": "gold", "id": "key"}
    problems = load_problems(write("set.jsonl", *rows), fields=fields).problems
    assert [(p.id, p.prompt, p.answer) for p in problems] == [
        ("7", "a?", "5"),
        ("set/1", "b?", "27"),
        ("set/2", "c?", "x+1"),
    ]


def test_blank_lines_and_byte_order_mark(write):
    path = write("x.jsonl", b"\xef\xbb\xbf", GOOD, b"\n", b"  \n", {**GOOD, "id": "b"})
    assert [p.id for p in load_problems(path).problems] == ["a", "b"]


def test_limit(write):
    path = write("x.jsonl", GOOD, b"broken\n")
    assert len(load_problems(path, limit=1).problems) == 1


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_verl_schema(write, name):
    row = {
        "data_source": "math_dapo",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 5, "split": "train"},
    }
    [problem] = load_problems(write(name, row)).problems
    assert (problem.id, problem.prompt, problem.answer) == ("math_dapo/train/5", "1+1?", "2")
    assert problem.info["messages"] == row["prompt"] and problem.info["data_source"] == "math_dapo"
    message = error(write("bad.jsonl", {**row, "reward_model": {"style": "rule"}}))
    assert "bad.jsonl:1" in message and "reward_model.ground_truth" in message
    assert "bad2.jsonl:1" in error(write("bad2.jsonl", {**row, "prompt": []}))


@pytest.mark.parametrize("answer", [1, "1", "B", "(b)", [1], "paper"])
def test_multiple_choice(write, answer):
    row = {"problem": "Which?", "choices": ["stone", "paper", "scissors"], "answer": answer}
    [problem] = load_problems(write("x.jsonl", row)).problems
    assert problem.prompt == "Which?\n\nA. stone\nB. paper\nC. scissors"
    assert (problem.answer, problem.task) == ("B", "choice")


def test_multiple_choice_that_names_no_choice(write):
    row = {"problem": "Which?", "choices": ["stone", "paper"], "answer": 2}
    assert "x.jsonl:1" in error(write("x.jsonl", row))
    assert format_choices("Which? (A) one (B) two", ["(A) one", "(B) two"]) == "Which? (A) one (B) two"
    assert format_choices("Which?", ["(A) one", "two"]) == "Which?\n\n(A) one\nB. two"


def test_hub_rows_are_converted(write, tmp_path):
    """Local copies with the hub's own field names: gsm8k's solution and gpqa's four choices."""
    write("gsm8k.jsonl", {"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 4"})
    [problem] = load_problems("gsm8k", data_dir=str(tmp_path)).problems
    assert (problem.prompt, problem.answer) == ("How many?", "4") and "####" in problem.info["solution"]
    wrong = {f"Incorrect Answer {i}": f"no{i}" for i in (1, 2, 3)}
    rows = [
        {"Question": f"Q{i}?", "Correct Answer": " yes ", **wrong, "Record ID": f"r{i}"} for i in range(40)
    ]
    write("gpqa_diamond.jsonl", *rows)
    problems = load_problems("gpqa_diamond", data_dir=str(tmp_path)).problems
    assert {p.answer for p in problems} == set("ABCD") and problems[3].id == "r3"
    assert all(f"{p.answer}. yes\n" in p.prompt + "\n" and p.task == "choice" for p in problems)
    write(
        "mmlu.jsonl", {"question": "Which?", "choices": ["a1", "b1", "c1", "d1"], "answer": 3, "subject": "x"}
    )
    assert load_problems("mmlu", data_dir=str(tmp_path)).problems[0].answer == "D"


OTHER_NAMES = {
    "question": ({"question": "Q?", "answer": "2"}, "2"),
    "capitals": ({"ID": "2024-I-1", "Problem": "Q?", "Solution": "..", "Answer": 204}, "204"),
    "gsm8k": ({"question": "Q?", "answer": "We add. #### 1,002"}, "1,002"),
    "expected": ({"prompt": "Q?", "expected_answer": 2.0}, "2"),
    "solution": ({"problem": "Q?", "solution": "So \\boxed{\\frac{1}{3}}."}, "\\frac{1}{3}"),
    "several": ({"question": "Q?", "final_answer": ["1", "-1"]}, "1, -1"),
    "null first": ({"question": "Q?", "answer": None, "target": "3"}, "3"),
}


@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_common_field_names_are_found(write, kind):
    row, answer = OTHER_NAMES[kind]
    [problem] = load_problems(write("x.jsonl", row)).problems
    assert (problem.prompt, problem.answer, problem.task) == ("Q?", answer, "math")
    assert problem.id == row.get("ID", "x/0")


def test_a_name_that_is_given_is_not_guessed(write):
    path = write("x.jsonl", {"question": "Q?", "answer": "2", "other": "3"})
    assert load_problems(path, fields={"answer": "other"}).problems[0].answer == "3"
    assert "no answer field 'gone'" in error(path, fields={"answer": "gone"})
    label = {"problem": "Q?", "label": 1}  # could be anything
    assert "no answer field" in error(write("label.jsonl", label))


CHOICES = {
    "options": {"options": ["red", "blue"], "answer": "B"},
    "lettered": {"options": ["(A) red", "(B) blue"], "answer": None, "label": "B"},
    "columns": {"A": "red", "B": "blue", "answer": "B"},
    "mapping": {"options": {"A": "red", "B": "blue"}, "answer": "B"},
    "arc": {"choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"},
    "gold": {"choices": ["red", "blue"], "gold": [1]},
    "text": {"choices": ["red", "blue"], "correct_answer": "blue"},
}


@pytest.mark.parametrize("kind", CHOICES)
def test_ways_to_write_choices(write, kind):
    [problem] = load_problems(write("x.jsonl", {"question": "Which?", **CHOICES[kind]})).problems
    assert (problem.answer, problem.task) == ("B", "choice")
    assert re.fullmatch(r"Which\?\n\n(A\.|\(A\)) red\n(B\.|\(B\)) blue", problem.prompt)


def test_passages_and_numbers_among_the_choices(write):
    row = {"passage": "Long. ", "question": "1 + 2 = ?", "options": ["1", "2", "3"], "answer": "C"}
    [problem] = load_problems(write("x.jsonl", row)).problems
    assert problem.prompt == "Long.\n\n1 + 2 = ?\n\nA. 1\nB. 2\nC. 3"  # the question does not list them


@pytest.mark.parametrize("name", ["MATH-500", "AIME 2024", "AMC23", "GPQA-Diamond", "Minerva", "OlympiadBench"])
def test_names_as_papers_write_them(write, tmp_path, name):
    assert known_name(name) in NAMES
    write(f"{known_name(name)}.jsonl", GOOD)
    assert load_problems(name, data_dir=str(tmp_path)).problems[0].answer == "2"


def test_directories(write, tmp_path):
    write("shards/data/train-00000-of-00002.parquet", GOOD)
    write("shards/data/train-00001-of-00002.parquet", {**GOOD, "id": "b"})
    assert [p.id for p in load_problems(str(tmp_path / "shards")).problems] == ["a", "b"]
    write("shards/data/test-00000-of-00001.parquet", {**GOOD, "id": "c"})
    assert [p.id for p in load_problems(str(tmp_path / "shards"), split="test").problems] == ["c"]
    assert "test, train" in error(str(tmp_path / "shards"))
    (tmp_path / "empty").mkdir()
    assert "no .jsonl" in error(str(tmp_path / "empty"))


def test_saved_hub_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([GOOD]).save_to_disk(tmp_path / "saved")
    assert load_problems(str(tmp_path / "saved")).problems[0].id == "a"
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])})
    both.save_to_disk(tmp_path / "both")
    assert load_problems(str(tmp_path / "both"), split="train").problems[0].id == "a"
    assert "both" in error(str(tmp_path / "both"), split="test")


def test_a_set_of_the_hub_is_named_with_its_config(monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []

    def load(name, config, split):
        asked.append((name, config, split))
        return [dict(GOOD)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for spec in ("owner/thing:hard", "owner/thing", "gsm8k"):
        assert len(load_problems(spec, split="train").problems) == 1
    expected = [("owner/thing", "hard"), ("owner/thing", None), ("openai/gsm8k", "main")]
    assert asked == [(*name, "train") for name in expected]


def test_unreachable_and_unknown_names(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = error("mmlu", data_dir=str(tmp_path))
    assert "cais/mmlu" in message and "no route" in message and str(tmp_path) in message
    assert "owner/thing" in error("owner/thing")
    message = error("nonsense", data_dir=str(tmp_path))
    assert all(name in message for name in NAMES) and str(tmp_path) in message
    assert "no such file" in error(str(tmp_path / "absent.jsonl"))


def test_the_hub_library_may_be_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install datasets" in error("mmlu")


BAD_ROWS = {
    "no problem": ({"answer": "2"}, "no field 'problem'"),
    "problem is null": ({"problem": None, "answer": "2"}, "'problem' is empty"),
    "problem is a list": ({"problem": [1], "answer": "2"}, "not text but list"),
    "blank problem": ({"problem": " ", "answer": "2"}, "'problem' is"),
    "no answer": (
        {"problem": "x", "solution": "2"},
        "no answer field 'answer'; the row has problem, solution",
    ),
    "null answer": ({"problem": "x", "answer": None}, "no answer field 'answer'"),
    "empty answer": ({"problem": "x", "answer": " "}, "'answer' is empty"),
    "answer is not a number": ({"problem": "x", "answer": float("nan")}, "'answer' is nan"),
    "answer is an object": ({"problem": "x", "answer": {}}, "'answer' is dict"),
    "answer is a flag": ({"problem": "x", "answer": True}, "'answer' is bool"),
    "not an object": (["x"], "a JSON list"),
    "not JSON": (b'{"problem": \n', "not JSON"),
    "latin-1": ('{"problem": "é", "answer": "2"}\n'.encode("latin-1"), "not UTF-8: byte 0xe9 at column 14"),
    "surrogate": (b'{"problem": "\\ud800", "answer": "2"}\n', "surrogate"),
    "too deep": (b"[" * 200_000 + b"\n", "not JSON"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows(write, kind):
    row, reason = BAD_ROWS[kind]
    path = write("x.jsonl", GOOD, row, {**GOOD, "id": "b"})
    message = error(path)
    assert f"{path}:2: " in message and reason in message
    loaded = load_problems(path, skip_bad_rows=True)
    assert [p.id for p in loaded.problems] == ["a", "b"] and len(loaded.skipped) == 1
    assert reason in loaded.skipped[0] and f"{path}:2" in loaded.skipped[0]
    only = error(write("only.jsonl", row), skip_bad_rows=True)
    assert "only.jsonl: empty data set: all 1 rows are bad" in only


def test_bad_rows_of_parquet(write):
    path = write("x.parquet", GOOD, {**GOOD, "answer": None})
    assert "x.parquet: row 1" in error(path) and len(load_problems(path, skip_bad_rows=True).skipped) == 1


def test_empty_answers_can_be_allowed(write):
    path = write("x.jsonl", {"problem": "x", "answer": ""})
    assert load_problems(path, allow_empty_answer=True).problems[0].answer == ""


def test_duplicates(write):
    path = write("x.jsonl", GOOD, {**GOOD, "id": "b"}, {**GOOD, "answer": "9"}, GOOD)
    message = error(path)
    assert f"{path}:3" in message and f"{path}:1" in message and "'a'" in message
    loaded = load_problems(path, duplicates="drop")
    assert [(p.id, p.answer) for p in loaded.problems] == [("a", "2"), ("b", "2")] and loaded.duplicates == 2
    path = write("y.jsonl", GOOD, {**GOOD, "id": "a#2"}, {**GOOD, "answer": "9"}, GOOD)
    loaded = load_problems(path, duplicates="keep")
    assert [(p.id, p.answer) for p in loaded.problems] == [("a", "2"), ("a#2", "2"), ("a#3", "9"), ("a#4", "2")]
    assert loaded.duplicates == 0


@pytest.mark.parametrize("duplicates, ids", [("drop", "ab"), ("keep", ["a", "b", "a#2"]), ("error", None)])
def test_duplicates_of_a_run_are_counted_and_printed(write, caplog, duplicates, ids):
    path = write("x.jsonl", GOOD, {**GOOD, "id": "b"}, GOOD)
    config = base_config()
    config.task.name, config.task.data, config.task.duplicates = "math", path, duplicates
    tokenizer = vocab_tokenizer([*map(chr, range(32, 127)), "<end>", "<pad>"], "<end>", "<pad>")
    with caplog.at_level("WARNING"), contextlib.ExitStack() as stack:
        if ids is None:
            with pytest.raises(UserError, match=f"{path}:3: id 'a' already used at {path}:1"):
                stack.enter_context(open_task(config, tokenizer))
            return
        assert [p.id for p in stack.enter_context(open_task(config, tokenizer)).train] == list(ids)
    counted = f"{path}: 1 rows left out, their ids were used before"
    assert (counted in caplog.text) == (duplicates == "drop")


def test_rows_left_out_of_a_run_are_counted_and_printed(write, caplog):
    path = write("x.jsonl", GOOD, {**GOOD, "id": "long", "problem": "1+" * 300}, {"problem": "no answer"})
    config = base_config()
    config.task.name, config.task.data, config.task.skip_bad_rows = "math", path, True
    tokenizer = vocab_tokenizer([*map(chr, range(32, 127)), "<end>", "<pad>"], "<end>", "<pad>")
    with pytest.raises(UserError, match="problem 'long': its prompt has .* 512 fit"), open_task(config, tokenizer):
        pass
    config.task.long_prompts = "drop"
    with caplog.at_level("WARNING"), open_task(config, tokenizer) as task:
        assert [p.id for p in task.train] == ["a"]
    assert "task.data: 1 of 2 prompts are too long and left out" in caplog.text
    assert f"{path}: 1 rows left out, the first: {path}:3: no answer field" in caplog.text


@pytest.mark.parametrize("cut", [1, 30, 200, -9, -1])
def test_truncated_gzip(tmp_path, cut):
    rows = "".join(json.dumps({**GOOD, "id": str(i), "x": i**9}) + "\n" for i in range(500)).encode()
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(rows)[:cut])
    message = error(str(path))
    assert str(path) in message and "gzip" in message
    assert "gzip" in error(str(path), skip_bad_rows=True)  # what follows is lost, not bad


def test_damaged_gzip_and_parquet(tmp_path, write):
    data = bytearray(gzip.compress(b"x" * 100_000))
    data[60] ^= 255
    (tmp_path / "x.jsonl.gz").write_bytes(data)
    (tmp_path / "y.jsonl.gz").write_bytes(b"not gzip at all")
    path = write("z.parquet", GOOD)
    with open(path, "r+b") as f:
        f.truncate(100)
    (tmp_path / "w.parquet").write_bytes(b"")
    for name in ("x.jsonl.gz", "y.jsonl.gz", "z.parquet", "w.parquet"):
        assert name in error(str(tmp_path / name))


def test_other_wrong_files(tmp_path, write):
    (tmp_path / "utf16.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    assert "UTF-16" in error(str(tmp_path / "utf16.jsonl"))
    assert "empty data set" in error(write("empty.jsonl"))
    assert "empty data set" in error(write("blank.jsonl", b"\n\n"))
    (tmp_path / "x.csv").write_text("a,b")
    assert ".parquet" in error(str(tmp_path / "x.csv"))
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert "not a list" in error(str(tmp_path / "x.json"))
    assert "duplicates='all'" in error("x.jsonl", duplicates="all")
    assert "question" in error("x.jsonl", fields={"question": "q"})


def test_prompt_lengths():
    problems = [Problem(str(i), "x", "1") for i in range(4)]
    tokens = [[1] * n for n in (3, 9, 5, 6)]
    assert check_prompt_lengths(problems, tokens, 5, "drop") == [0, 2]
    assert check_prompt_lengths(problems, tokens, 9) == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"problem '1': its prompt has 9 tokens, 5 fit \(2 of 4"):
        check_prompt_lengths(problems, tokens, 5)
    with pytest.raises(UserError, match="problem '0'"):
        check_prompt_lengths(problems, tokens, 2, "drop")
    with pytest.raises(UserError, match="valid: error, drop"):
        check_prompt_lengths(problems, tokens, 5, "cut")


def test_more_choices_than_letters_are_refused_with_file_and_line(write):
    path = write("x.jsonl", {"problem": "?", "choices": list(map(str, range(26))), "answer": 25})
    assert load_problems(path).problems[0].answer == "Z"
    path = write("x.jsonl", {"problem": "?", "choices": list(map(str, range(27))), "answer": 26})
    assert "x.jsonl:1: choices holds 27 choices; at most 26 have letters" in error(path)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ('["12"]', "12"),
        ('["1", "2"]', "1, 2"),
        (' [ "x=1", "x=2" ]', "x=1, x=2"),
        (r'["\\frac{1}{2}", "0.5"]', r"\frac{1}{2}"),
        (["1/2", "0.5", "3"], "1/2, 3"),
        ("[1, 2]", "[1, 2]"),  # an interval
        ('["1", 2]', '["1", 2]'),
        ('["broken', '["broken'),
    ],
)
def test_lists_of_golds(write, answer, gold):
    assert load_problems(write("x.jsonl", {**GOOD, "answer": answer})).problems[0].answer == gold


def test_values_that_json_has_no_form_for(write):
    when, day = datetime.datetime(2026, 1, 2, 3, 4), datetime.date(2026, 1, 2)
    row = {**GOOD, "answer": decimal.Decimal("12.50"), "when": when, "day": day, "raw": b"ab", "image": b"\xff\xd8"}
    row |= {"score": float("nan"), "deep": [{"when": when}], "took": datetime.timedelta(seconds=3)}
    [problem] = load_problems(write("x.parquet", row)).problems
    assert problem.answer == "12.50"
    info = json.loads(json.dumps(problem.info, allow_nan=False))
    assert info == problem.info and info["when"] == "2026-01-02T03:04:00" and info["day"] == "2026-01-02"
    assert (info["raw"], info["image"], info["score"]) == ("ab", "/9g=", None)
    assert info["deep"] == [{"when": "2026-01-02T03:04:00"}] and info["took"] == "0:00:03"


def test_digest_tells_rows_apart():
    one, two = Problem("a", "1+1?", "2", "math"), Problem("b", "1+2?", "3", "math")
    digests = {digest(rows) for rows in ([], [one], [two], [one, two], [two, one])}
    assert len(digests) == 5 and digest([one]) == digest([Problem("a", "1+1?", "2", "math", info={"x": 1})])
