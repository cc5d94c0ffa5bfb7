"""The study runner: plan, commands, resuming, and a table checked against the arithmetic done by hand."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxrl import study
from jaxrl.errors import UserError
from jaxrl.runtime.config import parse_config, validate
from jaxrl.runtime.manifest import commit

ROOT = pathlib.Path(__file__).parents[1]


LOSS = {"new---better": "maspo"}


def write_run(path, accuracies, tokens_per_step, steps, finished=True):
    """accuracies: {step: value}."""
    path.mkdir(parents=True)
    config = {"steps": steps, "seed": int(path.name[4:]), "algorithm": {"loss": LOSS.get(path.parent.name, "grpo")}}
    (path / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(steps + 1 if finished else steps):
        record = {"step": step} | ({"generated_tokens": tokens_per_step} if step else {})
        if step in accuracies:
            record |= {"eval/accuracy": accuracies[step], "eval/mean_tokens": 7.0}
        lines.append(json.dumps(record) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def grid(tmp_path):
    file = tmp_path / "study.py"
    file.write_text(
        "def get_study():\n    return " + repr(dict(
            config="configs/quickstart.py", out=str(tmp_path / "runs"), seeds=[0, 1, 2], baseline="base",
            common={"steps": 4, "sft.steps": 9}, stages={"warm": {"entry": "sft"}},
            methods={"base": {"start": "warm"}, "new & better": {"algorithm.loss": "maspo", "start": "warm"}},
        ))
    )  # fmt: skip
    return file


def test_plan_goes_seed_by_seed_with_what_runs_start_from_first(grid):
    s = study.load_study(str(grid))
    s["seeds"] = [0, 1]
    expected = [(label, seed) for seed in (0, 1) for label in ("warm", "base", "new & better")]
    assert study.plan(s, ["base", "new & better"]) == expected
    assert study.plan(s, ["new & better"]) == [(x, seed) for seed in (0, 1) for x in ("warm", "new & better")]


def test_commands(grid, tmp_path):
    s = study.load_study(str(grid))
    runs = tmp_path / "runs"
    assert study.command(s, "new & better", 2) == [
        sys.executable, "-m", "jaxrl.train", "--config=configs/quickstart.py",
        "--config.steps=4", "--config.sft.steps=0", "--config.algorithm.loss=maspo",
        f"--config.model.path={runs}/warm/seed2/model", f"--config.run_dir={runs}/new---better/seed2",
        "--config.seed=2",
    ]  # fmt: skip
    assert study.command(s, "warm", 0)[2:4] == ["jaxrl.sft", "--config=configs/quickstart.py"]


def test_runs_only_what_is_missing_and_goes_on_after_a_failure(grid, tmp_path, monkeypatch, capsys):
    runs, called = tmp_path / "runs", []
    (runs / "warm" / "seed0" / "model").mkdir(parents=True)
    (runs / "warm" / "seed0" / "model" / "config.json").touch()
    write_run(runs / "base" / "seed0", {4: 0.5}, 10, 4)
    write_run(runs / "new---better" / "seed0", {2: 0.5}, 10, 4, finished=False)

    monkeypatch.setattr(study, "run_apart", lambda line: called.append(line) or 1)
    code = study.main(["study", f"--config={grid}", "--seeds=0,1"])
    dirs = [flag.partition("run_dir=")[2] for line in called for flag in line if "run_dir=" in flag]
    # the others of seed 1 would start from a warm start that is not there
    assert dirs == [f"{runs}/{name}" for name in ("new---better/seed0", "warm/seed1")]
    said = capsys.readouterr().err
    assert code == 1 and "not started: warm seed 1 is not finished" in said
    assert "not finished: new & better seed 0, warm seed 1, base seed 1, new & better seed 1;" in said
    called.clear()
    assert study.main(["study", f"--config={grid}", "--seeds=0", "--print_commands"]) == 0
    assert not called and "new---better/seed0" in capsys.readouterr().out


def test_table_by_hand(grid, tmp_path):
    runs = tmp_path / "runs"
    base, new = [0.50, 0.52, 0.57], [0.60, 0.61, 0.65]
    for seed in range(3):
        write_run(runs / "base" / f"seed{seed}", {0: 0.1, 2: 0.4, 4: base[seed]}, 100, 4)
        write_run(runs / "new---better" / f"seed{seed}", {0: 0.1, 2: 0.3, 4: new[seed]}, 200, 4)
    s = study.load_study(str(grid))
    result = study.compare(s, "eval/accuracy")
    assert (result["step"], result["tokens"]) == (4, {0: 400, 1: 400, 2: 400})
    rows = {row["method"]: row for row in result["rows"]}
    t = 4.302652730  # 97.5 % quantile of Student's t, 2 degrees of freedom
    difference = np.subtract(new, base)
    half = t * np.std(difference, ddof=1) / np.sqrt(3)
    assert rows["new & better"]["updates"][0] == pytest.approx(np.mean(new))
    assert rows["new & better"]["difference_updates"] == pytest.approx([difference.mean(), half], rel=1e-3)
    # at the 400 tokens that the base spent in all, the other was at its step 2
    assert rows["new & better"]["tokens"] == pytest.approx([0.3, 0.0])
    assert rows["new & better"]["difference_tokens"][0] == pytest.approx(np.mean([0.3 - b for b in base]))
    assert rows["base"]["difference_updates"] is None and rows["base"]["tokens"][0] == pytest.approx(
        np.mean(base)
    )
    s["pools"] = {"a": ["base"], "both": ["base", "new & better"]}
    pools = {row["method"]: row for row in study.compare(s, "eval/accuracy")["pools"]}
    both = np.add(base, new) / 2
    half = t * np.std(both - base, ddof=1) / np.sqrt(3)
    assert pools["both"]["updates"][0] == pytest.approx(both.mean()) and pools["a"]["difference_updates"] is None
    assert pools["both"]["difference_updates"] == pytest.approx([(both - base).mean(), half], rel=1e-3)
    assert (pools["both"]["spent"], pools["both"]["length"]) == (600, 7.0)
    half = t * np.std(difference, ddof=1) / np.sqrt(3)
    text = study.write_table(s)
    assert (
        f"{100 * np.mean(new):.1f} ±" in text
        and f"+{100 * difference.mean():.1f} ± {100 * half:.1f}*" in text
    )
    assert json.loads((runs / "study.json").read_text())["results"][0]["rows"]
    assert (runs / "study.md").read_text() == text


def test_accuracy_between_two_evaluations_is_interpolated(tmp_path):
    write_run(tmp_path / "seed0", {0: 0.2, 4: 0.6}, 50, 4)
    run = study.read_run(tmp_path / "seed0")
    assert study.at_tokens(run, "eval/accuracy", 50) == pytest.approx(0.3)
    assert study.at_step(run, "eval/accuracy", 3) == pytest.approx(0.2)


def test_tokens_are_no_percentages(grid, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / "base" / f"seed{seed}", {4: 0.5}, 10, 4)
    s = study.load_study(str(grid))
    text = study.table(s, study.compare(s, "eval/mean_tokens"))
    assert "| 7.0 ± 0.0 |" in text and "eval/mean_tokens in tokens, mean" in text


def test_equal_tokens_are_those_of_the_cheapest_run_of_the_seed(grid, tmp_path):
    for seed, tokens in ((0, 100), (1, 50)):
        for name, factor in (("base", 1), ("new---better", 2)):
            write_run(tmp_path / "runs" / name / f"seed{seed}", {0: 0.0, 4: 0.8}, factor * tokens, 4)
    result = study.compare(study.load_study(str(grid)), "eval/accuracy")
    assert result["tokens"] == {0: 400, 1: 200}
    assert {row["method"]: row["tokens"][0] for row in result["rows"]} == {"base": 0.8, "new & better": 0.4}


def test_unequal_lengths_are_compared_at_the_step_all_have(grid, tmp_path):
    write_run(tmp_path / "runs" / "base" / "seed0", {0: 0.1, 2: 0.4}, 10, 2)
    write_run(tmp_path / "runs" / "new---better" / "seed0", {0: 0.1, 2: 0.3, 4: 0.9}, 10, 4)
    settings = study.load_study(str(grid))
    settings["methods"]["base"] |= {"steps": 2}
    result = study.compare(settings, "eval/accuracy")
    assert result["step"] == 2 and [row["updates"][0] for row in result["rows"]] == [0.4, 0.3]


@pytest.mark.parametrize("change, said", [
    ({"seeds": []}, "'seeds' is missing"),
    ({"grid": 1}, "'grid' is not a key of a study"),
    ({"baseline": "none"}, "baseline 'none' is not one of the methods"),
    ({"methods": {"a": {"start": "b"}}, "baseline": ""}, "'a' starts from 'b'"),
    ({"methods": {"a": {"start": "b"}, "b": {"start": "a"}}, "baseline": ""}, "starts from itself: a <- b <- a"),
    ({"methods": {"a": None}, "baseline": ""}, r"methods\['a'\] must be a dict, not None"),
    ({"methods": {"a": {"entry": "foo"}}, "baseline": ""}, "entry 'foo' must be one of train, sft"),
    ({"methods": {"a+1": {}, "a-1": {}}, "baseline": ""}, "'a-1' and 'a\\+1' would share the directory 'a-1'"),
    ({"methods": {"warm ": {}, "warm-": {}}, "baseline": ""}, "share the directory"),
    ({"pools": []}, "'pools' must be a dict"),
    ({"pools": {"all": "base"}}, r"pools\['all'\] must be a list, not 'base'"),
])  # fmt: skip
def test_mistakes_in_a_study(grid, change, said):
    content = study.runpy.run_path(str(grid))["get_study"]() | change
    grid.write_text(f"def get_study():\n    return {content!r}\n")
    with pytest.raises(UserError, match=said):
        study.load_study(str(grid))


@pytest.mark.parametrize("text, said", [
    ("def get_study(:", "invalid syntax"), ("def get_study():\n    return 1 / 0\n", r":2: ZeroDivisionError"),
    ("def get_study():\n    pass\n", "must return a dict, not None"), ("a = 1\n", "needs a function get_study"),
])  # fmt: skip
def test_a_study_file_that_fails_is_one_line(tmp_path, text, said):
    file = tmp_path / "study.py"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        study.load_study(str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_seeds_are_numbers(grid):
    with pytest.raises(UserError, match="--seeds=0,: not whole numbers"):
        study.main(["study", f"--config={grid}", "--seeds=0,"])


def test_a_finished_run_is_that_of_the_study(grid, tmp_path):
    run = tmp_path / "runs" / "base" / "seed0"
    write_run(run, {4: 0.5}, 10, 4)
    settings = study.load_study(str(grid))
    assert study.is_finished(settings, "base", 0)
    (run / "checkpoints" / "00000004").mkdir(parents=True)  # the save of the last step was cut off
    assert not study.is_finished(settings, "base", 0)
    commit(run / "checkpoints" / "00000004", {"metrics": {}})
    assert study.is_finished(settings, "base", 0)
    settings["common"]["steps"] = 5
    assert not study.is_finished(settings, "base", 0)
    settings["methods"]["base"] |= {"algorithm.loss": "dapo"}
    with pytest.raises(UserError, match=r"config.algorithm.loss='grpo', but 'base' has 'dapo'"):
        study.is_finished(settings, "base", 0)


@pytest.mark.parametrize("name", ["core", "length", "lspo", "lcpo", "rates", "smollm2"])
def test_every_run_of_the_shipped_studies_has_a_valid_config(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    s = study.load_study(f"configs/studies/{name}.py")
    for label, _ in study.plan(s, list(s["methods"]))[: 1 + len(s["methods"])]:
        flags = [f for f in study.command(s, label, 0)[3:] if "model.path" not in f]
        if name == "smollm2":  # the model whose directory is not here
            flags += ["--config.model.shape.hidden_size=576", "--config.model.tokenizer=dial"]
        validate(parse_config(["train", *flags]))


def test_in_one_process_a_mistake_of_one_run_does_not_end_the_study(grid, tmp_path, monkeypatch, capsys):
    ran = []

    def fake(argv):
        ran.append(argv[1:])
        if "--config.seed=1" in argv:
            raise UserError("config.steps: no")
        return 0

    monkeypatch.setattr("jaxrl.train.main", fake)
    for seed in (1, 2):
        (tmp_path / "runs" / "warm" / f"seed{seed}" / "model").mkdir(parents=True)
        (tmp_path / "runs" / "warm" / f"seed{seed}" / "model" / "config.json").touch()
    s = study.load_study(str(grid))
    assert study.main(["study", f"--config={grid}", "--seeds=1,2", "--only=base", "--in_process"]) == 1
    assert ran == [study.command(s, "base", seed)[3:] for seed in (1, 2)]
    said = capsys.readouterr().err
    assert "error: config.steps: no" in said and "not finished: base seed 1; " in said


@pytest.fixture
def swept(grid):
    content = study.runpy.run_path(str(grid))["get_study"]()
    content |= dict(sweep={"data": "dial", "budgets": "8,16"}, curves=["base"], sweeps={
        "asked": {"run": "new & better", "budget_mode": "exact"}, "left alone": {"run": "base", "budget_mode": "none"},
    })  # fmt: skip
    grid.write_text(f"def get_study():\n    return {content!r}\n")
    return grid


def write_sweep(path, accuracy):
    path.mkdir(parents=True)
    keys = ("mean_error", "mean_deviation", "rmse", "hard_violation", "soft_violation")
    row = dict(data="dial", accuracy=accuracy, mean_tokens=9.0) | dict.fromkeys(keys, 0.25)
    result = {"results": [row | {"budget": 8}, row | {"budget": 16}]}
    (path / "result.json").write_text(json.dumps(result))


def test_sweeps_are_made_of_the_finished_runs_and_averaged(swept, tmp_path, monkeypatch):
    runs, called = tmp_path / "runs", []
    for seed, accuracy in ((0, 0.4), (1, 0.6)):
        for name in ("base", "new---better"):
            write_run(runs / name / f"seed{seed}", {0: 0.1, 4: accuracy}, 10, 4)
        (runs / "warm" / f"seed{seed}" / "model").mkdir(parents=True)
        (runs / "warm" / f"seed{seed}" / "model" / "config.json").touch()
        write_sweep(runs / "base" / f"seed{seed}" / "sweep-left-alone", accuracy)
    write_sweep(runs / "new---better" / "seed1" / "sweep-asked", 0.5)

    monkeypatch.setattr(study, "run_apart", lambda line: called.append(line) or 0)
    images = tmp_path / "images"
    assert study.main(["study", f"--config={swept}", "--seeds=0,1", f"--images={images}"]) == 0
    run = runs / "new---better" / "seed0"
    assert called == [[sys.executable, "-m", "jaxrl.evaluate", "--data=dial", "--budgets=8,16", "--budget_mode=exact",
                       f"--model={run}", f"--out={run}/sweep-asked"]]  # fmt: skip
    text = (runs / "study.md").read_text()
    assert "| left alone | 50.0 ± 127.1 (9.0) | 50.0 ± 127.1 (9.0) |" in text and "| asked | 50.0 (9.0) |" in text
    names = {"study.svg", "study_curves.svg", "study_budgets_0.svg", "study_accuracy_0.svg"}
    assert {p.name for p in images.iterdir()} == names
    svg = (images / "study.svg").read_text()
    assert "new &amp; better" in svg and len(svg) < 150_000


def test_an_unfinished_run_is_not_swept(swept, tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(study, "run_apart", lambda line: called.append(line) or 75)
    (tmp_path / "runs" / "warm" / "seed0" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "warm" / "seed0" / "model" / "config.json").touch()
    write_run(tmp_path / "runs" / "base" / "seed0", {2: 0.5}, 10, 4, finished=False)
    assert study.main(["study", f"--config={swept}", "--seeds=0", "--only=base"]) == 1
    assert [line[2] for line in called] == ["jaxrl.train"]
    assert "not started: base seed 0 is not finished" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_leaves_the_command_the_time_to_save(tmp_path):
    """As a terminal does it: the signal goes to the study and to what it runs."""
    saves = (
        "import signal, time, pathlib, sys\n"
        "def stop(*_):\n    time.sleep(1)\n    pathlib.Path(sys.argv[1]).touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    # A shell that starts the tests in the background has them ignore the signal; the study must not inherit that.
    hears = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    runs = f"{hears}from jaxrl.study import run_apart\nrun_apart([sys.executable, '-c', {saves!r}, sys.argv[1]])"
    command = [sys.executable, "-c", runs, str(tmp_path / "saved")]
    both = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert both.stdout.readline() == "ready\n"
    os.killpg(both.pid, signal.SIGINT)
    _, error = both.communicate(timeout=60)
    assert (tmp_path / "saved").exists() and "KeyboardInterrupt" in error and both.returncode


def test_a_sweep_needs_a_method_of_the_study(grid):
    content = study.runpy.run_path(str(grid))["get_study"]()
    cases = [({"sweeps": {"a": {"run": "nobody"}}}, "sweep 'a' needs"), ({"curves": ["x"]}, "'curves' names 'x'")]
    cases.append(({"pools": {"p": ["base", "y"]}}, "'pools' names 'y'"))
    for change, said in cases:
        grid.write_text(f"def get_study():\n    return {content | change!r}\n")
        with pytest.raises(UserError, match=said):
            study.load_study(str(grid))
