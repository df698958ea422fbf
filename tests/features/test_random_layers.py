"""What is random before the backbone's outputs is refused, or recorded in several views."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FeatureCache, FrozenBackbone
from tests import models
from tests.shared import only_on, regression_data, values_of

pytestmark = pytest.mark.eager

X, Y = regression_data(20)


def noisy(layer, base=None):
    base = base or models.functional(["dense"])
    return keras.Sequential(
        [keras.Input((4,)), layer, FrozenBackbone(base), keras.layers.Dense(1, name="top")]
    )


def test_random_layers_before_the_backbone_are_refused_by_name():
    model = noisy(keras.layers.GaussianNoise(0.1, name="augmentation"))
    before = values_of(model)
    with pytest.raises(ValueError, match="augmentation.*are random.*`views=k`"):
        FeatureCache(model)(X, verbose=0)
    assert values_of(model) == before


def test_keras_augmentation_layers_are_refused():
    images = np.random.default_rng(0).random((4, 8, 8, 3), "float32")
    base = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    for layer in (
        keras.layers.RandomFlip(name="flip"),
        keras.layers.RandomRotation(0.2, name="turn"),
    ):
        model = keras.Sequential([keras.Input((8, 8, 3)), layer, FrozenBackbone(base)])
        with pytest.raises(ValueError, match=f"{layer.name}.*are random"):
            FeatureCache(model)(images, verbose=0)


def test_dropout_in_a_plain_backbone_is_active_in_fit_and_so_refused():
    base = models.functional(["dense", "dropout"])
    base.trainable = False
    model = models.functional_outer(base)
    with pytest.raises(ValueError, match="dropout.*are random"):
        FeatureCache(model, backbone=base)(X, verbose=0)


def test_dropout_in_a_frozen_backbone_is_off():
    model = models.functional_outer(FrozenBackbone(models.functional(["dense", "dropout"])))
    assert len(list(FeatureCache(model)(X, verbose=0))) == 1


def test_validation_data_has_no_augmentation():
    model = noisy(keras.layers.GaussianNoise(0.1))
    cache = FeatureCache(model)
    dataset = cache(X, training=False, shuffle=False, batch_size=20, verbose=0)
    predicted = cache.head.predict(dataset, verbose=0)
    assert predicted.tobytes() == model.predict(X, batch_size=20, verbose=0).tobytes()


def test_a_random_layer_without_effect_in_training_is_no_matter():
    model = noisy(keras.layers.Dropout(0.0))
    assert len(list(FeatureCache(model)(X, verbose=0))) == 1


@pytest.mark.parametrize(
    "on_disk",
    [pytest.param(False, id="memory", marks=pytest.mark.slow), pytest.param(True, id="disk")],
)
def test_each_epoch_draws_from_the_views(on_disk, tmp_path):
    model = noisy(keras.layers.GaussianNoise(1.0))
    cache = FeatureCache(model, cache_dir=tmp_path if on_disk else None)
    dataset = cache(X, np.arange(20), views=3, batch_size=4, verbose=0)
    assert int(dataset.cardinality()) == 5
    seen = {number: set() for number in range(20)}
    for _ in range(16):
        numbers = []
        for features, batch in dataset:
            for row, number in zip(features.numpy(), batch.numpy(), strict=True):
                seen[number].add(row.tobytes())
                numbers.append(number)
        assert sorted(numbers) == list(range(20))
    assert {len(rows) for rows in seen.values()} == {3}


def test_views_without_shuffling_keep_the_order():
    model = noisy(keras.layers.GaussianNoise(1.0))
    dataset = FeatureCache(model)(X, np.arange(20), views=2, shuffle=False, verbose=0)
    epochs = [np.concatenate([features for features, _ in dataset]) for _ in range(4)]
    for _, numbers in dataset:
        assert numbers.numpy().tolist() == list(range(20))
    assert len({epoch.tobytes() for epoch in epochs}) > 1


def augmented():
    augment = keras.layers.GaussianNoise(1.0)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    return data.map(lambda x, y: (augment(x, training=True), y))


@only_on("tensorflow", "A Keras layer in tf.data.")
def test_data_that_is_another_each_time_is_refused():
    cache = FeatureCache(models.functional_outer(FrozenBackbone(models.functional(["dense"]))))
    with pytest.raises(ValueError, match="with other values each time.*`views=k`"):
        cache(augmented(), verbose=0)
    assert len(list(cache(augmented(), check_data=False, verbose=0))) == 5
    assert len(list(cache(augmented(), views=2, verbose=0))) == 5


def test_data_in_another_order_each_time_is_the_same_data():
    cache = FeatureCache(models.functional_outer(FrozenBackbone(models.functional(["dense"]))))
    data = tf.data.Dataset.from_tensor_slices((X, np.arange(20))).shuffle(20).batch(4)
    dataset = cache(data, verbose=0)
    assert sorted(np.concatenate([y for _, y in dataset])) == list(range(20))


def test_views_need_data_that_can_be_read_again():
    model = noisy(keras.layers.GaussianNoise(1.0))
    with pytest.raises(ValueError, match="more than once. Received a generator"):
        FeatureCache(model)((batch for batch in [(X, Y)]), views=2, steps=1)


def test_a_layer_that_changes_its_own_state_is_refused():
    # A normalization without trainable weights still follows the data in `fit`.
    norm = keras.layers.BatchNormalization(center=False, scale=False, name="running")
    model = noisy(norm)
    before = values_of(model)
    with pytest.raises(ValueError, match="running.*change their own state"):
        FeatureCache(model)(X, verbose=0)
    assert values_of(model) == before
