"""The switch: other weights train from the next step on, in a running `fit` or a loop.

The recipe, in this order (`all_or_nothing` puts everything back if a step fails):

1. The best weights of the ending stage are restored, by the caller, so that an optimizer that
   copies weights when it is built (averages, schedule-free methods) starts from them.
2. `trainable` flags are changed, by the caller, with `freezing`.
3. `renew_optimizer`: an optimizer only knows the variables it was built with, so a new one is made
   from the configuration of the old one, with its own learning rate, and built at once, in the
   scope the weights live in.
4. `renew_training`: the model gets that optimizer, in its compile configuration too, and its train
   step is traced anew. Losses, metrics, `stop_training` and the evaluation function (where the
   backend allows) stay as they are.

The Keras internals that this needs are in `internals`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import keras
import numpy as np

from keras_tl import freezing, internals
from keras_tl.best_weights import Snapshot
from keras_tl.optimizers import GroupOptimizer

LearningRate: TypeAlias = (
    float | keras.optimizers.schedules.LearningRateSchedule | Callable[[], float]
)


def check_learning_rate(
    learning_rate: LearningRate, argument: str = "learning_rate"
) -> LearningRate:
    """Returns the learning rate as an optimizer takes it: numbers as a Python float.

    Raises:
        ValueError: If it is a number that is not finite and above 0, or not a number, schedule or
            callable.
    """
    if isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule) or callable(
        learning_rate
    ):
        return learning_rate
    is_number = isinstance(learning_rate, (int, float, np.number)) and not isinstance(
        learning_rate, bool
    )
    if is_number and math.isfinite(learning_rate) and learning_rate > 0:
        return float(learning_rate)
    raise ValueError(
        f"`{argument}` must be a finite number above 0, a `LearningRateSchedule` or a callable "
        f"without arguments. Received: {argument}={learning_rate!r}."
    )


def renew_optimizer(
    optimizer: keras.Optimizer,
    learning_rate: LearningRate | None = None,
    *,
    variables: Sequence[keras.Variable] | None = None,
) -> keras.Optimizer:
    """Returns a new optimizer with the configuration of another, without its state.

    What `exclude_from_weight_decay` was told is kept too, and so is the loss scale of a
    `LossScaleOptimizer`.

    Args:
        optimizer: A Keras optimizer, built or not.
        learning_rate: Float, `LearningRateSchedule` or callable for the new one. None keeps the old
            setting; a schedule starts again at its first step.
        variables: The variables that the new optimizer is to update, with which it is then built.
            None leaves that to the first step.

    Returns:
        A new optimizer of the same class.

    Raises:
        ValueError: If the learning rate is not one, or the optimizer has several.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> adam = keras.optimizers.Adam(1e-3)
    >>> optimizer = renew_optimizer(adam, 1e-5, variables=model.trainable_variables)
    >>> float(keras.ops.round(optimizer.learning_rate * 1e5))
    1.0
    """
    inner = internals.without_loss_scale(optimizer)
    if isinstance(inner, keras.optimizers.MultiOptimizer):
        raise ValueError(
            f"The optimizer {inner.name!r} is a MultiOptimizer, which has no single learning rate "
            "to replace. Pass `optimizer=` with the optimizer to fine-tune with."
        )
    config = inner.get_config()
    if learning_rate is not None:
        config["learning_rate"] = check_learning_rate(learning_rate)
    new = type(inner).from_config(config)
    internals.copy_weight_decay_exclusions(inner, new)
    if inner is not optimizer:
        return _loss_scaled_like(optimizer, new, variables)
    if variables is not None:
        new.build(list(variables))
    return new


def _loss_scaled_like(
    old: keras.optimizers.LossScaleOptimizer,
    inner: keras.Optimizer,
    variables: Sequence[keras.Variable] | None,
) -> keras.optimizers.LossScaleOptimizer:
    scale = float(internals.on_host(old.dynamic_scale)) if old.built else old.initial_scale
    new = keras.optimizers.LossScaleOptimizer(
        inner, initial_scale=scale, dynamic_growth_steps=old.dynamic_growth_steps, name=old.name
    )
    if variables is not None:
        new.build(list(variables))
        if old.built:
            new.step_counter.assign(old.step_counter)
    return new


def renew_training(
    model: keras.Model,
    learning_rate: LearningRate | None = None,
    *,
    head_learning_rate: LearningRate | None = None,
    optimizer: keras.Optimizer | None = None,
    keep_evaluation: bool = False,
) -> None:
    """Has a compiled model train, from the next step on, the weights that are trainable now.

    What `compile` and a new `fit` do together, for a `fit` that is running: the model gets a new
    optimizer and train step; its losses, metrics and `stop_training` stay.

    Args:
        model: A compiled and built model.
        learning_rate: Float, `LearningRateSchedule` or callable for a copy of the model's
            optimizer. None keeps the old setting.
        head_learning_rate: The same for the weights that have been trained so far, which then keep
            the state of their optimizer, in a group "head"; those that join are the group
            "backbone". None gives one new optimizer to all.
        optimizer: An optimizer to use instead of a copy of the model's. One that is built already
            is copied.
        keep_evaluation: Bool. Whether the evaluation function may stay, where the backend allows
            it: right if nothing that it computes depends on the flags that changed (regularizers
            do).

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> model.layers[0].trainable = False
    >>> renew_training(model, 1e-4)
    """
    variables = model.trainable_variables
    with internals.strategy_scope(model):
        if head_learning_rate is not None:
            joining = internals.without_loss_scale(optimizer or model.optimizer)
            if optimizer is None or joining.built:
                joining = renew_optimizer(joining, learning_rate)
            optimizer = _joined(model.optimizer, head_learning_rate, joining, variables)
        elif optimizer is None:
            optimizer = renew_optimizer(model.optimizer, learning_rate, variables=variables)
        else:
            if optimizer.built:
                optimizer = renew_optimizer(optimizer, learning_rate)
            optimizer = _loss_scaled_if(model.optimizer, optimizer)
            optimizer.build(variables)
    internals.install_optimizer(model, optimizer)
    internals.renew_functions(model, keep_evaluation=keep_evaluation)


def _joined(
    old: keras.Optimizer,
    head_learning_rate: LearningRate,
    joining: keras.Optimizer,
    variables: Sequence[keras.Variable],
) -> keras.Optimizer:
    """Returns an optimizer that goes on where `old` is, and takes new variables as a group."""
    inner = internals.without_loss_scale(old)
    known = {id(variable) for variable in internals.optimizer_weights(old) or ()}
    head = renew_optimizer(inner, head_learning_rate)
    groups = GroupOptimizer(
        {"head": head, "backbone": joining}, assign={"head": lambda one: id(one) in known}
    )
    optimizer = _loss_scaled_if(old, groups)
    optimizer.build(variables)
    internals.copy_optimizer_state(inner, head)
    groups.iterations.assign(inner.iterations)
    if optimizer is not groups:
        internals.copy_optimizer_state(old, optimizer)
    return optimizer


def _loss_scaled_if(old: keras.Optimizer, new: keras.Optimizer) -> keras.Optimizer:
    """Wraps a user's optimizer as `compile` wrapped the one before it."""
    if isinstance(old, keras.optimizers.LossScaleOptimizer) and not isinstance(new, type(old)):
        return _loss_scaled_like(old, new, None)
    return new


@contextlib.contextmanager
def all_or_nothing(model: keras.Model, weights: Iterable[keras.Variable] = ()) -> Iterator[None]:
    """A context after which, if it is left by an exception, the model is as it was before.

    Flags, optimizer, compiled functions and the values of `weights` are put back, so that a `fit`
    that goes on, or one started later, trains as if nothing had been tried.
    """
    flags = freezing.get_trainable_flags(model)
    compiled = internals.compiled_state(model)
    values = Snapshot(weights)
    try:
        yield
    except BaseException:
        freezing.set_trainable_flags(model, flags)
        internals.set_compiled_state(model, compiled)
        values.restore()
        raise


def regularization_loss(weights: Iterable[keras.Variable]) -> float:
    """Returns what regularizers add to the loss while these weights are trainable."""
    terms = [weight.regularizer(weight) for weight in weights if weight.regularizer is not None]
    return float(sum(float(keras.ops.convert_to_numpy(term)) for term in terms))
