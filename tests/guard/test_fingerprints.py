"""A fingerprint sees what has changed, whatever it is."""

import functools
import itertools

import hypothesis.extra.numpy as hnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl.guard.fingerprints import Fingerprints
from keras_tl.internals.values import on_host
from tests.shared import examples

DTYPES = ["float32", "float16", "bfloat16", "int8", "int32", "bool"]
if keras.backend.backend() != "jax":
    DTYPES.append("float64")  # JAX has none unless it is told to.
# Of those that become words in the same way, one is enough where every flip of a bit is tried too.
RARE_DTYPES = ("float16", "int32")
SOME_DTYPES = [
    pytest.param(one, marks=pytest.mark.slow) if one in RARE_DTYPES else one for one in DTYPES
]
# One number; small; more than a block of 2,048 words; large enough to be fingerprinted alone, with
# and without a rest; and a number of elements that no block divides.
SHAPES = [(), (11,), (5, 7), (2, 2049), (32 * 2048,), (257, 257)]


def values_for(shape, dtype, random):
    """Random bits, so infinities and NaN are among the numbers."""
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    numpy_dtype = keras.ops.convert_to_numpy(keras.ops.zeros((1,), dtype)).dtype
    count = int(np.prod(shape)) * numpy_dtype.itemsize
    return random.integers(0, 256, count, "uint8").view(numpy_dtype).reshape(shape)


@functools.cache
def watched():
    """Weights of all dtypes and shapes, two of each, with fingerprints: compiled once."""
    random = np.random.default_rng(0)
    weights = []
    for dtype in DTYPES:
        for shape in SHAPES:
            for _ in range(2):
                weight = keras.Variable(np.zeros(shape), dtype=dtype, trainable=False)
                weight.assign(values_for(shape, dtype, random))
                weights.append(weight)
    fingerprints = Fingerprints(weights)
    return weights, fingerprints, fingerprints.compute()


def in_numpy(weight):
    return on_host(weight)


def suspects_of(weight, changed):
    """The suspects while the weight has other values, which are then put back."""
    original = in_numpy(weight)
    weight.assign(changed)
    try:
        _, fingerprints, expected = watched()
        return fingerprints.suspects(expected, fingerprints.compute())
    finally:
        weight.assign(original)


def flipped(array, element, bit):
    changed = array.copy().reshape(-1)
    if changed.dtype == bool:
        changed[element] = ~changed[element]
    else:
        as_bytes = changed.view("uint8")
        as_bytes[element * array.itemsize + bit // 8] ^= np.uint8(1 << bit % 8)
    return changed.reshape(array.shape)


@given(data=st.data())
@settings(max_examples=examples(200))
def test_every_flip_of_one_bit_is_seen(data):
    weights, *_ = watched()
    weight = data.draw(st.sampled_from(weights))
    original = in_numpy(weight)
    element = data.draw(st.integers(0, original.size - 1))
    bit = data.draw(st.integers(0, 8 * original.itemsize - 1))

    suspects = suspects_of(weight, flipped(original, element, bit))

    assert any(suspect is weight for suspect in suspects)


@given(data=st.data())
@settings(max_examples=examples(100))
def test_any_change_of_several_elements_is_seen(data):
    weights, *_ = watched()
    weight = data.draw(st.sampled_from([w for w in weights if w.shape]))
    original = in_numpy(weight)
    changed = original
    for _ in range(data.draw(st.integers(2, 5))):
        element = data.draw(st.integers(0, original.size - 1))
        changed = flipped(changed, element, data.draw(st.integers(0, 8 * original.itemsize - 1)))

    suspects = suspects_of(weight, changed)

    assert any(s is weight for s in suspects) == (changed.tobytes() != original.tobytes())


def of_dtypes(name, values, slow=()):
    """All pairs of values and dtypes, of which the ordinary run has each value and each dtype."""

    def marks(value, dtype):
        ordinary = dtype == "float32" or (value == values[-1] and dtype not in RARE_DTYPES)
        return pytest.mark.slow if value in slow or not ordinary else ()

    pairs = itertools.product([*values, *slow], DTYPES)
    return pytest.mark.parametrize(
        (name, "dtype"), [pytest.param(*p, marks=marks(*p)) for p in pairs]
    )


@of_dtypes("distance", (1, 64, 2048, 65536), slow=(32, 640, 1024, 4096))
def test_swapped_elements_are_seen(dtype, distance):
    # In other columns, rows and blocks of words, and one of them in the rest after whole blocks.
    weight = next(w for w in watched()[0] if (w.dtype, w.shape) == (dtype, (257, 257)))
    changed = in_numpy(weight).reshape(-1)
    pairs = ((i, i + distance) for i in range(changed.size))
    first, second = next(p for p in pairs if changed[p[0]].tobytes() != changed[p[1]].tobytes())
    changed[[first, second]] = changed[[second, first]]

    assert any(suspect is weight for suspect in suspects_of(weight, changed.reshape(257, 257)))


@of_dtypes("shape", SHAPES[1:])
def test_swapped_weights_are_seen(dtype, shape):
    first, second = [w for w in watched()[0] if (w.dtype, w.shape) == (dtype, shape)]
    one, two = in_numpy(first), in_numpy(second)
    first.assign(two)
    try:
        suspects = suspects_of(second, one)
    finally:
        first.assign(one)

    assert {id(first), id(second)} <= {id(suspect) for suspect in suspects}


def bits(dtype, pattern):
    return np.array([pattern], f"uint{np.dtype(dtype).itemsize * 8}").view(dtype)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.array([0.0], "float32"), np.array([-0.0], "float32")),
        (np.array([0.0], "float16"), np.array([-0.0], "float16")),
        (bits("float32", 0x7FC00000), bits("float32", 0x7FC00001)),
        (bits("float32", 0x7FC00000), bits("float32", 0xFFC00000)),
        (bits("float16", 0x7E00), bits("float16", 0x7E01)),
        (np.zeros(64, "float32"), -np.zeros(64, "float32")),
        (np.ones(4096, "float32"), -np.ones(4096, "float32")),
        (np.ones(2048 * 33, "float32"), -np.ones(2048 * 33, "float32")),
    ],
    ids=["zero", "zero16", "payload", "sign of NaN", "payload16", "zeros", "signs", "many signs"],
)
def test_changes_that_arithmetic_hardly_sees_are_seen(before, after):
    weight = keras.Variable(before, dtype=str(before.dtype))
    fingerprints = Fingerprints([weight])
    weight.assign(before)
    expected = fingerprints.compute()
    weight.assign(after)

    assert fingerprints.suspects(expected, fingerprints.compute()) == [weight]


@given(array=hnp.arrays("float32", (3, 5)))
@settings(max_examples=examples(50))
def test_equal_bits_have_equal_fingerprints(array):
    weight = next(w for w in watched()[0] if (w.dtype, w.shape) == ("float32", (5, 7)))
    original = in_numpy(weight)
    changed = original.copy()
    changed[:3, :5] = array
    if changed.tobytes() == original.tobytes():
        return
    _, fingerprints, expected = watched()
    weight.assign(changed)
    first, again = fingerprints.compute(), fingerprints.compute()
    weight.assign(original)

    assert first.tobytes() == again.tobytes()
    assert fingerprints.compute().tobytes() == expected.tobytes()


def test_large_weights_are_told_apart():
    weights = [keras.Variable(np.zeros(32 * 2048, "float32")) for _ in range(3)]
    fingerprints = Fingerprints(weights)
    before = fingerprints.compute()
    weights[1].assign(np.eye(1, 32 * 2048, 777, dtype="float32")[0])

    suspects = fingerprints.suspects(before, fingerprints.compute())

    assert [id(suspect) for suspect in suspects] == [id(weights[1])]


def test_no_weights_have_no_fingerprints():
    fingerprints = Fingerprints([keras.Variable(np.zeros((0, 3), "float32"))])
    before = fingerprints.compute()
    assert before.shape == (0, 64)
    assert fingerprints.suspects(before, fingerprints.compute()) == []


def test_keys_are_drawn_anew():
    weight = keras.Variable(np.ones(3, "float32"))
    assert (Fingerprints([weight]).compute() != Fingerprints([weight]).compute()).any()


def test_the_seed_of_other_random_numbers_is_left_alone():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    Fingerprints([keras.Variable(np.ones(3, "float32"))]).compute()
    assert np.random.random() == expected
