import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_mtl.files import (
    CheckpointError,
    UnsafeFileError,
    read_json,
    replaced_files,
    safe_file,
    staged_folder,
    write_atomically,
)

FULL = OSError(28, "No space left on device")
CONFIG = '{"model_type": "mmoe"}'


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def save(target: Path, files: dict[str, str]) -> None:
    with staged_folder(target) as folder:
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "é")
    write_atomically(path, b"2")
    assert content(tmp_path) == {"a.json": b"2"}
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomically_on_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    write_atomically(tmp_path / "a", "old")

    def fail(*_):
        raise FULL

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": b"old"}


def test_staged_folder_appears_whole(tmp_path):
    target = tmp_path / "runs" / "model"
    with staged_folder(target) as folder:
        (folder / "config.json").write_text(CONFIG)
        assert not target.exists()
        assert folder.parent == target.parent
    assert content(tmp_path) == {"runs/model/config.json": CONFIG.encode()}


@pytest.mark.skipif(os.name == "nt", reason="modes are of Unix")
@pytest.mark.parametrize("writer", [staged_folder, lambda folder: replaced_files(folder, ())])
def test_weights_are_readable_by_whom_the_umask_lets_read(tmp_path, writer):
    """safetensors 0.8 leaves its files to the user alone: an adapter that one trained, nobody else could serve."""
    before = os.umask(0o027)
    try:
        with writer(tmp_path / "m") as folder:
            save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors")
            (folder / "config.json").write_text(CONFIG)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()} == {0o640}


def test_a_second_save_drops_stale_weights_and_keeps_what_is_not_ours(tmp_path):
    save(tmp_path / "m", {"config.json": CONFIG, "model-00001-of-00002.safetensors": "1", "README.md": "my prose"})
    (tmp_path / "m" / "notes").mkdir()
    (tmp_path / "m" / "notes" / "a.txt").write_text("mine")
    (tmp_path / "m" / "checkpoint-4").mkdir()
    (tmp_path / "m" / "checkpoint-4" / "state.json").write_text("{}")
    save(tmp_path / "m", {"config.json": CONFIG, "model.safetensors": "2"})
    assert content(tmp_path) == {
        "m/config.json": CONFIG.encode(),
        "m/model.safetensors": b"2",
        "m/README.md": b"my prose",
        "m/notes/a.txt": b"mine",
        "m/checkpoint-4/state.json": b"{}",
    }


@pytest.mark.parametrize(
    "files",
    [{"thesis.tex": "years"}, {"config.json": '{"name": "web-site"}', "index.html": ""}, {"config.json": "{", "x": ""}],
    ids=["foreign", "config-of-something-else", "broken-config"],
)
def test_foreign_folders_are_refused_before_any_work(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match="found other files in it"), staged_folder(tmp_path):
        pytest.fail("the block must not run")
    assert content(tmp_path) == before


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "m").write_text("x")
    with pytest.raises(FileExistsError, match="found a file"), staged_folder(tmp_path / "m"):
        pytest.fail("the block must not run")


def test_a_folder_that_turns_foreign_meanwhile_is_not_replaced(tmp_path):
    def meanwhile() -> None:
        with staged_folder(tmp_path / "m"):
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "mine.txt").write_text("mine")

    with pytest.raises(FileExistsError, match=r"mine.txt"):
        meanwhile()
    assert content(tmp_path) == {"m/mine.txt": b"mine"}


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError("bad")], ids=["full", "interrupt", "bug"])
def test_a_failure_inside_the_block_leaves_the_old_model(tmp_path, error):
    save(tmp_path / "m", {"config.json": CONFIG, "model.safetensors": "old"})
    before = content(tmp_path)

    def interrupted() -> None:
        with staged_folder(tmp_path / "m") as folder:
            (folder / "model.safetensors").write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert content(tmp_path) == before


def failing(real: Callable, countdown: Iterator[bool]) -> Callable:
    def call(*args):
        if next(countdown, False):
            raise FULL
        return real(*args)

    return call


def test_failing_at_any_step_leaves_one_whole_model_and_loses_nothing(tmp_path, monkeypatch):
    """Fails the k-th file operation for every k: the target is the old or the new model, the owner's file exists."""
    old = {"config.json": CONFIG.encode(), "model.safetensors": b"old", "notes.txt": b"mine"}
    new = {"config.json": CONFIG.encode(), "model.safetensors": b"new"}
    seen = set()
    for k in range(100):
        root = tmp_path / str(k)
        save(root / "m", {name: text.decode() for name, text in old.items()})
        with monkeypatch.context() as patch:
            countdown = iter([False] * k + [True])
            patch.setattr(os, "fsync", failing(os.fsync, countdown))
            patch.setattr(os, "rename", failing(os.rename, countdown))
            try:
                save(root / "m", {name: text.decode() for name, text in new.items()})
            except OSError:
                failed = True
            else:
                failed = False
        found = content(root / "m")
        assert found in (old, new, new | {"notes.txt": b"mine"}), f"step {k}"
        assert b"mine" in content(root).values(), f"step {k}"
        if found == old:
            assert os.listdir(root) == ["m"], f"step {k}: staging left behind"
        seen.add(("old" if found == old else "new", failed))
        if not failed:
            break
    assert seen == {("old", True), ("new", True), ("new", False)}
    assert content(root) == {f"m/{name}": text for name, text in (new | {"notes.txt": b"mine"}).items()}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(UnsafeFileError, match="expected the name of a file"):
        safe_file(tmp_path, name)


def test_links(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "real").write_text("r")
    (folder / "inside").symlink_to("real")
    (folder / "outside").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    assert safe_file(folder, "inside") == folder / "real"
    for name in ("outside", "loop", "sub", "pipe"):
        with pytest.raises(UnsafeFileError):
            safe_file(folder, name)


def test_links_of_the_hub_cache_reach_its_blob_stores_only(tmp_path):
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--name" / "snapshots" / "abc"
    for store in (cache / "models--org--name" / "blobs", cache / "blobs" / "12"):
        store.mkdir(parents=True)
        (store / "1234").write_text("blob")
    snapshot.mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (cache / "models--org--name" / "blobs" / "5678").symlink_to(tmp_path / "secret")
    (snapshot / "own").symlink_to("../../blobs/1234")
    (snapshot / "shared").symlink_to("../../../blobs/12/1234")
    (snapshot / "chain").symlink_to("../../blobs/5678")
    (snapshot / "away").symlink_to("../../../../secret")
    assert safe_file(snapshot, "own").read_text() == safe_file(snapshot, "shared").read_text() == "blob"
    for name in ("chain", "away"):
        with pytest.raises(UnsafeFileError, match="found a link to"):
            safe_file(snapshot, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "found list"),
        ("{", "expected JSON"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "no JSON number"),
        ("[" * 100_000, "expected JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "expected JSON"),
    ],
)
def test_read_json_refuses(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path, "config.json")


def test_read_json_bounds_the_size(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**36)  # sparse: takes no room on the disk
    with pytest.raises(CheckpointError, match="at most"):
        read_json(tmp_path, "config.json")
