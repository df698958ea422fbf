"""Data as `fit` takes it, as batches."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.from_generator import dataset_from_generator
from keras_tl.internals.imported import (
    ArrayDataAdapter,
    get_data_adapter,
    train_validation_split,
)
from keras_tl.internals.own_fit import keras_method

_DEFAULT_BATCH_SIZE = 32


def batch_count(x: Any, y: Any, sample_weight: Any, batch_size: int | None) -> int | None:
    """Returns how many batches `fit` sees in one pass over data, None if that is not known.

    Args:
        x: Whatever `fit` takes, but no generator: two of its batches would be lost.
        y: Targets, if they are not in `x`.
        sample_weight: Weights, if they are not in `x`.
        batch_size: Int or None. For arrays; None is Keras' default.
    """
    return get_data_adapter(x, y, sample_weight, batch_size).num_batches


def samples_in_batch(x: Any, batch_size: int | None) -> int | None:
    """Returns how many samples `fit` has in a batch, None if the data does not tell.

    Args:
        x: Whatever `fit` takes.
        batch_size: Int or None. For arrays; None is Keras' default.
    """
    if isinstance(x, tf.data.Dataset):
        return _batched_by(x)
    leaves = keras.tree.flatten(x)
    if leaves and all(hasattr(one, "shape") for one in leaves):
        return batch_size or _DEFAULT_BATCH_SIZE
    return getattr(x, "batch_size", None)  # As torch's loaders have it.


def _batched_by(dataset: Any) -> int | None:
    """Returns the size of the batches that a `tf.data.Dataset` was cut into, if it tells."""
    while dataset is not None:
        # TensorFlow's attributes, of which no other says it. Without them, it is not known.
        size = getattr(dataset, "_batch_size", None)
        if size is not None:
            return int(size)
        dataset = getattr(dataset, "_input_dataset", None)
    return None


def split_off_validation(x: Any, y: Any, sample_weight: Any, split: float) -> tuple[Any, Any]:
    """Returns arrays in two parts, as `validation_split` of `fit` does: to train and to validate.

    Args:
        x: Arrays.
        y: Arrays or None.
        sample_weight: Arrays or None.
        split: Float. The fraction at the end that is held out.

    Returns:
        Two tuples `(x, y, sample_weight)`.
    """
    arrays = [one for one in keras.tree.flatten((x, y, sample_weight)) if one is not None]
    if not any(isinstance(one, np.ndarray) and one.dtype.kind in "OSU" for one in arrays):
        return train_validation_split((x, y, sample_weight), validation_split=split)
    # Which Keras cannot split, as only a model's own `fit` can take them.
    positions, _ = train_validation_split((np.arange(len(arrays[0])),), validation_split=split)
    count = len(positions[0])

    def part(kept: slice) -> Any:
        whole = (x, y, sample_weight)
        return keras.tree.map_structure(lambda one: None if one is None else one[kept], whole)

    return part(slice(count)), part(slice(count, None))


def batches_of(
    x: Any, y: Any, sample_weight: Any, batch_size: int | None, steps: int | None
) -> tuple[Any, int | None, Callable[[], None]]:
    """Returns a `tf.data.Dataset` of the batches that `fit` would see, and how many there are.

    Args:
        x: Whatever `fit` takes.
        y: Targets, if they are not in `x`.
        sample_weight: Weights, if they are not in `x`.
        batch_size: Int or None. For arrays; None is Keras' default.
        steps: Int or None. How many batches are used, of data that has no end.

    Returns:
        The data set, the number of its batches (None if that is not known), and a function that
        ends what reads the data now.
    """
    adapter = get_data_adapter(x, y, sample_weight, batch_size, steps)
    count = adapter.num_batches
    if isinstance(x, keras.utils.PyDataset):
        passes = _Passes(x)
        dataset, close = _dataset_of_passes(adapter, passes), passes.close
    else:
        dataset, close = _dataset_of(adapter), _nothing
    if steps is None:
        return dataset, count, close
    return dataset.take(steps), steps if count is None else min(steps, count), close


def _nothing() -> None:
    """Does nothing."""


class _Passes:
    """Passes over a `PyDataset`, each with workers of its own, which end when it does.

    The iterators that Keras makes share one queue. A pass that is left halfway leaves its rest
    there, and its workers running: the next pass would take that rest, and then wait for ever for
    batches that nobody reads.

    Args:
        dataset: The `PyDataset`.
    """

    def __init__(self, dataset: keras.utils.PyDataset):
        self._dataset = dataset
        self._lock = threading.Lock()
        self._running: list[Any] = []

    def __call__(self) -> Iterator[Any]:
        """Yields the batches of a pass, as an epoch of `fit` without shuffling reads them."""
        adapter = get_data_adapter(self._dataset)
        self._running.append(adapter)
        try:
            adapter.on_epoch_begin()
            yield from map(keras.tree.lists_to_tuples, adapter.get_numpy_iterator())
        finally:
            self._end(adapter)

    def close(self) -> None:
        """Ends the passes that are not at their end, such as after an error."""
        for adapter in list(self._running):
            self._end(adapter)

    def _end(self, adapter: Any) -> None:
        with self._lock:
            if adapter not in self._running:
                return
            self._running.remove(adapter)
        _stop_workers(adapter)
        adapter.on_epoch_end()


@checked(SINCE_3_15)
def _stop_workers(adapter: Any) -> None:
    """Ends the workers of a `PyDatasetAdapter`, if it has any, without waiting for their results.

    `stop` of the queue waits for each result, of which a killed process never gives one, and ends
    halfway at the first that is an error. Without waiting, the thread that fills the queue may
    never find room to see that it is to end.
    """
    workers = adapter.enqueuer
    thread = None if workers is None else workers.run_thread
    if thread is None:
        return
    workers.stop(drain_queue_and_join=False)
    while thread.is_alive():
        with contextlib.suppress(queue.Empty):
            workers.future_queue.get(timeout=0.05)


def _dataset_of_passes(adapter: Any, passes: _Passes) -> Any:
    like = adapter.get_tf_dataset()
    spec = keras.tree.lists_to_tuples(like.element_spec)
    # Not our own: it may close a pass in one of the workers, for which that would wait.
    dataset = tf.data.Dataset.from_generator(passes, output_signature=spec)
    if adapter.enqueuer is None:
        return dataset.prefetch(1)
    # As Keras sets them: workers read ahead themselves, and TensorFlow's threads disturb them.
    return dataset.with_options(like.options())


def _dataset_of(adapter: Any) -> Any:
    """Returns the batches of a data adapter as a `tf.data.Dataset`.

    Of arrays one batch after the other: `get_tf_dataset` would copy all into memory first, even of
    a `numpy.memmap`.
    """
    is_arrays = isinstance(adapter, ArrayDataAdapter)
    first = next(iter(adapter.get_numpy_iterator()), None) if is_arrays else None
    if first is None:
        return adapter.get_tf_dataset()
    first = keras.tree.lists_to_tuples(first)
    spec = keras.tree.map_structure(
        lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), first
    )
    return dataset_from_generator(
        lambda: map(keras.tree.lists_to_tuples, adapter.get_numpy_iterator()), spec
    ).prefetch(1)


def constants_in(data: Any) -> list[Any] | None:
    """Returns the tensors that a `tf.data.Dataset` was made from, None of other data.

    Nothing is read from it: its steps are followed back to where they start, such as
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
            # Only steps that were made from tensors have `_tensors`. Of a TensorFlow without
            # either, a resume checks less of its data, which must not end a run.
            found += getattr(step, "_tensors", [])
            steps += getattr(step, "_inputs", list)()
    return [tensor for tensor in found if hasattr(tensor, "numpy")]


def predictions(model: keras.Model, batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields each batch of tensors, as `fit` takes it, and what the model returns for its inputs.

    As `predict` of Keras does it, which would hold the outputs of all batches. The outputs are
    NumPy arrays.
    """
    on_tensorflow = keras.backend.backend() == "tensorflow"
    for batch in batches:
        x = keras.utils.unpack_x_y_sample_weight(batch)[0]
        if not on_tensorflow:
            x = keras.tree.map_structure(lambda tensor: tensor.numpy(), x)
        yield batch, _predict(model, x)


def _predict(model: keras.Model, x: Any) -> Any:
    if keras.backend.backend() == "jax":
        x = keras.tree.map_structure(_spreading(model), x)
    strategy = model.distribute_strategy if keras.backend.backend() == "tensorflow" else None
    if strategy is None or strategy.num_replicas_in_sync == 1:
        # Which of a KerasHub task prepares what has been prepared.
        return keras_method(model, "predict_on_batch")(x)
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


def _spreading(model: keras.Model) -> Callable[[Any], Any]:
    """Returns a function that spreads a batch over the devices that hold a model, as `fit` does.

    `predict_on_batch` would have each device compute the whole batch. One that they cannot share
    equally, it still has.
    """
    import jax

    weight = next(iter(model.variables), None)
    sharding = None if weight is None else weight.value.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return lambda array: array
    distribution = keras.distribution.distribution()
    axis = sharding.mesh.axis_names[0] if distribution is None else distribution.batch_dim_name
    parts = sharding.mesh.shape[axis]
    rows = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(axis))

    def spread(array: Any) -> Any:
        return array if len(array) % parts else jax.device_put(array, rows)

    return spread
