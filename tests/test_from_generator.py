"""Data sets of what a generator yields, and the memory of the process after reading them."""

import ctypes
import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FeatureCache, FrozenBackbone
from keras_tl.internals import from_generator
from keras_tl.internals.from_generator import dataset_from_generator
from tests import models
from tests.shared import regression_data

SPEC = {"x": tf.TensorSpec((None, 2), tf.float32), "names": (tf.TensorSpec((None,), tf.string),)}


class Batches:
    """Yields batches, and notes the beginning and the end of each pass."""

    def __init__(self, count=4):
        self.count = count
        self.events = []

    def __call__(self):
        self.events.append("begin")
        try:
            for i in range(self.count):
                yield {"x": np.full((i + 1, 2), i, "float32"), "names": (np.array([f"é{i}"]),)}
        finally:
            self.events.append("end")


def numbers(dataset):
    return [int(batch["x"][0, 0]) for batch in dataset]


def test_each_pass_has_all_elements_in_their_order():
    batches = Batches()
    dataset = dataset_from_generator(batches, SPEC).prefetch(2)
    for _ in range(2):
        assert numbers(dataset) == [0, 1, 2, 3]
    assert numbers(dataset.repeat(2)) == [0, 1, 2, 3] * 2
    assert batches.events == ["begin", "end"] * 4


def test_elements_are_as_the_signature_says():
    dataset = dataset_from_generator(Batches(), SPEC)
    assert dataset.element_spec == SPEC
    *_, last = dataset
    assert last["x"].numpy().tolist() == [[3.0, 3.0]] * 4
    assert last["names"][0].numpy().tolist() == ["é3".encode()]


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.bool, tf.complex64, tf.uint16])
def test_tensors_of_any_dtype(dtype):
    values = np.array([0, 1], dtype.as_numpy_dtype)
    dataset = dataset_from_generator(lambda: iter([values]), tf.TensorSpec((2,), dtype))
    assert [batch.numpy().tobytes() for batch in dataset] == [values.tobytes()]


def test_passes_that_are_read_at_once_are_each_their_own():
    dataset = dataset_from_generator(Batches(), SPEC)
    assert [numbers(pair) for pair in zip(dataset, dataset)] == [[0, 0], [1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize("how", ["break", "take", "zip", "compiled"])
def test_a_pass_that_is_given_up_closes_its_generator(how):
    batches = Batches(1000)
    dataset = dataset_from_generator(batches, SPEC).prefetch(2)
    if how == "break":
        for _ in dataset:
            break
    elif how == "take":
        list(dataset.take(1))
    elif how == "zip":
        list(tf.data.Dataset.zip((tf.data.Dataset.range(1), dataset)))
    else:
        tf.function(lambda iterator: next(iterator)["x"])(iter(dataset))
    gc.collect()
    assert batches.events == ["begin", "end"]


def test_where_tensorflow_copies_the_number_of_a_pass_it_is_read_all_the_same(monkeypatch):
    monkeypatch.setattr(from_generator, "aligned", lambda memory, size: memory[1 : 1 + size])
    assert numbers(dataset_from_generator(Batches(), SPEC).prefetch(2)) == [0, 1, 2, 3]


def test_an_error_in_a_generator_is_the_one_that_tensorflows_own_raises():
    def broken():
        yield 0
        raise failure("no such file")

    for failure in (OSError, ValueError, NotImplementedError):
        spec = tf.TensorSpec((), tf.int64)
        raised = []
        for make in (dataset_from_generator, tf.data.Dataset.from_generator):
            with pytest.raises(tf.errors.OpError, match="no such file") as caught:
                list(make(broken, output_signature=spec))
            raised.append(caught.type)
        assert raised[0] is raised[1]


@pytest.mark.parametrize(
    "element",
    [np.zeros((3, 2), "float32"), np.zeros((2, 4), "float32"), (np.zeros((2, 2), "float32"),) * 2],
)
def test_an_element_that_is_not_as_the_signature_says_is_an_error(element):
    spec = tf.TensorSpec((2, 2), tf.float32)
    with pytest.raises(tf.errors.InvalidArgumentError):
        list(dataset_from_generator(lambda: iter([element]), spec))


# What is left of it in the process: glibc's threshold, read off by where large blocks come from.

LIBC = ctypes.CDLL(None) if os.name == "posix" else None
BLOCK = 30 << 20  # The threshold grows to 32 MiB.


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: `hblks` is how many blocks are mapped."""

    _fields_ = [
        ("before", ctypes.c_size_t * 3),
        ("hblks", ctypes.c_size_t),
        ("after", ctypes.c_size_t * 6),
    ]


def blocks_from_the_system():
    """Of four blocks that are held at once, after one was freed, how many are mapped."""
    LIBC.malloc.restype = ctypes.c_void_p
    LIBC.malloc.argtypes = [ctypes.c_size_t]
    LIBC.free.argtypes = [ctypes.c_void_p]
    LIBC.mallinfo2.restype = MallocInfo
    LIBC.free(LIBC.malloc(BLOCK))
    before = LIBC.mallinfo2().hblks
    blocks = [LIBC.malloc(BLOCK) for _ in range(4)]
    mapped = LIBC.mallinfo2().hblks - before
    for block in blocks:
        LIBC.free(block)
    return mapped


def main():
    """Prints that number after recording and reading features, and after `from_generator`."""
    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    features = FeatureCache(model)(*regression_data(), shuffle=True, verbose=0)
    for _ in features:
        break
    list(features)
    ours = blocks_from_the_system()
    list(tf.data.Dataset.from_generator(lambda: iter([0]), output_signature=tf.TensorSpec(())))
    print(ours, blocks_from_the_system())


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="Asks glibc.")
def test_recording_and_reading_leave_the_memory_of_the_process_as_it_is():
    result = subprocess.run(
        [sys.executable, "-m", "tests.test_from_generator"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours, theirs = map(int, result.stdout.split()[-2:])
    assert ours == 0
    if theirs == 0:
        pytest.skip(
            f"TensorFlow {tf.__version__} leaves the memory of the process as it is when it reads "
            "a `from_generator`, as 2.20 does. `dataset_from_generator` may go once no "
            "supported TensorFlow needs it."
        )


if __name__ == "__main__":
    main()
