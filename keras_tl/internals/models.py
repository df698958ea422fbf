"""Models: the compiled state that a switch renews, and the methods that train."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.imported import compute_output_spec
from keras_tl.internals.optimizers import without_loss_scale


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
        "compile_config": dict(model._compile_config.config),
        "compiled_flags": dict(model._compiled_trainable_state),
    }


@checked(SINCE_3_15)
def set_compiled_state(model: keras.Model, state: dict[str, Any]) -> None:
    """Puts back what `compiled_state` returned."""
    for name in _COMPILED:
        setattr(model, name, state[name])
    model._compile_config.config.update(state["compile_config"])
    model._compiled_trainable_state.update(state["compiled_flags"])


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
    which spares a trace.
    """
    if not (keep_evaluation and keras.backend.backend() == "tensorflow"):
        model.test_function = None
        model.predict_function = None
    # What `compile` notes, and Keras means to hold against the flags when `fit` begins.
    flags = {layer: layer.trainable for layer in model._flatten_layers()}
    model._compiled_trainable_state.update(flags)
    model.make_train_function(force=True)


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


def flags_when_compiled(model: keras.Model) -> dict[keras.Layer, bool]:
    """Returns the `trainable` flags that the layers had when the model was compiled."""
    return dict(getattr(model, "_compiled_trainable_state", {}))


@checked(SINCE_3_15)
def initial_epoch(model: keras.Model) -> int | None:
    """Returns the epoch that a restoring callback has set for `fit` to begin with, if one has."""
    return model._initial_epoch


@checked(SINCE_3_15)
def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Sets the epoch that `fit` begins with, when called in `on_train_begin`.

    As `BackupAndRestore` does it, which leaves it set: the next `fit` would begin there too.
    """
    if model._initial_epoch != epoch:
        model._initial_epoch = epoch


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


def own_methods(model: keras.Model) -> list[str]:
    """Returns the names of the methods with which a model is trained and that are not Keras'.

    Args:
        model: A Functional or Sequential model, of a class of one's own or not.
    """
    base = next(one for one in type(model).__mro__ if one.__module__.startswith("keras."))
    names = ("call", "train_step", "test_step", "compute_loss", "compute_metrics")
    return [
        name
        for name in names
        if getattr(type(model), name) is not getattr(base, name) or name in vars(model)
    ]


@checked(SINCE_3_15)
def losses_of(model: keras.Model, inputs: Any) -> list[Any]:
    """Returns what a built model adds to the loss when it is called on symbolic inputs."""

    def call(x: Any) -> Any:
        values = model.trainable_variables, model.non_trainable_variables
        return model.stateless_call(*values, x, return_losses=True)[2]

    return compute_output_spec(call, inputs)
