"""Weights that are no longer what they were, and what they were."""

import keras
import numpy as np
import pytest

from keras_tl.guard.watch import WeightWatch
from tests.shared import as_bytes


def dense():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    return layer


def in_place(layer):
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(layer.trainable_variables)
    gradients = [keras.ops.ones(weight.shape) for weight in layer.trainable_variables]
    optimizer.apply(gradients, layer.trainable_variables)


WAYS = {
    "assign": lambda layer: layer.kernel.assign(layer.kernel * 2 + 1),
    "assign_add": lambda layer: layer.kernel.assign_add(np.ones((4, 3))),
    "optimizer": in_place,
    "set_weights": lambda layer: layer.set_weights([np.ones((4, 3)), np.ones(3)]),
}
if keras.backend.backend() == "tensorflow":
    ones = np.ones((4, 3), "float32")
    WAYS["of the backend"] = lambda layer: layer.kernel.value.assign_sub(ones)
    WAYS["a slice"] = lambda layer: layer.kernel.value[1:2].assign(ones[:1])
if keras.backend.backend() == "torch":
    WAYS["of the backend"] = lambda layer: layer.kernel.value.data.sub_(1)
    WAYS["a slice"] = lambda layer: layer.kernel.value.data[1:2].fill_(1)


@pytest.mark.parametrize("way", WAYS)
def test_old_values_are_kept_whatever_changes_the_weight(way):
    layer = dense()
    before = np.array(layer.kernel)
    watch = WeightWatch(layer.weights)
    WAYS[way](layer)

    change = watch.changes()[0]

    assert change.weight is layer.kernel
    assert change.before.tobytes() == before.tobytes()
    assert change.after.tobytes() == np.array(layer.kernel).tobytes()
    assert not np.array_equal(change.before, change.after)


def test_nothing_changed_is_no_change():
    layer = dense()
    watch = WeightWatch(layer.weights)
    layer.set_weights(layer.get_weights())
    assert watch.changes() == []


def test_restore_puts_the_bits_back():
    layer = dense()
    layer.bias.assign([np.nan, -0.0, np.inf])
    before = as_bytes(layer.weights)
    watch = WeightWatch(layer.weights)
    layer.set_weights([np.ones((4, 3)), np.ones(3)])

    watch.restore(watch.changes())

    assert as_bytes(layer.weights) == before
    assert watch.changes() == []


def test_difference_counts_only_what_has_changed():
    layer = dense()
    layer.bias.assign([np.inf, 1.0, 2.0])
    watch = WeightWatch(layer.weights)
    layer.bias.assign([np.inf, 1.0, 2.5])

    change = watch.changes()[0]

    assert change.difference.tolist() == [0.0, 0.0, 0.5]
    assert change.largest == 0.5


def test_a_change_of_the_sign_of_zero_is_a_change_of_zero():
    layer = dense()
    watch = WeightWatch(layer.weights)
    layer.bias.assign([-0.0, 0.0, 0.0])
    assert [change.largest for change in watch.changes()] == [0.0]


def test_begin_takes_the_present_values():
    layer = dense()
    watch = WeightWatch(layer.weights)
    layer.bias.assign(np.ones(3))
    watch.begin()
    assert watch.changes() == []
    layer.bias.assign(np.zeros(3))
    assert watch.changes()[0].before.tolist() == [1.0, 1.0, 1.0]


def test_the_difference_of_integers_does_not_wrap():
    weight = keras.Variable(np.array([-128], "int8"), dtype="int8", trainable=False)
    watch = WeightWatch([weight])
    weight.assign(np.array([127], "int8"))
    assert watch.changes()[0].largest == 255
