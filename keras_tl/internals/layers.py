"""Layers: structure, flags, and the context of a call."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.imported import (
    get_keras_mask,
    global_state,
    set_keras_mask,
    to_snake_case,
)


@checked(SINCE_3_15)
def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the direct sublayers of any layer, in order (public only for a model: `layers`)."""
    return layer._flatten_layers(include_self=False, recursive=False)


@checked(SINCE_3_15)
def own_trainable_weights(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the weights that the layer itself created to be trained, frozen now or not."""
    return list(layer._trainable_variables)


@checked(SINCE_3_15)
def own_state(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the weights that the layer itself created never to be trained (statistics)."""
    return list(layer._non_trainable_variables)


def name_without_count(one: keras.Layer | keras.Variable) -> str:
    """Returns the name of a layer or weight, an automatic one without what counts up in it."""
    stem = to_snake_case("Variable" if isinstance(one, keras.Variable) else type(one).__name__)
    return stem if re.fullmatch(rf"{stem}_\d+", one.name) else one.name


def is_lora_backbone(layer: keras.Layer) -> bool:
    """Whether it is a KerasHub backbone whose `enable_lora` was called.

    It freezes the layers around those with LoRA, and notes nothing of it that is public.
    """
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
        weight.value._trainable = True


@checked(SINCE_3_15)
def seed_states(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the states of the random generators that the layer itself holds."""
    return [generator.state for generator in layer._seed_generators]


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


def mask_of(x: Any) -> Any | None:
    """Returns the mask that a tensor carries, or None."""
    return get_keras_mask(x)
