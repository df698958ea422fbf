"""The whole of transfer learning in one call is, bit for bit, the same in one `fit`."""

import csv
import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    FrozenWeightsChangedError,
    Stage,
    StaleCacheError,
    UnfreezeAtConvergence,
    fine_tune,
)
from keras_tl.internals.callback_list import callbacks_beside
from tests import models, strategies
from tests.shared import examples, only_on, regression_data, seeded_dropout, values_of

pytestmark = pytest.mark.covers("part: fine_tune")

X, Y = regression_data(16, seed=1)
VALIDATION = regression_data(8, seed=2)
HEAD = (lambda: keras.layers.BatchNormalization(momentum=0.5), lambda: seeded_dropout(0.3))


def build(kinds=("dense", "batchnorm"), optimizer=None, head=HEAD):
    keras.utils.set_random_seed(0)
    wrapper = FrozenBackbone(models.functional(kinds))
    model = models.functional_outer(wrapper, [make() for make in head])
    if optimizer is not None:
        optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    model.compile(optimizer or keras.optimizers.SGD(0.02, momentum=0.9), "mse", metrics=["mae"])
    return model


def small():
    """The least that can be fine-tuned, where it does not matter what trains."""
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    model.compile(keras.optimizers.SGD(0.02), "mse")
    return model


class Events(keras.callbacks.Callback):
    """Notes what a callback sees of a `fit`."""

    def __init__(self):
        super().__init__()
        self.events = []

    def on_train_begin(self, logs=None):
        self.events.append(("train begins", self.model.name.split("_")[0]))

    def on_train_end(self, logs=None):
        self.events.append("train ends")

    def on_epoch_begin(self, epoch, logs=None):
        self.events.append(("epoch begins", epoch))

    def on_epoch_end(self, epoch, logs=None):
        self.events.append(("epoch ends", epoch, dict(logs), values_of(self.model)))

    def on_train_batch_begin(self, batch, logs=None):
        self.events.append(("batch begins", batch))

    def on_train_batch_end(self, batch, logs=None):
        self.events.append(("batch ends", batch, values_of(self.model)))

    def on_test_end(self, logs=None):
        self.events.append("test ends")


SETTINGS = {"batch_size": 8, "shuffle": False, "validation_data": VALIDATION, "verbose": 0}


def in_one_fit(model, epochs, callbacks=(), **settings):
    data = {**SETTINGS, **{key: settings.pop(key) for key in SETTINGS if key in settings}}
    switch = UnfreezeAtConvergence(fine_tune_patience=3, verbose=0, **settings)
    guard = FreezeGuard(verbose=0)
    return model.fit(X, Y, epochs=epochs, callbacks=[*callbacks, switch, guard], **data)


def check_same(epochs, callbacks=lambda: (), build=build, **settings):
    events, other_events = Events(), Events()
    expected = build()
    history = in_one_fit(expected, epochs, [*callbacks(), events], **settings)
    model = build()
    run = {"epochs": epochs, "fine_tune_patience": 3, **SETTINGS, **settings}
    ours = fine_tune(model, X, Y, callbacks=[*callbacks(), other_events], **run)
    assert ours.epoch == history.epoch == list(range(len(history.epoch)))
    assert ours.history == history.history
    assert values_of(model) == values_of(expected)
    assert other_events.events == events.events
    assert model.history is ours
    return ours


OTHERS = {
    "optimizer": strategies.optimizers(),
    "learning_rate": st.sampled_from([1e-3, 1e-2]),
    "patience": st.integers(0, 2),
    "restore_best_weights": st.booleans(),
    "head_learning_rate": st.sampled_from([None, 1e-3]),
}


@pytest.mark.eager
@settings(max_examples=examples(6))
@given(kinds=strategies.layer_kinds(max_size=2), **OTHERS)
def test_as_in_one_fit(kinds, optimizer, **arguments):
    check_same(epochs=4, build=lambda: build(kinds, optimizer), **arguments)


@pytest.mark.slow
@settings(max_examples=examples(6))
@given(kinds=strategies.layer_kinds(), **OTHERS)
def test_as_in_one_fit_where_steps_are_compiled(kinds, optimizer, **arguments):
    check_same(epochs=12, build=lambda: build(kinds, optimizer), **arguments)


def test_as_in_one_fit_with_a_step_that_is_compiled_and_renewed():
    history = check_same(epochs=3, max_frozen_epochs=2)
    assert history.history["stage"] == [0, 0, 1]


@pytest.mark.eager
def test_in_several_stages():
    stages = [Stage(1, 1e-2, epochs=1), Stage("all", 1e-4)]
    history = check_same(epochs=4, stages=stages, max_frozen_epochs=1)
    assert history.history["stage"] == [0, 1, 2, 2]


@pytest.mark.eager
def test_an_early_stopping_before_it_counts_as_convergence():
    history = check_same(
        epochs=4,
        callbacks=lambda: [keras.callbacks.EarlyStopping("loss", patience=0, min_delta=9.0)],
        patience=8,
        build=small,
    )
    assert history.history["stage"][:3] == [0, 0, 1]


@pytest.mark.eager
def test_another_callback_ends_it_in_the_frozen_stage():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    class StopInBatch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 0

    for stop, events in ((Stop, 2), (StopInBatch, 1)):
        with pytest.warns(UserWarning, match="another callback stopped it"):
            history = check_same(epochs=8, callbacks=lambda stop=stop: [stop()], build=small)
        assert history.history["stage"] == [0] * events


@pytest.mark.eager
def test_all_epochs_in_the_frozen_stage():
    with pytest.warns(UserWarning, match="had not converged by the last epoch"):
        history = check_same(epochs=2, patience=8, build=small)
    assert history.history["stage"] == [0, 0]


@pytest.mark.eager
def test_the_backbone_does_not_run_in_the_frozen_stage(batches_extracted):
    def calls_of_the_backbone(epochs, frozen):
        calls = []
        model = small()
        wrapper = models.frozen_backbone_of(model)
        original = wrapper.call

        def counted(*arguments, **settings):
            calls.append(wrapper.trainable)
            return original(*arguments, **settings)

        wrapper.call = counted
        model.compile("sgd", "mse", run_eagerly=True)
        run = {"epochs": epochs, "max_frozen_epochs": frozen, "patience": 99, **SETTINGS}
        history = fine_tune(model, X, Y, **run)
        assert history.history["stage"] == [0] * frozen + [1] * (epochs - frozen)
        return len(calls)

    assert calls_of_the_backbone(2, 1) == calls_of_the_backbone(3, 2)
    assert len(batches_extracted) == 2 * 3


@pytest.mark.eager
def test_features_in_cache_dir_are_used_again(tmp_path, batches_extracted):
    run = {"epochs": 2, "max_frozen_epochs": 1, "cache_dir": tmp_path, **SETTINGS}
    first = fine_tune(small(), X, Y, **run).history
    assert len(batches_extracted) == 3
    batches_extracted.clear()
    assert fine_tune(small(), X, Y, **run).history == first
    assert batches_extracted == []
    with pytest.raises(StaleCacheError, match="the inputs"):
        fine_tune(small(), X + 1, Y, **run)


@pytest.mark.slow
@pytest.mark.eager
def test_half_precision_features_train_nearly_as_well(tmp_path):
    run = {"epochs": 2, "max_frozen_epochs": 1, **SETTINGS}
    whole = fine_tune(small(), X, Y, **run).history["val_loss"]
    half = fine_tune(small(), X, Y, dtype="bfloat16", **run).history["val_loss"]
    assert whole != half
    np.testing.assert_allclose(half, whole, rtol=0.05)


def noisy():
    inputs = keras.Input((models.FEATURES,))
    x = keras.layers.GaussianNoise(0.1, name="augmentation")(inputs)
    x = FrozenBackbone(models.functional(["dense"]))(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile("sgd", "mse")
    return model


def subclassed():
    model = models.SubclassedOuter(FrozenBackbone(models.functional(["dense"])))
    model.compile("sgd", "mse")
    return model


@pytest.mark.eager
@pytest.mark.parametrize(
    "make, why",
    [(noisy, "augmentation come before.* are random"), (subclassed, "Functional or a built")],
)
def test_through_the_backbone_where_features_cannot_be_recorded(make, why, capsys):
    run = {**SETTINGS, "verbose": 2}
    history = fine_tune(make(), X, Y, epochs=2, max_frozen_epochs=1, **run)
    assert history.history["stage"] == [0, 1]
    printed = capsys.readouterr().out
    assert "fine_tune trains the head through the backbone. The" in printed
    assert "Epoch 2/2" in printed


@pytest.mark.eager
def test_views_of_augmented_data(batches_extracted):
    history = fine_tune(noisy(), X, Y, epochs=2, max_frozen_epochs=1, views=3, **SETTINGS)
    assert history.history["stage"] == [0, 1]
    assert len(batches_extracted) == 3 * 2 + 1


@pytest.mark.eager
@only_on("tensorflow", "A Keras layer in tf.data.")
def test_augmented_data_sets_train_through_the_backbone(capsys):
    augment = keras.layers.GaussianNoise(1.0)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    data = data.map(lambda x, y: (augment(x, training=True), y))
    fine_tune(small(), data, validation_data=VALIDATION, epochs=2, max_frozen_epochs=1, verbose=2)
    assert "with other values each time" in capsys.readouterr().out


@pytest.mark.eager
def test_views_of_augmented_data_that_repeats(batches_extracted):
    def samples():
        for x, y in zip(X, Y):
            yield x + np.random.normal(size=x.shape), y

    spec = (tf.TensorSpec(X.shape[1:], "float32"), tf.TensorSpec(Y.shape[1:], "float32"))
    data = tf.data.Dataset.from_generator(samples, output_signature=spec).batch(8).repeat()
    run = {"steps_per_epoch": 2, "epochs": 2, "max_frozen_epochs": 1, "verbose": 0}
    fine_tune(small(), data, views=2, **run)
    assert len(batches_extracted) == 2 * 2


def generator():
    while True:
        for at in range(0, 16, 8):
            yield X[at : at + 8], Y[at : at + 8]


def data_set(x, y):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(8)


WEIGHTED = (X, Y, np.ones(16, "float32"))


@pytest.mark.eager
@pytest.mark.parametrize(
    "data, validation, settings",
    [
        (lambda: (data_set(X, Y),), VALIDATION, {}),
        (lambda: (generator(),), data_set(*VALIDATION), {"steps_per_epoch": 2}),
        (lambda: WEIGHTED, data_set(*VALIDATION), {"batch_size": 8}),
        pytest.param(lambda: (data_set(X, Y),), data_set(*VALIDATION), {}, marks=pytest.mark.slow),
        pytest.param(
            lambda: (generator(),), VALIDATION, {"steps_per_epoch": 2}, marks=pytest.mark.slow
        ),
        pytest.param(lambda: WEIGHTED, VALIDATION, {"batch_size": 8}, marks=pytest.mark.slow),
    ],
)
def test_kinds_of_data(data, validation, settings):
    run = {"epochs": 2, "max_frozen_epochs": 1, "verbose": 0, **settings}
    history = fine_tune(small(), *data(), validation_data=validation, **run)
    assert history.history["stage"] == [0, 1]
    assert len(history.history["val_loss"]) == 2


@pytest.mark.eager
def test_without_validation_data_the_loss_decides():
    settings = {"patience": 1, "fine_tune_patience": 9, "min_delta": 9.0, "verbose": 0}
    history = fine_tune(small(), X, Y, epochs=3, batch_size=8, **settings)
    assert history.history["stage"] == [0, 0, 1]


@pytest.mark.eager
def test_class_weights_count_in_both_stages():
    labels = (Y > 0).astype("float32")

    def losses(**settings):
        run = {"epochs": 2, "max_frozen_epochs": 1, "batch_size": 8, "verbose": 0, **settings}
        return fine_tune(small(), X, labels, shuffle=False, **run).history["loss"]

    plain, weighted = losses(), losses(class_weight={0: 1.0, 1: 10.0})
    assert all(one > other for one, other in zip(weighted, plain, strict=True))


@pytest.mark.eager
def test_a_plain_backbone_that_was_trainable():
    base = models.functional(["dense", "batchnorm", "dense"])
    model = models.functional_outer(base)
    model.compile("sgd", "mse")
    history = fine_tune(model, X, Y, backbone=base, epochs=2, max_frozen_epochs=1, **SETTINGS)
    assert history.history["stage"] == [0, 1]


@pytest.mark.eager
def test_a_model_that_is_being_fine_tuned_goes_on(batches_extracted):
    model = small()
    models.frozen_backbone_of(model).unfreeze()
    model.compile("sgd", "mse")
    history = fine_tune(model, X, Y, epochs=1, **SETTINGS)
    assert history.history["stage"] == [1]
    assert batches_extracted == []


@pytest.mark.eager
def test_callbacks_see_the_whole_model(tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    log = tmp_path / "log.csv"
    fine_tune(
        small(),
        X,
        Y,
        epochs=2,
        max_frozen_epochs=1,
        callbacks=[checkpoint, keras.callbacks.CSVLogger(log)],
        **SETTINGS,
    )
    for epoch in (1, 2):
        saved = keras.models.load_model(tmp_path / f"{epoch}.keras")
        assert saved.input_shape == (None, 4)
        assert isinstance(saved.layers[1], FrozenBackbone)
    with log.open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]


@pytest.mark.eager
def test_the_best_weights_of_both_stages_remain():
    model = build()
    history = fine_tune(model, X, Y, epochs=4, max_frozen_epochs=2, learning_rate=0.5, **SETTINGS)
    found = model.evaluate(*VALIDATION, batch_size=8, return_dict=True, verbose=0)["loss"]
    assert found == min(history.history["val_loss"])


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


build_resumed = functools.partial(build, ("dense",), head=HEAD[1:])
RESUMED = {"epochs": 4, "patience": 9, "max_frozen_epochs": 2, "learning_rate": 1e-2, **SETTINGS}


@functools.cache
def undisturbed(eager):
    """The history and weights of a run that was not interrupted, eager or compiled."""
    model = build_resumed()
    return fine_tune(model, X, Y, **RESUMED), values_of(model)


def check_goes_on(interrupted_at, folder, *, eager):
    history, values = undisturbed(eager)
    run = {**RESUMED, "backup_dir": folder / "backup"}
    with pytest.raises(KeyboardInterrupt):
        fine_tune(build_resumed(), X, Y, callbacks=[Interrupt(interrupted_at)], **run)
    model = build_resumed()
    rest = fine_tune(model, X, Y, **run)
    assert values_of(model) == values
    assert rest.epoch == history.epoch[interrupted_at:]
    for name, found in rest.history.items():
        assert found == history.history[name][interrupted_at:]


# In the frozen stage, before the switch, and after it.
@pytest.mark.eager
@pytest.mark.parametrize("interrupted_at", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_goes_on_from_its_backup(interrupted_at, tmp_path):
    check_goes_on(interrupted_at, tmp_path, eager=True)


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_at", range(4))
def test_goes_on_from_its_backup_where_steps_are_compiled(interrupted_at, tmp_path):
    check_goes_on(interrupted_at, tmp_path, eager=False)


@pytest.mark.eager
def test_the_backup_of_other_data_is_refused(tmp_path):
    run = {"x": X, "y": Y, "validation_data": VALIDATION, "epochs": 2, "verbose": 0}
    run["backup_dir"] = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(small(), callbacks=[Interrupt(1)], **run)
    for changed, what in (
        ({"y": Y + 1}, "samples in `y`"),
        ({"validation_data": (VALIDATION[0][:5], VALIDATION[1][:5])}, "`validation_data`"),
        ({"class_weight": {0: 2.0}}, "class_weight"),
    ):
        with pytest.raises(ValueError, match=f"is of another run.*{what}"):
            fine_tune(small(), **run | changed)
    assert fine_tune(small(), **run).epoch == [1]


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"patience": -1}, "patience"),
        ({"layers": "dens"}, "matches no layer"),
        ({"views": 0}, "views"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"backbone": keras.layers.Dense(1)}, "is not part of the model"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "`batch_size` must be an int of at least 1. Received: batch_size=0"),
        ({"steps_per_epoch": 0}, "`steps_per_epoch` must be an int of at least 1"),
        ({"validation_steps": -1}, "`validation_steps` must be an int of at least 1"),
    ],
)
def test_bad_input_before_any_step(argument, message, batches_extracted):
    model = small()
    before = values_of(model)
    with pytest.raises(ValueError, match=message):
        fine_tune(model, X, Y, **{**SETTINGS, **argument})
    assert batches_extracted == []
    assert values_of(model) == before


def test_a_model_that_is_not_compiled():
    with pytest.raises(ValueError, match="is not compiled. Call `compile` before"):
        fine_tune(models.functional_outer(FrozenBackbone(models.functional(["dense"]))), X, Y)


def test_an_argument_that_is_misspelt_is_named_with_its_function():
    with pytest.raises(TypeError, match=r'`fine_tune` has no .*Did you mean "max_frozen_epochs"'):
        fine_tune(small(), X, Y, max_frozen_epoch=2)
    with pytest.raises(TypeError, match=r'has no argument `lr`.*Did you mean "learning_rate"\?'):
        fine_tune(small(), X, Y, lr=1e-4)


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([keras.callbacks.EarlyStopping], r"of type type\). Call it.*`EarlyStopping\(\.\.\.\)`"),
        (UnfreezeAtConvergence, r"Call it.*`UnfreezeAtConvergence\(\.\.\.\)`"),
        (
            ["stop"],
            r"`keras.callbacks.Callback` or a list of these. Received: 'stop' \(of",
        ),
        (lambda: None, "of type function"),
    ],
)
def test_what_is_no_callback_is_refused_before_any_step(callbacks, words, batches_extracted):
    with pytest.raises(ValueError, match=words):
        fine_tune(small(), X, Y, validation_data=VALIDATION, callbacks=callbacks)
    assert batches_extracted == []


def test_a_second_switch_is_refused_with_what_to_do_instead():
    with pytest.raises(ValueError, match="makes its own.*Give its arguments to `fine_tune`"):
        fine_tune(small(), X, Y, validation_data=VALIDATION, callbacks=UnfreezeAtConvergence(1e-4))


def test_a_generator_that_ends_is_refused_before_any_step(batches_extracted):
    with pytest.raises(ValueError, match="A generator needs `steps_per_epoch`"):
        fine_tune(small(), generator(), validation_data=VALIDATION)
    assert batches_extracted == []


@pytest.mark.eager
def test_one_callback_and_none_in_silence(capsys):
    one = Events()
    for callbacks in (one, None):
        run = {"epochs": 2, "max_frozen_epochs": 1, "callbacks": callbacks, **SETTINGS}
        fine_tune(small(), X, Y, **run)
    assert one.events[-1] == "train ends"
    assert capsys.readouterr().out == ""


@pytest.mark.eager
def test_losses_before_the_split_count_in_both_stages():
    def regularized():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        x = keras.layers.ActivityRegularization(l2=1.0)(inputs)
        x = FrozenBackbone(models.functional(["dense"]))(x)
        model = keras.Model(inputs, keras.layers.Dense(1)(x), name="functional")
        model.compile(keras.optimizers.SGD(0.02, momentum=0.9), "mse", metrics=["mae"])
        return model

    check_same(epochs=2, build=regularized, max_frozen_epochs=1)


class Averages(keras.callbacks.Callback):
    """Moves a frozen layer towards another, as a teacher that is an average of its student."""

    def __init__(self, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher, student

    def on_epoch_end(self, epoch, logs=None):
        for mine, theirs in zip(self.teacher.weights, self.student.weights, strict=True):
            mine.assign(0.5 * mine + 0.5 * theirs)


def build_with_teacher():
    keras.utils.set_random_seed(0)
    student, teacher = models.functional(["dense"]), models.functional(["dense"])
    teacher.trainable = False
    inputs = keras.Input((4,))
    features = keras.layers.concatenate([FrozenBackbone(student)(inputs), teacher(inputs)])
    model = keras.Model(inputs, keras.layers.Dense(1)(features))
    model.compile(keras.optimizers.SGD(0.02, momentum=0.9), "mse", metrics=["mae"])
    return model, Averages(teacher, student)


@pytest.mark.slow
@pytest.mark.eager
def test_a_guard_among_the_callbacks_takes_the_place_of_the_one_that_is_added(capsys):
    def run(train):
        model, average = build_with_teacher()
        guard = FreezeGuard(exclude=average.teacher, check="batch")
        train(model, guard, average)
        return values_of(model)

    def in_two_steps(model, guard, average):
        order = []
        # Before the switch in the list, from where it must go behind it.
        fine_tune(
            model,
            X,
            Y,
            learning_rate=0.01,
            epochs=2,
            max_frozen_epochs=1,
            callbacks=[guard, average, Beside(order)],
            **SETTINGS,
        )
        assert [name for name in order if name in ("FreezeGuard", "UnfreezeAtConvergence")] == [
            "UnfreezeAtConvergence",
            "FreezeGuard",
        ]

    def in_one(model, guard, average):
        switch = UnfreezeAtConvergence(0.01, max_frozen_epochs=1, fine_tune_patience=3, verbose=0)
        model.fit(X, Y, epochs=2, callbacks=[average, switch, guard], **SETTINGS)

    assert run(in_two_steps) == run(in_one)
    assert capsys.readouterr().out.count("Not watched: ") == 2


class Beside(keras.callbacks.Callback):
    """Notes the names of the callbacks that it is among."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def on_train_begin(self, logs=None):
        self.names += [type(one).__name__ for one in callbacks_beside(self)]


@pytest.mark.eager
def test_a_layer_that_is_moved_is_caught_by_the_guard_that_is_added():
    model, average = build_with_teacher()
    with pytest.raises(FrozenWeightsChangedError, match=r"`FreezeGuard\(exclude=...\)`"):
        fine_tune(model, X, Y, epochs=2, callbacks=average, verbose=0)


class Scaling(keras.Model):
    """Prepares data in its own `fit`, for layers that expect prepared data, as KerasHub's tasks."""

    def fit(self, x=None, y=None, validation_data=None, **settings):
        return super().fit(x / 255, y, validation_data=(VALIDATION[0] / 255, Y[:8]), **settings)


class ScalingUnseen(keras.Model):
    """Does the same in a place that no list of methods names."""

    def _standardize_inputs(self, inputs):
        return super()._standardize_inputs(inputs / 255.0)


def scaling(kind):
    def make():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        x = FrozenBackbone(models.functional(["dense"]))(inputs)
        model = kind(inputs, keras.layers.Dense(1)(x), name="functional")
        model.compile(keras.optimizers.SGD(0.02, momentum=0.9), "mse", metrics=["mae"])
        return model

    return make


@pytest.mark.eager
@pytest.mark.parametrize(
    "kind, why",
    [(Scaling, "has its own fit"), (ScalingUnseen, "`predict` of the model.*gives something else")],
)
def test_a_model_that_prepares_data_first(kind, why, capsys, batches_extracted):
    run = {**SETTINGS, "epochs": 2}
    switch = UnfreezeAtConvergence(max_frozen_epochs=1, fine_tune_patience=3, verbose=0)
    expected = scaling(kind)().fit(X * 255, Y, callbacks=[switch], **run).history
    run["verbose"] = 2
    found = fine_tune(scaling(kind)(), X * 255, Y, max_frozen_epochs=1, **run).history
    assert found == expected
    printed = capsys.readouterr().out
    assert "trains the head through the backbone" in printed
    assert re.search(why, printed)
    assert len(batches_extracted) <= 1


def repeated(batches=2):
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).take(batches).repeat()


class Numbered(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        at = slice(8 * index, 8 * index + 8)
        return X[at], Y[at]


@pytest.mark.eager
@pytest.mark.parametrize(
    "data, steps, recorded",
    [
        (lambda: (repeated(),), 1, False),
        (lambda: (repeated(),), 2, True),
        pytest.param(lambda: (repeated(),), 3, False, marks=pytest.mark.slow),
        (lambda: (X, Y), 1, False),
        pytest.param(lambda: (X, Y), 2, True, marks=pytest.mark.slow),
        pytest.param(lambda: (generator(),), 1, False, marks=pytest.mark.slow),
        pytest.param(lambda: (Numbered(),), 1, False, marks=pytest.mark.slow),
        pytest.param(lambda: (Numbered(),), 2, True, marks=pytest.mark.slow),
    ],
)
def test_an_epoch_reads_what_fit_reads(data, steps, recorded, batches_extracted):
    run = {**SETTINGS, "steps_per_epoch": steps, "epochs": 3}
    run["validation_data"], run["validation_steps"] = repeated(), 1
    run["batch_size"] = 8 if len(data()) == 2 else None
    switch = UnfreezeAtConvergence(max_frozen_epochs=2, fine_tune_patience=3, verbose=0)
    expected = small().fit(*data(), callbacks=[switch], **run).history
    found = fine_tune(small(), *data(), max_frozen_epochs=2, **run).history
    assert found == expected
    assert bool(batches_extracted) == recorded


class Harder(Numbered):
    """Each epoch has data of its own."""

    epoch = 0

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x * (1 + self.epoch), y

    def on_epoch_end(self):
        self.epoch += 1


@pytest.mark.eager
def test_data_that_may_change_between_epochs_is_left_to_fit(batches_extracted):
    run = {"epochs": 3, "shuffle": False, "verbose": 0, "validation_data": VALIDATION}
    switch = UnfreezeAtConvergence(max_frozen_epochs=2, fine_tune_patience=3, verbose=0)
    expected = small().fit(Harder(), callbacks=[switch], **run).history
    assert fine_tune(small(), Harder(), max_frozen_epochs=2, **run).history == expected
    assert batches_extracted == []


class Iterating(Numbered):
    """As `ImageDataGenerator.flow`: a PyDataset that can also be read as an iterator."""

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration


@pytest.mark.eager
def test_a_py_dataset_that_is_an_iterator_is_no_generator(batches_extracted):
    run = {"epochs": 2, "max_frozen_epochs": 1, "verbose": 0}
    history = fine_tune(small(), Iterating(), **run)
    assert history.history["stage"] == [0, 1]
    assert batches_extracted


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return Numbered()[index % 2]


def test_data_without_an_end_is_refused_before_any_step(batches_extracted):
    for data in (repeated(), Endless()):
        with pytest.raises(ValueError, match="without an end needs `steps_per_epoch`"):
            fine_tune(small(), data, validation_data=VALIDATION)
    assert batches_extracted == []


@pytest.mark.eager
def test_validation_split_holds_out_the_last_part_as_fit_does(batches_extracted):
    weights = np.linspace(0.5, 1, 16).astype("float32")
    run = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0, "validation_split": 0.3}
    run["sample_weight"] = weights
    switch = UnfreezeAtConvergence(max_frozen_epochs=1, fine_tune_patience=3, verbose=0)
    expected = small().fit(X, Y, callbacks=[switch], **run).history
    assert fine_tune(small(), X, Y, max_frozen_epochs=1, **run).history == expected
    assert len(batches_extracted) == 2 + 1


@pytest.mark.eager
def test_the_direction_of_a_metric_is_known_as_in_fit():
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    labels = (Y > 0).astype("float32")
    stopping = keras.callbacks.EarlyStopping("val_accuracy", patience=9)
    run = {"epochs": 2, "max_frozen_epochs": 1, "callbacks": stopping, "verbose": 0}
    held_out = (VALIDATION[0], (VALIDATION[1] > 0).astype("float32"))
    history = fine_tune(model, X, labels, validation_data=held_out, monitor="val_accuracy", **run)
    assert history.history["stage"] == [0, 1]
    assert stopping.best == max(history.history["val_accuracy"])
