"""Layers: structure, flags, and the context of a call."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, UnsupportedKerasError, checked
from keras_tl.internals.imported import (
    compute_output_spec,
    get_keras_mask,
    global_state,
    to_snake_case,
)
from keras_tl.internals.unlisted_state import unlisted_state


@checked(SINCE_3_15)
def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the direct sublayers of any layer, in order (public only for a model: `layers`)."""
    return layer._flatten_layers(include_self=False, recursive=False)


def trains(operation: Any) -> bool:
    """Whether what a graph calls is a layer of which a weight trains, as flags are now."""
    return isinstance(operation, keras.Layer) and bool(operation.trainable_weights)


@checked(SINCE_3_15)
def was_called(layer: keras.Layer) -> bool:
    """Whether a layer has been called on symbolic tensors, which it then knows."""
    return bool(layer._inbound_nodes)


# What models have and layers must not: Keras asks any object whether it has `get_compile_config`,
# `save_assets` and so on, and would compile a layer, or save a model in a layer twice. Between a
# model and a layer are the classes that train, whatever they are called.
_TRAINING = [one for one in keras.Model.__mro__[1:] if not issubclass(keras.Layer, one)]
NOT_OF_A_LAYER = frozenset(
    ["save_assets", "load_assets", "optimizer", "loss", "compiled", "stop_training"]
    + ["steps_per_execution", "train_function", "test_function", "predict_function"]
    + [name for one in _TRAINING for name in vars(one)]
)


@checked(SINCE_3_15)
def own_trainable_weights(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the weights that the layer itself created to be trained, frozen now or not."""
    return list(layer._trainable_variables)


@checked(SINCE_3_15)
def own_state(layer: keras.Layer) -> list[keras.Variable]:
    """Returns what the layer itself holds that is never to be trained (statistics).

    With what Keras does not list: in training it moves all the same.
    """
    return [*layer._non_trainable_variables, *unlisted_state(layer)]


def name_without_count(one: keras.Layer | keras.Variable) -> str:
    """Returns the name of a layer or weight, an automatic one without what counts up in it."""
    stem = to_snake_case("Variable" if isinstance(one, keras.Variable) else type(one).__name__)
    return stem if re.fullmatch(rf"{stem}_\d+", one.name) else one.name


def is_lora_backbone(layer: keras.Layer) -> bool:
    """Whether it is a KerasHub backbone whose `enable_lora` was called.

    It freezes the layers around those with LoRA, and notes nothing of it that is public.
    """
    # KerasHub's attribute, made by that call. `lora_enabled` of each layer is what Keras tells.
    return bool(getattr(layer, "_lora_enabled_layers", None))


@checked(SINCE_3_15)
def set_layer_flag(layer: keras.Layer, value: bool) -> None:
    """Sets `trainable` on one layer alone; the public setter overwrites all that is in it."""
    if layer._trainable != value:
        layer._trainable = value


@checked(SINCE_3_15)
def set_weight_flag(weight: keras.Variable, value: bool) -> None:
    """Sets `trainable` on a weight, such that gradients reach it from the next trace on.

    Keras initializes the weights of a model that `fit` builds after the layers' flags are set, so
    on TensorFlow those of a frozen layer are made as `tf.Variable(trainable=False)`, which a
    gradient tape never watches.
    """
    weight.trainable = value
    if value and keras.backend.backend() == "tensorflow" and not weight.value.trainable:
        weight.value._trainable = True  # `tf.Variable.trainable` has no setter.


@checked(SINCE_3_15)
def seed_states(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the states of the random generators that the layer itself holds."""
    return [generator.state for generator in layer._seed_generators]


@contextlib.contextmanager
def call_context_kept() -> Iterator[None]:
    """Puts back the `training` value that the layers called after this one are to see.

    All layers of one outer call share a context. Keras stores an explicit `training=` of an inner
    call in it and leaves it there, so a backbone called with `training=False` would switch off the
    Dropout of the head.
    """
    _check_call_context()
    context = global_state.get_global_attribute("current_call_ctx")
    if context is None:
        yield  # This call is the outermost: Keras makes its context, and drops it after it.
        return
    training = context.get_value("training")
    try:
        yield
    finally:
        context.set_value("training", training)


@functools.cache
@checked(SINCE_3_15)
def _check_call_context() -> None:
    """Raises once if Keras keeps the context elsewhere: the head's Dropout would be off in silence.

    Between calls there is no context, so that none is found says nothing. Its name is looked for in
    the code of the method that makes it.
    """
    if "current_call_ctx" not in keras.Layer._get_call_context.__code__.co_consts:
        raise UnsupportedKerasError("current_call_ctx", SINCE_3_15)


class HeldInInference:
    """A context in which BatchNormalization layers run in inference mode.

    They do so whatever `training` they are called with: if its own `trainable` flag is cleared, the
    layer does not look at it. The flag of the layer alone, so gamma and beta keep training.
    Entries are counted, because threads may overlap.
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


def assigned_in_call(layer: keras.Layer, *args: Any, **kwargs: Any) -> list[keras.Variable]:
    """Returns the weights to which a built layer assigns values when it is called in training.

    Nothing is computed, and no weight changes.

    Args:
        layer: The layer.
        *args: What it is called with, `KerasTensor`s for tensors.
        **kwargs: The same, by name.
    """
    found: list[keras.Variable] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        with keras.StatelessScope() as scope:
            outputs = layer(*args, **kwargs, training=True)
        found[:] = [one for one in layer.weights if scope.get_current_value(one) is not None]
        return outputs

    compute_output_spec(call, *args, **kwargs)
    return found


@contextlib.contextmanager
def not_watched(weights: Iterable[keras.Variable]) -> Iterator[None]:
    """A context in which TensorFlow's gradient tapes do not watch the weights when they are read.

    A tape goes by the flag of the `tf.Variable`, which stays set when Keras freezes the weight, and
    so records each operation of a frozen backbone, in vain. What is computed from an input that is
    watched is recorded all the same. The other backends see themselves what no gradient needs.
    """
    variables = _watched_variables(weights)
    _set_watched(variables, False)
    try:
        yield
    finally:
        _set_watched(variables, True)


@checked(SINCE_3_15)
def _watched_variables(weights: Iterable[keras.Variable]) -> list[Any]:
    if keras.backend.backend() != "tensorflow":
        return []
    # Not `value`, which is a copy where Keras casts what a layer reads.
    values = [weight._value for weight in weights if weight._value is not None]
    # Under a distribution strategy the value is one variable for each replica, in `values`.
    variables = [one for value in values for one in getattr(value, "values", [value])]
    return [variable for variable in variables if variable.trainable]


@checked(SINCE_3_15)
def _set_watched(variables: Iterable[Any], flag: bool) -> None:
    for variable in variables:
        variable._trainable = flag


@checked(SINCE_3_15)
def take_call_signature(layer: keras.Layer, wrapped: keras.Layer) -> None:
    """Has a layer take the call arguments of another, and `training` besides.

    Keras reads a layer's signature once, when it is made, and goes by it ever after: it binds the
    arguments to names, and fills in masks and what a model hands down to all of its layers.
    """
    # All that `Layer.__init__` derives from the signature is derived again.
    parameters = list(wrapped._call_signature.parameters.values())
    if "training" not in wrapped._call_signature.parameters:
        training = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
        catches_all = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        parameters.insert(len(parameters) - catches_all, training)
    layer._call_signature = inspect.Signature(parameters)
    layer.call_signature_parameters = [parameter.name for parameter in parameters]
    layer._call_has_mask_arg = "mask" in layer.call_signature_parameters
    layer._call_context_args = layer._call_context_args | wrapped._call_context_args
    layer._call_has_context_arg = {
        name: name in layer.call_signature_parameters for name in layer._call_context_args
    }
    layer._allow_non_tensor_positional_args = wrapped._allow_non_tensor_positional_args


@checked(SINCE_3_15)
def training_by_name(
    layer: keras.Layer, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a layer's call arguments such that `training` and what comes after it have names.

    Those that `*inputs` catches have no name and stay as they are. So do too many, of which Keras
    says so itself.
    """
    parameters = layer._call_signature.parameters
    place = list(parameters).index("training")
    if (
        parameters["training"].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD
        or catches_inputs(layer)
        or len(args) > len(parameters)
    ):
        return tuple(args), kwargs
    named = dict(zip(list(parameters)[place:], args[place:]))
    if named.get("training") is None:
        named.pop("training", None)
    return tuple(args[:place]), {**kwargs, **named}


@checked(SINCE_3_15)
def catches_inputs(layer: keras.Layer) -> bool:
    """Whether a layer takes any number of inputs, as by `call(self, *inputs)`."""
    kinds = [one.kind for one in layer._call_signature.parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


_HALF = ("float16", "bfloat16")


def rounds_coarsely(layers: Iterable[keras.Layer]) -> bool:
    """Whether what layers compute may be rounded as in half precision.

    Their outputs may be of another dtype. On accelerators, float32 may be so too: GPUs round what
    is multiplied to 10 bits (TF32), TPUs to 7.
    """
    # Layers that Keras cannot quantize have no `quantization_mode`.
    return _on_accelerator() or any(
        layer.compute_dtype in _HALF or getattr(layer, "quantization_mode", None) is not None
        for layer in layers
    )


def _on_accelerator() -> bool:
    if keras.backend.backend() != "torch":
        devices = keras.distribution.list_devices()
        return any(not device.lower().startswith("cpu") for device in devices)
    import torch

    return torch.cuda.is_available()


def mask_of(x: Any) -> Any | None:
    """Returns the mask that a tensor carries, or None."""
    return get_keras_mask(x)
