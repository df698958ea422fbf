"""`tf.data.Dataset.from_generator`, without what it does to the memory of the process.

The first data set of that kind that TensorFlow 2.21 reads sets glibc's `M_MMAP_THRESHOLD` to 128
KiB, for the whole process and for good (`ApplyPython311MemoryPatch`). From then on larger blocks go
back to the system when they are freed, and each step of a large model gets them anew.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

# Of the start of an array, so that TensorFlow uses it as it is, without a copy.
ALIGNMENT = 64


def dataset_from_generator(
    generator: Callable[[], Iterator[Any]], output_signature: Any
) -> tf.data.Dataset:
    """Returns a `tf.data.Dataset` of what a generator yields.

    A generator that is not at its end when its pass is given up is closed then, in whichever thread
    that is.

    Args:
        generator: Function that returns an iterator. It is called at the start of each pass.
        output_signature: `tf.TensorSpec`s of an element, nested as it is.
    """
    specs = tf.nest.flatten(output_signature)
    dtypes = [spec.dtype for spec in specs]
    passes = _Passes(generator, dtypes)

    def next_of(number: tf.Tensor) -> tuple[tf.Tensor, ...]:
        more, *values = tf.numpy_function(passes.next, [number], [tf.bool, *dtypes])
        return tf.ensure_shape(more, ()), *values

    def packed(_: tf.Tensor, *values: tf.Tensor) -> Any:
        shaped = [tf.ensure_shape(value, spec.shape) for value, spec in zip(values, specs)]
        return tf.nest.pack_sequence_as(output_signature, shaped)

    def of_pass(_: tf.Tensor) -> tf.data.Dataset:
        number = tf.numpy_function(passes.begin, [], tf.int64)
        elements = tf.data.Dataset.counter().map(lambda _: next_of(number))
        return elements.take_while(lambda more, *_: more).map(packed)

    return tf.data.Dataset.from_tensors(0).flat_map(of_pass)


class _Passes:
    """The iterators of the passes that are being read.

    Args:
        generator: Function that returns an iterator.
        dtypes: List of `tf.DType`, of the tensors of an element.
    """

    def __init__(self, generator: Callable[[], Iterator[Any]], dtypes: list[tf.DType]):
        self._generator = generator
        self._dtypes = [dtype.as_numpy_dtype for dtype in dtypes]
        self._numbers = itertools.count()
        self._iterators: dict[int, Iterator[Any]] = {}

    def begin(self) -> np.ndarray:
        """Returns the number of a new pass, as an array that lives as long as the pass.

        TensorFlow tells nobody that a pass is given up, but lets go of its tensors.
        """
        size = np.dtype(np.int64).itemsize
        number = aligned(np.empty(size + ALIGNMENT, np.uint8), size).view(np.int64).reshape(())
        number[...] = next(self._numbers)
        weakref.finalize(number, self._iterators.pop, int(number), None).atexit = False
        return number

    def next(self, number: np.ndarray) -> list[np.ndarray]:
        """Returns whether there is another element in a pass, and its arrays, which may be any."""
        # Begun here, so that a TensorFlow that copies the number reads all the same.
        if int(number) not in self._iterators:
            self._iterators[int(number)] = self._generator()
        try:
            element = tf.nest.flatten(next(self._iterators[int(number)]))
        except StopIteration:
            del self._iterators[int(number)]
            return [np.array(False), *[np.empty(0, dtype) for dtype in self._dtypes]]
        arrays = [np.asarray(*both) for both in zip(element, self._dtypes, strict=True)]
        return [np.array(True), *arrays]


def aligned(memory: np.ndarray, size: int) -> np.ndarray:
    """Returns `size` bytes of memory from where on TensorFlow uses an array without a copy.

    Args:
        memory: Array of bytes, at least `size + ALIGNMENT`.
        size: Int.
    """
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size]
