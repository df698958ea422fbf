"""Which layers and weights of a backbone are trainable: freezing, unfreezing, reporting.

A backbone is any Keras layer or model, or a list of layers. Nothing here knows of training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras

from keras_tl.backbone.hand_frozen import (
    NOTHING,
    HandFrozen,
    frozen_around_lora,
    held_layers,
    is_held,
)
from keras_tl.backbone.lora import is_lora, lora_weights, weights_lora_leaves
from keras_tl.backbone.paths import layer_paths, weight_paths
from keras_tl.backbone.scales import is_scales, scale_weights
from keras_tl.backbone.selecting import (
    ALLOWED,
    Backbone,
    Selection,
    describe,
    flatten_layers,
    is_batchnorm,
    layer_units,
    select_layers,
)
from keras_tl.internals.layers import (
    own_state,
    own_trainable_weights,
    set_layer_flag,
    set_weight_flag,
    sublayers,
)


def freeze(backbone: Backbone, layers: Selection = "all") -> None:
    """Makes the selected layers of the backbone not trainable.

    Args:
        backbone: A layer, a model, or a list of layers.
        layers: Which layers; see `selecting.select_layers`.

    Raises:
        ValueError: If `layers` selects nothing.
    """
    part_of = _part(layers)
    weights_of = part_of or own_trainable_weights
    for layer in flatten_layers(select_layers(backbone, layers, count_batchnorm=True)):
        for weight in weights_of(layer):
            set_weight_flag(weight, False)
        keeps_rest = part_of is not None and layer.trainable and _has_trainable_part(layer)
        set_layer_flag(layer, keeps_rest)
    # From the inside out: a model counts as trainable for as long as something in it is.
    for layer in reversed(flatten_layers(backbone)):
        if layer.trainable and sublayers(layer):
            set_layer_flag(layer, _has_trainable_part(layer))


def unfreeze(
    backbone: Backbone,
    layers: Selection = "all",
    *,
    train_batchnorm: bool = False,
    hand_frozen: HandFrozen = NOTHING,
) -> list[keras.Layer]:
    """Makes the selected layers of the backbone trainable, and nothing else.

    Weights that were never trainable stay so (moving statistics, quantized kernels), and so do
    kernels that LoRA has frozen. What was frozen by hand stays frozen too; a whole layer only where
    the selection does not name it.

    Args:
        backbone: A layer, a model, or a list of layers.
        layers: Which layers; see `selecting.select_layers`. Of `"lora"` only the weights that
            LoRA added, of `"scales"` only biases and scales. A name, a list of names, a regular
            expression, a function and `"lora"` name the layers that they select. An int, `"all"`
            and `"scales"` name none, and nor does an expression or a function that selects all
            that `"all"` does.
        train_batchnorm: Bool. Whether selected BatchNormalization layers become trainable too.
        hand_frozen: What was frozen by hand.

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
    members = _members(backbone, layers, train_batchnorm, hand_frozen)
    weights = _trainable_in(backbone, layers, members, hand_frozen)
    newly = {id(weight) for weight in weights if not weight.trainable}
    # Flag by flag, for `layer.trainable = True` is recursive and forgets what is frozen in a layer.
    for layer in members:
        set_layer_flag(layer, True)
    for weight in weights:
        set_weight_flag(weight, True)
    # A frozen model keeps what is in it from training, so those around what trains follow.
    for layer in reversed(flatten_layers(backbone)):
        if _has_trainable_part(layer):
            set_layer_flag(layer, True)
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
    hand_frozen: HandFrozen = NOTHING,
) -> list[keras.Variable]:
    """Returns the frozen weights that `unfreeze` with these arguments would make trainable."""
    members = _members(backbone, layers, train_batchnorm, hand_frozen)
    weights = _trainable_in(backbone, layers, members, hand_frozen)
    return [weight for weight in weights if not weight.trainable]


def is_thawed(backbone: Backbone, hand_frozen: HandFrozen = NOTHING) -> bool:
    """Whether all weights train but those that LoRA keeps frozen, or froze around it.

    Args:
        backbone: A layer, a model, or a list of layers.
        hand_frozen: What was frozen by hand, whose weights do not count either.
    """
    kept = {id(weight) for weight in hand_frozen.weights}
    around_lora = {id(layer) for layer in frozen_around_lora(backbone)}
    return all(
        weight.trainable or id(weight) in kept
        for layer in flatten_layers(backbone)
        if id(layer) not in around_lora
        for weight in weights_lora_leaves(layer)
    )


def cannot_train(backbone: Backbone) -> list[keras.Variable]:
    """Returns the weights that no unfreezing makes trainable, in layers that are trainable.

    Quantized kernels, and kernels that LoRA keeps frozen.
    """
    weights = []
    for layer in flatten_layers(backbone):
        if layer.trainable:
            left = weights_lora_leaves(layer)
            weights += without(own_trainable_weights(layer), left)
            if getattr(layer, "quantization_mode", None):
                weights += [w for w in own_state(layer) if "int" in w.dtype]
    return weights


def without(
    weights: Iterable[keras.Variable], others: Iterable[keras.Variable]
) -> list[keras.Variable]:
    """Returns the weights that are not among the others."""
    known = {id(weight) for weight in others}
    return [weight for weight in weights if id(weight) not in known]


def count_params(weights: Iterable[keras.Variable]) -> int:
    """Returns how many numbers the weights hold."""
    return sum(math.prod(weight.shape) for weight in weights)


@dataclasses.dataclass(frozen=True)
class TrainableFlags:
    """The `trainable` flag of every layer and of every weight in a backbone, by their paths."""

    layers: dict[str, bool]
    weights: dict[str, bool]


def get_trainable_flags(backbone: Backbone) -> TrainableFlags:
    """Returns the flags of every layer and weight in the backbone, for `set_trainable_flags`."""
    return TrainableFlags(
        layers={path: layer.trainable for path, layer in layer_paths(backbone).items()},
        weights={path: weight.trainable for path, weight in weight_paths(backbone).items()},
    )


def set_trainable_flags(backbone: Backbone, flags: TrainableFlags) -> list[str]:
    """Gives layers and weights in the backbone the flags they had in `get_trainable_flags`.

    Layers and weights that are in one of the two only, such as those that LoRA adds, keep theirs.

    Returns:
        The paths of the layers and weights that were trainable and are not in this backbone.
    """
    layers, weights = layer_paths(backbone), weight_paths(backbone)
    for path, layer in layers.items():
        set_layer_flag(layer, flags.layers.get(path, layer.trainable))
    for path, weight in weights.items():
        set_weight_flag(weight, flags.weights.get(path, weight.trainable))
    lost = [path for path, flag in flags.layers.items() if flag and path not in layers]
    return lost + [path for path, flag in flags.weights.items() if flag and path not in weights]


def restore_trainable_flags(backbone: Backbone, config: Mapping[str, Any]) -> list[str]:
    """Gives a backbone made from a configuration the flags that were saved with it.

    Weights that it did not have then follow their layer. Nothing here fails: a backbone may have
    been saved with weights that its configuration knows nothing of, such as those of LoRA.

    Args:
        backbone: A built backbone, all frozen.
        config: The two dictionaries of `TrainableFlags`, or the two lists that version 0.1 wrote,
            whose flags are in the order of layers and weights.

    Returns:
        The paths of what trained when it was saved and is not in this backbone.
    """
    layers, weights = layer_paths(backbone), weight_paths(backbone)
    flags = TrainableFlags(
        layers=_by_path(layers, config["layers"]), weights=_by_path(weights, config["weights"])
    )
    # First all weights of layers that trained: some may have been added since, with no flag saved.
    for path, layer in layers.items():
        if flags.layers.get(path):
            for weight in weights_lora_leaves(layer):
                set_weight_flag(weight, True)
    return set_trainable_flags(backbone, flags)


def _by_path(paths: Iterable[str], flags: Mapping[str, bool] | Sequence[bool]) -> dict[str, bool]:
    if isinstance(flags, Mapping):
        return dict(flags)
    paths = list(paths)
    if len(paths) != len(flags):
        # Positions that do not fit tell nothing; as a path that is nowhere, they are reported.
        return {"told by position only": any(flags)}
    return dict(zip(paths, flags, strict=True))


@contextlib.contextmanager
def trainable_flags_kept(backbone: Backbone) -> Iterator[None]:
    """A context that puts every flag in the backbone back at its end."""
    flags = get_trainable_flags(backbone)
    try:
        yield
    finally:
        set_trainable_flags(backbone, flags)


def _members(
    backbone: Backbone, layers: Selection, train_batchnorm: bool, hand_frozen: HandFrozen
) -> list[keras.Layer]:
    """The layers that a selection makes trainable, at every depth."""

    def members_of(some: Backbone) -> list[keras.Layer]:
        return [one for one in flatten_layers(some) if train_batchnorm or not is_batchnorm(one)]

    held = held_layers(backbone, hand_frozen)
    selected = select_layers(backbone, layers, count_batchnorm=train_batchnorm, not_counted=held)
    members = members_of(selected)
    if not held:
        return members
    stay = {id(layer) for layer in held}
    # Who names a layer that was frozen by hand means it; who says "all" need not know of it.
    if not _is_catch_all(layers, members, members_of(backbone)):
        named = selected if _is_names(layers) else _outermost(selected)
        stay -= {id(layer) for one in named if is_held(one, held) for layer in flatten_layers(one)}
    return [layer for layer in members if id(layer) not in stay]


def _is_names(layers: Selection) -> bool:
    return isinstance(layers, Sequence) and not isinstance(layers, str)


def _is_catch_all(
    layers: Selection, members: list[keras.Layer], everything: list[keras.Layer]
) -> bool:
    """Whether a selection says as much as "all", or as little: it names no layer."""
    if layers == "all" or is_scales(layers) or isinstance(layers, int):
        return True
    selected = {id(layer) for layer in members}
    return not _is_names(layers) and all(
        id(layer) in selected for layer in everything if own_trainable_weights(layer)
    )


def _outermost(selected: list[keras.Layer]) -> list[keras.Layer]:
    """The selected layers less those that another one brings, which an expression matches too."""
    brought = {
        id(inner) for layer in selected for inner in flatten_layers(layer) if inner is not layer
    }
    return [layer for layer in selected if id(layer) not in brought]


def _trainable_in(
    backbone: Backbone,
    layers: Selection,
    members: list[keras.Layer],
    hand_frozen: HandFrozen,
) -> list[keras.Variable]:
    kept = {id(weight) for weight in hand_frozen.weights}
    weights_of = _part(layers) or weights_lora_leaves
    weights = [
        weight for layer in members for weight in weights_of(layer) if id(weight) not in kept
    ]
    if not weights:
        raise ValueError(
            f"`layers={layers!r}` selects layers of the backbone {describe(backbone)} that have no "
            "weights to train. BatchNormalization layers stay frozen unless `train_batchnorm=True` "
            "in a FrozenBackbone; weights that were frozen by hand stay frozen, and whole layers "
            "unless they are named; layers that are not built have no weights yet; of a SavedModel "
            "or torch module, Keras trains what was trainable when a TFSMLayer or a "
            f"TorchModuleWrapper took it. {ALLOWED}"
        )
    return weights


def _part(layers: Selection) -> Callable[[keras.Layer], list[keras.Variable]] | None:
    """The function that finds what a selection means of each layer, None if it is all of it."""
    if is_lora(layers):
        return lora_weights
    return scale_weights if is_scales(layers) else None


def _has_trainable_part(layer: keras.Layer) -> bool:
    return any(sublayer.trainable for sublayer in sublayers(layer)) or any(
        weight.trainable for weight in own_trainable_weights(layer)
    )
