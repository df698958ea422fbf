"""Stale compiles and causes that a `fit` with Keras' own step does not meet."""

import keras
import numpy as np
import pytest

from keras_tl import FreezeGuard, FrozenWeightsChangedError, StaleCompileError
from keras_tl.guard.diagnosis import stale_compile
from tests.shared import only_on, regression_data

OWN_STEP = only_on("tensorflow", "A step of one's own is written for one backend.")


def layers():
    return [keras.layers.Dense(4, name="body"), keras.layers.Dense(1, name="head")]


class TrainsTheHead(keras.Sequential):
    """Its step trains the last layer alone, whatever is trainable."""

    def train_step(self, data):
        x, y = data
        loss = self.compute_loss(x, y, self(x, training=True))
        weights = self.layers[-1].trainable_variables
        self.optimizer.apply([keras.ops.ones_like(weight) for weight in weights], weights)
        return {"loss": loss}


def train_steps(model):
    x, y = regression_data()
    model.fit(x, y, batch_size=4, callbacks=[FreezeGuard(verbose=0)], verbose=0)


@OWN_STEP
def test_a_step_that_trains_some_of_the_weights_is_not_stale():
    model = TrainsTheHead([keras.Input((4,)), *layers()])
    model.compile("sgd", "mse")
    train_steps(model)
    assert len(model.optimizer._trainable_variables) == 2
    train_steps(model)


@OWN_STEP
def test_such_a_step_is_stale_once_flags_have_changed():
    model = TrainsTheHead([keras.Input((4,)), *layers()])
    model.compile("sgd", "mse")
    train_steps(model)
    model.layers[0].trainable = False
    model.layers[1].trainable = False
    with pytest.raises(StaleCompileError) as caught:
        train_steps(model)
    assert [path.split("/")[-2] for path in caught.value.still_training] == ["head", "head"]


@OWN_STEP
def test_such_a_step_that_has_not_met_what_was_unfrozen_is_stale():
    model = TrainsTheHead([keras.Input((4,)), *layers()])
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    model.layers[0].trainable = True
    mismatch = stale_compile(model)
    assert [weight.path.split("/")[-2] for weight in mismatch.not_training] == ["body", "body"]


def test_an_optimizer_of_the_backends_variables_is_understood():
    model = keras.Sequential([keras.Input((4,)), *layers()])
    model.compile("sgd", "mse")
    model.optimizer.build([weight.value for weight in model.trainable_weights])
    assert not stale_compile(model)
    model.layers[0].trainable = False
    mismatch = stale_compile(model)
    assert [weight.name for weight in mismatch.still_training] == ["kernel", "bias"]
    assert mismatch.not_training == []


def test_a_model_that_is_not_compiled_is_not_stale():
    assert not stale_compile(keras.Sequential([keras.Input((4,)), *layers()]))


def test_several_optimizers_in_one_are_understood():
    sgd, adam = keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.1)
    optimizer = keras.optimizers.MultiOptimizer(lambda w: sgd if "body" in w.path else adam)
    model = keras.Sequential([keras.Input((4,)), *layers()])
    model.compile(optimizer, "mse")
    train_steps(model)
    train_steps(model)
    model.layers[0].trainable = False
    with pytest.raises(StaleCompileError):
        train_steps(model)


class AlwaysInTraining(keras.layers.BatchNormalization):
    """Does not look at whether it is trainable."""

    def call(self, inputs, training=None, mask=None):
        self.moving_mean.assign(self.moving_mean * 0.9 + keras.ops.mean(inputs, axis=0) * 0.1)
        self.moving_variance.assign(self.moving_variance * 0.9 + 0.1)
        return inputs


def test_a_batchnorm_that_ignores_its_flag_is_in_training_mode():
    norm = AlwaysInTraining()
    model = keras.Sequential([keras.Input((4,)), norm, *layers()])
    norm.trainable = False
    model.compile("sgd", "mse")
    norm.moving_variance.assign(np.full(4, 2.0))
    with pytest.raises(FrozenWeightsChangedError) as caught:
        train_steps(model)
    assert {c.cause for c in caught.value.changes} == {"BatchNormalization in training mode"}
