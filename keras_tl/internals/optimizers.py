"""Optimizers: the variables they were built for, and what they keep for each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, UnsupportedKerasError, checked
from keras_tl.internals.values import copy_value, on_host


def without_loss_scale(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Returns the optimizer inside a `LossScaleOptimizer`, or the optimizer itself.

    `compile` puts that wrapper around the optimizer of a model in float16.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


@checked(SINCE_3_15)
def optimizer_config(optimizer: Any) -> dict[str, Any]:
    """Returns an optimizer's configuration, with its schedule or function for a rate as it is.

    Serialized, one of the user's own class that has no `get_config` would fail, and one that is not
    registered could not be read. The rate is set aside meanwhile, for `get_config` serializes it.
    """
    rate = optimizer._learning_rate
    if isinstance(rate, keras.Variable):
        return optimizer.get_config()
    optimizer._learning_rate = 0.0
    try:
        config = optimizer.get_config()
    finally:
        optimizer._learning_rate = rate
    return {**config, "learning_rate": rate} if "learning_rate" in config else config


@checked(SINCE_3_15)
def schedule_of(optimizer: Any) -> keras.optimizers.schedules.LearningRateSchedule | None:
    """Returns an optimizer's schedule, or None where the learning rate is a number or function."""
    rate = optimizer._learning_rate
    return rate if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule) else None


@checked(SINCE_3_15)
def has_settable_rate(optimizer: Any) -> bool:
    """Whether an optimizer's learning rate is a number, which callbacks may set."""
    return isinstance(optimizer._learning_rate, keras.Variable)


@checked(SINCE_3_15)
def steps_of(optimizer: Any) -> int:
    """Returns the step count that an optimizer's schedule reads.

    With `gradient_accumulation_steps` that is not `iterations`, which counts updates. A
    `LossScaleOptimizer` has a count of its own, which no schedule reads.
    """
    return int(on_host(without_loss_scale(optimizer)._iterations))


def steps_in_update(optimizers: Iterable[Any]) -> int:
    """Returns how many steps the slowest of some optimizers takes for an update of the weights."""
    inner = [without_loss_scale(one) for one in optimizers]
    return max(getattr(one, "gradient_accumulation_steps", None) or 1 for one in inner)


@checked(SINCE_3_15)
def variable_key(optimizer: Any, variable: Any) -> Any:
    """Returns by what an optimizer knows a variable: the same for Keras' and for TensorFlow's."""
    return optimizer._var_key(variable)


@checked(SINCE_3_15)
def optimizer_weights(optimizer: Any) -> list[Any] | None:
    """Returns the variables that an optimizer was built to update, or None before it is built."""
    inner = without_loss_scale(optimizer)
    # Without `built` it is None, or an optimizer of another library in a custom loop.
    return list(inner._trainable_variables) if getattr(inner, "built", False) else None


def copy_weight_decay_exclusions(source: keras.Optimizer, target: keras.Optimizer) -> None:
    """Copies what `exclude_from_weight_decay` was told, which no configuration carries.

    Raises:
        UnsupportedKerasError: If `exclude_from_weight_decay` notes it elsewhere.
    """
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        # Only the call makes the attributes, so its code tells whether they are still the ones.
        if name not in keras.Optimizer.exclude_from_weight_decay.__code__.co_names:
            raise UnsupportedKerasError(name, SINCE_3_15)
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


@checked(SINCE_3_15)
def moving_averages(optimizer: Any) -> list[tuple[Any, keras.Variable]]:
    """Returns pairs of a variable and its moving average, which an optimizer may keep."""
    inner = without_loss_scale(optimizer)
    if isinstance(inner, keras.optimizers.MultiOptimizer):
        return [pair for one in inner._inner_optimizers for pair in moving_averages(one)]
    if inner is None or not (inner.built and inner.use_ema):
        return []
    kept = zip(inner._trainable_variables, inner._model_variables_moving_average, strict=True)
    return [(variable, average) for variable, average in kept if average is not None]


@checked(SINCE_3_15)
def averages_of_all(optimizer: Any) -> list[keras.Variable] | None:
    """Returns the moving average of each variable of a built optimizer, None if one has none."""
    averages = {variable_key(optimizer, one): kept for one, kept in moving_averages(optimizer)}
    keys = [variable_key(optimizer, one) for one in optimizer._trainable_variables]
    return [averages[key] for key in keys] if all(key in averages for key in keys) else None


@checked(SINCE_3_15)
def can_take_state(old: Any, new: Any, weights: Sequence[keras.Variable]) -> bool:
    """Whether an optimizer is another but for the values of its variables.

    Args:
        old: The built optimizer that a train step was made for.
        new: The other one, built for the same weights.
        weights: List of these weights.
    """
    inner, other = without_loss_scale(old), without_loss_scale(new)
    if not old.built or [id(one) for one in optimizer_weights(old) or ()] != [
        id(one) for one in weights
    ]:
        return False
    # An optimizer of one's own may keep state elsewhere; averages know when they have started.
    simple = type(inner).__module__.startswith("keras.") and not moving_averages(inner)
    several = isinstance(inner, keras.optimizers.MultiOptimizer)
    if not simple or several or type(inner) is not type(other):
        return False
    ours, theirs = optimizer_config(inner), optimizer_config(other)
    changing = ("learning_rate", "name")
    same = all(ours[key] == theirs.get(key) for key in ours if key not in changing)
    return same and [tuple(one.shape) for one in old.variables] == [
        tuple(one.shape) for one in new.variables
    ]


@checked(SINCE_3_15)
def continue_averages(old: Any, new: Any) -> None:
    """Has a new optimizer continue the averages that an old one keeps of the same weights.

    Keras starts each average at the first step of its optimizer: an average that is copied from an
    old optimizer would be overwritten there.

    Args:
        old: A built optimizer.
        new: A built optimizer. It stays as it is if either keeps no averages.
    """
    if not on_host(old.iterations):
        return
    kept = {id(variable): average for variable, average in moving_averages(old)}
    new = without_loss_scale(new)
    several = isinstance(new, keras.optimizers.MultiOptimizer)
    for optimizer in new._inner_optimizers if several else [new]:
        known = [(kept.get(id(one)), average) for one, average in moving_averages(optimizer)]
        for before, average in known:
            if before is not None:
                copy_value(before, average)
        begun = {id(average) for before, average in known if before is not None}
        if begun:
            # In a method of this one object: a subclass would change what a saved model names.
            update = functools.partial(_update_averages, optimizer, begun)
            _replace(optimizer, "_update_model_variables_moving_average", update)


@contextlib.contextmanager
def not_averaged(optimizer: keras.Optimizer) -> Iterator[None]:
    """A context in which the end of a `fit` does not give variables their moving averages.

    Of several fits that are one, only the last one's end is the end of training.
    """
    optimizer.finalize_variable_values = lambda variables: None
    try:
        yield
    finally:
        del optimizer.finalize_variable_values


@checked(SINCE_3_15)
def _replace(optimizer: Any, method: str, function: Callable) -> None:
    """Replaces a method of one optimizer, which must have it: else nothing would call it."""
    getattr(optimizer, method)  # Raises, and `checked` names what Keras lacks.
    setattr(optimizer, method, function)


@checked(SINCE_3_15)
def _update_averages(optimizer: Any, begun: set[int], variables: Sequence[Any]) -> None:
    # As Keras' own method, but for `begun`: at its first step it makes each average the variable.
    first_step = keras.ops.equal(optimizer.iterations, 0)
    kept = optimizer._model_variables_moving_average
    for variable, average in zip(variables, kept, strict=True):
        if average is not None:
            momentum = keras.ops.cast(optimizer.ema_momentum, variable.dtype)
            if id(average) not in begun:
                momentum = keras.ops.where(first_step, keras.ops.zeros_like(momentum), momentum)
            average.assign(momentum * average + (1 - momentum) * variable)


@checked(SINCE_3_15)
def copy_optimizer_state(source: keras.Optimizer, target: keras.Optimizer) -> None:
    """Gives a built optimizer the step count of one of its class, and slots of the same variables.

    The learning rate is not copied, nor what optimizers inside it hold.
    """
    from_slots, to_slots = _slots(source), _slots(target)
    from_shared, to_shared = _shared_state(source, from_slots), _shared_state(target, to_slots)
    pairs = list(zip(from_shared, to_shared, strict=True))
    known = {source._var_key(v): index for index, v in enumerate(source._trainable_variables)}
    for index, variable in enumerate(target._trainable_variables):
        position = known.get(target._var_key(variable))
        if position is not None:
            pairs += [
                (slots[position], to_slots[name][index]) for name, slots in from_slots.items()
            ]
    for old, new in pairs:
        if new is not None:
            copy_value(old, new)


@checked(SINCE_3_15)
def _slots(optimizer: keras.Optimizer) -> dict[str, list[Any]]:
    """The lists in which an optimizer keeps something for each variable, by attribute."""
    # Each optimizer class names its slots itself; in all of them a slot is a list that has
    # a variable, or None, for each variable that trains.
    count = len(optimizer._trainable_variables)
    apart = (optimizer._variables, optimizer._trainable_variables)
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, list)
        and len(value) == count
        and not any(value is one for one in apart)
        and all(one is None or isinstance(one, keras.Variable) for one in value)
    }


@checked(SINCE_3_15)
def _shared_state(optimizer: keras.Optimizer, slots: dict[str, list[Any]]) -> list[keras.Variable]:
    """What an optimizer keeps for all variables together: the step count, Nadam's momenta."""
    kept = {id(one) for values in slots.values() for one in values}
    kept.add(id(optimizer._learning_rate))
    return [variable for variable in optimizer._variables if id(variable) not in kept]


@checked(SINCE_3_15)
def scale_learning_rates(
    optimizer: keras.Optimizer, scale_of: Callable[[keras.Variable], float]
) -> None:
    """Has a built optimizer update each variable at a multiple of the learning rate.

    As if each rate had an optimizer of its own, at the cost of one. Backends that update several
    variables at once (torch) do so for those of one scale.

    Methods of this one object are replaced, for no hook of Keras sees a variable and its rate
    together: `update_step` has the rate as an argument, but weight decay asks for it once for all.
    """
    # By index, which Keras looks up for the backend's variables too, and under a strategy.
    scales = [scale_of(variable) for variable in optimizer._trainable_variables]

    index_of = optimizer._get_variable_index

    def scale(variable: Any) -> float:
        return scales[index_of(variable)]

    rate, update = optimizer._get_current_learning_rate, optimizer.update_step
    decay = optimizer._apply_weight_decay
    factor = 1.0

    def scaled_rate() -> Any:
        return rate() if factor == 1.0 else rate() * factor

    def scaled_update(gradient: Any, variable: Any, learning_rate: Any) -> None:
        update(gradient, variable, _scaled(learning_rate, scale(variable)))

    def scaled_decay(variables: Sequence[Any]) -> None:
        # Decay multiplies by the rate that `_get_current_learning_rate` returns meanwhile.
        nonlocal factor
        for factor, members in _by_scale(variables):
            decay(members)
        factor = 1.0

    def _by_scale(variables: Sequence[Any]) -> list[tuple[float, list[Any]]]:
        groups: dict[float, list[Any]] = {}
        for variable in variables:
            groups.setdefault(scale(variable), []).append(variable)
        return list(groups.items())

    _replace(optimizer, "_get_current_learning_rate", scaled_rate)
    _replace(optimizer, "_apply_weight_decay", scaled_decay)
    # Only torch has it, and not for every optimizer: Keras calls it in place of `update_step`.
    if not hasattr(optimizer, "_parallel_update_step"):
        _replace(optimizer, "update_step", scaled_update)
        return
    together = optimizer._parallel_update_step
    shared = _shared_state(optimizer, _slots(optimizer))

    def scaled_together(gradients: list[Any], variables: list[Any], learning_rate: Any) -> None:
        of = {id(v): gradient for v, gradient in zip(variables, gradients, strict=True)}
        before = [keras.ops.copy(variable) for variable in shared]
        for one, members in _by_scale(variables):
            # What all variables share (Nadam's product of momenta) advances once in a step.
            for variable, value in zip(shared, before, strict=True):
                variable.assign(value)
            together([of[id(v)] for v in members], members, _scaled(learning_rate, one))

    _replace(optimizer, "_parallel_update_step", scaled_together)


def _scaled(learning_rate: Any, scale: float) -> Any:
    return learning_rate if scale == 1.0 else learning_rate * scale
