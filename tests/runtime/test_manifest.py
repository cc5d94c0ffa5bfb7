"""Digests, markers and retention: what makes files a checkpoint."""

import hashlib
import os
import pathlib
import shutil

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.runtime import manifest, storage
from jaxrl.runtime.manifest import Checkpoint, Damaged


def make(directory: pathlib.Path, step: int, metrics=None) -> pathlib.Path:
    path = directory / f"{step:08d}"
    path.mkdir(parents=True)
    contents = {"data": bytes(range(256)) * 40, "host.json": b"{}", "empty": b""}
    files = {name: storage.write_chunks(path / name, [content]) for name, content in contents.items()}
    manifest.commit(path, {"step": step, "metrics": metrics or {}, "arrays": {}, "files": files})
    return path


def test_whole_checkpoint_has_no_damage(tmp_path):
    path = make(tmp_path, 3, {"eval/accuracy": 0.5})
    meta = manifest.read_manifest(path)
    assert sorted(meta["files"]) == ["data", "empty", "host.json"]
    assert manifest.find_damage(path, meta) is None
    assert manifest.list_checkpoints(tmp_path) == [Checkpoint(3, epath.Path(path), {"eval/accuracy": 0.5})]
    assert os.listdir(tmp_path) == ["00000003"]


def test_every_flipped_byte_position_is_found(tmp_path):
    path = make(tmp_path, 1)
    meta = manifest.read_manifest(path)
    victim = path / "data"
    good = victim.read_bytes()
    for position in (0, 1, len(good) // 2, len(good) - 1):
        victim.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1:])
        assert manifest.find_damage(path, meta) == "data has changed content (sha256)"
    victim.write_bytes(good[:-1])
    assert manifest.find_damage(path, meta) == "data has 10239 bytes instead of 10240"
    victim.unlink()
    assert manifest.find_damage(path, meta) == "data is missing"


def test_shares_cover_every_file_once(tmp_path):
    path = make(tmp_path, 1)
    meta = manifest.read_manifest(path)
    for name in meta["files"]:
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        (copy / name).write_bytes(b"other")
        found = [manifest.find_damage(copy, meta, i, 2) for i in range(2)]
        assert sum(x is not None for x in found) == 1
        shutil.rmtree(copy)


@pytest.mark.parametrize("break_it, reason", [
    (lambda p: (p / "COMMITTED").unlink(), "half-written, COMMITTED is missing"),
    (lambda p: (p / "manifest.json").unlink(), "half-written, manifest.json is missing"),
    (lambda p: (p / "COMMITTED").write_text(""), "manifest.json does not match COMMITTED"),
    (lambda p: (p / "COMMITTED").write_bytes(b"\xff\xfe"), "unreadable"),
    (lambda p: (p / "manifest.json").write_bytes((p / "manifest.json").read_bytes()[:-5]), "does not match"),
])
def test_broken_seal(tmp_path, break_it, reason):
    path = make(tmp_path, 1)
    break_it(path)
    with pytest.raises(Damaged, match=reason):
        manifest.read_manifest(path)
    assert manifest.list_checkpoints(tmp_path) == []


def test_remove_leaves_no_checkpoint_if_it_is_interrupted(tmp_path, monkeypatch):
    path = make(tmp_path, 1)
    remove = storage.remove

    def killed(what):
        if str(what).endswith("00000001"):
            raise KeyboardInterrupt
        remove(what)

    monkeypatch.setattr(storage, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.remove(path)
    assert manifest.list_checkpoints(tmp_path) == [] and (path / "data").exists()


def test_a_checkpoint_of_an_older_version_is_named(tmp_path):
    path = make(tmp_path, 1)
    text = (path / "manifest.json").read_text().replace('"format": 2', '"format": 1')
    (path / "manifest.json").write_text(text)
    (path / "COMMITTED").write_text(hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(Damaged, match="its format is 1, this version reads 2"):
        manifest.read_manifest(path)


VALUES = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, float("nan"), float("inf")]))


@given(st.lists(VALUES, max_size=8), st.integers(1, 4), st.booleans())
def test_retention_keeps_the_last_and_the_best(values, keep_last, keep_best):
    found = [Checkpoint(s, pathlib.Path(), {} if v is None else {"m": v}) for s, v in enumerate(values)]
    kept = manifest.retained(found, keep_last, "m" if keep_best else "")
    assert set(range(len(values))[-keep_last:]) <= kept
    others = kept - set(range(len(values))[-keep_last:])
    finite = {s: v for s, v in enumerate(values) if v is not None and v in (0.0, 0.25, 0.5)}
    assert others <= set(finite) and len(others) <= keep_best
    for s, v in finite.items():  # dropped only if another is better, or as good and newer
        if s not in kept and keep_best:
            assert any(w > v or (w == v and t > s) for t, w in finite.items())
