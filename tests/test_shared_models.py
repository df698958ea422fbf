"""Several models of the same layers: what one unfreezes, the others must notice."""

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence
from keras_tl.internals import models as inside_models
from tests import models
from tests.shared import as_bytes, regression_data

X, Y = regression_data()
ON_JAX = pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Only JAX compiles a step with the weights by position.",
)


def build(regularizer=None):
    """A model, and another one of the same two blocks of one shape. Both are compiled."""
    blocks = [
        keras.layers.Dense(4, "tanh", kernel_regularizer=regularizer, name=f"block{n}")
        for n in (1, 2)
    ]
    wrapper = FrozenBackbone(keras.Sequential([keras.Input((4,)), *blocks]))
    inputs = keras.Input((4,))
    features = wrapper(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(features))
    other = keras.Model(inputs, keras.layers.Dense(1)(features))
    for one in (model, other):
        one.compile(keras.optimizers.Adam(0.05), "mse")
    return model, other, wrapper


def error_of_predict(model):
    return np.abs(model.predict(X, verbose=0) - keras.ops.convert_to_numpy(model(X))).max()


def error_of_evaluate(model):
    outputs = keras.ops.convert_to_numpy(model(X))
    loss = float(np.mean((outputs - Y) ** 2)) + float(sum(model.losses))
    return abs(model.evaluate(X, Y, verbose=0) - loss)


class Compare(keras.callbacks.Callback):
    """Keeps the largest errors of another model at each epoch's end."""

    def __init__(self, other):
        super().__init__()
        self.other, self.errors = other, []

    def on_epoch_end(self, epoch, logs=None):
        _ = self.model  # Gives the weights their values, on JAX.
        self.errors.append((error_of_predict(self.other), error_of_evaluate(self.other)))


@pytest.mark.parametrize("regularizer", [pytest.param(None, marks=pytest.mark.slow), "l2"])
def test_another_model_predicts_and_evaluates_rightly_after_switches(regularizer):
    model, other, _ = build(regularizer)
    stages = [Stage("block2", 0.05, epochs=2), Stage("block1", 0.05, epochs=2)]
    switch = UnfreezeAtConvergence(
        stages=stages, monitor="loss", max_frozen_epochs=1, restore_best_weights=False, verbose=0
    )
    compare = Compare(other)
    model.fit(X, Y, epochs=5, verbose=0, callbacks=[switch, compare])
    assert np.max(compare.errors) < 1e-5


def test_predictions_are_right_after_unfreezing_without_compiling():
    model, other, wrapper = build()
    wrapper.unfreeze("block1")
    for one in (model, other):
        one.compile("sgd", "mse")
        one.evaluate(X, Y, verbose=0), one.predict(X, verbose=0)
    wrapper.freeze()
    wrapper.unfreeze("block2")
    for one in (model, other, wrapper.backbone):
        assert error_of_predict(one) < 1e-5
    for one in (model, other):
        assert error_of_evaluate(one) < 1e-5


@ON_JAX
def test_another_model_is_not_trained_with_weights_in_the_wrong_places():
    _, other, wrapper = build()
    wrapper.unfreeze("block1")
    other.compile("adam", "mse")
    other.fit(X, Y, verbose=0)
    wrapper.freeze("block1")
    wrapper.unfreeze("block2")
    before = as_bytes(other.weights)
    for train in (lambda: other.fit(X, Y, verbose=0), lambda: other.train_on_batch(X, Y)):
        with pytest.raises(ValueError, match="Compile it again"):
            train()
    assert as_bytes(other.weights) == before

    other.compile("adam", "mse")
    other.fit(X, Y, verbose=0)
    assert as_bytes(other.weights) != before


@ON_JAX
def test_another_model_trains_on_if_its_weights_are_those_it_was_compiled_for():
    _, other, wrapper = build()
    other.fit(X, Y, verbose=0)
    wrapper.unfreeze("block1")
    wrapper.freeze("block1")
    before = as_bytes(wrapper.weights)
    other.fit(X, Y, verbose=0)
    assert as_bytes(wrapper.weights) == before


@ON_JAX
def test_unfreezing_in_a_running_fit_is_an_error_that_keeps_the_weights():
    model, _, wrapper = build()
    unfreeze = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: wrapper.unfreeze("block1"))
    with pytest.raises(ValueError, match="Compile it again"):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[unfreeze])
    assert error_of_predict(model) < 1e-5


def test_a_model_that_shares_nothing_keeps_what_it_has_compiled():
    _, _, wrapper = build()
    stranger = models.functional(["dense"])
    stranger.predict(X, verbose=0)
    function = stranger.predict_function
    wrapper.unfreeze()
    assert stranger.predict_function is function


@ON_JAX
def test_models_are_looked_for_only_where_a_flag_changes(monkeypatch):
    asked, (_, _, wrapper) = [], build()
    monkeypatch.setattr(inside_models, "_compiled_models", lambda _: asked.append(1) or [])
    wrapper.freeze()
    assert not asked
    wrapper.unfreeze("block2")
    assert len(asked) == 1
    wrapper.unfreeze("block2")
    assert len(asked) == 1
    wrapper.freeze()
    assert len(asked) == 2
    assert not wrapper.trainable_weights
