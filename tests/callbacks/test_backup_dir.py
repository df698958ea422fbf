"""A run that is interrupted goes on as if it had not been."""

import dataclasses
import functools
import os
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    GroupOptimizer,
    Stage,
    UnfreezeAtConvergence,
)
from keras_tl.backup import snapshots as backup_module
from keras_tl.stages.training_state import TrainingState
from tests import models
from tests.shared import (
    SEVERAL_STEPS,
    Recorder,
    examples,
    forget_compiled,
    regression_data,
    seeded_dropout,
    values_of,
)

pytestmark = pytest.mark.covers("part: backup_dir")

X, Y = regression_data(24)
EPOCHS, STEPS = 6, 2


class Interruption(RuntimeError):
    """Stands for the end of the process."""


class InterruptAt(keras.callbacks.Callback):
    """Raises at one call of a hook."""

    def __init__(self, hook, at):
        super().__init__()
        self.seen = 0

        def interrupt(*_, **__):
            self.seen += 1
            if self.seen == at:
                raise Interruption

        setattr(self, hook, interrupt)


def build(optimizer=None, plain=False, **compile_arguments):
    forget_compiled()
    keras.utils.set_random_seed(0)
    backbone = models.functional(["dense", "batchnorm", "dense"])
    backbone = backbone if plain else FrozenBackbone(backbone)
    # Not drawn from the layer's seed, as on torch, it could not be drawn again in a resumed run.
    head = [keras.layers.BatchNormalization(momentum=0.5), seeded_dropout(0.3)]
    model = models.functional_outer(backbone, head)
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.9), "mse", **compile_arguments)
    return model, backbone


def fit(model, *callbacks, epochs=EPOCHS, **arguments):
    return model.fit(
        X,
        Y,
        batch_size=len(X) // STEPS,
        validation_batch_size=len(X),
        epochs=epochs,
        shuffle=False,
        validation_data=(X, Y),
        callbacks=list(callbacks),
        verbose=0,
        **arguments,
    ).history


def callback(folder=None, **arguments):
    # By the fourth epoch there is a switch, whatever weights a backend begins with.
    settings = {"patience": 0, "max_frozen_epochs": 3, "verbose": 0}
    if "stages" not in arguments:
        settings["learning_rate"] = 5e-3
    return UnfreezeAtConvergence(backup_dir=folder, **settings | arguments)


SETTINGS = [
    {},
    {"head_learning_rate": 1e-2},
    {"warmup_steps": 4},
    {"restore_best_weights": False},
    {"fine_tune_patience": 0},
    {
        "stages": [
            Stage(1, 1e-2, epochs=1),
            Stage("all", 5e-3, epochs=2),
            Stage(1, 1e-3),
        ]
    },
    {
        "stages": [
            Stage(1, 1e-2, head_learning_rate=1e-2, epochs=2),
            Stage("all", 5e-3, head_learning_rate=5e-3),
        ],
        "warmup_steps": 5,
    },
]
OPTIMIZERS = [
    lambda: keras.optimizers.Adam(0.02),
    lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    lambda: keras.optimizers.AdamW(0.02, use_ema=True, ema_momentum=0.5),
    lambda: keras.optimizers.RMSprop(0.01, gradient_accumulation_steps=STEPS + 1),
    lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.9)),
]


def moves(ours):
    """The transitions without the layers, whose names count up in a process."""
    return [dataclasses.replace(one, layers=(), frozen=()) for one in ours.transitions]


def undisturbed(optimizer, arguments, **compile_arguments):
    model, _ = build(optimizer, **compile_arguments)
    ours = callback(**arguments)
    history = fit(model, ours)
    return values_of(model), history, moves(ours)


@functools.cache
def undisturbed_by_default():
    """The same without arguments, for the tests with the mark `eager`: made once."""
    return undisturbed(None, {})


def interrupted(folder, make, arguments, hooks, **compile_arguments):
    """Starts the same fit until it ends; each time another hook ends it."""
    for hook, at in [*hooks, ("on_train_end", 99)]:
        model, _ = build(make(), **compile_arguments)
        ours = callback(folder, **arguments)
        try:
            history = fit(model, ours, InterruptAt(hook, at))
        except Interruption:
            continue
        return values_of(model), history, moves(ours)
    raise AssertionError


@pytest.mark.eager
@given(
    arguments=st.sampled_from(SETTINGS),
    make=st.sampled_from(OPTIMIZERS),
    hooks=st.lists(
        st.tuples(
            st.sampled_from(["on_epoch_begin", "on_epoch_end", "on_train_batch_end"]),
            st.integers(1, 8),
        ),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=examples(8))
def test_ends_as_if_it_had_not_been_interrupted(tmp_path_factory, arguments, make, hooks):
    folder = tmp_path_factory.mktemp("backup") / "run"
    expected = undisturbed(make(), arguments)
    weights, history, transitions = interrupted(folder, make, arguments, hooks)

    assert weights == expected[0]
    assert transitions == expected[2]
    for name, values in history.items():
        np.testing.assert_array_equal(values, expected[1][name][-len(values) :])
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.eager
def test_the_property_above_interrupts_in_each_stage(tmp_path):
    """Guards it: with such settings there is a switch, and an interruption before and after."""
    _, history, _ = undisturbed_by_default()
    assert history["stage"][0] == 0
    assert history["stage"][-1] == 1
    seen = []
    for at in (2, 5):
        model, _ = build()
        ours = callback(tmp_path / str(at))
        with pytest.raises(Interruption):
            fit(model, ours, InterruptAt("on_epoch_end", at))
        seen.append(ours.stage)
    assert seen == [0, 1]


@pytest.mark.parametrize(
    "compile_arguments",
    [
        pytest.param({"run_eagerly": True}, marks=pytest.mark.slow),
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
        pytest.param({"steps_per_execution": STEPS}, marks=[SEVERAL_STEPS, pytest.mark.slow]),
        pytest.param({"plain": True}, marks=pytest.mark.eager),
    ],
    ids=str,
)
def test_in_other_ways_of_training(tmp_path, compile_arguments):
    def one(folder, *others):
        model, backbone = build(**compile_arguments)
        given = backbone if compile_arguments.get("plain") else None
        ours = callback(folder, backbone=given)
        try:
            fit(model, ours, *others)
        except Interruption:
            return None
        return values_of(model), moves(ours)

    expected = one(None)
    assert one(tmp_path, InterruptAt("on_epoch_end", 2)) is None
    assert one(tmp_path, InterruptAt("on_epoch_end", 2)) is None
    assert one(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.eager
def test_mixed_precision_resumes_its_loss_scale(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        expected = undisturbed(None, SETTINGS[1])
        hooks = [("on_epoch_end", 4)]
        result = interrupted(tmp_path, lambda: None, SETTINGS[1], hooks)
        assert result[0] == expected[0]
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.eager
def test_groups_of_the_user_resume(tmp_path):
    def make():
        return GroupOptimizer(
            {"output": keras.optimizers.Adam(0.02), "rest": keras.optimizers.SGD(0.01)},
            assign={"output": "output/.*"},
        )

    arguments = {"learning_rate": None}
    expected = undisturbed(make(), arguments)
    result = interrupted(tmp_path, make, arguments, [("on_epoch_end", 4)])
    assert result[0] == expected[0]


@pytest.mark.eager
def test_goes_on_at_its_epoch_in_its_stage(tmp_path, capsys):
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path), InterruptAt("on_epoch_end", 4))
    model, backbone = build()
    ours = callback(tmp_path, verbose=1)
    history = fit(model, ours, FreezeGuard(verbose=0))
    assert len(history["loss"]) == EPOCHS - 4
    assert set(history["stage"]) == {1}
    assert "resumes after epoch 4, in stage 1, from " in capsys.readouterr().out
    assert backbone.trainable_weights


@pytest.mark.eager
def test_the_epochs_of_a_stage_go_on_being_counted(tmp_path):
    arguments = {"patience": 9, "max_frozen_epochs": 3}
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path, **arguments), InterruptAt("on_epoch_end", 2))
    model, _ = build()
    history = fit(model, callback(tmp_path, **arguments))
    assert history["stage"] == [0, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.eager
def test_a_later_fit_runs_all_its_epochs(tmp_path):
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path), InterruptAt("on_epoch_end", 4))
    model, _ = build()
    fit(model, callback(tmp_path))
    assert len(fit(model, epochs=2)["loss"]) == 2


@pytest.mark.eager
def test_a_resumed_fit_that_fails_before_its_first_epoch_leaves_no_epoch_set(tmp_path):
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path), InterruptAt("on_epoch_end", 4))
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path), InterruptAt("on_train_begin", 1))
    assert len(fit(model, callback(tmp_path))["loss"]) == EPOCHS - 4
    assert len(fit(model, epochs=2)["loss"]) == 2


@pytest.mark.slow
@pytest.mark.eager
def test_what_a_resumed_run_had_unfrozen_is_not_unfrozen_early(tmp_path):
    settings = {"stages": [Stage("dense.*", 1e-3, epochs=2), Stage("all", 1e-4)], "patience": 9}
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path, **settings), InterruptAt("on_epoch_begin", 5))
    model, _ = build()
    ours = callback(tmp_path, **settings)
    fit(model, ours)
    assert [one.unfrozen_early for one in ours.transitions] == [(), ()]


@pytest.mark.slow
@pytest.mark.eager
def test_rates_of_a_backup_that_is_not_used_are_not_watched(tmp_path, monkeypatch):
    settings = {"patience": 9, "max_frozen_epochs": 2}
    model, _ = build(keras.optimizers.SGD(0.02))
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path, **settings), InterruptAt("on_epoch_begin", 4))
    model, _ = build(keras.optimizers.SGD(0.02))
    ours = callback(tmp_path, **settings)
    read, failed = TrainingState._schedule_starts, []

    def raise_once(self, state):
        if not failed:
            failed.append(state)
            raise ValueError("it is damaged.")
        return read(self, state)

    class Harmless(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            pass

    monkeypatch.setattr(TrainingState, "_schedule_starts", raise_once)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(model, Harmless(), ours)
    assert len(history["stage"]) == EPOCHS - 2
    said = [str(one.message) for one in caught]
    assert any("it is damaged" in one for one in said)
    assert not [one for one in said if "UnfreezeAtConvergence had set" in one]


@pytest.mark.parametrize(
    ("hook", "at"),
    [
        pytest.param("on_epoch_end", 2, marks=pytest.mark.slow),
        ("on_train_batch_end", 4 * STEPS),
        pytest.param("on_epoch_begin", 5, marks=pytest.mark.slow),
    ],
)
def test_the_same_model_goes_on_after_an_interruption(tmp_path, hook, at):
    # In a notebook: the model lives on, in a later stage than its backup perhaps. Its step is
    # compiled for that stage.
    expected = undisturbed(None, {})
    model, _ = build()
    ours = callback(tmp_path)
    with pytest.raises(Interruption):
        fit(model, ours, InterruptAt(hook, at))
    fit(model, ours)
    assert values_of(model) == expected[0]
    assert moves(ours) == expected[2]


@pytest.mark.eager
def test_a_model_that_went_further_than_its_backup_goes_back(tmp_path):
    expected = undisturbed_by_default()
    model, _ = build()
    switch = len([stage for stage in expected[1]["stage"] if stage == 0])
    with pytest.raises(Interruption):
        # In the first epoch after the switch, before there is a backup of it.
        fit(model, callback(tmp_path), InterruptAt("on_train_batch_end", STEPS * switch + 1))
    fit(model, callback(tmp_path))
    assert values_of(model) == expected[0]


@pytest.mark.slow
@pytest.mark.eager
@pytest.mark.parametrize(
    "names", [pytest.param(("others", "rest"), marks=pytest.mark.slow), ("others", "head")], ids=str
)
def test_a_model_that_went_further_keeps_the_groups_it_was_compiled_with(tmp_path, names):
    def make():
        groups = {name: keras.optimizers.SGD(0.02, momentum=0.9) for name in names}
        return GroupOptimizer(groups, assign={names[0]: ".*(?<!bias)"})

    arguments = {"learning_rate": None}
    expected = undisturbed(make(), arguments)
    switch = expected[1]["stage"].index(1)
    model, _ = build(make())
    with pytest.raises(Interruption):
        fit(
            model,
            callback(tmp_path, **arguments),
            InterruptAt("on_train_batch_end", STEPS * switch + 1),
        )
    fit(model, callback(tmp_path, **arguments))
    assert list(model.optimizer.groups) == list(names)
    assert values_of(model) == expected[0]


@pytest.mark.eager
def test_what_had_stopped_stays_stopped(tmp_path):
    arguments = {"fine_tune_patience": 0, "monitor": "loss", "mode": "max", "patience": 0}
    expected = undisturbed(None, arguments)
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, InterruptAt("on_train_end", 1), callback(tmp_path, **arguments))
    model, _ = build()
    ours = callback(tmp_path, **arguments)
    assert fit(model, ours) == {}
    assert values_of(model) == expected[0]


@pytest.mark.eager
def test_the_backup_is_deleted_at_the_end_or_kept(tmp_path):
    for keep in (False, True):
        model, _ = build()
        fit(model, callback(tmp_path / "run", delete_checkpoint=not keep), epochs=1)
        assert (tmp_path / "run").exists() == keep
    model, _ = build()
    history = fit(model, callback(tmp_path / "run"), epochs=2)
    assert len(history["loss"]) == 1


# What cannot be used.


@pytest.mark.eager
def test_a_backup_of_another_run_is_refused_and_changes_nothing(tmp_path):
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path), InterruptAt("on_epoch_end", 5))

    def check_refused(model, words, **arguments):
        before, optimizer = values_of(model), model.optimizer
        with pytest.raises(ValueError, match=words):
            fit(model, callback(tmp_path, **arguments))
        assert values_of(model) == before
        assert model.optimizer is optimizer
        assert models.frozen_backbone_of(model).trainable_weights == []

    other = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    other.compile("adam", "mse")
    check_refused(other, r"it is of another run. Different: .*the model.layers \(was 5")
    model, _ = build(keras.optimizers.Adam(0.02))
    check_refused(model, r"Different: compile.optimizer \(was 'SGD', is 'Adam'\)")
    model, _ = build()
    words = r"UnfreezeAtConvergence.monitor \(was 'val_loss', is 'loss'\)"
    check_refused(model, words, monitor="loss")
    stages = [Stage(1, 1e-3), Stage("all", 1e-3)]
    check_refused(model, r"Different: stages \(was .*, is ", stages=stages)


@pytest.mark.eager
def test_a_damaged_backup_is_warned_of_and_the_one_before_is_used(tmp_path):
    expected = undisturbed_by_default()
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path), InterruptAt("on_epoch_end", 4))
    path = tmp_path / "epoch-000004" / "state.weights.h5"
    path.write_bytes(path.read_bytes()[:-1])
    model, _ = build()
    with pytest.warns(UserWarning, match="epoch-000004: state.weights.h5 is damaged"):
        history = fit(model, callback(tmp_path))
    assert len(history["loss"]) == EPOCHS - 3
    assert values_of(model) == expected[0]


@pytest.mark.eager
def test_a_full_disk_is_warned_of_once_and_training_goes_on(tmp_path, monkeypatch):
    expected = undisturbed_by_default()
    write = backup_module._write_arrays
    written = []

    def full(*arguments):
        written.append(arguments)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(backup_module, "_write_arrays", full)
    model, _ = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, callback(tmp_path, delete_checkpoint=False))
    messages = [str(one.message) for one in caught if "could not back up" in str(one.message)]
    assert len(messages) == 1
    assert "epoch 3: [Errno 28] No space left" in messages[0]
    assert values_of(model) == expected[0]
    assert max(os.listdir(tmp_path)) == "epoch-000002"


@pytest.mark.eager
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    model, _ = build()
    before = values_of(model)
    with pytest.raises(ValueError, match="cannot be written to"):
        fit(model, callback(tmp_path / "file"))
    assert values_of(model) == before


@pytest.mark.slow
@pytest.mark.eager
def test_a_model_that_is_not_built_when_callbacks_begin_cannot_resume(tmp_path):
    def subclassed():
        wrapper = FrozenBackbone(models.Subclassed(["dense"]))
        model = models.SubclassedOuter(wrapper)
        model.compile("adam", "mse")
        return model

    with pytest.raises(Interruption):
        fit(subclassed(), callback(tmp_path), InterruptAt("on_epoch_end", 2))
    model = subclassed()
    if keras.backend.backend() == "tensorflow":
        # Elsewhere Keras builds it before callbacks begin.
        with pytest.raises(ValueError, match="is not built, so nothing can be restored"):
            fit(model, callback(tmp_path))
        model = subclassed()
        model(X)
    assert len(fit(model, callback(tmp_path))["loss"]) == EPOCHS - 2


@pytest.mark.eager
def test_warm_up_that_ends_with_training_leaves_the_full_rate():
    model, _ = build()
    fit(model, callback(max_frozen_epochs=1, patience=9, warmup_steps=50), epochs=3)
    assert float(model.optimizer.learning_rate) == np.float32(5e-3)


@pytest.mark.slow
@pytest.mark.eager
def test_evaluates_alike_after_resuming(tmp_path):
    losses = Recorder(lambda model: model.evaluate(X, Y, verbose=0))
    model, _ = build()
    fit(model, callback(), losses)
    again = Recorder(lambda model: model.evaluate(X, Y, verbose=0))
    model, _ = build()
    with pytest.raises(Interruption):
        fit(model, callback(tmp_path), again, InterruptAt("on_epoch_end", 3))
    model, _ = build()
    fit(model, callback(tmp_path), again)
    assert again.records == losses.records
