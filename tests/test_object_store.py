"""A whole life on object stores: model and data from a bucket, a run in it, and what reads the run afterwards."""

import json

import pytest

from jaxrl import evaluate, export, report, study, train
from jaxrl.errors import UserError
from jaxrl.runtime.model_source import load_model
from tests.stores import Store
from tests.tiny import tiny


def upload(store, folder, name):
    from jaxrl.runtime import storage

    for path in folder.rglob("*"):
        if path.is_file():
            storage.atomic_write(f"{store.url}/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_model_run_evaluation_report_and_export_in_a_bucket(tmp_path, dial_model, scheme, monkeypatch):
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[scheme])
    monkeypatch.chdir(tmp_path)
    with Store(scheme) as store, store.found():
        upload(store, dial_model, "model")
        run = f"{store.url}/runs/first"
        config = tiny(run, {"steps": 2, "eval.problems": 4, "log.tensorboard": True}, f"{store.url}/model")
        assert train.train(config) == 0
        names = set(store.names("runs/first/"))
        assert {f"runs/first/{n}" for n in ("metrics.jsonl", "config.json", "model/config.json",
                                            "samples/step_00000002.jsonl", "checkpoints/00000002/COMMITTED")} <= names
        records = [json.loads(line) for line in store.read("runs/first/metrics.jsonl").splitlines()]
        assert [r["step"] for r in records] == [0, 1, 2]
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        found = accumulator.EventAccumulator(f"{run}/tensorboard").Reload().Scalars("eval/accuracy")
        assert [e.step for e in found] == [0, 2]  # what `tensorboard --logdir gs://...` shows
        assert train.train(tiny(run, {"steps": 3, "eval.problems": 4}, f"{store.url}/model")) == 0
        records = [json.loads(line) for line in store.read("runs/first/metrics.jsonl").splitlines()]
        assert [r["step"] for r in records] == [0, 1, 2, 3]

        out = f"{run}/results"
        evaluate.main(["evaluate", f"--model={run}", "--data=dial", "--limit=4", f"--out={out}", "--slots=8"])
        stopped_half_way(monkeypatch, f"--model={run}", f"--out={run}/again", store)
        result = json.loads(store.read("runs/first/results/result.json"))["results"]
        assert result[0]["step"] == 3 and result[0]["problems"] == 4
        report.main(["report", run])
        assert b"<html" in store.read("runs/first/report.html").lower()
        export.main(["export", run, f"{store.url}/exported"])
        config, params, _ = load_model(f"{store.url}/exported")
        assert config.num_layers == 1 and store.read("exported/model.safetensors")
        with pytest.raises(UserError, match="is there already and not empty"):
            export.main(["export", run, f"{store.url}/exported"])
    assert list(tmp_path.glob("gs:*")) == list(tmp_path.glob("s3:*")) == []


def stopped_half_way(monkeypatch, model, out, store):
    """An evaluation that dies in its second part goes on with what the bucket has, on a machine that has nothing."""
    answered, original = [], evaluate.evaluate_problems

    def answer(*args, **kwargs):
        if len(answered) == 1 and not resumed:
            raise KeyboardInterrupt
        answered.append([p.id for p in args[3]])
        return original(*args, **kwargs)

    flags, resumed = [model, "--data=dial", "--limit=6", out, "--slots=4", "--batch=3"], False
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_problems", answer)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(["evaluate", *flags])
        resumed = True
        evaluate.main(["evaluate", *flags])
    assert [len(part) for part in answered] == [3, 3] and not set(answered[0]) & set(answered[1])
    assert json.loads(store.read("runs/first/again/result.json"))["results"][0]["problems"] == 6


@pytest.mark.slow
def test_a_study_in_a_bucket_runs_what_is_missing_there(tmp_path, capsys):
    pytest.importorskip("gcp_storage_emulator")
    file = tmp_path / "small.py"
    keys = {"steps": 1, "eval.every": 1, "log.samples": 0}
    sweep = {"pairs": {"run": "base", "data": "dial", "limit": 2, "slots": 4, "budgets": "5,9"}}
    file.write_text("def get_study():\n    return " + repr(dict(
        config="tests/tiny.py", out="nowhere", seeds=[0], common=keys, stages={"warm": {"entry": "sft"}},
        methods={"base": {"start": "warm"}}, sweeps=sweep)))
    with Store("gs") as store, store.found():
        flags = ["study", f"--config={file}", "--in_process", f"--out={store.url}/study"]
        assert study.main(flags) == 0
        assert "base" in store.read("study/small.md").decode()
        assert store.read("study/base/seed0/sweep-pairs/result.json")
        capsys.readouterr()
        assert study.main(flags) == 0  # nothing is left to do
        assert "--config.run_dir" not in capsys.readouterr().out
        with pytest.raises(UserError, match="--out=gs:/study: need a local path"):
            study.main([*flags[:3], "--out=gs:/study"])


@pytest.mark.parametrize("key, value", [("run_dir", "gss://bucket/run"), ("model.path", "gs:/bucket/model"),
                                        ("task.data", "s4://bucket/train.jsonl")])
def test_a_misspelt_scheme_stops_training_before_anything_is_made(tmp_path, monkeypatch, key, value):
    monkeypatch.chdir(tmp_path)
    config = tiny(tmp_path / "run", {key: value})
    with pytest.raises(UserError, match=rf"{value}: need a local path, gs://bucket/\.\.\. or s3://bucket/") as e:
        train.train(config)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())
