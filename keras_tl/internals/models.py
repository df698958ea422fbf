"""Models: the compiled state that a switch renews, and the methods that train."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.imported import compute_output_spec
from keras_tl.internals.optimizers import optimizer_weights, without_loss_scale
from keras_tl.internals.own_fit import only_prepares


def strategy_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """Returns the scope in which the model's variables live, for making more of them."""
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


_COMPILED = ("optimizer", "train_function", "test_function", "predict_function")


@checked(SINCE_3_15)
def compiled_state(model: keras.Model) -> dict[str, Any]:
    """Returns what `set_compiled_state` needs to put the optimizer and compiled functions back."""
    state = {name: getattr(model, name) for name in _COMPILED}
    return {
        **state,
        "data_parallel": getattr(model, "ddp_model", None),
        "compile_config": dict(model._compile_config.config),
        "compiled_flags": dict(model._compiled_trainable_state),
    }


@checked(SINCE_3_15)
def set_compiled_state(model: keras.Model, state: dict[str, Any]) -> None:
    """Puts back what `compiled_state` returned."""
    for name in _COMPILED:
        setattr(model, name, state[name])
    _set_data_parallel(model, state["data_parallel"])
    model._compile_config.config.update(state["compile_config"])
    model._compiled_trainable_state.update(state["compiled_flags"])


@contextlib.contextmanager
def functions_set_aside(model: keras.Model, *, eager: bool = False) -> Iterator[None]:
    """A context in which the model is evaluated by functions of its own, which are gone after it.

    Those that it has are kept. On JAX, a function that stays would map values to the wrong
    variables once other weights are trainable. On TensorFlow nothing is traced, where no strategy
    needs it: that takes longer than the one step that is asked for.

    Args:
        model: The model.
        eager: Bool. Whether nothing is compiled on the other backends either, so that a model
            rounds as its parts do.
    """
    names = ("test_function", "predict_function", "run_eagerly")
    before = {name: getattr(model, name) for name in names}
    model.test_function = model.predict_function = None
    if keras.backend.backend() == "tensorflow":
        eager = model.distribute_strategy.num_replicas_in_sync == 1
    model.run_eagerly = before["run_eagerly"] or eager
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model, name, value)


@checked(SINCE_3_15)
def install_optimizer(model: keras.Model, optimizer: keras.Optimizer) -> None:
    """Makes `optimizer` the model's, and the one that a saved model is loaded with.

    `compile` would do it too, but in a running `fit` it cancels `stop_training`, makes metrics that
    crash under `MirroredStrategy` and leaves no train function. The compile configuration holds the
    optimizer without the `LossScaleOptimizer` that `compile` puts around it; one that an overridden
    `compile` set aside is left alone.
    """
    config = model._compile_config.config
    if config.get("optimizer") in (model.optimizer, without_loss_scale(model.optimizer)):
        config["optimizer"] = without_loss_scale(optimizer)
    model.optimizer = optimizer


@checked(SINCE_3_15)
def renew_functions(model: keras.Model, *, keep_evaluation: bool) -> None:
    """Has the model's steps traced anew for the variables that are trainable now.

    `fit` reads `train_function` at each step, so it must not be None. JAX and torch must not keep
    evaluation functions (on JAX they would map values to the wrong variables); TensorFlow may,
    which spares a trace. Other models that share weights are seen to as well.
    """
    renew_sharing(model.weights, besides=model, losses=not keep_evaluation)
    if not (keep_evaluation and keras.backend.backend() == "tensorflow"):
        model.test_function = None
        model.predict_function = None
    # What `compile` notes, and Keras means to compare with the flags when `fit` starts.
    flags = {layer: layer.trainable for layer in model._flatten_layers()}
    model._compiled_trainable_state.update(flags)
    _set_data_parallel(model, None)
    model.make_train_function(force=True)


def _set_data_parallel(model: keras.Model, wrapped: Any) -> None:
    """Sets what sums gradients over the processes on torch, since Keras 3.16; None: made anew.

    Keras wraps a model in torch's `DistributedDataParallel` before its first step and keeps that,
    but it sums the gradients of those weights alone that trained then: each process would fine-tune
    a backbone of its own. `make_train_function` wraps a model that is not wrapped.
    """
    if getattr(model, "ddp_model", None) is not wrapped:
        # As Keras sets it: torch would register the model as a part of itself.
        object.__setattr__(model, "ddp_model", wrapped)


def in_data_parallel(model: keras.Model) -> bool:
    """Whether Keras wraps each model that runs in torch's `DistributedDataParallel`."""
    if keras.backend.backend() != "torch" or not hasattr(model, "ddp_model"):
        return False
    import torch

    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


# In a switch that is only tried, and while flags are looked up and put back.
_kept = contextvars.ContextVar("kept", default=False)


@contextlib.contextmanager
def functions_kept() -> Iterator[None]:
    """A context in which `renew_sharing` does nothing: for flags that are put back at its end."""
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def renews_sharing() -> bool:
    """Whether `renew_sharing` has anything to do when flags change."""
    return keras.backend.backend() == "jax" and not _kept.get()


@checked(SINCE_3_15)
def renew_sharing(
    weights: Iterable[keras.Variable], *, besides: keras.Model | None = None, losses: bool = False
) -> None:
    """Has all models that share some of these weights compile their steps anew.

    To be called when `trainable` flags of the weights change. On JAX, what a model has compiled
    takes its weights by position among those that train and those that do not: it would take one
    for another, without an error if they have the same shape. On TensorFlow, what is compiled holds
    the weights themselves, but its loss has the regularizers of those that trained then.

    Args:
        weights: The weights.
        besides: A model to leave alone.
        losses: Bool. Whether regularizers are among what has changed.
    """
    on_jax = keras.backend.backend() == "jax"
    stale_losses = losses and keras.backend.backend() == "tensorflow"
    if _kept.get() or not (on_jax or stale_losses):
        return
    for model in _compiled_models(weights):
        if model is besides:
            continue
        model.test_function = None
        if on_jax:
            # Of a `fit` that runs: the values that it has go by position too.
            model.jax_state_sync()
            model.predict_function = None
            if model.train_function is not None:
                model.train_function = _made_when_called(model)


def _compiled_models(weights: Iterable[keras.Variable]) -> list[keras.Model]:
    """Returns the living models that have compiled anything and share some of the weights.

    No layer knows the models that it is in, so Python's garbage collector is asked. It takes about
    0.1 s, and does not see what `gc.freeze` has hidden.
    """
    known = {id(weight) for weight in weights}
    return [
        one
        for one in gc.get_objects()
        if issubclass(type(one), keras.Model)
        and any(vars(one).get(name) is not None for name in _COMPILED[1:])
        and any(id(variable) in known for variable in one.variables)
    ]


def _made_when_called(model: keras.Model) -> Callable[[Any, Any], Any]:
    """Returns a train function for JAX that is compiled at the first step, if it may be.

    Not at once: the flags may be put back before. And not `None`, which a `fit` that runs would
    call.
    """

    def train_function(state: Any, iterator: Any) -> Any:
        trained = optimizer_weights(model.optimizer) or ()
        if {id(one) for one in trained} == {id(one) for one in model.trainable_variables}:
            model.make_train_function(force=True)
            return model.train_function(state, iterator)
        _put_back(model, state)
        raise ValueError(
            f'The model "{model.name}" was compiled and trained before layers in it, which another '
            "model may share, were frozen or unfrozen, so its optimizer knows other weights than "
            "train now. Compile it again."
        )

    return train_function


def _put_back(model: keras.Model, state: Any) -> None:
    """Gives the variables the values that `fit` on JAX has taken out of them for its steps."""
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    for variables, values in zip(groups, state, strict=True):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


@checked(SINCE_3_15)
def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Returns what the model was compiled with, the objects themselves.

    `get_compile_config` returns them serialized, which custom losses do not survive.
    """
    arguments = dict(model._compile_config.config)
    return {**arguments, "optimizer": model.optimizer}


@checked(SINCE_3_15)
def compile_call(model: keras.Model) -> Any:
    """Returns an object that each call of `compile` makes anew, and nothing else replaces."""
    return model._compile_config


@checked(SINCE_3_15)
def flags_when_compiled(model: keras.Model) -> dict[keras.Layer, bool]:
    """Returns the `trainable` flags that the layers had when the model was compiled, if it was."""
    by_keras = getattr(type(model), "compile", None) is keras.Model.compile
    if by_keras and model.compiled:
        return dict(model._compiled_trainable_state)
    # A layer is never compiled, and an overridden `compile` need not call that of Keras.
    return dict(getattr(model, "_compiled_trainable_state", {}))


@checked(SINCE_3_15)
def initial_epoch(model: keras.Model) -> int | None:
    """Returns the epoch that a restoring callback has set for `fit` to start with, if one has."""
    return model._initial_epoch


# What was set, and what was there before, of each model whose `fit` has not started there yet.
_epochs_set: weakref.WeakKeyDictionary[keras.Model, tuple[int, int | None]]
_epochs_set = weakref.WeakKeyDictionary()


@checked(SINCE_3_15)
def set_initial_epoch(model: keras.Model, epoch: int) -> None:
    """Sets the epoch that `fit` starts with, when called in `on_train_begin`.

    As `BackupAndRestore` does it, which leaves it set: the next `fit` would start there too. So
    `unset_initial_epoch` is to be called once `fit` has started.
    """
    unset_initial_epoch(model)
    _epochs_set[model] = (epoch, model._initial_epoch)
    model._initial_epoch = epoch


@checked(SINCE_3_15)
def unset_initial_epoch(model: keras.Model) -> None:
    """Puts back what was there before `set_initial_epoch`, also one of a `fit` that failed."""
    now = model._initial_epoch
    epoch, before = _epochs_set.pop(model, (None, None))
    if epoch is not None and now == epoch:
        model._initial_epoch = before


def has_own_train_step(model: keras.Model) -> bool:
    """Whether the model's step is not that of Keras, and so may train any weights."""
    return type(model).train_step is not keras.Model.train_step or "train_step" in vars(model)


def keeps_no_optimizer(model: keras.Model) -> bool:
    """Whether a loaded model of this class is compiled anew, or not at all, as KerasHub's tasks.

    Keras compiles no model whose class overrides `compile` and does not say how to load it.
    """
    of = type(model)
    overridden = of.compile is not keras.Model.compile
    return overridden and of.compile_from_config is keras.Model.compile_from_config


def own_optimizers(model: keras.Model) -> list[str]:
    """Returns the names of a model's attributes that hold optimizers other than `optimizer`."""
    found = []
    for name, value in vars(model).items():
        held = value.values() if isinstance(value, dict) else value
        several = list(held) if isinstance(value, (list, tuple, dict)) else [value]
        if any(isinstance(one, keras.Optimizer) for one in several) and not any(
            one is model.optimizer for one in several
        ):
            found.append(name.removeprefix("_"))
    return found


_TRAINING_METHODS = (
    *("fit", "evaluate", "predict", "__call__", "call", "train_step", "test_step"),
    *("make_train_function", "make_test_function", "compute_loss", "compute_metrics"),
    *("get_metrics_result", "reset_metrics", "metrics"),
)


def own_methods(model: keras.Model) -> list[str]:
    """Returns the names of the methods with which a model is trained and that are not Keras'.

    But for those that only prepare data, as far as that can be told by where they come from.

    Args:
        model: A Functional or Sequential model, of a class of one's own or not.
    """
    base = next(one for one in type(model).__mro__ if one.__module__.startswith("keras."))
    return [
        name
        for name in _TRAINING_METHODS
        if (getattr(type(model), name) is not getattr(base, name) or name in vars(model))
        and not only_prepares(model, name)
    ]


@checked(SINCE_3_15)
def losses_of(model: keras.Model, inputs: Any) -> list[Any]:
    """Returns what a built model adds to the loss when it is called on symbolic inputs."""

    def call(x: Any) -> Any:
        values = model.trainable_variables, model.non_trainable_variables
        return model.stateless_call(*values, x, return_losses=True)[2]

    return compute_output_spec(call, inputs)
