"""The parameter groups of a model's optimizer, whichever optimizer that is.

A model's optimizer may be a `GroupOptimizer`, or one optimizer, which is one group; and either may
be in a `LossScaleOptimizer`. Whoever asks for groups and rates need not know which.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras

from keras_tl.internals.optimizers import without_loss_scale
from keras_tl.optimizers.group_optimizer import GroupOptimizer


def group_optimizer(optimizer: keras.Optimizer) -> GroupOptimizer | None:
    """Returns the `GroupOptimizer` that an optimizer is or holds, or None."""
    inner = without_loss_scale(optimizer)
    return inner if isinstance(inner, GroupOptimizer) else None


def groups_of(optimizer: keras.Optimizer, alone: str = "head") -> dict[str, keras.Optimizer]:
    """Returns the optimizers of an optimizer's groups by name.

    Args:
        optimizer: A model's optimizer.
        alone: String. The name of the one group that any but a `GroupOptimizer` is.

    Example:

    >>> list(groups_of(keras.optimizers.Adam()))
    ['head']
    """
    groups = group_optimizer(optimizer)
    return {alone: without_loss_scale(optimizer)} if groups is None else groups.groups


def newest_group(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Returns the optimizer of the group that joined last."""
    return list(groups_of(optimizer).values())[-1]


def learning_rate_of(optimizer: keras.Optimizer) -> float:
    """Returns the learning rate that an optimizer has now; of several groups, the newest one's."""
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def rates_of(optimizer: keras.Optimizer, weights: Sequence[keras.Variable]) -> list[float]:
    """Returns the learning rate at which an optimizer updates each of some weights."""
    groups = group_optimizer(optimizer)
    if groups is None:
        return [learning_rate_of(optimizer)] * len(weights)
    return groups.rates(weights)
