"""What changes features beside weights and data is seen, and what a record cannot hold refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FeatureCache, FrozenBackbone, StaleCacheError
from keras_tl.features import extraction
from tests import models
from tests.shared import only_on, regression_data

pytestmark = pytest.mark.eager

X, Y = regression_data(22)


def wrapped(*layers, shape=(4,)):
    keras.utils.set_random_seed(0)
    base = keras.Sequential([keras.Input(shape), *layers])
    return keras.Sequential([keras.Input(shape), FrozenBackbone(base), keras.layers.Dense(1)])


def record(model, folder, *data, **settings):
    settings = {"batch_size": 2, "shuffle": False, "verbose": 0, **settings}
    settings = {"name": "0", **settings}  # Without one, other data has a folder of its own.
    return FeatureCache(model, cache_dir=folder)(*(data or (X, Y)), **settings)


def contents(dataset):
    return [part.numpy().tobytes() for batch in dataset for part in keras.tree.flatten(batch)]


class Scale(keras.layers.Layer):
    """A layer that does not say what it depends on."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, inputs):
        return inputs * self.factor


class Plain(keras.layers.Layer):
    """The same, with a configuration that leaves it out."""

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, inputs):
        return inputs * self.factor

    def get_config(self):
        return {"name": self.name}


FACTOR = 1.0


def by_a_global(x):
    return x * FACTOR


@pytest.mark.parametrize(
    "before, after",
    [
        # Layers that are named like an argument.
        (
            lambda: keras.layers.Activation("relu", name="relu"),
            lambda: keras.layers.Activation("tanh", name="tanh"),
        ),
        (
            lambda: keras.layers.Dense(3, dtype="mixed_float16", kernel_initializer="ones"),
            lambda: keras.layers.Dense(3, dtype="mixed_bfloat16", kernel_initializer="ones"),
        ),
        (lambda: keras.layers.Rescaling(1.0), lambda: keras.layers.Rescaling(1.0, offset=1.0)),
        (lambda: Plain(1.0), lambda: Plain(2.0)),
        (lambda: keras.layers.Lambda(lambda x: x), lambda: keras.layers.Lambda(lambda x: 2 * x)),
    ],
    ids=["activation", "dtype policy", "argument", "attribute", "function"],
)
@pytest.mark.parametrize(
    "beside",
    [
        pytest.param(False, id="alone"),
        pytest.param(True, id="beside a layer without configuration", marks=pytest.mark.slow),
    ],
)
def test_another_layer_is_seen(before, after, beside, tmp_path):
    others = [Scale(1.0)] if beside else []
    record(wrapped(before(), *others), tmp_path)
    record(wrapped(before(), *others), tmp_path)
    with pytest.raises(StaleCacheError, match="the layers up to the backbone's outputs"):
        record(wrapped(after(), *others), tmp_path)


def test_a_function_that_computes_something_else_is_seen(tmp_path, monkeypatch):
    record(wrapped(keras.layers.Lambda(by_a_global)), tmp_path)
    monkeypatch.setattr("tests.features.test_what_features_depend_on.FACTOR", 2.0)
    with pytest.raises(StaleCacheError, match="what the layers .* compute"):
        record(wrapped(keras.layers.Lambda(by_a_global)), tmp_path)
    record(wrapped(keras.layers.Lambda(by_a_global)), tmp_path, check_data=False)


@only_on("tensorflow", "Strings are TensorFlow's.")
def test_another_vocabulary_is_seen(tmp_path):
    def model(words):
        lookup = keras.layers.StringLookup(vocabulary=words)
        base = keras.Sequential(
            [keras.Input((1,), dtype="string"), lookup, keras.layers.Embedding(4, 2)]
        )
        keras.utils.set_random_seed(0)
        base.set_weights([np.arange(8.0).reshape(4, 2)])
        inputs = keras.Input((1,), dtype="string")
        outputs = keras.layers.Dense(1)(FrozenBackbone(base)(inputs))
        return keras.Model(inputs, outputs)

    words = tf.data.Dataset.from_tensor_slices(([["a"], ["b"]], [0, 1])).batch(2)
    first = contents(record(model(["a", "b"]), tmp_path, words, batch_size=None))
    assert contents(record(model(["a", "b"]), tmp_path, words, batch_size=None)) == first
    with pytest.raises(StaleCacheError):
        record(model(["b", "a"]), tmp_path, words, batch_size=None)


def test_inputs_that_change_places_are_seen(tmp_path):
    def model(first, second):
        keras.utils.set_random_seed(0)
        inputs = [keras.Input((4,), name=first), keras.Input((4,), name=second)]
        base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        features = keras.layers.Subtract()([FrozenBackbone(base)(x) for x in inputs])
        return keras.Model(inputs, keras.layers.Dense(1)(features))

    data = {"left": X, "right": -X}
    record(model("left", "right"), tmp_path, data, Y)
    record(model("left", "right"), tmp_path, data, Y)
    with pytest.raises(StaleCacheError, match="the layers up to the backbone's outputs"):
        record(model("right", "left"), tmp_path, data, Y)


# Data.


def generator(x, y):
    for at in range(0, len(x), 2):
        yield x[at : at + 2], y[at : at + 2]


def test_a_generator_of_other_data_is_seen(tmp_path):
    model = wrapped(keras.layers.Dense(3))
    generated = {"steps": 11, "batch_size": None}
    record(model, tmp_path, generator(X, Y), **generated)
    record(model, tmp_path, generator(X, Y), **generated)
    with pytest.raises(StaleCacheError, match="the inputs"):
        record(model, tmp_path, generator(2 * X, Y + 1000), **generated)


def augmented(x, y):
    augment = keras.layers.GaussianNoise(1.0)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
    return data.map(lambda x, y: (augment(x, training=True), y))


@only_on("tensorflow", "A Keras layer in tf.data.")
@pytest.mark.parametrize(
    "other, message",
    [((X[:10], Y[:10]), "the number of samples"), ((X, Y + 1000), "the targets")],
)
def test_other_data_is_seen_though_its_inputs_are_random(other, message, tmp_path):
    model = wrapped(keras.layers.Dense(3))
    views = {"views": 2, "batch_size": None}
    record(model, tmp_path, augmented(X, Y), **views)
    record(model, tmp_path, augmented(X, Y), **views)
    with pytest.raises(StaleCacheError, match=message):
        record(model, tmp_path, augmented(*other), **views)


def test_targets_that_change_places_are_seen(tmp_path):
    model = wrapped(keras.layers.Dense(3))
    record(model, tmp_path)
    with pytest.raises(StaleCacheError, match="which go with other inputs"):
        record(model, tmp_path, X, Y[::-1].copy())


def test_data_without_end_needs_steps():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(2).repeat()
    with pytest.raises(ValueError, match="no end. Pass `steps`"):
        record(wrapped(keras.layers.Dense(3)), None, data, batch_size=None)


def test_targets_that_are_none_are_refused():
    with pytest.raises(ValueError, match="Some of the targets are None"):
        record(wrapped(keras.layers.Dense(3)), None, X, {"one": Y, "two": None})


# What a record cannot hold.


class Noise(keras.layers.Layer):
    """Random numbers from the global generator, which no state of the layer tells of."""

    def call(self, inputs):
        return inputs + keras.random.normal((4,))


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX refuses them itself.")
def test_random_numbers_without_a_seed_generator_are_refused():
    model = wrapped(Noise())
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="something else each time that they are called"):
        record(model, None)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.ActivityRegularization(0.1, name="adds"),
        lambda: keras.layers.Dense(4, activity_regularizer="l2", name="adds"),
        lambda: AddsLoss(name="adds"),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["before", "in the backbone"])
def test_losses_before_the_split_are_refused(layer, inside):
    if inside:
        model = wrapped(layer())
    else:
        before = layer()
        before.trainable = False
        inputs = keras.Input((4,))
        x = FrozenBackbone(models.functional(["dense"]))(before(inputs))
        model = keras.Model(inputs, keras.layers.Dense(1)(x))
    with pytest.raises(ValueError, match="up to the outputs of the backbone.*add to the loss"):
        FeatureCache(model)


class AddsLoss(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(keras.ops.mean(inputs))
        return inputs


@pytest.mark.parametrize("method", ["train_step", "test_step", "compute_loss", "compute_metrics"])
def test_models_that_train_in_a_way_of_their_own_are_refused(method):
    base = keras.Model
    own = type("Own", (base,), {method: lambda self, *arguments, **settings: None})
    inputs = keras.Input((4,))
    x = FrozenBackbone(models.functional(["dense"]))(inputs)
    with pytest.raises(ValueError, match=f"its own {method}"):
        FeatureCache(own(inputs, keras.layers.Dense(1)(x)))


def test_models_with_a_call_of_their_own_are_refused():
    class Own(keras.Sequential):
        def call(self, inputs, training=None, mask=None):
            return 3 * super().call(inputs, training=training, mask=mask)

    base = FrozenBackbone(models.functional(["dense"]))
    model = Own([keras.Input((4,)), base, keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="its own call"):
        FeatureCache(model)


def test_a_backbone_over_several_pieces_of_a_sample_is_refused():
    inputs = keras.Input((8,))
    x = keras.ops.reshape(inputs, (-1, 4))
    x = FrozenBackbone(models.functional(["dense"]))(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.ops.reshape(x, (-1, 8))))
    for batch_size in (1, 2):
        with pytest.raises(ValueError, match="one output for each sample"):
            record(model, None, np.hstack([X, X]), Y, batch_size=batch_size)


# Records that change while they are in use.


def test_features_that_are_recorded_again_while_in_use_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD_BATCHES", 3)
    model = wrapped(keras.layers.Dense(3))
    in_use = record(model, tmp_path)
    model.layers[0].backbone.layers[0].bias.assign([1.0, 2.0, 3.0])
    record(model, tmp_path, refresh=True)
    with pytest.raises(tf.errors.OpError, match="recorded again while it was in use"):
        list(in_use)


def test_a_repair_that_fails_leaves_no_mixed_record(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD_BATCHES", 3)
    data = tf.data.Dataset.from_tensor_slices((X, np.arange(22))).shuffle(22).batch(2)
    model = wrapped(keras.layers.Dense(3))
    record(model, tmp_path, data, batch_size=None)
    min(tmp_path.rglob("*.shard-*")).unlink()
    for check_data in (True, False):
        with pytest.raises(StaleCacheError, match="the order of the samples|the inputs"):
            record(model, tmp_path, data, batch_size=None, check_data=check_data)
    again = record(model, tmp_path, data, batch_size=None, refresh=True)
    assert sorted(np.concatenate([y for _, y in again])) == list(range(22))
