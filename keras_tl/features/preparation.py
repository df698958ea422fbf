"""Data as the layers of a model get it in `fit`, if the model's own `fit` prepares it."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tl.errors import UncacheableError
from keras_tl.internals.batches import batches_of
from keras_tl.internals.own_fit import handed_on, prepares_data

Data = tuple[Any, Any, Any]


def prepared(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    training: bool = True,
) -> Data:
    """Returns data as Keras' `fit` gets it from the model's own, and as it is from other models.

    Args:
        model: The model.
        x: Whatever its `fit` takes.
        y: Targets, if they are not in `x`.
        sample_weight: Weights, if they are not in `x`.
        batch_size: Int or None. For arrays.
        training: Bool. Whether the data is prepared as training data, or as validation data.

    Returns:
        A tuple `(x, y, sample_weight)`: arrays, or a `tf.data.Dataset` and twice None.

    Raises:
        UncacheableError: If it cannot be known what `fit` does with the data.
    """
    if not prepares_data(model):
        return x, y, sample_weight
    if inspect.isgenerator(x):
        raise _unknown(model, "a generator would be used up by asking it")
    given = {"x": x, "y": y, "sample_weight": sample_weight, "batch_size": batch_size}
    if not training:
        arrays = y is not None or all(map(_is_array, keras.tree.flatten(x)))
        given["validation_data"] = (x, y, sample_weight) if arrays else x
    found, steps = _handed_on(model, given, training)
    if not all(hasattr(one, "shape") for one in keras.tree.flatten(found[0])):
        return _dataset(found[0], steps), None, None
    if not _same(found, _handed_on(model, given, training)[0]):
        raise _unknown(model, "arrays are prepared another way each time")
    return found


def _handed_on(
    model: keras.Model, given: dict[str, Any], training: bool
) -> tuple[Data, int | None]:
    """Returns data as it is handed on, and the number of its batches if `fit` says it."""
    try:
        call = handed_on(model, **given, verbose=0)
    except Exception as error:  # Its `fit` is not ours, and may raise anything.
        raise _unknown(model, f"{type(error).__name__}: {error}") from error
    if training:
        return (call["x"], call["y"], call["sample_weight"]), call["steps_per_epoch"]
    held_out = call["validation_data"]
    several = isinstance(held_out, (tuple, list))
    x, y, weight = keras.utils.unpack_x_y_sample_weight(held_out if several else (held_out,))
    return (x, y, weight), call["validation_steps"]


def _unknown(model: keras.Model, what: str) -> UncacheableError:
    return UncacheableError(
        f'The model "{model.name}" (a {type(model).__name__}) prepares data in its own `fit`, but '
        f"what its layers get is not known: {what}. Train through the backbone."
    )


def _dataset(x: Any, steps: int | None) -> Any:
    """Returns a data set that says how many batches it has, if `fit` does."""
    if steps is None:
        return x
    dataset, _, _ = batches_of(x, None, None, None, steps)
    return dataset.apply(tf.data.experimental.assert_cardinality(steps))


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") or isinstance(x, (str, bytes, int, float))


def _same(some: Data, others: Data) -> bool:
    pairs = zip(keras.tree.flatten(some), keras.tree.flatten(others), strict=True)
    return all(one is other or np.array_equal(one, other) for one, other in pairs)
