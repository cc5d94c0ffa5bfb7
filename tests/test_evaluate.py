"""The evaluate command: what it writes, that it can be interrupted, and that it refuses to mix settings."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrl import evaluate
from jaxrl.errors import UserError
from jaxrl.evaluation.benchmarks import asked_as, grade_text
from jaxrl.rollout.engine import Engine
from jaxrl.rollout.paged import PagedCache
from jaxrl.runtime.checkpoint import Checkpointer
from jaxrl.runtime.config import base_config
from jaxrl.runtime.model_source import load_model
from jaxrl.tasks import dial
from jaxrl.tasks.task import Grade, Task
from jaxrl.types import Problem
from models.config import DecoderConfig, to_hf
from models.decoder import abstract_params
from models.tokenizers import vocab_tokenizer
from models.weights import save_params
from tests.shared import shared_path
from tests.test_multihost import free_port

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A dial model with random weights."""
    tokenizer = vocab_tokenizer(dial.PIECES, dial.END, dial.PAD)
    config = DecoderConfig(
        tokenizer.vocab_size, 16, 24, 1, 2, 2, 8, tie_embeddings=True, max_position_embeddings=64
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(config)[0]
    )
    path = tmp_path_factory.mktemp("model")
    save_params(path, params, config, tokenizer)
    return path


def run(model, out, *flags):
    evaluate.main(["evaluate", f"--model={model}", f"--out={out}", "--slots=8", *flags])
    result = json.loads((out / "result.json").read_text())
    files = {f.name: f.read_text().splitlines() for f in sorted((out / "completions").iterdir())}
    return result, files


def test_writes_completions_result_and_table(model, tmp_path, capsys):
    result, files = run(model, tmp_path, "--data=dial:n_max=3,dial:mode=exact", "--limit=5", "--samples=3")
    assert [len(lines) for lines in files.values()] == [6, 6]
    rows = [json.loads(line) for line in files["dial_n_max_3.jsonl"][1:]]
    by_id = {p.id: p for p in dial.problems("heldout", 1, 5, n_max=3)}
    assert {r["id"] for r in rows} == set(by_id)
    for r in rows:
        assert r["prompt"] == dial.prompt_text(by_id[r["id"]]) and len(r["samples"]) == 3
        for s in r["samples"]:
            assert s["outcome"] == dial.grade(by_id[r["id"]], s["text"])
    plain, budgeted = result["results"]
    assert plain["accuracy"] == np.mean([s["correct"] for r in rows for s in r["samples"]])
    assert plain["mean_tokens"] == pytest.approx(np.mean([s["tokens"] for r in rows for s in r["samples"]]))
    assert "mean_error" in budgeted and "mean_error" not in plain
    assert result["grader_version"] and result["model"]["config"]["hidden_size"] == 16
    assert result["flags"]["temperature"] == 1.0
    table = (tmp_path / "table.md").read_text()
    assert "avg@3" in table and "dial:n_max=3" in table and table in capsys.readouterr().out


def test_continues_where_it_was_killed_and_gives_the_same(model, tmp_path):
    flags = ("--data=dial:n_max=3", "--limit=6", "--samples=2", "--batch=2")
    whole, files = run(model, tmp_path / "a", *flags)
    (tmp_path / "b" / "completions").mkdir(parents=True)
    killed = tmp_path / "b" / "completions" / "dial_n_max_3.jsonl"
    lines = files["dial_n_max_3.jsonl"]
    marked = lines[1].replace(
        '"prompt_tokens": ', '"prompt_tokens": 1000'
    )  # to see that it is not made again
    killed.write_text("\n".join([lines[0], marked, lines[2][:40]]))
    again, files_again = run(model, tmp_path / "b", *flags)
    assert files_again["dial_n_max_3.jsonl"][1] == marked
    assert sorted(files_again["dial_n_max_3.jsonl"][2:]) == sorted(lines[2:])
    assert again["results"] == whole["results"]


def test_statistics_are_made_once_a_set_however_many_batches(model, tmp_path, monkeypatch, capsys):
    calls, real = [], evaluate.summarize
    monkeypatch.setattr(evaluate, "summarize", lambda records: calls.append(len(records)) or real(records))
    result, _ = run(model, tmp_path, "--data=dial", "--limit=3", "--samples=2", "--batch=1")
    assert calls == [3]  # with many samples they take longer than a batch
    said = [line for line in capsys.readouterr().err.splitlines() if "accuracy" in line]
    assert len(said) == 3 and f"3/3 problems, accuracy {100 * result['results'][0]['accuracy']:.1f} %" in said[-1]


def test_other_settings_do_not_share_completions(model, tmp_path):
    run(model, tmp_path, "--data=dial:n_max=3", "--limit=2")
    with pytest.raises(UserError, match="temperature=1.0, now 0.5; choose another --out"):
        run(model, tmp_path, "--data=dial:n_max=3", "--limit=2", "--temperature=0.5")


def test_pages_are_a_runs_unless_given_and_give_the_same_completions(model, tmp_path, monkeypatch):
    made, begin = [], PagedCache.__init__
    monkeypatch.setattr(PagedCache, "__init__", lambda self, *a, **k: made.append(k) or begin(self, *a, **k))
    flags = ("--data=dial:n_max=3", "--limit=6", "--samples=2")
    dense = run(model, tmp_path / "a", *flags)[1]
    paged = run(model, tmp_path / "b", *flags, "--pages=8")[1]
    monkeypatch.setattr(evaluate, "run_settings", lambda path: {"sampling": {"pages": 4}})
    as_the_run = run(model, tmp_path / "c", *flags)[1]
    assert [sizes["page"] for sizes in made] == [8, 4]

    def texts(files):
        return [[s["text"] for s in json.loads(line)["samples"]] for line in files["dial_n_max_3.jsonl"][1:]]

    assert texts(dense) == texts(paged) == texts(as_the_run)


def test_budget_sweep(model, tmp_path):
    result, files = run(model, tmp_path, "--data=dial:n_max=3", "--limit=3", "--budgets=7,10", "--budget_mode=max",
                        "--max_new_tokens=12")  # fmt: skip
    rows = [json.loads(line) for line in files["dial_n_max_3___7.jsonl"][1:]]
    assert all(r["prompt"].startswith("[max 7 tokens] ") and r["budget"] == 7 for r in rows)
    seven = result["results"][0]
    lengths = np.array([s["tokens"] for r in rows for s in r["samples"]])
    assert (seven["budget"], seven["mode"]) == (7, "max")
    assert seven["mean_error"] == pytest.approx(lengths.mean() / 7 - 1)
    assert set(result["sweeps"]["dial:n_max=3"]) >= {"control", "scaling", "performance", "log_linear_slope"}
    assert "Control" in (tmp_path / "table.md").read_text()


def test_sweep_of_budget_forcing(model, tmp_path):
    flags = ("--data=dial:n_max=3", "--limit=6", "--samples=2", "--budget_mode=forced")
    result, files = run(model, tmp_path, *flags, "--budgets=5,9", "--waits=100")
    for row, budget in zip(result["results"], (5, 9), strict=True):
        assert (row["budget"], row["mode"], row["hard_violation"]) == (budget, "forced", 0.0)
        rows = [json.loads(line) for line in files[f"dial_n_max_3___{budget}.jsonl"][1:]]
        samples = [s for r in rows for s in r["samples"]]
        assert not any(r["prompt"].startswith("[") for r in rows)  # the model is not told
        assert all(dial.ARROW in s["text"] for s in samples)  # a model with random weights never gets there itself
        # prolonged to the budget: working, " => ", and an answer of one or two tokens
        assert {s["tokens"] for s in samples} <= {budget - 1, budget}
        assert row["mean_error"] == pytest.approx(np.mean([s["tokens"] for s in samples]) / budget - 1)
    with pytest.raises(UserError, match="waits=100, now 0"):
        run(model, tmp_path, *flags, "--budgets=5")
    with pytest.raises(UserError, match="--budgets=3: budget forcing needs more than 3 tokens"):
        run(model, tmp_path / "b", *flags, "--budgets=3")


def test_sweep_of_an_uncontrolled_model_samples_once(model, tmp_path):
    flags = ("--data=dial:n_max=3", "--limit=4", "--samples=2")
    plain, _ = run(model, tmp_path / "plain", *flags)
    result, files = run(model, tmp_path / "none", *flags, "--budget_mode=none", "--budgets=7,10")
    assert list(files) == ["dial_n_max_3.jsonl"] and len(files["dial_n_max_3.jsonl"]) == 5
    for row, budget in zip(result["results"], (7, 10), strict=True):
        assert (row["budget"], row["mode"]) == (budget, "none")
        for key in ("accuracy", "mean_tokens"):
            assert row[key] == plain["results"][0][key]
        assert row["mean_error"] == pytest.approx(row["mean_tokens"] / budget - 1)
    assert result["sweeps"]["dial:n_max=3"]["log_linear_slope"] is None  # one length has no slope


@pytest.fixture
def training_run(model, tmp_path):
    """A run directory with checkpoints of steps 3 and 7; returns the newer parameters too."""
    config, params, tokenizer = load_model(model)
    root = tmp_path / "run"
    (root / "model").mkdir(parents=True)
    (root / "model" / "config.json").write_text(json.dumps(to_hf(config)))
    tokenizer.save(root / "model")
    newer = jax.tree.map(lambda leaf: leaf[..., ::-1], params)
    with Checkpointer(root / "checkpoints", keep_last=2) as saver:
        saver.save(3, {"params": params, "opt": np.zeros(2)}, {})
        saver.save(7, {"params": newer, "opt": np.zeros(2)}, {})
    return root


def test_a_question_that_changed_is_asked_again(model, tmp_path):
    data, flags = tmp_path / "x.jsonl", ("--max_new_tokens=4", "--template=plain")
    rows = [{"id": str(i), "problem": f"dial {i}: a+1 ?", "answer": "3"} for i in range(3)]

    def ask():
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run(model, tmp_path / "out", f"--data={data}", *flags)[1]["x.jsonl"]

    before = ask()
    rows[1]["answer"] = "4"
    after = ask()
    assert after[:4] == before and [json.loads(line)["id"] for line in after[4:]] == ["1"]
    assert ask() == after


def test_questions_in_no_words_of_the_model_are_answered_wrongly(model, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "What is <1>?", "answer": "1"}) + "\n")
    result, files = run(model, tmp_path / "out", f"--data={tmp_path / 'x.jsonl'}", "--samples=2")
    (row,) = result["results"]
    assert (row["accuracy"], row["unparsed"], row["truncated"]) == (0.0, 1.0, 0.0)
    assert "1 of 1 prompts hold text that the model has no tokens for" in capsys.readouterr().err


def test_files_of_one_name_are_kept_apart(model, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text(json.dumps([{"question": "dial 1: a+1 ?", "answer": folder}]))
    specs = [str(tmp_path / folder / "x.json") for folder in ("a", "b")]
    flags = ("--max_new_tokens=4", "--template=plain")
    result, files = run(model, tmp_path / "out", f"--data={','.join(specs)}", *flags)
    assert [row["name"] for row in result["results"]] == ["x", specs[1]] and len(files) == 2
    assert (result["results"][0]["template"], result["results"][0]["max_tokens"]) == ("plain", 4)
    assert result["results"][0]["grader"] == result["grader_version"]
    with pytest.raises(UserError, match="twice"):
        run(model, tmp_path / "out", f"--data={specs[0]},{specs[0]}", *flags)


def test_a_damaged_file_of_completions_is_one_line(model, tmp_path):
    run(model, tmp_path, "--data=dial:n_max=3", "--limit=2")
    file = tmp_path / "completions" / "dial_n_max_3.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + "{\n" + lines[2])
    with pytest.raises(UserError, match="damaged; delete it"):
        run(model, tmp_path, "--data=dial:n_max=3", "--limit=2")


def test_all_checkpoints_of_a_run(model, training_run, tmp_path):
    flags = ("--data=dial:n_max=3", "--limit=3", "--samples=2")
    result, files = run(training_run, tmp_path / "all", *flags, "--all_checkpoints")
    assert [row["step"] for row in result["results"]] == [3, 7]
    newest, only = run(training_run, tmp_path / "newest", *flags)
    assert newest["results"] == result["results"][1:]
    assert only["dial_n_max_3_step_7.jsonl"] == files["dial_n_max_3_step_7.jsonl"]
    _, exported = run(model, tmp_path / "hf", *flags)  # the same weights as step 3
    assert exported["dial_n_max_3.jsonl"][1:] == files["dial_n_max_3_step_3.jsonl"][1:]
    assert files["dial_n_max_3_step_3.jsonl"][1:] != files["dial_n_max_3_step_7.jsonl"][1:]


@pytest.mark.slow
def test_eight_devices_give_the_same_completions(model, tmp_path):
    flags = ("--data=dial:n_max=3", "--limit=6", "--samples=2")
    _, files = run(model, tmp_path / "one", *flags)
    program = [sys.executable, "-m", "jaxrl.evaluate", f"--model={model}", f"--out={tmp_path}/eight", *flags]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run([*program, "--slots=6", "--tensor=2"], env=env, cwd=ROOT, check=True)
    assert (tmp_path / "eight/completions/dial_n_max_3.jsonl").read_text().splitlines() == files[
        "dial_n_max_3.jsonl"
    ]


def test_held_out_metrics_of_a_training_run(model):
    decoder, params, tokenizer = load_model(model)
    sampler = Engine(decoder, tokenizer.eos_ids, max_prompt=16, max_tokens=12, slots=8)
    config = base_config()
    config.length.mode, config.length.low, config.length.high = "exact", 3, 20
    config.eval.problems, config.eval.samples, config.sampling.max_tokens = 3, 2, 12
    problems = dial.problems("heldout", 0, 5, n_max=3)
    seen = []

    def grade(problems, texts):
        seen.extend(problems)
        return [Grade(1.0, 1.0, True, "correct") for _ in texts]

    task = Task([], problems, lambda p: tokenizer.encode(dial.prompt_text(p)), grade)
    args = (config, sampler, sampler.layout(params), tokenizer, task)
    metrics = evaluate.evaluate_task(*args)
    assert metrics == evaluate.evaluate_task(*args)  # the same budgets and the same draws at every call
    assert metrics["eval/accuracy"] == metrics["eval/pass@2"] == 1.0
    assert {"eval/mean_error", "eval/mean_deviation", "eval/mean_tokens"} < set(metrics)
    assert [p.id for p in seen[:6:2]] == [p.id for p in problems[:3]] and len(seen) == 12
    assert all(3 <= p.budget <= 20 and p.mode == "exact" for p in seen)


@pytest.mark.parametrize("flag, said", [
    ("--data=nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--data=dial:size=3", "'size=3': need one of count, seed, n_min"),
    ("--budgets=5,x", "need distinct positive token counts"),
    ("--data=dial:count=0", "count must be at least 1"),
    ("--data=dial:seed=-1", "seed at least 0"),
    ("--samples=0", "--samples='0': must be an integer of at least 1"),
    ("--seed=-1", "--seed='-1': must be an integer of at least 0"),
    ("--min_p=1.5", "--min_p='1.5': must be a number of at least 0 and at most 1"),
    ("--budget_mode=about", "--budget_mode='about': must be one of exact, max"),
    ("--all_checkpoints", "not a run directory with checkpoints"),
    ("--step=3", "no checkpoint of step 3"),
    ("--reward=tests.tasks.naughty_worker:reward", "'dial' of --data has its own reward"),
])  # fmt: skip
def test_mistakes_are_one_line(model, tmp_path, flag, said):
    data = () if flag.startswith("--data") else ("--data=dial",)
    with pytest.raises(UserError, match="^[^\n]*" + said):
        run(model, tmp_path, *data, flag)


def test_grades_of_text_answers():
    class Grader:
        reading = {}

        def grade(self, pairs):
            return [
                "timeout" if text == "slow" else "correct" if text == gold else "wrong"
                for text, gold in pairs
            ]

    problems = [Problem(str(i), "q", a) for i, a in enumerate(["1", "1", "", "", "2"])]
    problems.append(Problem("5", "q", "B", task="choice"))
    grades = grade_text(problems, ["1", "2", "", "7", "slow", "So it is \\boxed{B}."], Grader())
    assert [g.outcome for g in grades] == ["correct", "wrong", "correct", "wrong", "timeout", "correct"]
    assert [g.valid for g in grades] == [True, True, True, True, False, True]


def test_problems_are_asked_as_a_run_was_trained_unless_flags_say_else(tmp_path):
    class Chat:
        chat_template = "x"

    def asked(**flags):
        off = {"model": str(tmp_path), "template": "", "system_prompt": "", "enable_thinking": ""}
        return tuple(asked_as(off | flags, Chat()).values())

    assert asked() == ("chat", "", None)
    assert asked(system_prompt="Be brief.", enable_thinking="off") == ("chat", "Be brief.", False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"task": {"template": "boxed"}}')  # of an older run
    assert asked() == ("boxed", "", None)
    with pytest.raises(UserError, match="--system_prompt needs --template=chat, not boxed"):
        asked(system_prompt="Be brief.")
    task = {"template": "chat", "system_prompt": "Think.", "enable_thinking": "off"}
    (tmp_path / "config.json").write_text(json.dumps({"task": task}))
    assert asked() == ("chat", "Think.", False)
    assert asked(enable_thinking="default") == ("chat", "Think.", None)


def test_trained_stories_model_on_gsm8k(tmp_path):
    result, files = run(
        shared_path("data", "models", "stories260K"), tmp_path, f"--data={shared_path('data', 'gsm8k_test.jsonl')}",
        "--samples=2", "--limit=3", "--max_new_tokens=8", "--temperature=0",
    )  # fmt: skip
    (row,) = result["results"]
    assert (row["problems"], row["samples"], row["data"]) == (3, 2, "gsm8k_test")
    for line in files["gsm8k_test.jsonl"][1:]:
        a, b = json.loads(line)["samples"]
        assert a == b  # greedy


@pytest.mark.slow
def test_two_hosts_evaluate_as_one(dial_model, tmp_path):
    """Two processes of two devices against one process; then continued from a torn file; then refused."""
    flags = ["--data=dial:n_max=3,dial:mode=exact", "--limit=11", "--samples=3", "--slots=8", "--batch=4"]
    done, _ = run(dial_model, tmp_path / "one", *flags)

    def start(out, **env):
        command = [sys.executable, "-m", "jaxrl.evaluate", f"--model={dial_model}", f"--out={out}", *flags]
        env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([*command, "--distributed"], cwd=ROOT, env=os.environ | env, **pipes)

    def both(out):
        address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
        hosts = [start(out, **address, JAX_PROCESS_ID=str(i)) for i in range(2)]
        try:
            return hosts, [host.communicate(timeout=600) for host in hosts]
        finally:
            for host in hosts:
                host.kill()

    hosts, printed = both(tmp_path / "two")
    assert [host.returncode for host in hosts] == [0, 0], printed[0][1][-3000:]
    assert "avg@3" in printed[0][0] and "avg@3" not in printed[1][0] and "problems" not in printed[1][1]  # one speaks
    file = tmp_path / "two" / "completions" / "dial_n_max_3.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 12 and json.loads((tmp_path / "two" / "result.json").read_text())["results"] == done["results"]
    file.write_text("".join(lines[:5]) + lines[5][:30])
    assert [host.returncode for host in both(tmp_path / "two")[0]] == [0, 0]
    assert file.read_text().splitlines(keepends=True)[:5] == lines[:5] and sorted(file.open()) == sorted(lines)
    flags[2] = "--samples=2"  # refused by both, not by one while the other waits
    hosts, printed = both(tmp_path / "two")
    assert [host.returncode for host in hosts] == [2, 2] and all("choose another --out" in e for _, e in printed)
