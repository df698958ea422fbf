"""Which layers and weights of a backbone are trainable: freezing, unfreezing, reporting.

A backbone is any Keras layer or model, or a list of layers. Nothing here knows of training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import keras

from keras_tl import internals
from keras_tl.selecting import (
    ALLOWED,
    Backbone,
    Selection,
    describe,
    flatten_layers,
    is_batchnorm,
    layer_units,
    select_layers,
)


def freeze(backbone: Backbone, layers: Selection = "all") -> None:
    """Makes the selected layers of the backbone not trainable.

    Args:
        backbone: A layer, a model, or a list of layers.
        layers: Which layers; see `selecting.select_layers`.

    Raises:
        ValueError: If `layers` selects nothing.
    """
    for layer in flatten_layers(select_layers(backbone, layers, count_batchnorm=True)):
        internals.set_layer_flag(layer, False)
        for weight in internals.own_trainable_weights(layer):
            internals.set_weight_flag(weight, False)
    for layer in reversed(flatten_layers(backbone)):
        if layer.trainable and internals.sublayers(layer):
            internals.set_layer_flag(layer, _has_trainable_part(layer))


def unfreeze(
    backbone: Backbone,
    layers: Selection = "all",
    *,
    train_batchnorm: bool = False,
    keep_frozen: Iterable[keras.Variable] = (),
) -> list[keras.Layer]:
    """Makes the selected layers of the backbone trainable, and nothing else.

    Weights that were never trainable stay so (moving statistics, quantized kernels), and so do
    kernels that LoRA has frozen.

    Args:
        backbone: A layer, a model, or a list of layers.
        layers: Which layers; see `selecting.select_layers`.
        train_batchnorm: Bool. Whether selected BatchNormalization layers become trainable too.
        keep_frozen: Weights that stay frozen in layers that are selected.

    Returns:
        The list of layers that became trainable, from input to output. Models in the backbone are
        not in it, their layers are.

    Raises:
        ValueError: If `layers` selects nothing that could be trained.

    Example:

    >>> layers = [keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")]
    >>> backbone = keras.Sequential([keras.Input((4,)), *layers])
    >>> freeze(backbone)
    >>> [layer.name for layer in unfreeze(backbone, "b")]
    ['b']
    """
    members = _members(backbone, layers, train_batchnorm)
    weights = _trainable_in(backbone, layers, members, keep_frozen)
    newly = {id(weight) for weight in weights if not weight.trainable}
    for layer in members:
        internals.set_layer_flag(layer, True)
    for weight in weights:
        internals.set_weight_flag(weight, True)
    for layer in reversed(flatten_layers(backbone)):
        if _has_trainable_part(layer):
            internals.set_layer_flag(layer, True)
    return [
        unit
        for unit in layer_units(backbone)
        if any(id(weight) in newly for weight in unit.weights)
    ]


def would_unfreeze(
    backbone: Backbone,
    layers: Selection = "all",
    *,
    train_batchnorm: bool = False,
    keep_frozen: Iterable[keras.Variable] = (),
) -> list[keras.Variable]:
    """Returns the frozen weights that `unfreeze` with these arguments would make trainable."""
    members = _members(backbone, layers, train_batchnorm)
    weights = _trainable_in(backbone, layers, members, keep_frozen)
    return [weight for weight in weights if not weight.trainable]


def hand_frozen_weights(backbone: Backbone) -> list[keras.Variable]:
    """Returns the weights that were frozen one by one, in layers that are trainable."""
    return [
        weight
        for layer in flatten_layers(backbone)
        if layer.trainable
        for weight in internals.own_trainable_weights(layer)
        if not weight.trainable
    ]


def cannot_train(backbone: Backbone) -> list[keras.Variable]:
    """Returns the weights that no unfreezing makes trainable, in layers that are trainable.

    Quantized kernels, and kernels that LoRA keeps frozen.
    """
    weights = []
    for layer in flatten_layers(backbone):
        if layer.trainable:
            left = _weights_lora_leaves(layer)
            weights += without(internals.own_trainable_weights(layer), left)
            if getattr(layer, "quantization_mode", None):
                weights += [w for w in internals.own_state(layer) if "int" in w.dtype]
    return weights


def without(
    weights: Iterable[keras.Variable], others: Iterable[keras.Variable]
) -> list[keras.Variable]:
    """Returns the weights that are not among the others."""
    known = {id(weight) for weight in others}
    return [weight for weight in weights if id(weight) not in known]


def changeable_weights(
    model: keras.Model, inference_only: Iterable[keras.Layer] = ()
) -> list[keras.Variable]:
    """Returns the weights of the model that training can change as the flags stand now.

    Args:
        model: A built model.
        inference_only: BatchNormalization layers that run in inference mode even where they are
            trainable.

    Returns:
        The list of weights: those that are trainable, and the state (such as moving statistics) of
        every layer but BatchNormalization layers in inference mode.
    """
    inference = {id(layer) for layer in inference_only}
    weights = []
    for layer in flatten_layers(model):
        weights += [w for w in internals.own_trainable_weights(layer) if w.trainable]
        if not (is_batchnorm(layer) and (id(layer) in inference or not layer.trainable)):
            weights += internals.own_state(layer)
    return weights


def constant_weights(
    model: keras.Model, inference_only: Iterable[keras.Layer] = ()
) -> list[keras.Variable]:
    """Returns the weights of the model that training must not change as the flags stand now.

    Args:
        model: A model; of one that is not built, the weights that there are.
        inference_only: BatchNormalization layers that are to run in inference mode even where they
            are trainable.

    Returns:
        The list of weights: all of the layers that are not trainable, those frozen one by one in
        others, and the moving statistics of `inference_only`. Weights that another layer trains are
        not in it.
    """
    inference = {id(layer) for layer in inference_only}
    constant: dict[int, keras.Variable] = {}
    for layer in flatten_layers(model):
        weights = internals.own_trainable_weights(layer)
        if layer.trainable:
            weights = [weight for weight in weights if not weight.trainable]
        if not layer.trainable or id(layer) in inference:
            weights = weights + internals.own_state(layer)
        constant.update({id(weight): weight for weight in weights})
    for weight in model.trainable_weights:
        constant.pop(id(weight), None)
    return list(constant.values())


def count_params(weights: Iterable[keras.Variable]) -> int:
    """Returns how many numbers the weights hold."""
    return sum(math.prod(weight.shape) for weight in weights)


@dataclasses.dataclass(frozen=True)
class TrainableFlags:
    """The `trainable` flag of every layer and of every weight in a backbone, in their order.

    By position and not by name: a subclassed model made again from its configuration has others.
    """

    layers: list[bool]
    weights: list[bool]


def get_trainable_flags(backbone: Backbone) -> TrainableFlags:
    """Returns the flags of every layer and weight in the backbone, for `set_trainable_flags`."""
    layers = flatten_layers(backbone)
    return TrainableFlags(
        layers=[layer.trainable for layer in layers],
        weights=[weight.trainable for weight in _weights_of(layers)],
    )


def set_trainable_flags(backbone: Backbone, flags: TrainableFlags) -> None:
    """Gives every layer and weight in the backbone the flag it had in `get_trainable_flags`.

    Raises:
        ValueError: If the flags are of a backbone with another structure. Nothing is changed then.
    """
    layers = flatten_layers(backbone)
    weights = _weights_of(layers)
    if (len(layers), len(weights)) != (len(flags.layers), len(flags.weights)):
        raise ValueError(
            f"The trainable flags are of a backbone with {len(flags.layers)} layers and "
            f"{len(flags.weights)} weights to train; {describe(backbone)} has {len(layers)} and "
            f"{len(weights)}. Make the backbone with the code and the configuration that the flags "
            "were saved with."
        )
    for layer, flag in zip(layers, flags.layers):
        internals.set_layer_flag(layer, flag)
    for weight, flag in zip(weights, flags.weights):
        internals.set_weight_flag(weight, flag)


@contextlib.contextmanager
def trainable_flags_kept(backbone: Backbone) -> Iterator[None]:
    """A context that puts every flag in the backbone back at its end."""
    flags = get_trainable_flags(backbone)
    try:
        yield
    finally:
        set_trainable_flags(backbone, flags)


def _weights_of(layers: Iterable[keras.Layer]) -> list[keras.Variable]:
    return [weight for layer in layers for weight in internals.own_trainable_weights(layer)]


def _members(backbone: Backbone, layers: Selection, train_batchnorm: bool) -> list[keras.Layer]:
    """The layers that a selection makes trainable, at every depth."""
    selected = select_layers(backbone, layers, count_batchnorm=train_batchnorm)
    return [
        layer for layer in flatten_layers(selected) if train_batchnorm or not is_batchnorm(layer)
    ]


def _trainable_in(
    backbone: Backbone,
    layers: Selection,
    members: list[keras.Layer],
    keep_frozen: Iterable[keras.Variable],
) -> list[keras.Variable]:
    kept = {id(weight) for weight in keep_frozen}
    weights = [
        weight
        for layer in members
        for weight in _weights_lora_leaves(layer)
        if id(weight) not in kept
    ]
    if not weights:
        raise ValueError(
            f"`layers={layers!r}` selects layers of the backbone {describe(backbone)} that have no "
            "weights to train. BatchNormalization layers stay frozen unless `train_batchnorm=True` "
            f"in a FrozenBackbone; layers that are not built have no weights yet. {ALLOWED}"
        )
    return weights


def _weights_lora_leaves(layer: keras.Layer) -> list[keras.Variable]:
    """The layer's own weights to train, less the kernel that `enable_lora` keeps frozen."""
    weights = internals.own_trainable_weights(layer)
    if not getattr(layer, "lora_enabled", False):
        return weights
    factors = [re.fullmatch(r"lora_(.*)_[ab]", weight.name) for weight in weights]
    bases = {match[1] for match in factors if match}
    return [weight for weight in weights if weight.name not in bases]


def _has_trainable_part(layer: keras.Layer) -> bool:
    return any(sublayer.trainable for sublayer in internals.sublayers(layer)) or any(
        weight.trainable for weight in internals.own_trainable_weights(layer)
    )
