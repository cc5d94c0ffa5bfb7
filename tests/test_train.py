"""The training loop as a user meets it: what a run leaves behind, how it resumes, fails and stops."""

import gzip
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl import build, train
from jaxrl.batch import fill_in, make_batches, with_advantages
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.rollouts import from_sequences
from jaxrl.runtime import cli, manifest, rundir
from jaxrl.runtime.manifest import list_checkpoints
from jaxrl.runtime.mesh import make_mesh
from jaxrl.runtime.metrics import read_metrics
from jaxrl.runtime.model_source import checkpoint_steps, load_model
from jaxrl.runtime.signals import EXIT_UNSAVED, StopRequest
from tests.chaos import assert_same_run
from tests.tiny import tiny

ROOT = pathlib.Path(__file__).parents[1]

# What docs and plots rely on, in every record of a step with an update.
NAMES = """reward/mean reward/std accuracy zero_std_fraction entropy clip_fraction/low clip_fraction/high
    response_length/mean response_length/min response_length/max truncated_fraction grad_norm loss lr
    tokens_per_second time/rollout time/grade time/update time/step logprob_diff/mean logprob_diff/max
    acceptance_rate selection/groups perf/padding_waste""".split()


def steps_of(run):
    return [r["step"] for r in read_metrics(run / "metrics.jsonl")]


def cli_train(*flags, env=None, **kwargs):
    """`python -m jaxrl.train` from the repository root, as a process."""
    command = [sys.executable, "-m", "jaxrl.train", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(env or {})}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)  # fmt: skip


def on_fake_devices(count):
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}


# ---- what a run leaves behind


def test_a_run_with_warm_start_leaves_everything_behind(tmp_path, capsys):
    changes = {"sft.steps": 12, "sft.full_steps": 6, "sft.warmup_steps": 2, "steps": 3, "log.tensorboard": True}
    assert train.train(tiny(tmp_path, {**changes, "algorithm.kl_coef": 0.01})) == 0
    printed = capsys.readouterr().out
    assert "warm start" in printed and "before" in printed and f"run directory: {tmp_path}" in printed
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    assert [r["step"] for r in records if "eval/accuracy" in r] == [0, 2, 3]
    for record in records[1:]:
        missing = [name for name in [*NAMES, "kl"] if name not in record]
        assert not missing
        assert record["time/rollout"] + record["time/grade"] + record["time/update"] <= record["time/step"]
        assert record["generated_tokens"] == 16 * record["response_length/mean"]
        assert record["logprob_diff/max"] < 1e-4  # sampler and learner agree
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sft"]["steps"] == 12 and config["algorithm"]["loss"] == "dapo"
    samples = sorted((tmp_path / "samples").iterdir())
    assert [s.name for s in samples] == [f"step_0000000{i}.jsonl" for i in (1, 2, 3)]
    rows = [json.loads(line) for line in samples[0].read_text().splitlines()]
    assert len(rows) == 2 * 4 and all(len(r["tokens"]) == r["length"] == len(r["logprobs"]) for r in rows)
    assert checkpoint_steps(tmp_path) == [2, 3]
    assert list((tmp_path / "tensorboard").glob("events*"))
    decoder, params, tokenizer = load_model(tmp_path)
    assert decoder.hidden_size == 32 and tokenizer.decode(tokenizer.encode("dial 7: a+5 ?")) == "dial 7: a+5 ?"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_step_without_any_selected_group_is_a_record_without_an_update(tmp_path, dial_model):
    # Accuracy of the shaped rewards of a task that nobody solves: all answers are wrong.
    changes = {"algorithm.selection": "accuracy", "batch.max_generation_batches": 1, "steps": 2,
               "sampling.max_tokens": 1, "batch.epochs": 2, "batch.updates": 2, "algorithm.kl_coef": 0.1,
               "algorithm.kl_in_reward": True}  # fmt: skip
    assert train.train(tiny(tmp_path, changes, dial_model)) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2]
    for r in records[1:]:
        assert r["selection/groups"] == 0 and r["selection/dropped/accuracy/all_wrong"] == 4
        assert "loss" not in r and "grad_norm" not in r and r["accuracy"] == 0 and r["response_length/max"] == 1
    before, after = load_model(dial_model)[1], load_model(tmp_path)[1]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)}  # the default place, empty
    records = []
    for name in ("first", "second"):
        child = cli_train("--config=tests/tiny.py", "--config.sft.steps=24", "--config.sft.full_steps=12",
                          "--config.steps=2", f"--config.run_dir={tmp_path / name}", env=cache)  # fmt: skip
        out, error = child.communicate(timeout=600)
        assert child.returncode == 0, error[-3000:]
        assert ("compiled decode" in out) == (name == "first")  # each compile is a line as it happens
        records.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    first, second = ([r["perf/compiles"] for r in run] for run in records)
    assert first[0] > 10 and sum(first[1:]) > 0 and sum(r["perf/compile_seconds"] for r in records[0]) > 1
    assert second == [0, 0, 0]
    assert os.listdir(tmp_path / "jaxrl" / "xla")


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_warming_up_leaves_the_sampler_nothing_to_compile(tmp_path, dial_model, top_p, capsys, caplog):
    changes = {"sampling.warmup": True, "sampling.prefetch": True, "sampling.top_p": top_p, "steps": 2}
    assert train.train(tiny(tmp_path, changes, dial_model)) == 0
    printed = capsys.readouterr().out
    assert "shapes ready in" in printed and "False" not in printed
    assert not [r for r in caplog.records if "sampler: compiled" in r.getMessage()]


# ---- resume

PLAIN = {"steps": 4}
EVERYTHING = {
    "steps": 4,
    "batch.keep_surplus": True,
    "sampling.carry_over": 5,
    "sampling.prefetch": True,
    "batch.generation_prompts": 6,
    "batch.greso": True,
    "batch.updates": 2,
    "batch.epochs": 2,
    "algorithm.selection": "accuracy",
    "algorithm.kl_coef": 0.05,
    "algorithm.loss": "maspo",
    "optimizer.schedule": "cosine",
    "length.reward": "alp",
}


def test_a_continued_run_says_what_was_changed(tmp_path, dial_model, capsys):
    for steps, rate in ((1, 1e-3), (2, 5e-4)):
        changes = {"steps": steps, "optimizer.learning_rate": rate, "eval.problems": 2, "task.dial.train": 63 + steps}
        assert train.train(tiny(tmp_path, changes, dial_model)) == 0
    printed = capsys.readouterr().out
    assert "\nconfig.optimizer.learning_rate is 0.0005, was 0.001\nconfig.steps is 2, was 1\n" in printed
    assert "\nconfig.task.data: its rows are others than before\n" in printed and "eval_data" not in printed
    assert printed.count(", was ") == 3


@pytest.mark.parametrize("changes", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_a_restarted_run_is_the_same_run(tmp_path, dial_model, changes, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.train(tiny(whole, changes, dial_model)) == 0
    stop_after(2, monkeypatch)
    assert train.train(tiny(parts, changes, dial_model)) == 75
    assert steps_of(parts) == [0, 1, 2]
    monkeypatch.undo()
    assert train.train(tiny(parts, changes, dial_model)) == 0
    assert_same_run(parts, whole)
    if changes is EVERYTHING:
        state = json.loads((list_checkpoints(whole / "checkpoints")[-1].path / "host.json").read_text())["collector"]
        assert state["greso"]["streaks"]
        assert any(r["selection/surplus"] for r in read_metrics(whole / "metrics.jsonl")[1:])
        assert all(r["kl"] >= 0 for r in read_metrics(whole / "metrics.jsonl")[1:] if "kl" in r)


def stop_after(step, monkeypatch):
    """SIGTERM arrives during step number `step`."""
    requests, real = [], StopRequest.__enter__

    def entered(self):
        requests.append(self)
        return real(self)

    def batches(rollouts, config, index, *shards):
        if index == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests[0].received.wait(60)
        return make_batches(rollouts, config, index, *shards)

    monkeypatch.setattr(StopRequest, "__enter__", entered)
    monkeypatch.setattr(train, "make_batches", batches)


def test_another_architecture_cannot_continue_and_spoils_nothing(tmp_path, dial_model):
    config = tiny(tmp_path, {"steps": 1, "eval.problems": 2}, dial_model)
    assert train.train(config) == 0
    files = {p: (tmp_path / p).read_bytes() for p in ("config.json", "model/config.json", "metrics.jsonl")}
    other = tiny(tmp_path, {"steps": 2, "sft.steps": 0, "model.shape.intermediate_size": 48})
    with pytest.raises(UserError, match="is of another model or optimizer: .* has shape .* there, .* here") as e:
        train.train(other)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert files == {p: (tmp_path / p).read_bytes() for p in files}
    with pytest.raises(UserError, match="already holds a run; set config.resume=True"):
        train.train(tiny(tmp_path, {"resume": False}, dial_model))
    with pytest.raises(UserError, match="reference is missing: this run began without"):
        train.train(tiny(tmp_path, {"steps": 2, "algorithm.kl_coef": 0.1}, dial_model))
    held = rundir.Lock(tmp_path)
    with pytest.raises(UserError, match=f"config.run_dir: {tmp_path} is in use by pid {os.getpid()}"):
        train.train(config)
    held.release()
    assert train.train(config) == 0  # complete already: nothing left to do


# ---- mistakes: one line, exit code 2


def bad_data(tmp_path, name):
    """(flags, words that the line must hold) of one kind of bad input."""
    good = [{"problem": f"What is 1+{i}?", "answer": str(1 + i)} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in good)
    path = tmp_path / "data.jsonl"
    flags = ["--config=tests/tiny.py", "--config.task.name=math", "--config.model.tokenizer=" + str(tmp_path / "tok"),
             f"--config.task.data={path}", "--config.sft.steps=0"]  # fmt: skip
    write_tokenizer(tmp_path / "tok", eos=name != "tokenizer without EOS")
    words = [str(path)]
    path.write_text(lines)
    if name == "unknown key":
        return ["--config=tests/tiny.py", "--config.algorithm.los=grpo"], ["los"]
    if name == "short warm start":
        return ["--config=tests/tiny.py", "--config.sft.steps=8"], ["config.sft.warmup_steps=20", "sft.steps=8"]
    if name == "warm start of one half":
        return ["--config=tests/tiny.py", "--config.sft.steps=60"], ["config.sft.full_steps=100", "sft.steps=60"]
    if name == "missing file":
        path.unlink()
        words += ["no such file"]
    elif name == "truncated gzip":
        path = path.with_suffix(".jsonl.gz")
        path.write_bytes(gzip.compress(lines.encode() * 50)[:-20])
        flags[3], words = f"--config.task.data={path}", [str(path), "truncated"]
    elif name == "line without answer":
        path.write_text(lines + '{"problem": "What?"}\n')
        words = [f"{path}:4", "answer"]
    elif name == "long prompt":
        path.write_text(lines + json.dumps({"problem": "1 " * 50, "answer": "1"}) + "\n")
        flags += ["--config.sampling.max_prompt=30"]
        words = ["config.task.data", "data/3", "30 fit", "1 of 4", "sampling.max_prompt"]
    elif name == "long context":
        flags += ["--config.sampling.max_prompt=4000", "--config.batch.row_tokens=0"]
        words = ["sampling.max_prompt=4000", "context"]
    elif name == "empty data":
        path.write_text("")
        words += ["empty data set"]
    elif name == "tokenizer without EOS":
        words = [str(tmp_path / "tok"), "without EOS", "eos_token"]
    return flags, words


def write_tokenizer(folder, eos):
    """A word-level tokenizer as Hugging Face stores it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder.mkdir()
    made = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "1": 2, "2": 3}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"eos_token": "</s>"} if eos else {})))


MISTAKES = ["unknown key", "short warm start", "warm start of one half", "missing file", "truncated gzip",
            "line without answer", "long prompt",
            "long context", "empty data", "tokenizer without EOS"]  # fmt: skip


def check_error(code, error, words):
    lines = [line for line in error.splitlines() if line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), error
    assert all(word in lines[0] for word in words), (lines[0], words)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, name, monkeypatch, capsys):
    flags, words = bad_data(tmp_path, name)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", *flags, f"--config.run_dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as e:
        cli.run(train.main)
    check_error(e.value.code, capsys.readouterr().err, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [MISTAKES[0], *[pytest.param(m, marks=pytest.mark.slow) for m in MISTAKES[1:]]])
def test_a_mistake_is_one_line_of_the_command_too(tmp_path, name):
    flags, words = bad_data(tmp_path, name)
    child = cli_train(*flags, f"--config.run_dir={tmp_path / 'run'}", env={"JAX_PLATFORMS": "cpu"})
    _, error = child.communicate(timeout=600)
    check_error(child.returncode, error, words)


DAMAGE = {
    "not finite": "model.safetensors: tensor model.norm.weight at [3] is nan",
    "missing": "tensor model.norm.weight is missing",
    "extra": "tensor model.more is unexpected",
    "misshapen": "tensor model.norm.weight has shape [31]",
    "truncated": "model.safetensors: truncated",
    "tokenizer": "vocab.json:1: not valid JSON",
    "config": "config.json: key 'hidden_size'",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_model_that_cannot_be_used_is_one_line(tmp_path, dial_model, damage, monkeypatch, capsys):
    model = shutil.copytree(dial_model, tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    scale = tensors.pop("model.norm.weight").copy()
    if damage == "not finite":
        scale[3] = np.nan
    scales = {"missing": {}, "extra": {"model.norm.weight": scale, "model.more": scale},
              "misshapen": {"model.norm.weight": scale[:31]}}  # fmt: skip
    save_file(tensors | scales.get(damage, {"model.norm.weight": scale}), file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "tokenizer":
        (model / "vocab.json").write_text("{")
    elif damage == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"hidden_size": "32"}))
    monkeypatch.chdir(ROOT)
    flags = ["--config=tests/tiny.py", f"--config.model.path={model}", "--config.model.tokenizer=",
             "--config.sft.steps=0", f"--config.run_dir={tmp_path / 'run'}"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    with pytest.raises(SystemExit) as e:
        cli.run(train.main)
    check_error(e.value.code, capsys.readouterr().err, [str(model), DAMAGE[damage]])


# ---- SIGTERM


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_completes_the_run(tmp_path, dial_model):
    flags = ["--config=tests/tiny.py", "--config.steps=60", "--config.checkpoint.every=50", "--config.sft.steps=0",
             f"--config.model.path={dial_model}", "--config.model.tokenizer="]  # fmt: skip
    run, reference = tmp_path / "run", tmp_path / "reference"
    child = cli_train(*flags, f"--config.run_dir={run}")
    metrics = run / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate(timeout=600)
    assert child.returncode == 75 and "SIGTERM: saving after this step" in error
    stopped = steps_of(run)[-1]
    assert 3 <= stopped < 60 and checkpoint_steps(run)[-1] == stopped
    for folder in (run, reference):
        child = cli_train(*flags, f"--config.run_dir={folder}")
        out, error = child.communicate(timeout=600)
        assert child.returncode == 0, error
        assert ("continuing" in out) == (folder == run)
    assert steps_of(run) == list(range(61))
    assert_same_run(run, reference)


# ---- the same update, however it is cut


def random_rollouts(count, size, longest):
    rng = np.random.default_rng(2)
    lengths, group = rng.integers(1, longest + 1, count * size), np.repeat(np.arange(count), size)
    prompts = [rng.integers(5, 90, rng.integers(2, 9)) for _ in range(count)]
    rewards = rng.normal(size=len(group)).astype(np.float32)
    responses, logprobs = [rng.integers(5, 90, n) for n in lengths], [rng.normal(size=n) for n in lengths]
    return from_sequences(prompts, responses, logprobs, group, reward=rewards)


def test_micro_batches_and_rows_do_not_change_the_update(dial_model):
    rollouts, results = random_rollouts(4, 4, 12), []
    for micro, row in ((4096, 128), (24, 24), (96, 48)):
        # A large epsilon makes Adam linear in the gradient, else it would blow rounding up to full steps.
        config = tiny("", {"batch.micro_tokens": micro, "batch.row_tokens": row, "optimizer.eps": 1.0,
                           "optimizer.learning_rate": 1.0}, dial_model)  # fmt: skip
        mesh = make_mesh(1, 1, 1, jax.devices()[:1])
        learner = Learner(config, build.decoder_config(config), mesh)
        state = learner.init(build.params_maker(config, learner.decoder, mesh)())
        batches = fill_in(make_batches(rollouts, config, 0), with_advantages(rollouts, config))
        state, metrics = learner.update(state, [b.data for b in batches])
        results.append((int(batches[0].data.num_micro), metrics, jax.tree.leaves(jax.device_get(state.params))))
    assert len({r[0] for r in results}) == 3  # really cut in other ways
    for _, metrics, params in results[1:]:
        for name, value in results[0][1].items():
            assert metrics[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
        for a, b in zip(params, results[0][2], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def assert_metrics_close(ours, theirs):
    """The same steps and, but for rounding in the parameters, the same numbers."""
    skip = ("time/", "perf/", "tokens_per_second", "hist/")
    a, b = ([{k: v for k, v in r.items() if not k.startswith(skip)} for r in read_metrics(run / "metrics.jsonl")]
            for run in (ours, theirs))  # fmt: skip
    assert len(a) == len(b) and [set(x) for x in a] == [set(x) for x in b]
    for x, y in zip(a, b, strict=True):
        for name, value in x.items():
            assert value == pytest.approx(y[name], rel=1e-3, abs=2e-5), (x["step"], name)


MESHES = {"8 devices, data": (8, 1, 1), "8 devices, all three": (2, 2, 2)}


def smooth(dial_model, **changes):
    """Flags of a run whose numbers rounding cannot blow up (see the learner test above)."""
    given = {"model.path": dial_model, "model.tokenizer": "", "sft.steps": 0, "optimizer.eps": 1.0,
             "optimizer.learning_rate": 0.5, "steps": 2, **changes}  # fmt: skip
    return ["--config=tests/tiny.py", *[f"--config.{k}={v}" for k, v in given.items()]]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_of_eight_devices_gives_the_same_run_as_one(tmp_path, dial_model, mesh):
    for name, devices, (data, fsdp, tensor) in (("one", 1, (1, 1, 1)), ("many", 8, MESHES[mesh])):
        sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "run_dir": tmp_path / name}
        child = cli_train(*smooth(dial_model, **sizes), env=on_fake_devices(devices))
        out, error = child.communicate(timeout=900)
        assert child.returncode == 0, error[-3000:]
        assert f"{devices} cpu device(s)" in out
    assert any(r.get("grad_norm", 0) > 0 for r in read_metrics(tmp_path / "one" / "metrics.jsonl"))
    assert_metrics_close(tmp_path / "many", tmp_path / "one")


# ---- updates that are not finite


def poison(monkeypatch, when):
    """NaN among the advantages of update number u of the step that begins after `index`, if when(index, u)."""
    seen = []

    def batches(rollouts, config, index, *shards):
        seen.append(index)
        return make_batches(rollouts, config, index, *shards)

    def filled(batches, rollouts):
        made, index = fill_in(batches, rollouts), seen[-1]
        for u, batch in enumerate(made):
            if when(index, seen.count(index), u):
                batch.data.advantages[batch.data.response_mask > 0] = np.nan
        return made

    monkeypatch.setattr(train, "make_batches", batches)
    monkeypatch.setattr(train, "fill_in", filled)
    return seen


def test_a_single_update_that_is_not_finite_is_skipped_and_kept_for_a_look(tmp_path, dial_model, monkeypatch):
    poison(monkeypatch, lambda index, time, u: index == 1 and u == 0)
    assert train.train(tiny(tmp_path, {"steps": 3, "batch.updates": 2}, dial_model)) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r.get("nonfinite") for r in records] == [None, 0, 1, 0]
    assert records[2]["nonfinite/updates"] == [0] and "nonfinite/updates" not in records[1]
    stored = np.load(tmp_path / "nonfinite" / "step_00000002.npz")
    assert np.isnan(stored["update0/advantages"]).any() and stored["update0/tokens"].max() > 0
    assert not any(k.startswith("update1") for k in stored)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_model(tmp_path)[1]))


def test_after_too_many_in_a_row_the_run_goes_back_once_and_on_with_other_problems(
    tmp_path, dial_model, monkeypatch, capsys
):
    # Steps 3 and 4 fail the first time; the checkpoint of step 2 is the last good one.
    seen = poison(monkeypatch, lambda index, time, u: index in (2, 3) and time == 1)
    changes = {"steps": 5, "nonfinite.max_in_a_row": 2, "checkpoint.every": 1, "log.samples": 1}
    assert train.train(tiny(tmp_path, changes, dial_model)) == 0
    assert seen == [0, 1, 2, 3, 2, 3, 4]
    assert "2 updates in a row were not finite: back from step 4 to 2" in capsys.readouterr().out
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(6)) and not any(r.get("nonfinite") for r in records)
    assert sorted(p.name for p in (tmp_path / "nonfinite").iterdir()) == ["step_00000003.npz", "step_00000004.npz"]
    host = json.loads((list_checkpoints(tmp_path / "checkpoints")[-1].path / "host.json").read_text())
    assert host["rollbacks"] == 1 and host["collector"]["position"] == 7 * 4  # nothing was drawn twice


def test_without_a_checkpoint_there_is_no_way_back(tmp_path, dial_model, monkeypatch):
    poison(monkeypatch, lambda index, time, u: True)
    monkeypatch.setattr("jaxrl.runtime.checkpoint.Checkpointer.save", lambda *args, **kwargs: None)  # a full disk
    with pytest.raises(UserError, match="step 1: 1 updates in a row .* no checkpoint could be saved in"):
        train.train(tiny(tmp_path, {"steps": 3, "nonfinite.max_in_a_row": 1}, dial_model))


def test_the_second_time_it_stops(tmp_path, dial_model, monkeypatch):
    seen = poison(monkeypatch, lambda index, time, u: index == 1)
    changes = {"steps": 4, "nonfinite.max_in_a_row": 1, "checkpoint.every": 1}
    with pytest.raises(UserError, match="step 2: loss, gradient or step were .* again after .*learning_rate") as e:
        train.train(tiny(tmp_path, changes, dial_model))
    assert seen == [0, 1, 1] and str(tmp_path / "nonfinite") in str(e.value)
    assert checkpoint_steps(tmp_path)[-1] == 1
    # Skipping for ever is a choice, too.
    changes["nonfinite.max_in_a_row"] = 0
    assert train.train(tiny(tmp_path, changes, dial_model)) == 0
    assert [r.get("nonfinite") for r in read_metrics(tmp_path / "metrics.jsonl")] == [None, 0, 1, 0, 0]


def test_a_last_save_that_fails_is_not_success(tmp_path, dial_model, monkeypatch, caplog):
    commit = manifest.commit

    def full(path, meta):
        if meta["step"]:
            raise OSError(28, "No space left on device")
        commit(path, meta)

    monkeypatch.setattr(manifest, "commit", full)
    config = tiny(tmp_path, {"steps": 1, "eval.problems": 2}, dial_model)
    assert train.train(config) == EXIT_UNSAVED == 74
    assert "checkpoint of step 1 was NOT saved" in caplog.text and checkpoint_steps(tmp_path) == [0]
    monkeypatch.undo()
    assert train.train(config) == 0 and checkpoint_steps(tmp_path) == [0, 1]
