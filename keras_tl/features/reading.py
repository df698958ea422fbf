"""Recorded features as a `tf.data.Dataset` to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl.features.record_reader import RecordReader
from keras_tl.features.store import Shard
from keras_tl.internals.from_generator import dataset_from_generator


def positions_of_batches(parts: Sequence[Sequence[Shard]]) -> list[np.ndarray]:
    """Returns the positions of the records of each batch, in the order of the data.

    Args:
        parts: The shards of each part. Batch j of the data is in part j modulo their number.
    """
    batches: list[list[np.ndarray]] = []
    start = 0
    for shards in parts:
        batches.append([])
        for count in (count for shard in shards for count in shard.samples.batches):
            batches[-1].append(np.arange(start, start + count))
            start += count
    longest = max(map(len, batches), default=0)
    return [part[i] for i in range(longest) for part in batches if i < len(part)]


def sizes_of_batches(
    batches: Sequence[np.ndarray], *, batch_size: int | None, shuffle: bool
) -> list[int]:
    """Returns how many samples each batch of a data set has; see `dataset_of`."""
    sizes = [len(batch) for batch in batches]
    if sizes and (shuffle or batch_size is not None):
        size = batch_size or sizes[0]
        whole, rest = divmod(sum(sizes), size)
        sizes = [size] * whole + ([rest] if rest else [])
    return sizes


def dataset_of(
    reader: RecordReader,
    pack: Callable[[Sequence[Any]], Any],
    *,
    batches: Sequence[np.ndarray],
    sizes: Sequence[int],
    known_size: bool,
    views: int,
    shuffle: bool,
    seed: int | None,
) -> tf.data.Dataset:
    """Returns a data set of batches.

    Args:
        reader: The `RecordReader` of the records.
        pack: Function from the tensors of a batch to an element.
        batches: The positions of each batch in the first pass, in the order of the data.
        sizes: How many samples each batch of the data set has.
        known_size: Bool. Whether all have the same, and its shapes say so.
        views: Int. How many passes there are. Each epoch draws one for every sample.
        shuffle: Bool. Whether each epoch has an order of its own.
        seed: Int or None. For the orders and the passes.
    """
    in_order = np.concatenate([np.zeros(0, np.int64), *batches])
    ends = np.cumsum([0, *sizes])
    # From NumPy's global generator, as in `fit`: `keras.utils.set_random_seed` decides it.
    generator = np.random.default_rng(np.random.randint(2**31) if seed is None else seed)

    dtypes = [tf.as_dtype(dtype) for _, dtype in reader.records.layout]

    def epoch() -> Iterator[np.ndarray]:
        """Yields the order of an epoch; closes the files at its end, or when it is abandoned."""
        order = generator.permutation(in_order) if shuffle else in_order
        if views > 1:
            order = order + len(order) * generator.integers(views, size=len(order))
        try:
            yield order
        finally:
            reader.close()

    def batch(order: tf.Tensor, begin: tf.Tensor, end: tf.Tensor) -> Any:
        tensors = tf.numpy_function(reader.read, [order[begin:end]], dtypes)
        decoded = reader.records.decode(tensors)
        if known_size:
            decoded = [tf.ensure_shape(one, (sizes[0], *one.shape[1:])) for one in decoded]
        return pack(decoded)

    def of_epoch(order: tf.Tensor) -> tf.data.Dataset:
        bounds = tf.data.Dataset.from_tensor_slices((ends[:-1], ends[1:]))
        return bounds.map(lambda begin, end: batch(order, begin, end))

    order = dataset_from_generator(epoch, tf.TensorSpec((None,), tf.int64))
    dataset = order.flat_map(of_epoch)
    return dataset.apply(tf.data.experimental.assert_cardinality(len(sizes))).prefetch(2)
