"""The warm start on demonstrations of one's own, and on one phase of the embedded ones only."""

import json
import types

import numpy as np
import pytest

from jaxrl import build, sft
from jaxrl.errors import UserError
from tests.tiny import tiny

ROWS = [{"problem": f"dial {d}: a+1 ?", "answer": str(d + 1), "solution": f" a={d + 1} => {d + 1}"} for d in range(5)]


def from_file(tmp_path, rows, changes=()):
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"sft.data": str(path), "task.template": "plain", "sft.steps": 4, "sft.full_steps": 0, "sft.batch": 4}
    return tiny(tmp_path, {**given, **dict(changes)})


@pytest.mark.parametrize("full_steps", [0, 3, 4])
def test_demonstrations_of_a_file_are_visited_evenly(tmp_path, full_steps):
    config = from_file(tmp_path, ROWS, {"sft.full_steps": full_steps})
    tokenizer = build.tokenizer(config)
    made = list(sft.batches(sft.demonstrations(config, tokenizer), config, 1))
    assert len(made) == 4
    texts = [tokenizer.decode(row[row > 0]) for b in made for row in np.asarray(b.tokens).reshape(-1, 128)]
    seen = [sum(text.count(row["problem"] + row["solution"]) for text in texts) for row in ROWS]
    assert sum(seen) == 16 and min(seen) >= 2  # 4 steps of 4, over 5 demonstrations


@pytest.mark.parametrize("full_steps", [0, 2])
def test_the_embedded_task_may_have_one_phase(tmp_path, full_steps):
    config = tiny(tmp_path, {"sft.steps": 2, "sft.full_steps": full_steps})
    phases = sft.demonstrations(config, build.tokenizer(config))
    assert [bool(rows) for rows in phases] == [full_steps > 0, full_steps < 2]
    assert len(list(sft.batches(phases, config, 1))) == 2


def test_a_file_warms_a_model_up(tmp_path):
    config = from_file(tmp_path, ROWS, {"sft.steps": 30, "sft.warmup_steps": 2})
    tokenizer, mesh, said = build.tokenizer(config), build.mesh(config), []
    decoder = build.decoder_config(config, tokenizer)
    sft.warm_start(config, decoder, mesh, build.params_maker(config, decoder, mesh)(), tokenizer, note=said.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in said]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("share, error", [(1.0, 0.0), (1.0, 0.33), (0.0, 0.0), (0.5, 0.0)])
def test_demonstrations_are_asked_for_in_about_their_length(tmp_path, monkeypatch, share, error):
    asked = []  # the embedded task's tokenizer has no words for a budget
    monkeypatch.setattr(sft, "encode_prompt", lambda problem, *_, **__: asked.append(problem) or [1])
    settings = {"sft.budget_share": share, "sft.budget_error": error}
    config = from_file(tmp_path, [row | {"mode": "exact"} for row in 40 * ROWS], settings)
    tokenizer = build.tokenizer(config)
    sft.demonstrations(config, tokenizer)
    ratio = [p.budget / (len(tokenizer.encode(p.info["solution"])) + 1) for p in asked if p.budget]
    assert abs(len(ratio) / len(asked) - share) < 0.1
    if ratio:
        assert (min(ratio) == max(ratio) == 1) if error == 0 else (0.6 < min(ratio) < 0.9 and 1.1 < max(ratio) < 1.5)


@pytest.mark.parametrize("solution", [None, 3, ""])
def test_a_solution_that_is_no_text_is_named(tmp_path, solution):
    config = from_file(tmp_path, [*ROWS, {"id": "p7", "problem": "dial 1: ?", "answer": "2", "solution": solution}])
    with pytest.raises(UserError, match=r"sft.data=.*demos.jsonl: problem 'p7' needs text in the field 'solution'"):
        sft.demonstrations(config, build.tokenizer(config))


def test_rows_are_named_and_left_out_as_the_task_says(tmp_path, caplog):
    rows = [{"frage": row["problem"], "id": "same", "solution": row["solution"]} for row in ROWS]
    rows += [{"frage": None}, rows[0] | {"solution": 9 * ROWS[0]["solution"]}]
    settings = {"task.problem_field": "frage", "task.duplicates": "keep", "task.skip_bad_rows": True}
    config = from_file(tmp_path, rows, settings)
    with pytest.raises(UserError, match="1 of 6 demonstrations are longer than sampling.max_prompt or max_tokens"):
        sft.demonstrations(config, build.tokenizer(config))
    config.task.long_prompts = "drop"
    assert len(sft.demonstrations(config, build.tokenizer(config))[0]) == len(ROWS)
    assert "1 rows left out" in caplog.text and "1 of 6 demonstrations are longer" in caplog.text


@pytest.mark.parametrize("there", ["checkpoints/00000000", "metrics.jsonl"])
def test_the_command_does_not_write_into_a_training_run(tmp_path, monkeypatch, there):
    config = from_file(tmp_path, ROWS, {"sft.warmup_steps": 1})
    (tmp_path / "run" / there).mkdir(parents=True)
    config.run_dir = str(tmp_path / "run")
    monkeypatch.setattr(sft, "parse_config", lambda argv: config)
    with pytest.raises(UserError, match=rf"config.run_dir=.*run is a training run \({there.partition('/')[0]}\)"):
        sft.main(["sft"])
    assert not (tmp_path / "run" / "model").exists()


def test_a_solution_that_says_its_length_says_the_right_one():
    """Its digits are tokens, too, and so is the end: a letter each here: 97 and three digits are 101."""
    letters = types.SimpleNamespace(encode=list)
    for text in ("of {tokens}", "x" * 94 + "{tokens}", "x" * 97 + "{tokens}", "{tokens} and {tokens}"):
        tokens = sft._with_length(text, "{tokens}", letters)
        said = text.replace("{tokens}", str(len(tokens) + 1))
        assert "".join(tokens) == said, (said, tokens)
    assert sft._with_length("a set {tokens}", None, letters) == list("a set {tokens}")  # nobody's mark
