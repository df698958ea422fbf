"""A model that is as sure as it is right."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FrozenBackbone, scale_temperature
from tests import models
from tests.shared import values_of

pytestmark = pytest.mark.eager
ACTIVATIONS = [("linear", 3), ("softmax", 3), ("linear", 1), ("sigmoid", 1)]


def noisy_classes(classes, samples=300):
    """Samples, labels of which a tenth are wrong, and a network that is too sure of the others."""
    generator = np.random.default_rng(0)
    true = generator.integers(classes, size=samples)
    wrong = generator.random(samples) < 0.1
    x = np.eye(models.FEATURES, dtype="float32")[true]
    return x, np.where(wrong, (true + 1) % classes, true)


def classifier(activation, units, sureness=8.0):
    x, y = noisy_classes(max(units, 2))
    inputs = keras.Input((models.FEATURES,))
    model = keras.Model(inputs, keras.layers.Dense(units, activation, name="last")(inputs))
    kernel = np.zeros((models.FEATURES, units), "float32")
    kernel[:units, :units] += np.eye(units)
    model.get_layer("last").kernel.assign(sureness * (kernel if units > 1 else 1 - 2 * kernel))
    from_logits = activation == "linear"
    kind = (
        keras.losses.SparseCategoricalCrossentropy if units > 1 else keras.losses.BinaryCrossentropy
    )
    model.compile("sgd", kind(from_logits=from_logits), metrics=["accuracy"])
    if units == 1:
        y = (y == 1).astype("float32")[:, None]
    return model, x, y


@pytest.mark.parametrize("activation, units", ACTIVATIONS)
def test_the_loss_is_lowest_and_the_classes_stay(activation, units):
    model, x, y = classifier(activation, units)
    before, classes = model.evaluate(x, y, verbose=0)[0], model.predict(x, verbose=0)
    last, sizes = model.get_layer("last"), model.get_weights()
    temperature = scale_temperature(model, x, y)
    assert temperature > 1.5
    np.testing.assert_allclose(last.kernel, sizes[0] / temperature, rtol=1e-6)
    best = model.evaluate(x, y, verbose=0)[0]
    assert best < before - 0.1
    for factor in (0.9, 1.1):
        last.kernel.assign(last.kernel * factor)
        assert model.evaluate(x, y, verbose=0)[0] > best
        last.kernel.assign(last.kernel / factor)
    again = model.predict(x, verbose=0)
    if units > 1:
        np.testing.assert_array_equal(again.argmax(1), classes.argmax(1))
    else:
        between = 0.5 if activation == "sigmoid" else 0.0
        np.testing.assert_array_equal(again > between, classes > between)


def test_a_second_time_changes_nothing_more():
    model, x, y = classifier("softmax", 3)
    scale_temperature(model, x, y)
    assert scale_temperature(model, x, y) == pytest.approx(1, abs=1e-3)


def test_takes_a_dataset_and_a_head_in_a_model_of_its_own():
    inner, x, y = classifier("linear", 3)
    wrapper = FrozenBackbone(
        keras.Sequential([keras.Input((models.FEATURES,)), keras.layers.Flatten()])
    )
    model = keras.Sequential([keras.Input((models.FEATURES,)), wrapper, inner])
    model.compile("sgd", inner.loss)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    alone, _, _ = classifier("linear", 3)
    assert scale_temperature(model, data) == pytest.approx(scale_temperature(alone, x, y), rel=1e-4)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda model: model.compile("sgd", "mse"), "the loss 'mse'"),
        (
            lambda model: setattr(model.get_layer("last"), "activation", keras.activations.relu),
            "ends in 'last'",
        ),
        (
            lambda model: model.get_layer("last").kernel.assign(np.full((4, 3), np.nan)),
            "not finite",
        ),
    ],
)
def test_what_cannot_be_scaled_is_an_error_and_stays(change, said):
    model, x, y = classifier("linear", 3)
    change(model)
    before = values_of(model)
    with pytest.raises(ValueError, match=said):
        scale_temperature(model, x, y)
    assert values_of(model) == before


def test_a_model_without_a_graph_is_an_error():
    model = models.Subclassed(["dense"])
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="has no such graph"):
        scale_temperature(model, np.zeros((1, 4)), np.zeros(1))
