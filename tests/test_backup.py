"""Snapshots on disk: whole or not at all, whatever happens."""

import json
import os

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import backup as module
from keras_tl.backup import Backup
from tests.conftest import examples

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
@settings(max_examples=examples(60))
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
        (module.shutil, "rmtree"),
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
        left = [name for name in os.listdir(folder) if name.startswith(".")]
        assert ".writing" not in left


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
