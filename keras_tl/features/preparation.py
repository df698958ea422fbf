"""Data as the layers of a model get it in `fit`, if the model's own `fit` prepares it."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tl.backbone.selecting import flatten_layers
from keras_tl.errors import UncacheableError
from keras_tl.internals.batches import batches_of
from keras_tl.internals.layers import seed_states
from keras_tl.internals.own_fit import handed_on, prepares_data, preparing_layers
from keras_tl.internals.values import on_host

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
    return found


def check_prepares_alike(
    model: keras.Model, data: Data, *, batch_size: int | None, training: bool
) -> None:
    """Raises an UncacheableError if a model prepares the same batch another way each time.

    Once prepared, the data may well be the same each time that it is read: so are random numbers
    in a `tf.data.Dataset` under a seed.
    """
    if not prepares_data(model):
        return
    x, y, sample_weight = data
    if isinstance(x, tf.data.Dataset):
        # One batch as it was read, as the next may be in another order.
        x = tf.data.Dataset.from_tensors(next(iter(x))) if x.cardinality() else x
    seeds = [seed for one in flatten_layers(preparing_layers(model)) for seed in seed_states(one)]
    before = [on_host(seed) for seed in seeds]
    once, again = (
        _first(*prepared(model, x, y, sample_weight, batch_size=batch_size, training=training))
        for _ in range(2)
    )
    if not _same(once, again) or not _same(before, [on_host(seed) for seed in seeds]):
        raise UncacheableError(
            f'The model "{model.name}" (a {type(model).__name__}) prepares data in its own `fit` '
            "at random. Recorded once, every epoch would see the same. Pass `views=k` to record k "
            "random passes, of which each epoch draws; or train through the backbone."
        )


def _first(x: Any, y: Any, sample_weight: Any) -> Any:
    """Returns the first batch of a data set, or arrays as they are."""
    return next(iter(x), None) if isinstance(x, tf.data.Dataset) else (x, y, sample_weight)


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


def _same(some: Any, others: Any) -> bool:
    pairs = zip(keras.tree.flatten(some), keras.tree.flatten(others), strict=True)
    return all(one is other or np.array_equal(one, other) for one, other in pairs)
