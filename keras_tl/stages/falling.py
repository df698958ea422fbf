"""A learning rate that falls for an epoch, and that an optimizer gets back."""

from __future__ import annotations

import weakref

import keras

from keras_tl.optimizers.groups import learning_rate_of

# By optimizer: the rate that it had, and the one that it fell to. With the optimizer and not with a
# run, for what ends a `fit` early leaves it to whoever trains the model next.
_FALLEN: weakref.WeakKeyDictionary[keras.Optimizer, tuple[float, float]] = (
    weakref.WeakKeyDictionary()
)


def fall(optimizer: keras.Optimizer, highest: float) -> None:
    """Lowers an optimizer's rate to the highest that it may have, from what it had at first.

    What another callback has made of the rate stays, if it is lower.
    """
    rise(optimizer)
    full = learning_rate_of(optimizer)
    if full > highest:
        optimizer.learning_rate = highest
        _FALLEN[optimizer] = full, learning_rate_of(optimizer)


def rise(optimizer: keras.Optimizer) -> None:
    """Gives an optimizer the rate that it had, unless something else has set another one."""
    full, fallen = _FALLEN.pop(optimizer, (None, None))
    if full is not None and learning_rate_of(optimizer) == fallen:
        optimizer.learning_rate = full


def rate_before(optimizer: keras.Optimizer) -> float | None:
    """Returns the rate that an optimizer had before it fell; None if it has it now."""
    full, fallen = _FALLEN.get(optimizer, (None, None))
    return full if fallen == learning_rate_of(optimizer) else None


def has_fallen(optimizer: keras.Optimizer, full: float) -> None:
    """Notes of an optimizer that its rate has fallen, as `rate_before` has said."""
    _FALLEN[optimizer] = full, learning_rate_of(optimizer)
