"""Arrays are known again, in any order, and told from others."""

import hypothesis.extra.numpy as hnp
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_tl.backup import sketches
from keras_tl.backup.sketches import alike, sketch

arrays = hnp.arrays(
    st.sampled_from(["float32", "float64", "uint8", "int64"]),
    st.tuples(st.integers(2, 9), st.integers(1, 5)),
    elements={"min_value": 0, "max_value": 200},
)


@given(array=arrays, data=st.data())
def test_the_same_rows_in_any_order(array, data):
    order = data.draw(st.permutations(range(len(array))))
    assert alike(sketch(array), sketch(array[order]))


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64", "float16", "bool"])
def test_other_rows(dtype):
    array = np.random.default_rng(0).integers(0, 2, (1000, 6)).astype(dtype)
    other = array.copy()
    other[7, 2] = 1 - other[7, 2]
    assert not alike(sketch(array), sketch(other))
    assert not alike(sketch(array[:-1]), sketch(array))


def test_other_rows_of_an_array_that_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(sketches, "_ELEMENTS_AT_ONCE", 12)
    array = np.random.default_rng(0).normal(size=(11, 6)).astype("float32")
    for row in (0, 5, 10):
        other = array.copy()
        other[row] += 1
        assert not alike(sketch(array), sketch(other))
    assert alike(sketch(array), sketch(array[::-1]))


def test_texts_by_their_names():
    names = np.array(["a/1.png", "a/2.png", "b/3.png"])
    assert alike(sketch(names), sketch(np.array([f"/moved/{name}" for name in names[::-1]])))
    assert not alike(sketch(names), sketch(np.array(["a/1.png", "a/2.png", "b/4.png"])))
    assert alike(sketch(names), sketch(names.astype(object)))


def test_not_a_number_and_infinity():
    array = np.array([[1.0, np.nan], [np.inf, 2.0], [3.0, 4.0]])
    assert alike(sketch(array), sketch(array))


def test_tensors_and_files(tmp_path):
    array = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    np.save(tmp_path / "array.npy", array)
    mapped = np.load(tmp_path / "array.npy", mmap_mode="r")
    for same in (keras.ops.convert_to_tensor(array), mapped):
        assert alike(sketch(array), sketch(same))


def test_what_cannot_be_read_is_known_by_its_shape():
    class Odd:
        shape = (3, 2)

    assert alike(sketch(Odd()), sketch(np.ones((3, 2))))
    assert not alike(sketch(Odd()), sketch(np.ones((4, 2))))
