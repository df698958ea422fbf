"""Features of data that a model's own `fit` prepares: raw numbers, strings, targets and weights."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import (
    FeatureCache,
    FrozenBackbone,
    StaleCacheError,
    UnfreezeAtConvergence,
    find_learning_rate,
    fine_tune,
)
from keras_tl.features.preparation import prepared
from tests import models
from tests.shared import as_bytes

WORDS = ["cat", "dog", "sat", "ran"]
TEXTS = np.array(["cat sat", "dog ran", "cat ran", "dog sat", "cat cat", "ran dog"] * 2)
LABELS = np.arange(12, dtype="float32").reshape(12, 1) % 3
X = np.random.default_rng(0).uniform(0, 255, (12, 4)).astype("float32")
WEIGHTS = np.linspace(0.1, 2, 12).astype("float32")


class Counts(keras.layers.Layer):
    """Counts known words, and knows them by a vocabulary that is no part of its settings."""

    def __init__(self, words):
        super().__init__()
        self.words = list(words)

    def save_assets(self, path):
        with open(f"{path}/words.txt", "w") as file:
            file.write("\n".join(self.words))

    def __call__(self, texts):  # Not as other layers, which take no strings on torch and JAX.
        words = tf.strings.split(texts).to_tensor()
        return tf.reduce_sum(tf.cast(words[..., None] == self.words, "float32"), axis=-2)


class Preparing(keras.Model):
    """Prepares data as KerasHub's tasks do, in the methods that they override."""

    scale = 1 / 255

    def preprocess_samples(self, x, y=None, sample_weight=None):
        prepare = getattr(self, "preprocessor", None) or (
            lambda x: tf.cast(x, "float32") * self.scale
        )
        x = prepare(x)
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def _prepared(self, x, y=None, sample_weight=None, batch_size=None):
        if not isinstance(x, tf.data.Dataset):
            whole = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
            x = tf.data.Dataset.from_tensor_slices(whole).batch(batch_size or 32)
        return x.map(tf.autograph.experimental.do_not_convert(self.preprocess_samples))

    def fit(self, x, y=None, batch_size=None, sample_weight=None, validation_data=None, **settings):
        if validation_data is not None:
            several = isinstance(validation_data, tuple)
            held_out = validation_data if several else (validation_data,)
            validation_data = self._prepared(*held_out, batch_size=batch_size)
        x = self._prepared(x, y, sample_weight, batch_size)
        return super().fit(x, validation_data=validation_data, **settings)

    def evaluate(self, x, y=None, batch_size=None, sample_weight=None, **settings):
        if not settings.get("_use_cached_eval_dataset"):
            x = self._prepared(x, y, sample_weight, batch_size)
        return super().evaluate(x, **settings)

    def predict(self, x, batch_size=None, **settings):
        return super().predict(self._prepared(x, batch_size=batch_size), **settings)


def build(kind=Preparing, preprocessor=None, **attributes):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = FrozenBackbone(models.functional(["dense"]))(inputs)
    model = kind(inputs, keras.layers.Dense(1)(x))
    if preprocessor is not None:
        model.preprocessor = preprocessor
    for name, value in attributes.items():
        setattr(model, name, value)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def text_model(words=WORDS):
    return build(preprocessor=Counts(words))


def in_fit(model, *data, **settings):
    switch = UnfreezeAtConvergence(1e-3, max_frozen_epochs=2, verbose=0)
    return model.fit(*data, epochs=3, callbacks=[switch], verbose=0, **settings).history


def in_one_call(model, *data, **settings):
    settings = {"shuffle": False, **settings, "epochs": 3, "max_frozen_epochs": 2}
    return fine_tune(model, *data, learning_rate=1e-3, **settings).history


def assert_same(history, expected):
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-4)


@functools.cache
def history_on_texts():
    held_out = (TEXTS[8:], LABELS[8:])
    return in_fit(text_model(), TEXTS[:8], LABELS[:8], validation_data=held_out, batch_size=4)


@pytest.mark.covers("data: prepared by the model's own fit")
@pytest.mark.eager
@pytest.mark.parametrize(
    "kind",
    [
        "strings",
        "dataset",
        pytest.param("list", marks=pytest.mark.slow),
        pytest.param("split", marks=pytest.mark.slow),
    ],
)
def test_recorded_training_is_that_of_fit(kind, capsys):
    data, held_out = (TEXTS[:8], LABELS[:8]), (TEXTS[8:], LABELS[8:])
    if kind == "split":
        data, settings = (TEXTS, LABELS), {"validation_split": 1 / 3, "batch_size": 4}
    elif kind == "dataset":
        data, settings = [batches(*data)], {"validation_data": batches(*held_out)}
    else:
        data = ([*map(str, data[0])], data[1]) if kind == "list" else data
        settings = {"validation_data": held_out, "batch_size": 4}

    found = in_one_call(text_model(), *data, **settings)

    assert "through the backbone" not in capsys.readouterr().out
    assert_same(found, history_on_texts())


def batches(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays).batch(4)


@pytest.mark.eager
def test_targets_and_weights_that_it_makes_are_recorded(capsys):
    class Targets(Preparing):
        def preprocess_samples(self, x, y=None, sample_weight=None):
            x = tf.cast(x, "float32") / 255
            if sample_weight is None:
                return x, x[:, :1], x[:, 1]
            return x, x[:, :1] + y, sample_weight * 2

    for data in ([X], [X, LABELS, WEIGHTS]):
        keys = dict(zip(("x", "y", "sample_weight"), data))
        settings = {"validation_data": tuple(data) if len(data) > 1 else X, "batch_size": 4}
        expected = in_fit(build(Targets), **keys, **settings)
        assert_same(in_one_call(build(Targets), **keys, **settings), expected)
    assert "through the backbone" not in capsys.readouterr().out


@pytest.mark.eager
def test_validation_data_is_prepared_as_such(capsys):
    class Sharper(keras.Model):
        def preprocess_samples(self, x, y=None, sample_weight=None):
            return x / 255, y, sample_weight

        def fit(self, x, y=None, validation_data=None, **settings):
            if validation_data is not None:
                validation_data = (validation_data[0] / 100, validation_data[1])
            x, y, _ = self.preprocess_samples(x, y)
            return super().fit(x, y, validation_data=validation_data, **settings)

    settings = {"validation_data": (X, LABELS), "batch_size": 4, "shuffle": False}
    expected = in_fit(build(Sharper), X, LABELS, **settings)
    assert_same(in_one_call(build(Sharper), X, LABELS, **settings), expected)
    assert "through the backbone" not in capsys.readouterr().out


GENERATOR = tf.random.Generator.from_seed(1)


def noise(x):
    return tf.cast(x, "float32") / 255 + GENERATOR.normal(tf.shape(x))


@pytest.mark.eager
def test_random_preparation_is_refused_or_recorded_in_views():
    cache = FeatureCache(build(preprocessor=noise))
    with pytest.raises(ValueError, match="prepares data in its own `fit` at random"):
        cache(X, LABELS, verbose=0)
    features = cache(X, LABELS, views=2, batch_size=4, shuffle=False, verbose=0)
    epochs = {b"".join(batch[0].numpy().tobytes() for batch in features) for _ in range(8)}
    assert len(epochs) > 1


@pytest.mark.eager
def test_arrays_that_are_prepared_at_random_are_refused():
    class Once(keras.Model):
        def preprocess_samples(self, x, y=None, sample_weight=None):
            return x + np.random.normal(size=x.shape), y, sample_weight

        def fit(self, x, y=None, **settings):
            return super().fit(*self.preprocess_samples(x, y)[:2], **settings)

    with pytest.raises(ValueError, match="at random"):
        FeatureCache(build(Once))(X, LABELS, verbose=0)


class Unbound(keras.Model):
    def preprocess_samples(self, x, y=None, sample_weight=None):
        return x / 255, y, sample_weight

    def fit(self, x, y=None, **settings):
        return keras.Model.fit(self, *self.preprocess_samples(x, y)[:2], **settings)


@pytest.mark.eager
def test_nothing_trains_while_fit_is_asked():
    model = build(Unbound)
    before = as_bytes(model.weights)
    with pytest.raises(ValueError, match="otherwise than as `super"):
        FeatureCache(model)(X, LABELS, verbose=0)
    assert as_bytes(model.weights) == before and type(model) is Unbound


def more_epochs(self, x, y=None, epochs=1, **settings):
    return Preparing.fit(self, x, y, epochs=2 * epochs, **settings)


def two_phases(self, x, y=None, **settings):
    Preparing.fit(self, x, y, **settings)
    return Preparing.fit(self, x, y, **settings)


@pytest.mark.eager
@pytest.mark.parametrize("fit, why", [(more_epochs, "changes epochs"), (two_phases, "just once")])
def test_a_fit_that_does_more_is_not_recorded(fit, why):
    bringing = {"preprocess_samples": Preparing.preprocess_samples, "fit": fit}
    model = build(type("More", (Preparing,), bringing))
    with pytest.raises(ValueError, match="its own fit"):
        FeatureCache(model)
    with pytest.raises(ValueError, match=why):
        prepared(model, X, LABELS)
    assert type(model).__name__ == "More" and type(model).__mro__[1] is Preparing


@pytest.mark.eager
def test_data_that_fit_cannot_prepare_trains_through_it(capsys):
    model = build()
    generator = ((X[:4], LABELS[:4]) for _ in range(100))
    with pytest.raises(ValueError, match="generator"):
        in_one_call(model, generator, steps_per_epoch=3)
    assert "a generator would be used up" in capsys.readouterr().out
    assert next(generator)


@pytest.mark.parametrize("other", ["vocabulary", "layer"])
def test_another_vocabulary_or_preprocessor_makes_a_record_stale(tmp_path, other):
    settings = {"name": "texts", "check_data": False, "verbose": 0}
    FeatureCache(text_model(), cache_dir=tmp_path)(TEXTS, LABELS, **settings)
    FeatureCache(text_model(), cache_dir=tmp_path)(TEXTS, LABELS, **settings)
    now = Counts(WORDS[::-1]) if other == "vocabulary" else Negative(WORDS)
    changed = build(preprocessor=now)
    with pytest.raises(StaleCacheError, match="how the model prepares data"):
        FeatureCache(changed, cache_dir=tmp_path)(TEXTS, LABELS, **settings)


class Negative(Counts):
    def __call__(self, texts):
        return -super().__call__(texts)


@pytest.mark.eager
def test_a_changed_function_is_seen_by_the_data(tmp_path):
    FeatureCache(build(), cache_dir=tmp_path)(X, LABELS, name="one", verbose=0)
    with pytest.raises(StaleCacheError, match="the inputs"):
        FeatureCache(build(scale=0.5), cache_dir=tmp_path)(X, LABELS, name="one", verbose=0)


def test_the_range_test_takes_raw_data_before_anything_was_called():
    found = find_learning_rate(text_model(), TEXTS, LABELS, batch_size=4, steps=20, verbose=0)
    assert len(found.losses) > 10 and np.isfinite(found.losses).all()
