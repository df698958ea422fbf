"""UnfreezeAtConvergence in the many ways in which people call `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from tests import models
from tests.shared import (
    SEVERAL_STEPS,
    Recorder,
    Scripted,
    as_bytes,
    regression_data,
    values_of,
)

X, Y = regression_data(24)


def backbone():
    return FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))


def unfreezer(**arguments):
    return UnfreezeAtConvergence(1e-2, **{"max_frozen_epochs": 2, "verbose": 0} | arguments)


def check(model, wrapper, *data, epochs=3, callback=None, **fit_arguments):
    """Fits over a switch, and checks who moved when. Returns the History."""
    callback = callback or unfreezer(restore_best_weights=False)
    backbone = Recorder(lambda model: as_bytes(wrapper.trainable_weights or wrapper.weights))
    statistics = as_bytes(models.statistics(wrapper))
    before = as_bytes(wrapper.weights)
    fit_arguments.setdefault("validation_data", (X, Y))
    history = model.fit(
        *data, epochs=epochs, callbacks=[callback, backbone], verbose=0, **fit_arguments
    )
    stages = history.history["stage"]
    assert set(stages) == {0, 1}
    frozen = [record for record, stage in zip(backbone.records, stages) if stage == 0]
    tuned = [record for record, stage in zip(backbone.records, stages) if stage == 1]
    assert all(record == before for record in frozen)
    unmoved = dict(before)
    assert all(unmoved[path] != value for path, value in tuned[-1])
    assert as_bytes(models.statistics(wrapper)) == statistics
    return history


@pytest.mark.parametrize(
    "compile_arguments",
    [
        {},
        {"run_eagerly": True},
        # Of a Functional model: test_modes_by_hand.
        pytest.param({"steps_per_execution": 2}, marks=[SEVERAL_STEPS, pytest.mark.slow]),
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_subclassed_model(compile_arguments):
    wrapper = backbone()
    model = models.SubclassedOuter(wrapper)
    model.compile("adam", "mse", metrics=["mae"], **compile_arguments)
    check(model, wrapper, X, Y, batch_size=8)


@pytest.mark.covers("model: subclassed, built by `fit`")
def test_subclassed_model_that_is_not_built_before_fit():
    wrapper = FrozenBackbone(models.Subclassed(["dense", "batchnorm"]))
    model = models.SubclassedOuter(wrapper)
    model.compile("adam", "mse")
    assert not model.built
    first = Recorder(lambda model: as_bytes(wrapper.weights))
    callback = unfreezer(restore_best_weights=False)
    model.fit(X, Y, validation_data=(X, Y), epochs=4, callbacks=[callback, first], verbose=0)
    assert len(wrapper.trainable_weights) == 2
    before, frozen, _, after = (dict(record) for record in first.records)
    assert before == frozen
    moved = {path.split("/")[-1] for path in before if before[path] != after[path]}
    assert moved == {"kernel", "bias"}


@pytest.mark.eager
def test_best_weights_of_a_model_that_is_not_built_before_fit():
    model = models.SubclassedOuter(FrozenBackbone(models.Subclassed(["dense"])))
    model.compile("adam", "mse")
    recorder = Recorder(values_of)
    script = Scripted("score", [1, 0, 2, 3])
    callback = unfreezer(monitor="score", mode="min", max_frozen_epochs=3)
    model.fit(X, Y, epochs=4, callbacks=[script, recorder, callback], verbose=0)
    assert values_of(model) == recorder.records[1] != recorder.records[-1]


def test_plain_backbone_in_a_model_that_is_not_built_before_fit():
    base = models.Subclassed(["dense", "batchnorm"])
    model = models.SubclassedOuter(base)
    model.compile("adam", "mse")
    records = Recorder(lambda model: as_bytes(base.weights))
    callback = unfreezer(backbone=base, restore_best_weights=False)
    model.fit(X, Y, validation_data=(X, Y), epochs=4, callbacks=[callback, records], verbose=0)
    before, frozen, _, after = (dict(record) for record in records.records)
    assert before == frozen
    moved = {path.split("/")[-1] for path in before if before[path] != after[path]}
    assert moved == {"kernel", "bias"}


@pytest.mark.eager
def test_empty_selection_in_a_model_that_is_not_built_before_fit():
    model = models.SubclassedOuter(FrozenBackbone(models.Subclassed(["dense"])))
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match='`layers="none_such"` matches no layer'):
        model.fit(
            X, Y, validation_data=(X, Y), callbacks=[unfreezer(layers="none_such")], verbose=0
        )


def multi_output_model(wrapper):
    inputs = keras.Input((models.FEATURES,))
    x = wrapper(inputs)
    left = keras.layers.Dense(1, name="left")(x)
    right = keras.layers.Dense(1, name="right")(x)
    model = keras.Model(inputs, {"left": left, "right": right})
    model.compile(
        "adam",
        loss={"left": "mse", "right": "mae"},
        loss_weights={"left": 0.5, "right": 2.0},
        weighted_metrics={"left": ["mae"], "right": ["mse"]},
    )
    return model


@pytest.mark.eager
@pytest.mark.covers("model: several outputs with weights and metrics")
def test_several_outputs_with_weighted_metrics():
    wrapper = backbone()
    targets = {"left": Y, "right": -Y}
    weights = {"left": np.ones(len(Y)), "right": np.linspace(0, 1, len(Y))}
    validation = (X, targets, weights)
    model = multi_output_model(wrapper)
    history = check(model, wrapper, X, targets, sample_weight=weights, validation_data=validation)
    assert "val_right_mse" in history.history


@pytest.mark.eager
def test_metrics_after_the_switch_are_what_evaluate_says():
    wrapper = backbone()
    model = models.functional_outer(wrapper)
    model.compile("adam", "mse", metrics=["mae"])
    measured = Recorder(lambda model: None)

    class Evaluate(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            measured.records.append((logs["val_loss"], logs["val_mae"]))

    model.fit(
        X,
        Y,
        validation_data=(X, Y),
        epochs=4,
        callbacks=[unfreezer(restore_best_weights=False), Evaluate()],
        verbose=0,
    )
    assert measured.records == [tuple(model.evaluate(X, Y, verbose=0))]


def error_of(y, predicted):
    return keras.ops.mean((predicted - y) ** 2)


class StepOfTensorFlow:
    """The custom step of Keras' guide for this backend, with its own loss tracker."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = error_of(y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}

    def test_step(self, data):
        x, y = data
        self.tracker.update_state(error_of(y, self(x, training=False)))
        return {"loss": self.tracker.result()}


class StepOfTorch:
    """The same for torch."""

    test_step = StepOfTensorFlow.test_step

    def train_step(self, data):
        import torch

        x, y = data
        self.zero_grad()
        loss = error_of(y, self(x, training=True))
        loss.backward()
        weights = self.trainable_weights
        with torch.no_grad():
            self.optimizer.apply([weight.value.grad for weight in weights], weights)
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}


class StepOfJax:
    """The same for JAX."""

    def train_step(self, state, data):
        import jax

        x, y = data
        trainable, non_trainable, optimizer, metrics = state

        def loss_of(values):
            predicted, after = self.stateless_call(values, non_trainable, x, training=True)
            return error_of(y, predicted), after

        (loss, non_trainable), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        metrics = self.tracker.stateless_update_state(metrics, loss)
        logs = {"loss": self.tracker.stateless_result(metrics)}
        return logs, (trainable, non_trainable, optimizer, metrics)

    def test_step(self, state, data):
        x, y = data
        trainable, non_trainable, metrics = state
        predicted, non_trainable = self.stateless_call(trainable, non_trainable, x, training=False)
        metrics = self.tracker.stateless_update_state(metrics, error_of(y, predicted))
        logs = {"loss": self.tracker.stateless_result(metrics)}
        return logs, (trainable, non_trainable, metrics)


STEPS = {"tensorflow": StepOfTensorFlow, "torch": StepOfTorch, "jax": StepOfJax}


class CustomStep(STEPS[keras.backend.backend()], keras.Model):
    def __init__(self, wrapper):
        super().__init__()
        self.wrapper = wrapper
        self.dense = keras.layers.Dense(1)
        self.tracker = keras.metrics.Mean(name="loss")

    def call(self, x, training=None):
        return self.dense(self.wrapper(x))

    @property
    def metrics(self):
        return [self.tracker]


@pytest.mark.covers("model: `train_step` of its own")
def test_custom_train_step():
    wrapper = backbone()
    model = CustomStep(wrapper)
    model.compile("adam")
    check(model, wrapper, X, Y)


@pytest.mark.eager
@pytest.mark.covers("model: `compile` of its own")
def test_overridden_compile():
    class Overridden(CustomStep):
        def compile(self, my_optimizer):
            super().compile()
            self.optimizer = my_optimizer

    wrapper = backbone()
    model = Overridden(wrapper)
    model.compile(keras.optimizers.SGD(0.1))
    check(model, wrapper, X, Y)
    assert isinstance(model.optimizer, keras.optimizers.SGD)


@pytest.mark.eager
def test_model_without_an_optimizer_is_refused():
    class Without(CustomStep):
        def compile(self):
            super().compile(optimizer=None)

    model = Without(backbone())
    model.compile()
    with pytest.raises(ValueError, match="has no `optimizer`.*`compile` must set"):
        model.fit(X, Y, validation_data=(X, Y), callbacks=[unfreezer()], verbose=0)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(index * 8, index * 8 + 8)
        return X[part], Y[part]


def generator():
    while True:
        yield X[:8], Y[:8]


DATASET = tf.data.Dataset.from_tensor_slices((X, Y))


def kind_of_data(name, make, arguments=None):
    covers = pytest.mark.covers(f"data: {name}")
    # One is compiled: from where a batch comes makes no other step.
    marks = [covers] if name == "tf.data.Dataset" else [covers, pytest.mark.eager]
    return pytest.param(make, arguments or {}, id=name, marks=marks)


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        kind_of_data("tf.data.Dataset", lambda: DATASET.batch(8)),
        kind_of_data("PyDataset", lambda: Batches()),
        kind_of_data("generator", generator, {"steps_per_epoch": 2}),
    ],
)
def test_kinds_of_data(data, arguments):
    wrapper = backbone()
    model = models.functional_outer(wrapper)
    model.compile("adam", "mse")
    check(model, wrapper, data(), **arguments)


@pytest.mark.eager
@pytest.mark.covers("data: validation split")
def test_validation_split():
    wrapper = backbone()
    model = models.functional_outer(wrapper)
    model.compile("adam", "mse")
    check(model, wrapper, X, Y, validation_split=0.5, validation_data=None)


@pytest.mark.eager
def test_validation_in_some_epochs_only():
    wrapper = backbone()
    model = models.functional_outer(wrapper)
    model.compile(keras.optimizers.SGD(10.0), "mse")
    callback = unfreezer(max_frozen_epochs=None, patience=1, restore_best_weights=False)
    history = check(model, wrapper, X, Y, epochs=6, callback=callback, validation_freq=2)
    assert history.history["stage"] == [0, 0, 0, 0, 1, 1]


@pytest.mark.eager
def test_initial_epoch():
    wrapper = backbone()
    model = models.functional_outer(wrapper)
    model.compile("adam", "mse")
    callback = unfreezer(restore_best_weights=False)
    history = check(model, wrapper, X, Y, callback=callback, initial_epoch=5, epochs=9)
    assert history.history["stage"] == [0, 0, 1, 1]
    assert callback.transitions[0].epoch == 7


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        wrapper = backbone()
        model = models.functional_outer(wrapper)
        model.compile("adam", "mse")
        check(model, wrapper, X, Y)
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


def test_predictions_are_the_same_before_and_after_the_switch():
    wrapper = backbone()
    model = models.functional_outer(wrapper)
    model.compile("adam", "mse")
    model.predict(X, verbose=0)

    class Compare(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            predicted = self.model.predict(X, verbose=0)
            called = keras.ops.convert_to_numpy(self.model(X))
            assert np.allclose(predicted, called, atol=1e-6)

    model.fit(X, Y, validation_data=(X, Y), epochs=4, callbacks=[unfreezer(), Compare()], verbose=0)
