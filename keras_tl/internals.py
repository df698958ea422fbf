"""Every touch of a Keras internal, and every backend named, in keras_tl.

Nothing else in the package reads an underscore attribute of a Keras object or names a backend. Each
function says what it touches and why no public route serves. All were checked with Keras 3.15.1 and
with the development version 3.16.0.dev2026102704, on TensorFlow 2.21.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

# Layers: structure, flags, and the context of a call.


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the direct sublayers of any layer, in order (public only for a model: `layers`)."""
    return layer._flatten_layers(include_self=False, recursive=False)


def own_trainable_weights(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the weights that the layer itself created to be trained, frozen now or not."""
    return list(layer._trainable_variables)


def own_state(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the weights that the layer itself created never to be trained (statistics)."""
    return list(layer._non_trainable_variables)


def set_layer_flag(layer: keras.Layer, value: bool) -> None:
    """Sets `trainable` on one layer alone; the public setter overwrites all that is in it."""
    layer._trainable = value


def set_weight_flag(weight: keras.Variable, value: bool) -> None:
    """Sets `trainable` on a weight, such that gradients reach it from the next trace on.

    Keras initializes the weights of a model that `fit` builds after the layers' flags are set, so
    on TensorFlow those of a frozen layer are made as `tf.Variable(trainable=False)`, which a
    gradient tape never watches.
    """
    weight.trainable = value
    if value and keras.backend.backend() == "tensorflow" and not weight.value.trainable:
        weight.value._trainable = True


def outputs_in_graph(model: keras.Model, layer: keras.Layer) -> list[Any]:
    """Returns what the layer returns each time the graph of a Functional or Sequential calls it.

    `layer.output` is that of its first call, which may be in the graph of another model.
    """
    graph = getattr(model, "_functional", model)
    nodes = [node for depth in graph._nodes_by_depth.values() for node in depth]
    calls = [node.outputs for node in nodes if node.operation is layer]
    return [outputs[0] if len(outputs) == 1 else outputs for outputs in calls]


@contextlib.contextmanager
def call_context_kept() -> Iterator[None]:
    """Puts back the `training` value that the layers called after this one are to see.

    An explicit `training=` in an inner call is stored in the context that all layers of an outer
    call share, so a backbone called with `training=False` would switch off the Dropout of the head.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    if context is None:
        yield
        return
    training = context.get_value("training")
    try:
        yield
    finally:
        context.set_value("training", training)


class HeldInInference:
    """A context in which BatchNormalization layers run in inference mode.

    They do so whatever `training` they are called with: if its own `trainable` flag is cleared, the
    layer does not look at it. The flag of the layer alone, so gamma and beta go on training.
    Counted, because threads may overlap.
    """

    _lock = threading.Lock()

    def __init__(self, layers: Sequence[keras.Layer]):
        self._layers = layers
        self._entered = 0
        self._held: list[keras.Layer] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._entered == 0:
                self._held = [layer for layer in self._layers if layer.trainable]
                for layer in self._held:
                    set_layer_flag(layer, False)
            self._entered += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                for layer in self._held:
                    set_layer_flag(layer, True)


def stop_gradient(x: Any) -> Any:
    """Returns `keras.ops.stop_gradient(x)` with the mask that `x` carries, if any."""
    stopped = keras.ops.stop_gradient(x)
    mask = get_keras_mask(x)
    if mask is not None:
        set_keras_mask(stopped, mask)
    return stopped


# Models: the compiled state that a switch renews.


def strategy_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """Returns the scope in which the model's variables live, for making more of them."""
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


_COMPILED = ("optimizer", "train_function", "test_function", "predict_function")


def compiled_state(model: keras.Model) -> dict[str, Any]:
    """Returns what `set_compiled_state` needs to put the optimizer and compiled functions back."""
    state = {name: getattr(model, name) for name in _COMPILED}
    return {
        **state,
        "compile_config": dict(model._compile_config.config),
        "compiled_flags": dict(model._compiled_trainable_state),
    }


def set_compiled_state(model: keras.Model, state: dict[str, Any]) -> None:
    """Puts back what `compiled_state` returned."""
    for name in _COMPILED:
        setattr(model, name, state[name])
    model._compile_config.config.update(state["compile_config"])
    model._compiled_trainable_state.update(state["compiled_flags"])


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


def without_loss_scale(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Returns the optimizer inside a `LossScaleOptimizer`, or the optimizer itself."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def copy_weight_decay_exclusions(source: keras.Optimizer, target: keras.Optimizer) -> None:
    """Copies what `exclude_from_weight_decay` was told, which no configuration carries."""
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


# Callbacks: what is beside ours in the list given to `fit`.


def callbacks_beside(callback: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """Returns the callbacks of the running `fit`, in their order, or `[callback]` where none runs.

    Keras gives a callback no way to see the list it is in; the list that called it is found on the
    stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        running = frame.f_locals.get("self")
        if isinstance(running, keras.callbacks.CallbackList) and callback in running.callbacks:
            return list(running.callbacks)
        frame = frame.f_back
    return [callback]
