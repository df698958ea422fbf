"""The biases and scales of layers, which the selection `"scales"` trains alone (BitFit)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from keras_tl.backbone.lora import weights_lora_leaves
from keras_tl.internals.layers import own_trainable_weights


def is_scales(layers: Any) -> bool:
    """Whether a selection of layers is `"scales"`: of them, only biases and scales."""
    return isinstance(layers, str) and layers == "scales"


def scale_weights(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the biases and scales that a layer itself made to be trained.

    These are the weights with at most one dimension, and those named `bias`, `gamma`, `beta` or
    `scale` with more: attention has a bias for each head, a GRU two in one, and a normalization may
    go over several axes.

    Example:

    >>> layer = keras.layers.EinsumDense("ab,bcd->acd", (2, 3), bias_axes="cd")
    >>> layer.build((None, 4))
    >>> [(weight.name, tuple(weight.shape)) for weight in scale_weights(layer)]
    [('bias', (2, 3))]
    """
    return [weight for weight in weights_lora_leaves(layer) if _is_scale(weight)]


def trains_scales_alone(layers: Iterable[keras.Layer]) -> bool:
    """Whether of the weights that the layers made themselves some train, and all are scales."""
    weights = [w for layer in layers if layer.trainable for w in own_trainable_weights(layer)]
    training = [weight for weight in weights if weight.trainable]
    return bool(training) and all(_is_scale(weight) for weight in training)


def _is_scale(weight: keras.Variable) -> bool:
    return len(weight.shape) <= 1 or weight.name in ("bias", "gamma", "beta", "scale")
