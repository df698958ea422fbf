"""Whether each epoch of `fit` reads the same samples, so that a record of one stands for all."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import keras
import tensorflow as tf

from keras_tl.errors import UncacheableError
from keras_tl.features.source import Samples, Source
from keras_tl.internals.batches import batch_count


def check_training_data(
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    batch_size: int | None,
    steps: int | None,
    random: bool = False,
) -> None:
    """Raises an UncacheableError if an epoch may read other samples than the one before it.

    With `steps_per_epoch`, `fit` continues in the data from epoch to epoch: epochs read the same
    samples only if each is one whole pass.

    Args:
        x: Whatever `fit` takes.
        y: Targets, if they are not in `x`.
        sample_weight: Weights, if they are not in `x`.
        batch_size: Int or None. For arrays.
        steps: Int or None. The `steps_per_epoch` of `fit`.
        random: Bool. Whether inputs may change on every read. Then only targets are compared.

    Raises:
        ValueError: If the data has no end, and `steps` is None.
    """
    _check_kind(x, f"`fit` with `steps_per_epoch={steps}`")
    if steps is None:
        return
    batches = batch_count(x, y, sample_weight, batch_size)
    if batches is None and _repeats_after(x, steps, random=random):
        return
    if batches is None or steps < batches:
        length = "has no known length" if batches is None else f"has {batches} batches"
        remedy = "the number of batches in one pass" if batches is None else str(batches)
        raise UncacheableError(
            f"With `steps_per_epoch={steps}`, `fit` continues in the data from epoch to epoch, so "
            f"an epoch reads other samples than the one before: the data {length}. Pass "
            f"`steps_per_epoch={remedy}`, or leave it out for data that ends, to record features."
        )


def check_validation_data(data: Any, *, steps: int | None) -> None:
    """Raises an UncacheableError if a validation may read other samples than the one before.

    Each validation starts at the start of the data, except that of a generator.

    Args:
        data: `validation_data` of `fit`, or None.
        steps: Int or None. The `validation_steps` of `fit`.
    """
    _check_kind(data, f"Validation with `validation_steps={steps}`")


def _check_kind(x: Any, reader: str) -> None:
    if inspect.isgenerator(x):
        raise UncacheableError(
            f"{reader} continues in a generator from epoch to epoch, and nothing tells whether it "
            "yields the same again. Pass arrays, a `tf.data.Dataset` or a `keras.utils.PyDataset` "
            "to record features."
        )
    if not isinstance(x, keras.utils.PyDataset):
        return
    hooks = [
        name
        for name in ("on_epoch_begin", "on_epoch_end")
        if getattr(type(x), name) is not getattr(keras.utils.PyDataset, name)
    ]
    if hooks:
        raise UncacheableError(
            f"The {type(x).__name__} has its own {' and '.join(hooks)}, so its samples may be "
            "others in each epoch. Leave that out to record features: `shuffle=True` has each "
            "epoch in a random order."
        )
    if x.num_batches is None:
        raise UncacheableError(
            f"{reader} continues in a {type(x).__name__} without an end from epoch to epoch. Give "
            "it a length, the number of batches in one pass, to record features."
        )


def _repeats_after(x: Any, steps: int, *, random: bool) -> bool:
    """Whether the second `steps` batches of data have the samples of the first."""
    windows = Samples(), Samples()
    source = Source(x, None, None, batch_size=None, steps=2 * steps)
    for number, batch in enumerate(itertools.islice(source.part(0, 1), 2 * steps)):
        windows[number // steps].add(Samples.of(batch))
    first, second = windows
    same_sizes = sorted(first.batches) == sorted(second.batches)
    if random and not source.describe()["targets"]:
        return False  # Nothing is left to tell by.
    return same_sizes and first.difference(second, inputs=not random) is None


def never_ends(x: Any) -> bool:
    """Returns whether data has no end, as far as that can be known before it is read."""
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches is None
    return inspect.isgenerator(x) or (
        isinstance(x, tf.data.Dataset) and x.cardinality() == tf.data.INFINITE_CARDINALITY
    )


def starts_over(x: Any, steps: int | None) -> bool:
    """Returns whether each reading of data starts at its start, and ends.

    Args:
        x: Whatever `evaluate` takes.
        steps: Int or None. How many batches are read.
    """
    # A generator, or a `PyDataset` without an end, goes on where it was.
    return not never_ends(x) or (steps is not None and isinstance(x, tf.data.Dataset))
