"""What a user froze by hand in a backbone, and unfreezing leaves frozen.

Single weights always; whole layers where a selection does not name them. A backbone of which
nothing trains says nothing: that is how transfer learning starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from keras_tl.backbone.lora import lora_weights
from keras_tl.backbone.paths import layer_paths, weight_paths
from keras_tl.backbone.scales import trains_scales_alone
from keras_tl.backbone.selecting import Backbone, flatten_layers, is_batchnorm, roots
from keras_tl.internals.layers import is_lora_backbone, own_trainable_weights, sublayers


@dataclasses.dataclass(frozen=True)
class HandFrozen:
    """Layers and weights that were frozen by hand. By object: weights added later shift nothing.

    Attributes:
        layers: The layers that were frozen as a whole.
        weights: The weights that were frozen one by one, in layers that train.
        knows_lora: Bool. Whether `enable_lora` of a backbone had been called before, so that
            `layers` holds what it froze.
    """

    layers: Sequence[keras.Layer] = ()
    weights: Sequence[keras.Variable] = ()
    knows_lora: bool = False

    def beyond_lora(self, backbone: Backbone) -> HandFrozen:
        """Returns it less what `enable_lora` of a backbone froze around the layers with LoRA."""
        around = _ids(frozen_around_lora(backbone)) if self.knows_lora else set()
        layers = [layer for layer in self.layers if id(layer) not in around]
        return dataclasses.replace(self, layers=layers, knows_lora=True)

    def to_config(self, backbone: Backbone) -> dict[str, list[str]]:
        """Returns it as the paths of layers and weights in the backbone."""
        layers, weights = _ids(self.layers), _ids(self.weights)
        return {
            "layers": [path for path, one in layer_paths(backbone).items() if id(one) in layers],
            "weights": [path for path, one in weight_paths(backbone).items() if id(one) in weights],
        }

    @classmethod
    def from_config(cls, backbone: Backbone, config: Any) -> HandFrozen:
        """Returns what `to_config` wrote down, as far as the backbone has it.

        Args:
            backbone: A layer, a model, or a list of layers, that is built.
            config: What `to_config` returned, or the positions of weights that version 0.1 wrote.
        """
        if not isinstance(config, Mapping):
            every = [weight for root in roots(backbone) for weight in root.weights]
            return cls(weights=[every[index] for index in config if index < len(every)])
        layers, weights = layer_paths(backbone), weight_paths(backbone)
        return cls(
            layers=[layers[path] for path in config["layers"] if path in layers],
            weights=[weights[path] for path in config["weights"] if path in weights],
        )


NOTHING = HandFrozen()


def frozen_by_hand(backbone: Backbone) -> HandFrozen:
    """Returns what is frozen in a backbone before anything else freezes it.

    BatchNormalization layers do not count: whether they train is `train_batchnorm`'s to say.
    """
    training = _ids(_training(backbone))
    layers = [layer for layer in flatten_layers(backbone) if _could_train(layer)]
    frozen = [layer for layer in layers if id(layer) not in training]
    partly = len(frozen) < len(layers)
    return HandFrozen(
        layers=frozen if partly else (),
        weights=hand_frozen_weights(backbone),
        knows_lora=partly and bool(frozen_around_lora(backbone)),
    )


def hand_frozen_weights(backbone: Backbone) -> list[keras.Variable]:
    """Returns the weights that were frozen one by one, in layers that are trainable.

    A layer of which the LoRA weights train alone says nothing: so a stage of LoRA looks.
    """
    return [
        weight
        for layer in flatten_layers(backbone)
        if layer.trainable and not _trains_lora_alone(layer)
        for weight in own_trainable_weights(layer)
        if not weight.trainable
    ]


def hand_frozen_beside_scales(backbone: Backbone) -> list[keras.Variable]:
    """Returns the weights that were frozen one by one, where a stage may train scales alone.

    A backbone of which nothing but scales trains says nothing of its kernels: so that stage looks.
    """
    weights = hand_frozen_weights(backbone)
    return [] if trains_scales_alone(flatten_layers(backbone)) else weights


def _trains_lora_alone(layer: keras.Layer) -> bool:
    lora = _ids(lora_weights(layer))
    return bool(lora) and lora == _ids(w for w in own_trainable_weights(layer) if w.trainable)


def frozen_around_lora(backbone: Backbone) -> list[keras.Layer]:
    """Returns the layers that `enable_lora` of a KerasHub backbone froze around those with LoRA."""
    adapted = [layer for layer in flatten_layers(backbone) if is_lora_backbone(layer)]
    return [
        layer
        for layer in flatten_layers(adapted)
        if own_trainable_weights(layer) and not getattr(layer, "lora_enabled", False)
    ]


def held_layers(backbone: Backbone, hand_frozen: HandFrozen) -> list[keras.Layer]:
    """Returns the layers that stay frozen where a selection does not name them."""
    around_lora = [] if hand_frozen.knows_lora else frozen_around_lora(backbone)
    return [*hand_frozen.layers, *around_lora]


def is_held(layer: keras.Layer, held: Iterable[keras.Layer]) -> bool:
    """Whether all of a layer that could train was frozen by hand: then that was one decision."""
    frozen = _ids(held)
    parts = [
        part
        for part in flatten_layers(layer)
        if own_trainable_weights(part) and not is_batchnorm(part)
    ]
    return bool(parts) and all(id(part) in frozen for part in parts)


def _training(backbone: Backbone) -> list[keras.Layer]:
    """The layers that are trainable, and are in none that is not."""
    training = []

    def visit(layer: keras.Layer) -> None:
        if layer.trainable:
            training.append(layer)
            for sublayer in sublayers(layer):
                visit(sublayer)

    for root in roots(backbone):
        visit(root)
    return training


def _could_train(layer: keras.Layer) -> bool:
    """Whether the layer has weights to train of its own, or may make some when it is built."""
    may_make_some = not layer.built and not sublayers(layer)
    has_some = bool(own_trainable_weights(layer))
    return (has_some or may_make_some) and not is_batchnorm(layer)


def _ids(objects: Iterable[object]) -> set[int]:
    return {id(one) for one in objects}
