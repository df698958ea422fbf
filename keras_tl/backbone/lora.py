"""The weights of LoRA, which `enable_lora` of a layer adds beside the ones that it freezes."""

from __future__ import annotations

import re
from typing import Any

import keras

from keras_tl.internals.layers import own_trainable_weights


def is_lora(layers: Any) -> bool:
    """Whether a selection of layers is `"lora"`: of them, only the weights that LoRA added."""
    return isinstance(layers, str) and layers == "lora"


def lora_weights(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the weights that `enable_lora` added to a layer itself.

    Example:

    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 3))
    >>> layer.enable_lora(rank=1)
    >>> [weight.name for weight in lora_weights(layer)]
    ['lora_kernel_a', 'lora_kernel_b']
    """
    return [weight for weight in _weights(layer) if re.fullmatch(_FACTOR, weight.name)]


def weights_lora_leaves(layer: keras.Layer) -> list[keras.Variable]:
    """Returns a layer's own weights to train, less the kernel that `enable_lora` keeps frozen."""
    factors = [re.fullmatch(_FACTOR, weight.name) for weight in _weights(layer)]
    bases = {match[1] for match in factors if match}
    return [weight for weight in own_trainable_weights(layer) if weight.name not in bases]


_FACTOR = "lora_(.*)_[ab]"


def _weights(layer: keras.Layer) -> list[keras.Variable]:
    enabled = getattr(layer, "lora_enabled", False)
    return own_trainable_weights(layer) if enabled else []
