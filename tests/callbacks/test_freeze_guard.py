"""FreezeGuard: which weights it watches, what it says and does when one changes.

How it goes with steps that are traced: see `test_freeze_guard_and_steps`.
"""

import copy
import pickle
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    FrozenWeightsChangedError,
    StaleCompileError,
)
from tests import models
from tests.shared import as_bytes, regression_data

pytestmark = [pytest.mark.covers("part: FreezeGuard"), pytest.mark.eager]

# Four batches. Of arrays, each `fit` would trace a pipeline of its own.
DATA = tf.data.Dataset.from_tensor_slices(regression_data()).batch(4)


class At(keras.callbacks.Callback):
    """Calls a function of the model in one hook, the n-th time it is called."""

    def __init__(self, hook, n, function):
        super().__init__()
        self.calls = 0

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == n:
                function(self.model)

        setattr(self, hook, call)


def build(kinds=("dense", "batchnorm", "dense"), head=(), optimizer=None, **compile_arguments):
    wrapper = FrozenBackbone(models.functional(kinds))
    model = models.functional_outer(wrapper, head)
    model.compile(optimizer or keras.optimizers.SGD(0.01, momentum=0.9), "mse", **compile_arguments)
    return model, wrapper


def fit(model, *callbacks, epochs=2, **arguments):
    return model.fit(
        DATA, epochs=epochs, callbacks=list(callbacks), shuffle=False, verbose=0, **arguments
    )


def add_one(weight):
    weight.assign_add(np.ones(weight.shape))


def caught(model, *callbacks, **arguments):
    with pytest.raises(FrozenWeightsChangedError) as caught:
        fit(model, *callbacks, **arguments)
    return caught.value


# What is watched.


def test_head_and_seeds_may_change():
    model, _ = build(head=[keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)])
    before = as_bytes(model.weights)
    fit(model, FreezeGuard(check="batch", verbose=0))
    assert as_bytes(model.weights) != before


def test_every_weight_of_a_frozen_backbone_is_watched():
    model, wrapper = build()
    assert len(wrapper.backbone.weights) == 8
    for weight in wrapper.backbone.weights:
        with pytest.raises(FrozenWeightsChangedError) as error, FreezeGuard().watching(model):
            add_one(weight)
        assert error.value.paths == [weight.path]


def test_plain_frozen_layers_are_watched():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    bias = model.layers[0].bias
    assert caught(
        model, FreezeGuard(), At("on_train_batch_end", 1, lambda _: add_one(bias))
    ).paths == [bias.path]


def test_weights_frozen_one_by_one_are_watched():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.layers[0].kernel.trainable = False
    model.compile("sgd", "mse")
    kernel, bias = model.layers[0].weights

    fit(model, FreezeGuard(verbose=0), At("on_train_batch_end", 1, lambda _: add_one(bias)))
    error = caught(model, FreezeGuard(), At("on_train_batch_end", 1, lambda _: add_one(kernel)))

    assert error.paths == [kernel.path]


def test_a_kernel_that_lora_froze_is_watched():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.layers[0].enable_lora(2)
    model.compile("sgd", "mse")
    fit(model, FreezeGuard(verbose=0))
    kernel = model.layers[0]._kernel
    error = caught(model, FreezeGuard(), At("on_train_batch_end", 1, lambda _: add_one(kernel)))
    assert error.paths == [kernel.path]


def test_a_weight_shared_with_a_layer_that_trains_is_not_watched():
    class Tied(keras.layers.Layer):
        def __init__(self, dense):
            super().__init__()
            self.kernel = dense.kernel

        def call(self, x):
            return x @ keras.ops.transpose(self.kernel)

    dense = keras.layers.Dense(4)
    dense.build((None, 4))
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(1)(Tied(dense)(dense(inputs))))
    dense.trainable = False
    dense.kernel.trainable = True
    model.compile("sgd", "mse")
    before = np.array(dense.kernel)
    fit(model, FreezeGuard(verbose=0))
    assert not np.array_equal(np.array(dense.kernel), before)


def test_statistics_of_an_unfrozen_backbone_are_watched():
    model, wrapper = build()
    wrapper.unfreeze(train_batchnorm=True)
    model.compile("adam", "mse")
    mean = models.statistics(wrapper)[0]
    fit(model, FreezeGuard(verbose=0))
    error = caught(model, FreezeGuard(), At("on_train_batch_end", 1, lambda _: add_one(mean)))
    assert (error.paths, error.changes[0].cause) == ([mean.path], "overwritten")


def test_layers_adds_to_what_is_watched():
    model, _ = build()
    error = caught(model, FreezeGuard(layers="output"))
    assert {change.cause for change in error.changes} == {"trained"}
    assert error.paths == [weight.path for weight in model.get_layer("output").weights]


def test_a_selection_that_matches_nothing_is_an_error_before_a_step():
    model, _ = build()
    before = as_bytes(model.weights)
    with pytest.raises(ValueError, match='Did you mean "output"'):
        fit(model, FreezeGuard(layers="outputt"))
    assert as_bytes(model.weights) == before


def test_a_subclassed_model_is_watched_once_it_is_built():
    wrapper = FrozenBackbone(models.Subclassed(["dense", "batchnorm"]))
    model = models.SubclassedOuter(wrapper, [keras.layers.BatchNormalization()])
    model.compile("adam", "mse")
    guard = FreezeGuard(check="batch")
    overwrite = At("on_train_batch_end", 3, lambda _: add_one(wrapper.backbone.weights[0]))
    error = caught(model, overwrite, guard)
    assert str(error.changes[0].last_clean) == "epoch 1, batch 2"


def test_a_model_without_frozen_weights_is_no_error(capsys):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model, FreezeGuard())
    assert "nothing is frozen at the end" in capsys.readouterr().out


# What is left out.


def with_teacher():
    """A backbone, and a frozen layer beside it that a callback moves on purpose."""
    wrapper, teacher = FrozenBackbone(models.functional(["dense"])), models.functional(["dense"])
    teacher.name = "teacher"
    teacher.trainable = False
    inputs = keras.Input((4,))
    features = keras.layers.concatenate([wrapper(inputs), teacher(inputs)])
    model = keras.Model(inputs, keras.layers.Dense(1, name="output")(features))
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
    return model, wrapper, teacher


class Moves(keras.callbacks.Callback):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def on_epoch_end(self, epoch, logs=None):
        for weight in self.layer.weights:
            add_one(weight)


EXCLUDE = {
    "layer": lambda teacher: teacher,
    "layers": lambda teacher: [teacher, "output"],
    "name": lambda teacher: "teacher",
    "names": lambda teacher: ["teacher"],
    "pattern": lambda teacher: re.compile("teach.*"),
    "function": lambda teacher: lambda layer: layer is teacher,
    "layer in it": lambda teacher: teacher.layers[1],
}


@pytest.mark.parametrize("exclude", EXCLUDE.values(), ids=EXCLUDE)
def test_what_is_left_out_may_move_and_the_rest_may_not(exclude):
    model, wrapper, teacher = with_teacher()
    guard = FreezeGuard(exclude=exclude(teacher))
    with pytest.raises(FrozenWeightsChangedError) as error, guard.watching(model):
        for weight in teacher.weights:
            add_one(weight)
        guard.check()
        for weight in wrapper.weights:
            add_one(weight)
    assert error.value.paths == [weight.path for weight in wrapper.weights]


def test_it_says_what_is_left_out(capsys):
    model, wrapper, teacher = with_teacher()
    guard = FreezeGuard(exclude=["teacher"])
    fit(model, Moves(teacher), guard)
    out = capsys.readouterr().out
    assert "all 2 weights that must not change (20 parameters)" in out
    assert "Not watched: " in out and "(2 weights that must not change otherwise)." in out
    error = caught(model, Moves(teacher), Moves(wrapper), guard)
    assert error.paths == [weight.path for weight in wrapper.weights]


def test_without_leaving_it_out_the_error_says_how_to():
    model, _, teacher = with_teacher()
    error = caught(model, Moves(teacher), FreezeGuard())
    assert "`FreezeGuard(exclude=...)`" in str(error)


def test_what_is_left_out_goes_before_what_is_watched_in_addition():
    model, _, _ = with_teacher()
    fit(model, FreezeGuard(layers="output", exclude="output", verbose=0))


def test_leaving_out_all_says_so(capsys):
    model, wrapper, _ = with_teacher()
    fit(model, Moves(wrapper), FreezeGuard(exclude="all"))
    assert "(4 weights that must not change otherwise)" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["layers", "exclude"])
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (lambda: "teachr", 'Did you mean "teacher"'),
        (lambda: ["output", "teachr"], 'Did you mean "teacher"'),
        (lambda: lambda layer: False, "selects no layer"),
        (lambda: keras.layers.Dense(1, name="teacher"), "which is not one of the model"),
        (lambda: [keras.layers.Dense(1, name="teacher")], r"or its name, as in .*='teacher'"),
    ],
    ids=["name", "names", "function", "layer", "layers"],
)
def test_a_choice_of_no_layer_of_the_model_is_an_error_before_a_step(argument, chosen, message):
    model, _, _ = with_teacher()
    before = as_bytes(model.weights)
    with pytest.raises(ValueError, match=message) as error:
        fit(model, FreezeGuard(**{argument: chosen()}))
    assert str(error.value).startswith(f"`{argument}")
    assert as_bytes(model.weights) == before


def test_leaving_out_layers_without_weights_is_an_error():
    model, _, _ = with_teacher()
    with pytest.raises(ValueError, match="`exclude` selects concat.*, without a weight"):
        fit(model, FreezeGuard(exclude="concatenate.*"))


@pytest.mark.parametrize("argument", ["layers", "exclude"])
@pytest.mark.parametrize("chosen", [1.5, True, [1], {"teacher"}])
def test_what_can_choose_no_layer_is_refused_at_once(argument, chosen):
    with pytest.raises(ValueError, match=f"`{argument}=.*` is not a selection of layers"):
        FreezeGuard(**{argument: chosen})


def test_a_layer_of_a_subclassed_model_that_is_not_built_yet_is_left_out():
    model = models.SubclassedOuter(FrozenBackbone(models.functional(["dense", "batchnorm"])))
    model.compile("adam", "mse")
    layer = model.backbone
    fit(model, Moves(layer), FreezeGuard(exclude="frozen_backbone.*", verbose=0), epochs=2)


# When it looks.


@pytest.mark.parametrize(
    ("check", "batch", "last_clean", "detected"),
    [
        ("epoch", 6, "epoch 2, start", "epoch 2, batch 4"),
        ("batch", 6, "epoch 2, batch 1", "epoch 2, batch 2"),
        (2, 5, "epoch 2, start", "epoch 2, batch 2"),
        pytest.param(3, 8, "epoch 2, batch 3", "epoch 2, batch 4", marks=pytest.mark.slow),
    ],
)
def test_the_first_check_after_a_change_reports_it(check, batch, last_clean, detected):
    model, wrapper = build()
    weight = wrapper.backbone.weights[0]
    overwrite = At("on_train_batch_end", batch, lambda _: add_one(weight))
    error = caught(model, overwrite, FreezeGuard(check=check))
    change = error.changes[0]
    assert (str(change.last_clean), str(change.detected)) == (last_clean, detected)
    assert detected in str(error)
    assert last_clean in str(error)


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_test_end", "on_train_end"])
def test_a_change_by_a_later_callback_is_reported(hook):
    model, wrapper = build()
    overwrite = At(hook, 1, lambda _: add_one(wrapper.backbone.weights[0]))
    callbacks = [overwrite, FreezeGuard()] if hook == "on_train_end" else [FreezeGuard(), overwrite]
    error = caught(model, *callbacks, validation_data=DATA)
    assert error.changes[0].cause == "overwritten"


def test_what_is_loaded_before_the_first_epoch_is_what_must_stay():
    model, wrapper = build()
    load = At("on_train_begin", 1, lambda _: add_one(wrapper.backbone.weights[0]))
    fit(model, FreezeGuard(verbose=0), load)


def test_weights_may_change_between_fits():
    model, wrapper = build()
    guard = FreezeGuard(verbose=0)
    fit(model, guard)
    add_one(wrapper.backbone.weights[0])
    fit(model, guard)


def test_batches_are_only_hooked_when_asked_for():
    def has_batch_hook(guard):
        method = guard.on_train_batch_end
        return not getattr(method, "_is_default", False)

    assert not has_batch_hook(FreezeGuard())
    assert has_batch_hook(FreezeGuard(check="batch"))
    assert has_batch_hook(FreezeGuard(check=5))


@pytest.mark.parametrize(
    ("hook", "calls_super"),
    [
        ("on_train_batch_end", True),
        ("on_batch_end", False),
        pytest.param("on_train_batch_end", False, marks=pytest.mark.slow),
        pytest.param("on_batch_end", True, marks=pytest.mark.slow),
    ],
)
def test_a_subclass_keeps_its_own_hook(hook, calls_super):
    seen = []

    def own(self, batch, logs=None):
        seen.append(batch)
        if calls_super:
            getattr(super(Subclass, self), hook)(batch, logs)

    Subclass = type("Subclass", (FreezeGuard,), {hook: own})
    model, wrapper = build(["dense"])
    overwrite = At("on_train_batch_end", 3, lambda _: add_one(wrapper.weights[0]))
    error = caught(model, overwrite, Subclass(check="batch"), epochs=1)
    assert seen == [0, 1, 2]
    assert str(error.changes[0].detected) == "epoch 1, batch 3"


# What it does.


def test_raising_leaves_the_model_as_it_was_found():
    model, wrapper = build()
    seen = {}

    def overwrite(_):
        add_one(wrapper.backbone.weights[0])
        seen["weights"] = as_bytes(model.weights)

    caught(model, At("on_train_batch_end", 3, overwrite), FreezeGuard(check="batch"))
    assert as_bytes(model.weights) == seen["weights"]
    fit(model, FreezeGuard(verbose=0))


def test_the_error_carries_differences():
    model, wrapper = build()
    bias = wrapper.backbone.layers[1].bias

    def overwrite(_):
        bias.assign(np.array(bias) + [0.0, 0.5, 0.0, -2.0])

    change = caught(model, FreezeGuard(), At("on_epoch_end", 1, overwrite)).changes[0]
    assert change.path == bias.path
    assert change.difference.tolist() == [0.0, 0.5, 0.0, -2.0]
    assert change.largest_change == 2.0
    assert (change.detected.epoch, change.detected.batch) == (1, -1)


def test_warning_comes_once_for_each_weight():
    model, wrapper = build()
    first, second = wrapper.backbone.weights[:2]
    guard = FreezeGuard(action="warn", check="batch", verbose=0)
    with pytest.warns(UserWarning, match="must not change") as warned:
        fit(
            model,
            At("on_train_batch_end", 2, lambda _: add_one(first)),
            At("on_train_batch_end", 4, lambda _: add_one(first)),
            At("on_train_batch_end", 6, lambda _: add_one(second)),
            guard,
        )
    messages = [str(w.message) for w in warned if "must not change" in str(w.message)]
    assert [path in m for m in messages for path in (first.path, second.path)] == [
        True,
        False,
        False,
        True,
    ]


def test_restoring_puts_the_values_back_and_counts(capsys):
    model, wrapper = build()
    weight = wrapper.backbone.weights[0]
    before = as_bytes([weight])
    guard = FreezeGuard(action="restore", check="batch")
    with pytest.warns(UserWarning, match="They were restored") as warned:
        fit(
            model,
            At("on_train_batch_end", 2, lambda _: add_one(weight)),
            At("on_train_batch_end", 4, lambda _: add_one(weight)),
            guard,
        )
    assert as_bytes([weight]) == before
    assert guard.restored == {weight.path: 2}
    assert len([w for w in warned if "restored" in str(w.message)]) == 1
    assert "restored 1 weight, 2 times in all" in capsys.readouterr().out


def test_restoring_does_not_change_how_the_rest_trains():
    def weights_after(*callbacks):
        keras.utils.set_random_seed(1)
        model, wrapper = build()
        overwrite = At("on_epoch_end", 1, lambda _: add_one(wrapper.backbone.weights[0]))
        fit(model, *([overwrite, *callbacks] if callbacks else []))
        return [value for _, value in as_bytes(model.weights)]

    with pytest.warns(UserWarning, match="restored"):
        restored = weights_after(FreezeGuard(action="restore", verbose=0))
    assert restored == weights_after()


def test_a_long_table_is_cut():
    model, wrapper = build(["dense"] * 12)
    error = caught(
        model,
        At("on_epoch_end", 1, lambda _: [add_one(w) for w in wrapper.backbone.weights]),
        FreezeGuard(),
    )
    assert len(error.changes) == 24
    assert "and 4 more" in str(error)


# Beside other callbacks, and other ways to train.


def test_beside_callbacks_that_save_and_load(tmp_path):
    def run(stop_after):
        keras.utils.set_random_seed(0)
        model, _ = build()

        def stop(epoch, logs):
            if epoch + 1 == stop_after:
                raise KeyboardInterrupt

        fit(
            model,
            FreezeGuard(check="batch", verbose=0),
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
            keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True),
            keras.callbacks.LambdaCallback(on_epoch_end=stop),
            validation_data=DATA,
            epochs=3,
        )

    with pytest.raises(KeyboardInterrupt):
        run(stop_after=2)
    run(stop_after=None)


def test_a_generator_of_unknown_length():
    model, wrapper = build()
    x, y = regression_data()

    def batches():
        for _ in range(3):
            yield x, y

    guard = FreezeGuard()
    overwrite = At("on_train_batch_end", 2, lambda _: add_one(wrapper.backbone.weights[0]))
    with pytest.raises(FrozenWeightsChangedError) as caught:
        model.fit(batches(), callbacks=[guard, overwrite], verbose=0)
    assert str(caught.value.changes[0].detected) == "epoch 1, end"


# Outside `fit`.


def test_watching_checks_at_its_end():
    model, wrapper = build()
    x, y = regression_data()
    with pytest.raises(FrozenWeightsChangedError) as caught, FreezeGuard().watching(model):
        model.train_on_batch(x, y)
        wrapper.backbone.weights[0].assign(np.zeros((4, 4)))
    change = caught.value.changes[0]
    assert (change.cause, str(change.last_clean)) == ("overwritten", "the start")


def test_watching_checks_when_asked_to():
    model, wrapper = build()
    x, y = regression_data()
    with FreezeGuard().watching(model) as guard:
        for _ in range(3):
            model.train_on_batch(x, y)
            guard.check()
        kernel = wrapper.backbone.weights[0]
        before = np.array(kernel)
        add_one(kernel)
        with pytest.raises(FrozenWeightsChangedError, match="check 3  .* check 4"):
            guard.check()
        kernel.assign(before)
        guard.check()


def test_watching_does_not_hide_another_error():
    model, wrapper = build()
    with pytest.raises(ZeroDivisionError), FreezeGuard().watching(model):
        add_one(wrapper.backbone.weights[0])
        raise ZeroDivisionError


def test_watching_a_training_loop_with_its_own_optimizer():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.layers[0].trainable = False
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.1)
    optimizer.build(model.weights)
    guard = FreezeGuard().watching(model, optimizer=optimizer)
    with pytest.raises(FrozenWeightsChangedError) as caught, guard:
        optimizer.apply([keras.ops.zeros(w.shape) for w in model.weights], model.weights)
    assert {change.cause for change in caught.value.changes} == {"optimizer side effect"}


def test_watching_around_fit():
    model, wrapper = build()
    guard = FreezeGuard(verbose=0)
    with pytest.raises(FrozenWeightsChangedError), guard.watching(model):
        fit(model, guard)
        add_one(wrapper.backbone.weights[0])


def test_checking_nothing_is_an_error():
    guard = FreezeGuard(verbose=0)
    with pytest.raises(RuntimeError, match="with guard.watching"):
        guard.check()
    model, _ = build()
    fit(model, guard)
    with pytest.raises(RuntimeError, match="with guard.watching"):
        guard.check()


# Arguments and messages.


@pytest.mark.parametrize("check", ["step", 0, -1, 1.5, True, None])
def test_check_must_be_a_frequency(check):
    with pytest.raises(ValueError, match="`check` must be"):
        FreezeGuard(check=check)


@pytest.mark.parametrize("action", ["stop", None])
def test_action_must_be_known(action):
    with pytest.raises(ValueError, match="`action` must be one of"):
        FreezeGuard(action=action)


def test_it_says_what_it_has_watched(capsys):
    model, _ = build()
    fit(model, FreezeGuard())
    assert capsys.readouterr().out == (
        "FreezeGuard: all 8 weights that must not change (56 parameters) are as they were, bit for "
        "bit.\n"
    )


def test_it_says_why_weights_are_frozen_where_the_rest_trains(capsys):
    model, wrapper = build()
    wrapper.unfreeze()
    model.compile("sgd", "mse")
    fit(model, FreezeGuard())
    out = capsys.readouterr().out
    assert "all 4 weights" in out
    assert "BatchNormalization's (gamma, beta, moving_mean, moving_variance), constant" in out


def test_a_new_guard_can_be_copied_and_pickled():
    # KerasTuner copies callbacks for each trial.
    guard = FreezeGuard(check=2, action="warn", verbose=0)
    for twin in (copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))):
        assert twin.on_train_batch_end.__self__ is twin
        model, wrapper = build(["dense"])
        overwrite = At("on_train_batch_end", 2, lambda _, w=wrapper: add_one(w.weights[0]))
        with pytest.warns(UserWarning, match="must not change"):
            fit(model, overwrite, twin)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
}


@pytest.mark.parametrize("twin_of", COPIES.values(), ids=COPIES)
def test_a_used_guard_can_be_copied_and_pickled(twin_of):
    model, wrapper = build(["dense"])
    overwrite = At("on_train_batch_end", 2, lambda _: add_one(wrapper.weights[0]))
    guard = FreezeGuard(check="batch", action="restore", exclude="output", verbose=0)
    with pytest.warns(UserWarning, match="must not change"):
        fit(model, overwrite, guard, epochs=1)

    twin = twin_of(guard)

    assert (twin.action, twin.exclude, twin.model) == ("restore", "output", None)
    assert twin.restored == guard.restored == {wrapper.weights[0].path: 1}
    with pytest.raises(RuntimeError, match="with guard.watching"):
        twin.check()
    other, other_wrapper = build(["dense"])
    before = as_bytes(other_wrapper.weights)
    with pytest.warns(UserWarning, match="must not change"):
        fit(
            other,
            At("on_train_batch_end", 2, lambda _: add_one(other_wrapper.weights[0])),
            twin,
            epochs=1,
        )
    assert as_bytes(other_wrapper.weights) == before
    assert twin.restored == {other_wrapper.weights[0].path: 1}


def test_a_guard_can_be_copied_while_it_watches():
    model, wrapper = build(["dense"])
    guard = FreezeGuard(check="batch", verbose=0)
    with pytest.raises(FrozenWeightsChangedError), guard.watching(model):
        twin = copy.deepcopy(guard)
        with pytest.raises(RuntimeError, match="with guard.watching"):
            twin.check()
        add_one(wrapper.weights[0])
        guard.check()


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copy_leaves_out_the_same_layer(twin_of):
    model, _, teacher = with_teacher()
    guard = FreezeGuard(exclude=[teacher], verbose=0)
    twin = twin_of([guard])[0]
    fit(model, Moves(teacher), twin, epochs=2)


def test_its_errors_can_be_pickled():
    model, wrapper = build(["dense"])
    error = caught(
        model, At("on_epoch_end", 1, lambda _: add_one(wrapper.weights[0])), FreezeGuard()
    )
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.paths) == (str(error), error.paths)
    stale = StaleCompileError("stale", still_training=["a"], not_training=["b"])
    twin = pickle.loads(pickle.dumps(stale))
    assert (str(twin), twin.still_training, twin.not_training) == ("stale", ("a",), ("b",))


def test_a_layer_that_writes_its_weights_in_training_mode_is_told_what_to_do():
    layers = [keras.layers.SpectralNormalization(keras.layers.Dense(4)), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    error = caught(model, FreezeGuard())
    assert [path.split("/")[-1] for path in error.paths] == ["kernel", "vector_u"]
    assert "such as SpectralNormalization or a torch module with BatchNorm, belongs" in str(error)

    wrapped = keras.Sequential([keras.Input((4,)), FrozenBackbone(layers[0]), layers[1]])
    wrapped.compile("sgd", "mse")
    fit(wrapped, FreezeGuard(verbose=0))


def test_quietly(capsys):
    model, _ = build()
    fit(model, FreezeGuard(verbose=0))
    assert capsys.readouterr().out == ""
