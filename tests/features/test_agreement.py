"""Features are recorded only of a model that gives for data what its head gives for them."""

import keras
import numpy as np
import pytest

from keras_tl import FeatureCache, FrozenBackbone
from tests import models
from tests.shared import as_bytes, regression_data

X, Y = regression_data(20)


class Scaling(keras.Model):
    """Prepares data where no list of methods has it."""

    def _standardize_inputs(self, inputs):
        return super()._standardize_inputs(inputs / 255.0)


class AlwaysRandom(keras.layers.Layer):
    """Is random in `evaluate` too."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(1)

    def call(self, x):
        return keras.random.dropout(x, 0.5, seed=self.seed_generator)


def build(kind=keras.Model, head=()):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = FrozenBackbone(models.functional(["dense"]))(inputs)
    for layer in head:
        x = layer(x)
    model = kind(inputs, keras.layers.Dense(1)(x))
    model.compile("sgd", "mse", metrics=["mae"])
    return model


@pytest.mark.eager
@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_that_prepares_data_is_refused(compiled, tmp_path):
    model = build(Scaling)
    if not compiled:
        model = Scaling(model.inputs, model.outputs)
    with pytest.raises(ValueError, match="`predict` of the model.*gives something else"):
        FeatureCache(model, cache_dir=tmp_path)(X * 255, Y, verbose=0)
    assert not list(tmp_path.rglob("*shard*"))


@pytest.mark.eager
def test_so_is_one_for_which_another_has_recorded_before(tmp_path):
    plain = build()
    FeatureCache(plain, cache_dir=tmp_path)(X, Y, verbose=0)
    scaling = Scaling(plain.inputs[0], plain.outputs[0])
    with pytest.raises(ValueError, match="gives something else"):
        FeatureCache(scaling, cache_dir=tmp_path)(X, Y, verbose=0)


@pytest.mark.eager
def test_the_check_changes_nothing_in_the_model():
    model = build(head=[AlwaysRandom(), keras.layers.BatchNormalization()])
    model.evaluate(X, Y, verbose=0)
    functions = model.test_function, model.predict_function, model.run_eagerly
    metrics, variables = as_bytes(model.metrics_variables), as_bytes(model.variables)

    FeatureCache(model)(X, Y, shuffle=False, verbose=0)

    assert as_bytes(model.metrics_variables) == metrics
    assert as_bytes(model.variables) == variables
    assert (model.test_function, model.predict_function, model.run_eagerly) == functions


@pytest.mark.slow
def test_half_precision_that_a_compiler_rounds_another_way_is_no_difference(tmp_path):
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layers = [
            layer
            for _ in range(6)
            for layer in (
                keras.layers.Conv2D(16, 3, padding="same"),
                keras.layers.LayerNormalization(),
                keras.layers.Activation("gelu"),
            )
        ]
        inputs = keras.Input((12, 12, 8))
        backbone = keras.Sequential([inputs, *layers, keras.layers.GlobalAveragePooling2D()])
        x = keras.layers.Dense(32, activation="relu")(FrozenBackbone(backbone)(inputs))
        model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("sgd", "mse", jit_compile=keras.backend.backend() != "torch")
    x = np.random.default_rng(0).normal(size=(8, 12, 12, 8)).astype("float32")
    y = x[:, 0, 0, :1]
    for _ in range(2):  # The second time, what is there is compared.
        assert len(list(FeatureCache(model, cache_dir=tmp_path)(x, y, verbose=0))) == 1


@pytest.mark.eager
def test_targets_that_the_loss_cannot_take_are_no_difference():
    model = build()
    targets = np.zeros((20, 3, 7), "float32")
    assert len(list(FeatureCache(model)(X, targets, verbose=0))) == 1
