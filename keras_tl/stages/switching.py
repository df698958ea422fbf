"""The switch: other weights train from the next step on, in a running `fit` or a loop.

The recipe, and why in this order. `all_or_nothing` puts everything back if a step fails, so that
`fit` ends with the model it had: on JAX, a step after half a switch loses the model's weights.

1. Restore the best weights of the ending stage (the caller: `BestWeights`). First, so that an
   optimizer that copies weights when it is built (averages, schedule-free methods) copies these.
2. Change the `trainable` flags (the caller: `freezing`, or the `FrozenBackbone`). Everything after
   this is made for the weights that are trainable then.
3. Make a new optimizer (`_fresh`, `_same_groups`, `_joined`): an optimizer only knows the variables
   it was built with. It is made from the old one's configuration, with the learning rate of the new
   stage, in the scope the weights live in (a strategy's variables cannot be made outside it).
4. Build it at once (`_build`), and not at the first step: there it would be traced a second time,
   and an error in it would come after the old optimizer is gone. Groups that stay take over their
   state now, while the old optimizer still has it.
5. Give it to the model (`install_optimizer`), in the compile configuration too, which a saved model
   is loaded with. Not by `compile`, which would cancel `stop_training`, drop the loss's state and
   leave no train function to the `fit` that runs.
6. Make a new train function (`renew_functions`), last, as it is made of all of the above. `fit`
   reads it anew at each step. Losses, metrics and `stop_training` stay as they are, and so does the
   evaluation function where the backend allows, which spares a trace.

Each Keras internal that this needs is in `internals`.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras

from keras_tl.arguments import check_learning_rate
from keras_tl.backbone import freezing
from keras_tl.backbone.selecting import variables_of
from keras_tl.internals.models import (
    compiled_state,
    functions_kept,
    install_optimizer,
    renew_functions,
    set_compiled_state,
    strategy_scope,
)
from keras_tl.internals.optimizers import (
    can_take_state,
    continue_averages,
    copy_weight_decay_exclusions,
    optimizer_config,
    optimizer_weights,
    without_loss_scale,
)
from keras_tl.internals.randomness import random_state
from keras_tl.internals.values import copy_value, on_host
from keras_tl.optimizers import GroupOptimizer
from keras_tl.optimizers.assignment import Assignment
from keras_tl.optimizers.groups import group_optimizer, groups_of, newest_group
from keras_tl.optimizers.learning_rates import (
    LayerwiseLearningRates,
    LearningRate,
)
from keras_tl.optimizers.shifted_schedule import (
    begin_schedule,
    continue_schedule,
    first_step_of,
    set_first_step,
)
from keras_tl.stages.best_weights import Snapshot


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
            setting; a schedule starts again at its first step. Must be None for a `GroupOptimizer`,
            each group of which is made anew.
        variables: The variables that the new optimizer is to update, with which it is then built.
            None leaves that to the first step.

    Returns:
        A new optimizer of the same class.

    Raises:
        ValueError: If the learning rate is not one, the optimizer has several, or it cannot be made
            from its configuration.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> adam = keras.optimizers.Adam(1e-3)
    >>> optimizer = renew_optimizer(adam, 1e-5, variables=model.trainable_variables)
    >>> float(keras.ops.round(optimizer.learning_rate * 1e5))
    1.0
    """
    groups = group_optimizer(optimizer)
    if groups is not None and learning_rate is None:
        new = _renewed_groups(groups)
    else:
        new = _renewed(without_loss_scale(optimizer), learning_rate)
    new = _loss_scaled_like(optimizer, new)
    if variables is not None:
        _build(new, variables, optimizer)
    return new


def _renewed_groups(groups: GroupOptimizer) -> GroupOptimizer:
    return groups.renewed({name: renew_optimizer(one) for name, one in groups.groups.items()})


def _renewed(optimizer: keras.Optimizer, learning_rate: LearningRate | None) -> keras.Optimizer:
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            f"The optimizer {optimizer.name!r} is a MultiOptimizer, which has no single learning "
            "rate to replace. Pass `optimizer=` with the optimizer to fine-tune with."
        )
    config = optimizer_config(optimizer)
    if learning_rate is not None:
        config["learning_rate"] = check_learning_rate(learning_rate)
    new = _from_config(optimizer, config)
    copy_weight_decay_exclusions(optimizer, new)
    # The step count of the new one starts at 0, whatever an earlier switch has shifted.
    set_first_step(new, 0)
    return new


def _from_config(optimizer: keras.Optimizer, config: dict[str, Any]) -> keras.Optimizer:
    kind = type(optimizer).__name__
    message = (
        f"A switch needs a new optimizer like {optimizer.name!r}, and {kind} cannot be made from "
        f"what its `get_config` returns ({{}}). Have it return all arguments of {kind}, or pass "
        "`optimizer=` with another optimizer to fine-tune with."
    )
    try:
        new = type(optimizer).from_config(config)
    except (TypeError, ValueError, LookupError, AttributeError, NotImplementedError) as error:
        raise ValueError(message.format(f"{type(error).__name__}: {error}")) from error
    lost = _lost_arguments(optimizer, new, config)
    if lost:
        raise ValueError(message.format(f"it lacks {', '.join(lost)}"))
    return new


def _lost_arguments(
    optimizer: keras.Optimizer, new: keras.Optimizer, config: Mapping[str, Any]
) -> list[str]:
    """Returns the arguments that the configuration lacks, and that are others in the new one."""
    # Only plain settings can be compared; Keras' own optimizers write down all the others.
    lost = []
    for name in inspect.signature(type(optimizer).__init__).parameters:
        if name not in config and hasattr(optimizer, name):
            before, after = getattr(optimizer, name), getattr(new, name, None)
            if isinstance(before, (bool, int, float, str)) and before != after:
                lost.append(name)
    return lost


def check_fresh(optimizer: Any) -> None:
    """Raises a ValueError unless this is an optimizer that is not built."""
    if not isinstance(optimizer, keras.Optimizer):
        raise ValueError(
            "`optimizer` must be a `keras.optimizers.Optimizer` instance. "
            f"Received: optimizer={optimizer!r}."
        )
    if optimizer.built:
        raise ValueError(
            f"`optimizer` {optimizer.name!r} is built already, and can only update the variables "
            "it was built with. Pass a fresh instance."
        )


def _loss_scaled_like(old: keras.Optimizer, new: keras.Optimizer) -> keras.Optimizer:
    """Wraps an optimizer as `compile` wrapped the one before it, if it did."""
    wrapper = keras.optimizers.LossScaleOptimizer
    if not isinstance(old, wrapper) or isinstance(new, wrapper):
        return new
    scale = float(on_host(old.dynamic_scale)) if old.built else old.initial_scale
    return wrapper(
        new, initial_scale=scale, dynamic_growth_steps=old.dynamic_growth_steps, name=old.name
    )


def _build(new: keras.Optimizer, variables: Sequence[keras.Variable], old: keras.Optimizer) -> None:
    new.build(list(variables))
    wrapper = keras.optimizers.LossScaleOptimizer
    if isinstance(new, wrapper) and isinstance(old, wrapper) and old.built:
        # How many steps went well since the scale has last grown.
        copy_value(old.step_counter, new.step_counter)


def renew_training(
    model: keras.Model,
    learning_rate: LearningRate | LayerwiseLearningRates | None = None,
    *,
    head_learning_rate: LearningRate | None = None,
    optimizer: keras.Optimizer | None = None,
    trained: Sequence[keras.Variable] | None = None,
    group: str = "backbone",
    keep_evaluation: bool = False,
    same_step: bool = False,
) -> None:
    """Has a compiled model train, from the next step on, the weights that are trainable now.

    What `compile` and a new `fit` do together, for a `fit` that is running: the model gets a new
    optimizer and train step; its losses, metrics and `stop_training` stay.

    Args:
        model: A compiled and built model.
        learning_rate: Float, `LearningRateSchedule`, callable or `LayerwiseLearningRates` for a
            copy of the model's optimizer. None keeps the old setting; a `GroupOptimizer` then keeps
            the state of each group that no weight joins.
        head_learning_rate: The same for the weights that have been trained so far, which then keep
            the state of their optimizer, in a group "head" (or the groups they are in); those that
            join are a new group. None gives one new optimizer to all.
        optimizer: An optimizer whose copy to use instead of a copy of the model's. It stays as it
            is.
        trained: List of the weights that have been trained so far. None: those that the optimizer
            was built with.
        group: String. The name of the new group.
        keep_evaluation: Bool. Whether the evaluation function may stay, where the backend allows
            it: right if nothing that it computes depends on the flags that changed (regularizers
            do).
        same_step: Bool. Whether nothing but the rate and the optimizer's state is to be new, so
            that the train step may stay, which spares a trace. It does if the optimizer's class is
            one of Keras, whose variables are all of its state.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> model.layers[0].trainable = False
    >>> renew_training(model, 1e-4)
    """
    variables, old = model.trainable_variables, model.optimizer
    groups = group_optimizer(old)
    with strategy_scope(model):
        if groups is not None and learning_rate is None and not optimizer:
            new = _going_on(_renewed_groups(groups), groups, variables)
            starts_anew = False
        elif head_learning_rate is not None:
            joining = without_loss_scale(_fresh(optimizer, old, learning_rate))
            known = optimizer_weights(old) if trained is None else trained
            new = _joined(
                without_loss_scale(old),
                head_learning_rate,
                joining,
                group,
                learning_rate,
                variables,
                known or (),
            )
            starts_anew = False
        else:
            new = _fresh(optimizer, old, learning_rate)
            if isinstance(learning_rate, LayerwiseLearningRates):
                new = _by_layers(new, group, learning_rate)
            starts_anew = True
        new = _loss_scaled_like(old, new)
        _build(new, variables, old)
        if starts_anew:
            # Groups that stay have their averages among their state.
            continue_averages(old, new)
    if same_step and can_take_state(old, new, variables):
        for kept, fresh in zip(old.variables, new.variables, strict=True):
            copy_value(fresh, kept)
        return
    install_optimizer(model, new)
    renew_functions(model, keep_evaluation=keep_evaluation)


def build_optimizer(model: keras.Model) -> keras.Optimizer:
    """Builds a model's optimizer for what is trainable now, as the first step would do."""
    with strategy_scope(model):
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
    return model.optimizer


def restore_training(
    model: keras.Model, values: Sequence[Any], optimizer_values: Sequence[Any]
) -> None:
    """Gives a model's variables and those of its optimizer the values they had.

    Args:
        model: A compiled model, with the trainable weights and the optimizer that it had then.
        values: Arrays, one for each of `variables_of(model)`.
        optimizer_values: Arrays, one for each of the optimizer's variables.

    Raises:
        ValueError: If the optimizer has other variables.
    """
    optimizer = build_optimizer(model)
    known = [tuple(variable.shape) for variable in optimizer.variables]
    if known != [tuple(value.shape) for value in optimizer_values]:
        raise ValueError(
            f"The backup is of another optimizer than {optimizer.name!r}, or of one for other "
            "weights. Compile the model as in the run that was interrupted, with the same stages."
        )
    for variable, value in zip(variables_of(model), values, strict=True):
        variable.assign(value)
    for variable, value in zip(optimizer.variables, optimizer_values, strict=True):
        variable.assign(value)


def schedule_starts(model: keras.Model) -> dict[str, int]:
    """Returns, by parameter group, the step of its optimizer at which its schedule starts."""
    return {name: first_step_of(one) for name, one in groups_of(model.optimizer).items()}


def set_schedule_starts(model: keras.Model, starts: Mapping[str, int]) -> None:
    """Has schedules start where `schedule_starts` said, which no optimizer's variables hold."""
    if starts == schedule_starts(model):
        return
    groups = groups_of(model.optimizer)
    for name, first_step in starts.items():
        set_first_step(groups[name], first_step)
    # A step that was traced already has the old start in it.
    renew_functions(model, keep_evaluation=True)


def _fresh(
    given: keras.Optimizer | None,
    old: keras.Optimizer,
    learning_rate: LearningRate | LayerwiseLearningRates | None,
) -> keras.Optimizer:
    """Returns an optimizer that is not built: a copy of the one given, or of the newest there is.

    Never the one given itself: built and decayed, it would not serve another run.
    """
    if isinstance(learning_rate, LayerwiseLearningRates):
        learning_rate = learning_rate.learning_rate
    if given is not None:
        return renew_optimizer(given, learning_rate)
    newest = newest_group(old)
    new = renew_optimizer(newest, learning_rate)
    if learning_rate is None:
        continue_schedule(newest, new)
    return new


def _by_layers(
    new: keras.Optimizer, group: str, learning_rates: LayerwiseLearningRates
) -> GroupOptimizer:
    """Returns an optimizer that has a group for the layers with rates, and one for the rest."""
    return GroupOptimizer(
        {"head": renew_optimizer(new), group: new},
        assign={group: learning_rates},
        loss_scale_factor=new.loss_scale_factor,
    )


def _joined(
    old: keras.Optimizer,
    head_learning_rate: LearningRate,
    joining: keras.Optimizer,
    group: str,
    learning_rate: LearningRate | LayerwiseLearningRates | None,
    variables: Sequence[keras.Variable],
    trained: Sequence[keras.Variable],
) -> GroupOptimizer:
    """Returns an optimizer that continues `old`, and takes new variables as a group."""
    known = {id(variable) for variable in trained}
    before, old_groups = groups_of(old), group_optimizer(old)
    groups = {
        name: renew_optimizer(one, head_learning_rate if name == "head" else None)
        for name, one in before.items()
    }
    assign: dict[str, Assignment] = {name: _same_as(one, known) for name, one in before.items()}
    if isinstance(learning_rate, LayerwiseLearningRates):
        unknown = [variable for variable in variables if id(variable) not in known]
        assign[group] = learning_rate.restricted_to(unknown)
    new = GroupOptimizer(
        {**groups, group: joining},
        assign=assign,
        # That of one optimizer, its copy in the group "head" has.
        global_clipnorm=None if old_groups is None else old_groups.global_clipnorm,
        loss_scale_factor=old.loss_scale_factor,
    )
    _going_on(new, old, variables)
    if "head" in before:
        # Its step count continues, for Adam's bias correction, but its new schedule starts here.
        begin_schedule(new.groups["head"])
    return new


def _going_on(
    new: GroupOptimizer, old: keras.Optimizer, variables: Sequence[keras.Variable]
) -> GroupOptimizer:
    """Builds new groups such that they continue those of `old`."""
    before, old_groups = groups_of(old), group_optimizer(old)
    new.build_from(variables, before if old_groups is None else old_groups)
    for name, one in before.items():
        continue_schedule(one, new.groups[name])
    copy_value(old.iterations, new.iterations)
    return new


def _same_as(optimizer: keras.Optimizer, among: set[int]) -> Callable[[keras.Variable], bool]:
    """Returns whether a variable is one of an optimizer's, and among those with these ids."""
    known = {id(variable) for variable in optimizer_weights(optimizer) or ()} & among
    return lambda variable: id(variable) in known


@contextlib.contextmanager
def all_or_nothing(model: keras.Model, weights: Iterable[keras.Variable] = ()) -> Iterator[None]:
    """A context after which, if it is left by an exception, the model is as it was before.

    Flags, optimizer, compiled functions and the values of `weights` are put back, so that a `fit`
    that keeps running, or one started later, trains as if nothing had been tried.
    """
    put_back = _remember(model, weights)
    try:
        yield
    except BaseException:  # An interrupt by the user too.
        put_back()
        raise


@contextlib.contextmanager
def only_tried(model: keras.Model, *, built: bool = False) -> Iterator[None]:
    """A context after which the model is as it was before, and other models have noticed nothing.

    For a switch that is tried before the first step: what can fail in it fails here. Nothing is
    traced, and the optimizers that it makes are given up. The values of the model's weights are not
    kept: a switch without best weights does not write them.

    Args:
        model: A compiled and built model.
        built: Bool. Whether the switch needs a built optimizer to start from, as it would find one.
    """
    put_back = _remember(model, ())
    restore_random_state = random_state()
    try:
        with functions_kept():
            if built and not model.optimizer.built:
                with strategy_scope(model):
                    # A copy: the model's own is built by the first step, for what trains then.
                    model.optimizer = renew_optimizer(
                        model.optimizer, variables=model.trainable_variables
                    )
            yield
    finally:
        put_back()
        restore_random_state()
        if built:
            # Groups refer to themselves: without this, their slots would stay for a while.
            gc.collect()


@contextlib.contextmanager
def left_as_found(model: keras.Model) -> Iterator[None]:
    """A context after which the model is as it was before, whatever was trained in it.

    Besides what `all_or_nothing` puts back, the values of all weights, seeds and metrics, the
    `history` of the last `fit`, `stop_training`, and the random generators of Keras, NumPy and the
    backend.
    """
    put_back = _remember(model, [*variables_of(model), *model.metrics_variables])
    attributes = {name: getattr(model, name, None) for name in ("history", "stop_training")}
    restore_random_state = random_state()
    try:
        yield
    finally:
        put_back()
        for name, value in attributes.items():
            setattr(model, name, value)
        restore_random_state()


def _remember(model: keras.Model, weights: Iterable[keras.Variable]) -> Callable[[], None]:
    flags = freezing.get_trainable_flags(model)
    compiled = compiled_state(model)
    values = Snapshot(weights)

    def put_back() -> None:
        freezing.set_trainable_flags(model, flags)
        set_compiled_state(model, compiled)
        values.restore()

    return put_back


def regularization_loss(weights: Iterable[keras.Variable]) -> float:
    """Returns what regularizers add to the loss while these weights are trainable."""
    terms = [weight.regularizer(weight) for weight in weights if weight.regularizer is not None]
    return float(sum(float(keras.ops.convert_to_numpy(term)) for term in terms))
