"""Data as `fit` takes it, as batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from keras_tl.internals.imported import ArrayDataAdapter, get_data_adapter


def batches_of(
    x: Any, y: Any, sample_weight: Any, batch_size: int | None, steps: int | None
) -> tuple[Any, int | None]:
    """Returns a `tf.data.Dataset` of the batches that `fit` would see, and how many there are.

    Args:
        x: Whatever `fit` takes.
        y: Targets, if they are not in `x`.
        sample_weight: Weights, if they are not in `x`.
        batch_size: Int or None. For arrays; None is Keras' default.
        steps: Int or None. How many batches are used, of data that has no end.

    Returns:
        The data set and the number of its batches, None if that is not known.
    """
    adapter = get_data_adapter(x, y, sample_weight, batch_size, steps)
    dataset, count = _dataset_of(adapter), adapter.num_batches
    if steps is None:
        return dataset, count
    return dataset.take(steps), steps if count is None else min(steps, count)


def _dataset_of(adapter: Any) -> Any:
    """Returns the batches of a data adapter as a `tf.data.Dataset`.

    Of arrays one batch after the other: `get_tf_dataset` would copy all into memory first, even of
    a `numpy.memmap`.
    """
    is_arrays = isinstance(adapter, ArrayDataAdapter)
    first = next(iter(adapter.get_numpy_iterator()), None) if is_arrays else None
    if first is None:
        return adapter.get_tf_dataset()
    import tensorflow as tf

    first = keras.tree.lists_to_tuples(first)
    spec = keras.tree.map_structure(
        lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), first
    )
    return tf.data.Dataset.from_generator(
        lambda: map(keras.tree.lists_to_tuples, adapter.get_numpy_iterator()), output_signature=spec
    ).prefetch(1)


def constants_in(data: Any) -> list[Any] | None:
    """Returns the tensors that a `tf.data.Dataset` was made from, None of other data.

    Nothing is read from it: its steps are followed back to where they begin, such as
    `from_tensor_slices`. TensorFlow has no public way to see them; what it does not show is left
    out.
    """
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None or not isinstance(data, tensorflow.data.Dataset):
        return None
    found: list[Any] = []
    steps, seen = [data], set()
    while steps:
        step = steps.pop()
        if id(step) not in seen:
            seen.add(id(step))
            found += getattr(step, "_tensors", [])
            steps += getattr(step, "_inputs", list)()
    return [tensor for tensor in found if hasattr(tensor, "numpy")]


def predictions(model: keras.Model, batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields each batch of tensors, as `fit` takes it, and what the model returns for its inputs.

    As `predict` does it, which would hold the outputs of all batches. The outputs are NumPy arrays.
    """
    on_tensorflow = keras.backend.backend() == "tensorflow"
    for batch in batches:
        x = keras.utils.unpack_x_y_sample_weight(batch)[0]
        if not on_tensorflow:
            x = keras.tree.map_structure(lambda tensor: tensor.numpy(), x)
        yield batch, _predict(model, x)


def _predict(model: keras.Model, x: Any) -> Any:
    strategy = model.distribute_strategy if keras.backend.backend() == "tensorflow" else None
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return model.predict_on_batch(x)
    count = strategy.num_replicas_in_sync

    def piece(context: Any) -> Any:
        def of(tensor: Any) -> Any:
            bounds = np.linspace(0, tensor.shape[0], count + 1).astype(int)
            replica = context.replica_id_in_sync_group
            return tensor[bounds[replica] : bounds[replica + 1]]

        return keras.tree.map_structure(of, x)

    # `predict_on_batch` would have each replica compute the whole batch.
    pieces = strategy.experimental_distribute_values_from_function(piece)
    model.make_predict_function()
    outputs = model.predict_function([(pieces,)])
    return keras.tree.map_structure(np.array, outputs)
