import json
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl.stages.best_weights import BestWeights, Snapshot
from tests.shared import as_bytes, examples


@pytest.fixture
def weights():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    return layer.weights


def assign(weights, number):
    for weight in weights:
        weight.assign(np.full(weight.shape, number))


@given(dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8", "bool"]), data=st.data())
@settings(max_examples=examples(100))
def test_snapshot_puts_back_every_bit(dtype, data):
    shape = (2, 3)
    trainable = dtype not in ("int8", "bool")  # Which torch gives no gradient.
    weight = keras.Variable(np.zeros(shape), dtype=dtype, trainable=trainable, name="w")
    size = np.asarray(keras.ops.convert_to_numpy(weight)).nbytes
    bits = data.draw(st.binary(min_size=size, max_size=size))
    if dtype == "bool":
        bits = bytes(b & 1 for b in bits)
    numpy_type = np.asarray(keras.ops.convert_to_numpy(weight)).dtype
    weight.assign(np.frombuffer(bits, numpy_type).reshape(shape))
    before = as_bytes([weight])

    snapshot = Snapshot([weight])
    weight.assign(np.ones(shape))
    snapshot.restore()

    assert as_bytes([weight]) == before
    assert snapshot.nbytes == size


def test_snapshot_is_a_copy(weights):
    snapshot = Snapshot(weights)
    before = as_bytes(weights)
    assign(weights, 7)
    assign(weights, 8)
    snapshot.restore()
    assert as_bytes(weights) == before


def test_extended_snapshot_keeps_its_copies_and_takes_the_rest_as_it_is(weights):
    kernel, bias = weights
    assign(weights, 1)
    snapshot = Snapshot([kernel])
    assign(weights, 2)

    snapshot = snapshot.extended(weights)
    assign(weights, 3)
    snapshot.restore()

    assert float(kernel[0, 0]) == 1
    assert float(bias[0]) == 2


@given(
    values=st.lists(st.sampled_from([0.1, 0.2, 0.3, math.nan, math.inf, -math.inf]), max_size=8),
    mode=st.sampled_from(["min", "max"]),
)
def test_best_of_run_is_the_first_best_finite_value(values, mode):
    weight = keras.Variable(0.0)
    best = BestWeights(mode)
    for epoch, value in enumerate(values):
        weight.assign(epoch)
        best.update(epoch, value, [weight], best_of_stage=False)
    weight.assign(-1)
    best.restore_run()

    finite = [value for value in values if math.isfinite(value)]
    if finite:
        expected = values.index(min(finite) if mode == "min" else max(finite))
        assert (best.epoch, float(weight)) == (expected, expected)
    else:
        assert (best.epoch, float(weight)) == (None, -1)


def test_best_of_stage_is_what_the_caller_says():
    weight = keras.Variable(1.0)
    best = BestWeights("min")
    best.update(0, 0.5, [weight], best_of_stage=True)
    weight.assign(2.0)
    best.update(1, 0.49, [weight], best_of_stage=False)
    weight.assign(3.0)

    best.restore_stage()
    assert float(weight) == 1.0
    best.restore_run()
    assert float(weight) == 2.0


def test_a_new_stage_adds_its_offset_to_the_best_value():
    weight = keras.Variable(1.0)
    best = BestWeights("min")
    best.update(0, 0.5, [weight], best_of_stage=True)
    best.begin_stage([weight], value_offset=5.0)
    weight.assign(2.0)

    best.update(1, 5.4, [weight], best_of_stage=True)

    assert (best.epoch, best.value) == (1, 5.4)


@pytest.mark.parametrize("min_delta_hides", [False, True])
def test_goes_through_data(min_delta_hides):
    layer = keras.layers.Dense(1)
    layer.build((None, 2))
    best = BestWeights("min")
    layer.bias.assign([1.0])
    best.update(0, 5.0, layer.weights, best_of_stage=True)
    layer.bias.assign([2.0])
    best.update(1, 4.9, layer.weights, best_of_stage=not min_delta_hides)
    state, arrays = best.get_state(layer.weights)
    again = BestWeights("min")
    again.set_state(json.loads(json.dumps(state)), arrays, layer.weights)
    assert (again.value, again.epoch, again.measured) == (4.9, 1, 4.9)
    layer.bias.assign([9.0])
    again.restore_stage()
    assert float(layer.bias[0]) == (1.0 if min_delta_hides else 2.0)
    again.restore_run()
    assert float(layer.bias[0]) == 2.0
