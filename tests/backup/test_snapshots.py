"""Snapshots on disk: whole or not at all, whatever happens."""

import json
import os
import subprocess
import sys

import h5py
import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl.backup import snapshots as module
from keras_tl.backup import temporary_folders
from keras_tl.backup.snapshots import Backup
from tests.shared import examples

ARRAYS = {"model": [np.arange(6.0).reshape(2, 3), np.array(3)], "best": []}


def accept(state, arrays):
    return None


def saved(folder, *epochs):
    backup = Backup(folder)
    for epoch in epochs:
        backup.save(epoch, {"stage": epoch}, {"model": [np.full(3, epoch)]})
    return backup


def epoch_of(loaded):
    state, arrays, _ = loaded
    assert arrays["model"][0].tolist() == [state["epoch"]] * 3
    return state["epoch"]


dtypes = st.sampled_from(
    ["float32", "float16", "float64", "int8", "int64", "uint32", "bool", "bfloat16"]
)


@given(data=st.data())
@settings(max_examples=examples(60))
def test_arrays_come_back_bit_for_bit(tmp_path_factory, data):
    values = []
    for dtype in data.draw(st.lists(dtypes, max_size=4)):
        shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        raw = data.draw(st.binary(min_size=64 * 8, max_size=64 * 8))
        if dtype == "bool":
            raw = bytes(byte % 2 for byte in raw)
        values.append(np.frombuffer(raw, kind)[: int(np.prod(shape))].reshape(shape))
    backup = Backup(tmp_path_factory.mktemp("backup"))
    backup.save(1, {}, {"model": values})
    _, arrays, _ = backup.load(accept)
    assert [(a.dtype, a.shape, a.tobytes()) for a in arrays["model"]] == [
        (v.dtype, v.shape, v.tobytes()) for v in values
    ]


@given(
    state=st.dictionaries(
        st.text(max_size=4).filter(lambda key: key not in ("epoch", "arrays")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=4,
        ),
        max_size=4,
    )
)
@settings(max_examples=examples(20))
def test_state_comes_back(tmp_path_factory, state):
    backup = Backup(tmp_path_factory.mktemp("backup"))
    backup.save(3, state, ARRAYS)
    loaded, _, reasons = backup.load(accept)
    assert {key: loaded[key] for key in state} == state
    assert loaded["epoch"] == 3
    assert reasons == []


def test_the_newest_counts_and_the_one_before_is_kept(tmp_path):
    backup = saved(tmp_path, 1, 2, 3)
    assert epoch_of(backup.load(accept)) == 3
    assert sorted(os.listdir(tmp_path)) == ["epoch-000002", "epoch-000003"]


def test_an_epoch_may_be_saved_again(tmp_path):
    backup = saved(tmp_path, 1, 2)
    backup.save(2, {"again": True}, {"model": [np.full(3, 2)]})
    state, _, _ = backup.load(accept)
    assert state["again"]


def test_without_snapshots_there_is_nothing_to_load(tmp_path):
    assert Backup(tmp_path / "new" / "folder").load(accept) is None


def test_no_code_is_in_the_files(tmp_path):
    backup = saved(tmp_path, 1)
    (snapshot,) = tmp_path.iterdir()
    assert sorted(os.listdir(snapshot)) == ["state.json", "state.weights.h5"]
    json.loads((snapshot / "state.json").read_text())
    assert (snapshot / "state.weights.h5").read_bytes().startswith(b"\x89HDF\r\n")
    assert backup.load(accept) is not None


# Damage.


@given(
    file=st.sampled_from(["state.json", "state.weights.h5"]),
    where=st.floats(0, 1),
    bit=st.integers(0, 7),
)
@settings(max_examples=examples(60))
def test_a_flipped_bit_anywhere_falls_back_to_the_one_before(tmp_path_factory, file, where, bit):
    folder = tmp_path_factory.mktemp("backup")
    backup = saved(folder, 1, 2)
    path = folder / "epoch-000002" / file
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)
    loaded = backup.load(accept)
    # A bit of what does not count (the name of the version) may flip without harm.
    if epoch_of(loaded) == 2:
        assert file == "state.json"
        assert loaded[0]["stage"] == 2
    else:
        assert loaded[2][0].startswith("epoch-000002: ")


@pytest.mark.parametrize("file", ["state.json", "state.weights.h5"])
@pytest.mark.parametrize("how", ["truncated", "empty", "missing"])
def test_half_a_snapshot_falls_back_to_the_one_before(tmp_path, file, how):
    backup = saved(tmp_path, 1, 2)
    path = tmp_path / "epoch-000002" / file
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"")
    loaded = backup.load(accept)
    assert epoch_of(loaded) == 1
    assert len(loaded[2]) == 1


def rewrite(tmp_path, epoch, change):
    path = tmp_path / f"epoch-{epoch:06d}" / "state.json"
    written = json.loads(path.read_text())
    change(written)
    path.write_text(json.dumps(written))


def test_a_newer_format_is_refused_by_name(tmp_path):
    backup = saved(tmp_path, 1)
    rewrite(tmp_path, 1, lambda written: written.update(format=99, keras_tl="9.0"))
    with pytest.raises(ValueError, match=r"written by keras_tl 9\.0, in a format that this"):
        backup.load(accept)


def test_what_none_can_be_used_for_is_said(tmp_path):
    backup = saved(tmp_path, 1, 2)
    with pytest.raises(ValueError, match="epoch-000002: other model.*epoch-000001: other model"):
        backup.load(lambda state, arrays: "other model.")
    assert epoch_of(backup.load(accept)) == 2


def test_the_one_before_is_used_if_the_newest_is_refused(tmp_path):
    backup = saved(tmp_path, 1, 2)
    loaded = backup.load(lambda state, arrays: "odd." if state["epoch"] == 2 else None)
    assert epoch_of(loaded) == 1
    assert loaded[2] == ["epoch-000002: odd."]


# Failure while writing.


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()])
def test_wherever_writing_ends_the_last_snapshot_is_whole(tmp_path, monkeypatch, error):
    calls = []
    limit = None

    def counted(function):
        def call(*arguments, **keywords):
            calls.append(function)
            if limit is not None and len(calls) > limit:
                raise error
            return function(*arguments, **keywords)

        return call

    for owner, name in [
        (module.os, "fsync"),
        (module.pathlib.Path, "mkdir"),
        (module.pathlib.Path, "write_text"),
        (module.pathlib.Path, "rename"),
        (module.h5py, "File"),
        (module, "_digest"),
        (temporary_folders.shutil, "rmtree"),
    ]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    backup = saved(tmp_path / "all", 1, 2)
    calls.clear()
    backup.save(3, {"stage": 3}, {"model": [np.full(3, 3)]})
    steps = len(calls)
    assert steps > 8
    for step in range(steps):
        limit = None
        folder = tmp_path / str(step)
        backup = saved(folder, 1, 2)
        calls.clear()
        limit = step
        with pytest.raises((OSError, Killed)):
            backup.save(3, {"stage": 3}, {"model": [np.full(3, 3)]})
        limit = None
        assert epoch_of(Backup(folder).load(accept)) in (2, 3)
        backup.save(4, {"stage": 4}, {"model": [np.full(3, 4)]})
        assert epoch_of(backup.load(accept)) == 4
        assert [name for name in os.listdir(folder) if name.startswith(".")] == []


def test_a_disk_without_space(tmp_path):
    backup = saved(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(module, "_write_arrays", full)
        with pytest.raises(OSError, match="No space left"):
            backup.save(2, {}, {"model": [np.full(3, 2)]})
    assert epoch_of(backup.load(accept)) == 1


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`backup_dir=.*file/sub'` cannot be written to"):
        Backup(tmp_path / "file" / "sub")


def test_deleting_leaves_what_is_not_its_own(tmp_path):
    backup = saved(tmp_path / "mine", 1, 2)
    backup.delete()
    assert not (tmp_path / "mine").exists()
    backup = saved(tmp_path / "shared", 1)
    (tmp_path / "shared" / "notes.txt").write_text("keep")
    backup.delete()
    assert os.listdir(tmp_path / "shared") == ["notes.txt"]


# Other processes in the folder.


def test_a_snapshot_of_another_process_is_neither_replaced_nor_deleted(tmp_path):
    one, other = saved(tmp_path, 1), Backup(tmp_path)
    one.save(2, {"stage": 2}, {"model": [np.full(3, 2)]})
    with pytest.raises(module.FolderInUseError, match="another process has made epoch-000002 in"):
        other.save(2, {"stage": 9}, {"model": [np.full(3, 9)]})
    other.delete()
    assert os.listdir(tmp_path) == ["epoch-000002"]
    assert epoch_of(one.load(accept)) == 2
    # The process goes on, and then deletes what is its own.
    one.save(3, {"stage": 3}, {"model": [np.full(3, 3)]})
    one.delete()
    assert not tmp_path.exists()


def test_what_another_process_is_writing_stays(tmp_path):
    backup = saved(tmp_path, 1)
    with backup._temporary.new("writing") as aside:
        (aside / "file").write_text("half")
        other = Backup(tmp_path)
        other.save(2, {"stage": 2}, {"model": [np.full(3, 2)]})
        other.delete()
        assert (aside / "file").exists()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    hexadecimal = "0" * 32
    for host, pid in [(temporary_folders._host(), gone.pid), ("elsewhere", gone.pid)]:
        left = tmp_path / f".writing-{host}-{pid}-{hexadecimal}"
        left.mkdir()
        (left / "state.json").write_text("half")
    Backup(tmp_path)
    # Of another machine nobody knows, until it is a day old.
    assert os.listdir(tmp_path) == [left.name]
    os.utime(left, (0, 0))
    Backup(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [".writing", ".removing", ".probe"])
def test_a_file_in_the_way_does_no_harm(tmp_path, name):
    (tmp_path / name).write_text("not ours")
    backup = saved(tmp_path, 1, 2, 3)
    backup.delete()
    assert os.listdir(tmp_path) == [name]


def test_a_relative_folder_stays_where_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    backup = saved("run", 1)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert epoch_of(backup.load(accept)) == 1
    backup.delete()
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_on_a_system_that_opens_no_folders(tmp_path, monkeypatch):
    """As Windows, which also flushes only what is open for writing."""
    opened = os.open

    def open_files_to_write(path, flags, *arguments):
        if os.path.isdir(path) or not flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *arguments)

    backup = saved(tmp_path, 1)
    monkeypatch.setattr(module.os, "open", open_files_to_write)
    backup.save(2, {"stage": 2}, {"model": [np.full(3, 2)]})
    monkeypatch.undo()
    assert epoch_of(backup.load(accept)) == 2


# Hostile files.


def sealed_again(tmp_path, epoch):
    """Has the digests be right, as who writes a hostile file would."""
    path = tmp_path / f"epoch-{epoch:06d}"
    written = json.loads((path / "state.json").read_text())
    written["content"]["arrays"] = module._digest(path / "state.weights.h5")
    written["digest"] = module._digest_of(written["content"])
    (path / "state.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "[]", "null", "{}", "1" * 10_000, '{"format": []}']
)
def test_a_state_that_is_none_falls_back_to_the_one_before(tmp_path, text):
    backup = saved(tmp_path, 1, 2)
    (tmp_path / "epoch-000002" / "state.json").write_text(text)
    loaded = backup.load(accept)
    assert epoch_of(loaded) == 1
    assert loaded[2][0].startswith("epoch-000002: ")
    # And it is of no other process: it can be replaced.
    backup.save(2, {"stage": 2}, {"model": [np.full(3, 2)]})
    assert epoch_of(backup.load(accept)) == 2


def huge(file):
    del file["model/000000"]
    return file.create_dataset("model/000000", (10**14,), "f4", chunks=(10**6,))


def claimed(file):
    del file["model/000000"]
    return file.create_dataset("model/000000", (10**14,), "f4")


def outside(file):
    del file["model/000000"]
    external = [("/dev/zero", 0, h5py.h5f.UNLIMITED)]
    return file.create_dataset("model/000000", (100,), "f4", external=external)


def linked(file):
    del file["model/000000"]
    file["model/000000"] = h5py.ExternalLink("/elsewhere.h5", "/")


def looped(file):
    file["model/model"] = file["model"]


def flat(file):
    del file["model"]
    file["model"] = np.ones(3)


def without_type(file):
    del file["model/000000"].attrs["dtype"]


def of_objects(file):
    file["model/000000"].attrs["dtype"] = "object"


@pytest.mark.parametrize(
    "change",
    [huge, claimed, outside, linked, looped, flat, without_type, of_objects],
    ids=lambda change: change.__name__,
)
def test_hostile_arrays_fall_back_to_the_one_before(tmp_path, change):
    backup = saved(tmp_path, 1, 2)
    with h5py.File(tmp_path / "epoch-000002" / "state.weights.h5", "r+") as file:
        dataset = change(file)
        if dataset is not None:
            dataset.attrs["dtype"], dataset.attrs["shape"] = "float32", dataset.shape
    sealed_again(tmp_path, 2)
    loaded = backup.load(accept)
    assert epoch_of(loaded) == 1
    assert loaded[2][0].startswith("epoch-000002: ")
