"""Disks and object stores: the same calls, one-line refusals, and what passing and lasting faults do."""

import os
import sys
import types

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from jaxrl.errors import UserError
from jaxrl.runtime import storage
from jaxrl.runtime.rundir import open_run_dir
from models.ranges import RangeFile
from tests.stores import Store


@pytest.fixture(scope="module", params=["gs", "s3"])
def store(request):
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[request.param])
    with Store(request.param) as store, store.found():
        yield store


@pytest.fixture
def quick(monkeypatch):
    """A clock that sleeping moves, for the retries of this project and of gcsfs; the list of sleeps."""
    slept = []
    clock = types.SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(storage, "time", clock)

    async def nap(_):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=nap))
    monkeypatch.setattr("s3fs.core.asyncio.sleep", nap)
    return slept


@pytest.fixture(params=["disk", "gs", "s3"])
def root(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path)
        return
    pytest.importorskip({"gs": "gcp_storage_emulator", "s3": "moto"}[request.param])
    with Store(request.param) as store, store.found():
        yield f"{store.url}/some/where"


def test_the_same_calls_on_a_disk_and_on_stores(root):
    assert storage.files_below(f"{root}/a") == {} and storage.children(f"{root}/a") == []
    storage.in_threads([lambda: os.makedirs(f"{root}/a/b") if not storage.is_remote(root) else None])
    storage.atomic_write(f"{root}/a/x", "hello")
    storage.atomic_write(f"{root}/a/x", b"hallo")
    assert storage.write_chunks(f"{root}/a/b/y", [b"12", memoryview(b"345")])[0] == 5
    assert storage.read(f"{root}/a/x") == b"hallo" and storage.read(f"{root}/a/b/y", 1, 4) == b"234"
    assert storage.sha256(f"{root}/a/b/y") == storage.write_chunks(f"{root}/a/b/y", [b"12345"])[1]
    assert storage.files_below(f"{root}/a") == {"b/y": 5, "x": 5}
    assert storage.children(f"{root}/a") == ["b", "x"]
    assert storage.exists(f"{root}/a") and storage.exists(f"{root}/a/x") and not storage.exists(f"{root}/none")
    with pytest.raises(FileNotFoundError):
        storage.read(f"{root}/a/none")
    storage.remove_file(f"{root}/a/x")
    storage.remove_file(f"{root}/a/x")
    assert storage.files_below(f"{root}/a") == {"b/y": 5}
    storage.remove(f"{root}/a")
    storage.remove(f"{root}/a")
    assert not storage.exists(f"{root}/a")


def test_a_conditional_write_is_won_once(store):
    name = f"{store.url}/claim"
    won = storage.in_threads([lambda i=i: storage.create(name, b"%d" % i) for i in range(6)], threads=6)
    assert won.count(True) == 1 and storage.read(name) == b"%d" % won.index(True)


@pytest.mark.parametrize("path", [
    " gs://bucket/run", "gss://bucket/run", "gs:/bucket/run", "gs:///run", "http://host/run", "S3://b/run",
])  # fmt: skip
def test_a_misspelt_scheme_is_one_line_and_no_local_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^config.run_dir={path}: need a local path, gs://bucket/... or s3://"):
        open_run_dir(path, resume=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path, package", [("gs://b/run", "gcsfs"), ("s3://b/run", "s3fs")])
def test_a_missing_client_is_one_line(path, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"config.run_dir={path}: .* needs the package {package} \(pip install 'jaxrl"):
        open_run_dir(path, resume=True)


@pytest.mark.parametrize("fault, says", [
    ({"status": 403}, "no permission"), ({"status": 401}, "credentials are missing or expired")])
def test_a_refusal_is_one_line(store, fault, says):
    store.faults({**fault, "times": -1})
    try:
        with pytest.raises(UserError, match=rf"^config.run_dir: {store.url}/run.*: {says}") as e:
            open_run_dir(f"{store.url}/run", resume=True)
        assert "\n" not in str(e.value)
        with pytest.raises(UserError, match=says):
            storage.local_copy(f"{store.url}/data.jsonl", "config.task.data")
    finally:
        store.faults()


def test_a_missing_bucket_and_a_missing_object_are_one_line(store):
    elsewhere = store.url.replace("bucket", "nobucket")
    with pytest.raises(UserError, match=rf"^config.run_dir: {elsewhere}/run\S*: no such bucket"):
        open_run_dir(f"{elsewhere}/run", resume=True)
    with pytest.raises(UserError, match="^config.task.data: .*train.jsonl: not found"):
        storage.local_copy(f"{store.url}/train.jsonl", "config.task.data")


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"status": 500}, {"drop": True}, {"delay": 0.2}],
                         ids=str)
def test_passing_faults_are_tried_again(store, quick, fault):
    for call in (lambda: storage.atomic_write(f"{store.url}/f", "new"), lambda: storage.read(f"{store.url}/f"),
                 lambda: storage.files_below(store.url)):
        store.faults({**fault, "times": 2})
        call()
        store.faults()
    assert storage.read(f"{store.url}/f") == b"new"


def outage(store, seconds, quick):
    """The store answers 503 until the clock has moved so far."""
    store.faults({"status": 503, "times": -1})
    append = quick.append

    def sleep(s):
        append(s)
        if sum(quick) > seconds:
            store.faults()

    storage.time.sleep = sleep


def test_an_outage_of_a_minute_is_survived_with_warnings(store, quick, caplog):
    outage(store, 60, quick)
    storage.atomic_write(f"{store.url}/g", "after")
    assert 60 < sum(quick) < storage.PATIENCE and caplog.text.count("trying again") == len(quick) > 3
    assert storage.read(f"{store.url}/g") == b"after"


def test_an_outage_that_lasts_ends_in_one_line(store, quick):
    outage(store, 1e9, quick)
    try:
        with pytest.raises(storage.StoreError, match=f"^{store.url}/g: .*(503|Service Unavailable)") as e:
            storage.atomic_write(f"{store.url}/g", "never")
        assert e.value.passing and sum(quick) > storage.PATIENCE / 2
    finally:
        store.faults()


def test_a_mirror_uploads_what_changed(store, tmp_path):
    mirror = storage.Mirror(f"{store.url}/m", kind="test")
    (mirror.local / "sub").mkdir()
    (mirror.local / "sub/a").write_text("1")
    (mirror.local / ".hidden").write_text("1")
    mirror.push()
    store.counts()
    mirror.push()
    assert store.counts().keys() <= {"GET", "received", "sent", "faults"}  # nothing but this question
    with open(mirror.local / "sub/a", "a") as f:
        f.write("2")
    mirror.push()
    assert store.names("m/") == ["m/sub/a"] and store.read("m/sub/a") == b"12"
    mirror = storage.Mirror(f"{store.url}/m", pull=["sub/a", "none"], kind="test")
    assert (mirror.local / "sub/a").read_text() == "12"
    mirror.forget(["sub/a"])
    assert store.names("m/") == [] and not (mirror.local / "sub/a").exists()
    mirror.close()
    assert not mirror.local.exists()


def test_what_was_pulled_is_not_pushed_back(store):
    names = ["d/checkpoints/00000001/x", "d/completions/a", "d/completions/b"]
    for name in names:
        storage.atomic_write(epath.Path(f"{store.url}/{name}"), b"1")
    results = storage.output(f"{store.url}/d", "--out", "completions")
    assert sorted(p.name for p in results.local.rglob("*") if p.is_file()) == ["a", "b"]
    (results.local / "completions/b").write_text("23")
    storage.atomic_write(epath.Path(f"{store.url}/d/completions/a"), b"another process's")
    results.close()
    assert store.read("d/completions/a") == b"another process's" and store.read("d/completions/b") == b"23"
    assert store.names("d/") == names


@pytest.mark.parametrize("one, other", [
    ("gs://b/exp", "gs://b/exp/seed1"), ("gs://b/lr=1,a", "gs://b/lr=1_a"), ("gs://b/run", "gs://c/run"),
    ("gs://b/../../..", "gs://b/x"),
])  # fmt: skip
def test_local_folders_of_two_directories_do_not_meet(one, other):
    first, second = (storage.scratch(url, "runs") for url in (one, other))
    assert first != second and first not in second.parents and second not in first.parents
    for path in (first, second):
        assert path.parents[2].name == f"jaxrl-{os.getuid()}" and ".." not in path.parts


def test_a_copy_holds_what_the_store_holds_now(store):
    url = f"{store.url}/model"
    for name in ("config.json", "chat_template.jinja"):
        storage.atomic_write(epath.Path(f"{url}/{name}"), b"1")
    copy = storage.local_copy(url + "/", "--model")
    assert sorted(p.name for p in copy.iterdir()) == ["chat_template.jinja", "config.json"]
    storage.remove_file(epath.Path(f"{url}/chat_template.jinja"))
    storage.local_copy.cache_clear()  # as in another process
    assert [p.name for p in storage.local_copy(url, "--model").iterdir()] == ["config.json"]


def test_a_busy_store_is_not_a_matter_of_credentials():
    assert storage.explain(OSError("b/bucket/o/runs%2Fnot-expired%2Fx (503)"))[1]


def test_tensors_are_read_by_ranges(store, tmp_path):
    tensors = {"a": np.arange(60000, dtype=np.float32).reshape(200, 300), "s": np.array(3, np.float32),
               "h": np.arange(8, dtype=np.float16)}
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    storage.atomic_write(f"{store.url}/t.safetensors", (tmp_path / "t.safetensors").read_bytes())
    for path in (tmp_path / "t.safetensors", f"{store.url}/t.safetensors"):
        file = RangeFile(path)
        assert sorted(file.keys()) == ["a", "h", "s"] and file.get_slice("a").get_shape() == [200, 300]
        store.counts()
        block = file.get_slice("a")[10:20, 5:9]
        assert np.array_equal(block, tensors["a"][10:20, 5:9]) and block.dtype == np.float32
        received = store.counts().get("received", 0)
        assert received == (10 * 300 * 4 if "://" in str(path) else 0)
        assert file.get_slice("s")[()] == 3 and np.array_equal(file.get_slice("h")[0:8,], tensors["h"])
    storage.atomic_write(f"{store.url}/t.safetensors", (tmp_path / "t.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="t.safetensors: truncated or not a safetensors file"):
        RangeFile(f"{store.url}/t.safetensors")
