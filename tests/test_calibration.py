"""A model that is as sure as it is right."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FrozenBackbone, scale_temperature
from keras_tl.internals.values import on_host
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


# Around its minimum the loss is flat: its rounding tells no more digits of where that is.
CLOSE = 3e-3


@pytest.mark.parametrize("activation, units", [("softmax", 3), ("sigmoid", 1)])
@pytest.mark.parametrize("sureness", [8.0, 40.0])
def test_probabilities_that_are_rounded_to_one_hide_nothing(activation, units, sureness):
    model, x, y = classifier(activation, units, sureness)
    logits, _, _ = classifier("linear", units, sureness)
    expected = scale_temperature(logits, x, y)
    assert expected > sureness / 8
    assert scale_temperature(model, x, y) == pytest.approx(expected, rel=CLOSE)
    best = logits.evaluate(x, y, verbose=0)[0]
    assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(best, rel=1e-3)
    assert model.get_layer("last").activation is getattr(keras.activations, activation)


def named(model):
    return keras.Model(model.input, {"last": model.output})


SPARSE, BINARY = "sparse_categorical_crossentropy", "binary_crossentropy"
# By name, the number of units, and what the model, its loss and its targets are made.
COMPILED = {
    "a string": (3, lambda model: model, SPARSE, lambda y: y),
    "a list": (3, lambda model: model, [SPARSE], lambda y: y),
    "by name": (3, lambda model: model, {"last": SPARSE}, lambda y: y),
    "all by name": (3, named, {"last": SPARSE}, lambda y: {"last": y}),
    "an object by name": (
        *(3, named, {"last": keras.losses.SparseCategoricalCrossentropy()}),
        lambda y: {"last": y},
    ),
    "one number a sample": (1, lambda model: model, BINARY, lambda y: y[:, 0]),
}


@pytest.mark.parametrize("name", COMPILED)
def test_takes_a_model_however_it_was_compiled(name):
    units, remade, loss, targets = COMPILED[name]
    plain, x, y = classifier("softmax" if units > 1 else "sigmoid", units)
    expected = scale_temperature(plain, x, y)
    model = remade(classifier("softmax" if units > 1 else "sigmoid", units)[0])
    model.compile("sgd", loss)
    data = tf.data.Dataset.from_tensor_slices((x, targets(y))).batch(50)
    assert scale_temperature(model, data) == pytest.approx(expected, rel=CLOSE)


def test_weights_of_samples_count_and_steps_bound_what_is_read():
    model, x, y = classifier("linear", 3)
    first = np.arange(len(x)) < 100
    expected = scale_temperature(classifier("linear", 3)[0], x[first], y[first])
    assert expected != pytest.approx(scale_temperature(classifier("linear", 3)[0], x, y), rel=0.02)
    found = scale_temperature(model, x, y, sample_weight=first.astype("float32"))
    assert found == pytest.approx(expected, rel=CLOSE)
    endless = tf.data.Dataset.from_tensor_slices((x, y)).batch(50).repeat()
    found = scale_temperature(classifier("linear", 3)[0], endless, steps=2)
    assert found == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("sureness", [8.0, -8.0])
def test_data_that_tells_of_no_temperature_is_warned_of(sureness):
    model, x, _ = classifier("linear", 3, sureness)
    before = values_of(model)
    with pytest.warns(UserWarning, match="no temperature from 0.02 to 50"):
        assert scale_temperature(model, x, x.argmax(axis=1)) == 1.0
    assert values_of(model) == before


def test_a_layer_with_lora_predicts_the_same_classes():
    model, x, y = classifier("softmax", 3)
    last = model.get_layer("last")
    last.enable_lora(2)
    last.lora_kernel_b.assign(np.random.default_rng(0).normal(size=(2, 3)))
    last.lora_kernel_a.assign(np.random.default_rng(1).normal(size=(models.FEATURES, 2)))
    before = np.log(model.predict(x, verbose=0))
    temperature = scale_temperature(model, x, y)
    after = np.log(model.predict(x, verbose=0))
    differences = [(each - each[:, :1]) for each in (before, after)]
    np.testing.assert_allclose(differences[1], differences[0] / temperature, atol=1e-4)


class AlwaysRandom(keras.layers.Dropout):
    """A dropout that is active in inference too, as for Monte Carlo estimates."""

    def call(self, x, training=None):
        return super().call(x, training=True)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("random", [False, True])
def test_rounding_and_randomness_are_no_error(dtype, random):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 200))
    inputs = keras.Input((200,))
    features = keras.layers.Dense(200, "relu", dtype=dtype)(inputs)
    features = AlwaysRandom(0.1, seed=0, dtype=dtype)(features) if random else features
    outputs = keras.layers.Dense(2, name="last", dtype=dtype)(features)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    kernel = model.get_layer("last").kernel
    kernel.assign(5 * kernel)
    before = on_host(kernel)
    right = model.predict(x, verbose=0).argmax(axis=1)
    y = np.where(generator.random(64) < 0.2, 1 - right, right)
    temperature = scale_temperature(model, x, y, batch_size=1)
    assert 1 < temperature < 50
    after = on_host(model.get_layer("last").kernel)
    np.testing.assert_allclose(after, before / temperature, rtol=1e-6)


def called_twice():
    inputs = keras.Input((3,))
    last = keras.layers.Dense(3, name="last")
    model = keras.Model(inputs, last(last(inputs)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    last.kernel.assign(3 * np.eye(3))
    return model


def test_a_layer_of_which_more_depends_is_an_error_and_stays():
    model = called_twice()
    x, y = noisy_classes(3)
    before = values_of(model)
    with pytest.raises(ValueError, match="as where a layer is called twice"):
        scale_temperature(model, x[:, :3], y)
    assert values_of(model) == before


def test_a_quantized_layer_is_an_error():
    model, x, y = classifier("softmax", 3)
    model.quantize("int8")
    before = values_of(model)
    with pytest.raises(ValueError, match="Scale the model first, then quantize it"):
        scale_temperature(model, x, y)
    assert values_of(model) == before


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
