"""What a `fit` does with the files of a backup: hostile, old, of a folder that is lost."""

import json
import shutil
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import UnfreezeAtConvergence
from keras_tl.backbone import freezing
from keras_tl.backup import snapshots as backup
from keras_tl.stages import switching
from tests.callbacks.test_backup_dir import (
    EPOCHS,
    InterruptAt,
    Interruption,
    build,
    callback,
    fit,
)
from tests.shared import examples, values_of

SETTINGS = {"max_frozen_epochs": 2, "warmup_steps": 20}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run that was interrupted in stage 1, with two snapshots of it."""
    folder = tmp_path_factory.mktemp("interrupted")
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(folder, **SETTINGS), InterruptAt("on_epoch_end", 4))
    return folder


@pytest.fixture(scope="module")
def fresh():
    return build()[0]


@pytest.fixture
def folder(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def rewrite(folder, epoch, change):
    """Changes what a state says, with a digest that is right."""
    path = folder / f"epoch-{epoch:06d}" / "state.json"
    written = json.loads(path.read_text())
    change(written)
    written["digest"] = backup._digest_of(written["content"])
    path.write_text(json.dumps(written))


def state_of(model):
    return values_of(model), freezing.get_trainable_flags(model), model.optimizer


def begin(model, folder):
    """Begins the run anew, and stops before its first step. Returns its stage and the warnings."""
    ours = callback(folder, **SETTINGS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(Interruption):
            fit(model, ours, InterruptAt("on_train_begin", 1))
    return ours, [str(one.message) for one in caught]


ODD = st.sampled_from(
    [None, True, -1, 10**9, 1.5, float("nan"), "text", [], [[]], {}, {"0": -1.0}, [None], [0, 0]]
)


def places(value, path=()):
    """Yields where in a state there is something."""
    if path:
        yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, one in value.items() if isinstance(value, dict) else ():
        yield from places(one, (*path, key))


@given(data=st.data())
@settings(max_examples=examples(60))
def test_whatever_a_state_says_the_one_before_is_used(interrupted, fresh, tmp_path_factory, data):
    folder = shutil.copytree(interrupted, tmp_path_factory.mktemp("fuzzed") / "run")

    def change(written):
        run = {key: written["content"][key] for key in ("run", "variables", "epoch")}
        *outer, last = data.draw(st.sampled_from(list(places(run))))
        inner = run
        for key in outer:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[last] = data.draw(ODD)
        else:
            del inner[last]
        written["content"] |= run

    rewrite(folder, 4, change)
    before = state_of(fresh)
    with pytest.raises(Interruption), switching.all_or_nothing(fresh, fresh.variables):
        ours, told = begin(fresh, folder)
        assert ours.stage == 1
        assert fresh.trainable_weights
        used = [one for one in told if "a backup is not used: epoch-000004: " in one]
        assert len(used) == (ours._run._kept.epochs_done == 3)
        raise Interruption
    assert state_of(fresh) == before


@given(data=st.data())
@settings(max_examples=examples(30))
def test_a_model_is_as_it_was_where_none_can_be_used(interrupted, fresh, tmp_path_factory, data):
    folder = shutil.copytree(interrupted, tmp_path_factory.mktemp("fuzzed") / "run")
    name = data.draw(st.sampled_from(["stage", "stage_epochs", "transitions", "warm_up", "best"]))
    for epoch in (3, 4):
        odd = data.draw(ODD.filter(lambda one: one not in (None, [])))
        rewrite(folder, epoch, lambda w, odd=odd: w["content"]["run"].update({name: odd}))
    before = state_of(fresh)
    if name == "stage_epochs" and odd == 10**9:
        return  # Which nobody can tell from a stage that long.
    with pytest.raises(ValueError, match=r"its '|it is in stage|it has no|no snapshot to resume"):
        fit(fresh, callback(folder, **SETTINGS))
    assert state_of(fresh) == before


def test_arrays_of_another_optimizer_are_rolled_back(folder, fresh, monkeypatch):
    before = state_of(fresh)
    restore, calls = switching.restore_training, []

    def fail_at_first(model, values, optimizer_values):
        calls.append(model)
        if len(calls) == 1:
            optimizer_values = optimizer_values[1:]
        restore(model, values, optimizer_values)

    monkeypatch.setattr(switching, "restore_training", fail_at_first)
    with pytest.raises(Interruption), switching.all_or_nothing(fresh, fresh.variables):
        ours, told = begin(fresh, folder)
        assert ours._run._kept.epochs_done == 3
        assert any("epoch-000004: The backup is of another optimizer" in one for one in told)
        raise Interruption
    assert state_of(fresh) == before


def test_a_backup_of_the_first_version_is_resumed_with_a_warning(folder, fresh):
    def older(written):
        written["format"] = 1
        del written["writer"], written["content"]["identity"]
        written["content"]["settings"] = {"monitor": "val_loss", "stages": 1}

    for epoch in (3, 4):
        rewrite(folder, epoch, older)
    with pytest.raises(Interruption), switching.all_or_nothing(fresh, fresh.variables):
        ours, told = begin(fresh, folder)
        assert ours._run._kept.epochs_done == 4
        assert any(
            "was made by keras_tl 0.1, which did not note of which run" in one for one in told
        )
        raise Interruption


def test_a_backup_of_another_backend_is_named(folder, fresh):
    for epoch in (3, 4):
        rewrite(folder, epoch, lambda w: w["content"]["identity"].update(backend="abacus"))
    before = state_of(fresh)
    with pytest.raises(ValueError, match=r"the Keras backend \(was abacus, is "):
        fit(fresh, callback(folder, **SETTINGS))
    assert state_of(fresh) == before


def test_another_run_deletes_and_changes_nothing(folder):
    names = sorted(path.name for path in folder.iterdir())
    model, _ = build(keras.optimizers.SGD(0.1))
    before = state_of(model)
    with pytest.raises(ValueError, match="To start over, delete the folder or pass another"):
        fit(model, callback(folder, **SETTINGS))
    assert state_of(model) == before
    assert sorted(path.name for path in folder.iterdir()) == names


def test_fewer_epochs_than_are_done_keep_the_backup(folder, fresh):
    with switching.left_as_found(fresh):
        with pytest.warns(UserWarning, match="has 4 epochs done, and `epochs=3`, so nothing is"):
            assert fit(fresh, callback(folder, **SETTINGS), epochs=3) == {}
        assert sorted(path.name for path in folder.iterdir()) == ["epoch-000003", "epoch-000004"]
        # As many as are done are a run that was killed before it could delete its backup.
        assert fit(fresh, callback(folder, **SETTINGS), epochs=4) == {}
        assert not folder.exists()


def test_a_backup_that_cannot_be_deleted_is_warned_of_and_fit_ends(folder, monkeypatch):
    model, _ = build()
    ended = []

    def denied(*_):
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr(backup.Backup, "_remove", denied)
    monkeypatch.setattr(backup.Backup, "save", lambda *_: None)
    later = keras.callbacks.LambdaCallback(on_train_end=lambda logs: ended.append(True))
    with pytest.warns(UserWarning, match="could not be deleted: .*Delete the folder, or the next"):
        history = fit(model, callback(folder, **SETTINGS), later)
    assert len(history["loss"]) == EPOCHS - 4
    assert ended == [True]


def test_a_relative_folder_is_absolute_once_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = UnfreezeAtConvergence(backup_dir="run")
    monkeypatch.chdir("/")
    assert ours.backup_dir == str(tmp_path / "run")
    assert UnfreezeAtConvergence().backup_dir is None


def test_a_run_that_another_process_backs_up_trains_on(tmp_path):
    model, _ = build()
    other = backup.Backup(tmp_path)

    class Other(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 0:
                other.save(7, {}, {"model": [np.zeros(1)]})

    with pytest.warns(UserWarning, match="Give each run a `backup_dir` of its own") as caught:
        history = fit(model, Other(), callback(tmp_path, **SETTINGS), epochs=3)
    assert len([one for one in caught if "could not back up" in str(one.message)]) == 1
    assert len(history["loss"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-000007"]
