"""Which weights of a model training can change, and which it must not, as the flags stand now."""

from __future__ import annotations

from collections.abc import Iterable

import keras

from keras_tl.backbone.selecting import batchnorm_layers, flatten_layers, is_batchnorm
from keras_tl.internals.graphs import called_in_inference_mode
from keras_tl.internals.layers import own_state, own_trainable_weights
from keras_tl.layers import FrozenBackbone


def changeable_weights(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights of a model that training can change.

    Args:
        model: A built model.

    Returns:
        The list of weights: those that are trainable, and the state (such as moving statistics) of
        every layer but BatchNormalization layers in inference mode. In a `FrozenBackbone` these are
        in inference mode even where they train.
    """
    inference = _ids(batchnorm_layers(_wrappers(model)))
    weights = []
    for layer in flatten_layers(model):
        weights += [w for w in own_trainable_weights(layer) if w.trainable]
        if not (is_batchnorm(layer) and (id(layer) in inference or not layer.trainable)):
            weights += own_state(layer)
    return weights


def constant_weights(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights of a model that training must not change.

    Args:
        model: A model; of one that is not built, the weights that there are.

    Returns:
        The list of weights: all of the layers that are not trainable, those frozen one by one in
        others, and moving statistics in every `FrozenBackbone` and in every layer that a Functional
        model calls with `training=False`, which `fit` overrides up to Keras 3.15. Weights that
        another layer trains are not in it.
    """
    called = [held for layer in flatten_layers(model) for held in called_in_inference_mode(layer)]
    inference = _ids(batchnorm_layers([*_wrappers(model), *called]))
    constant: dict[int, keras.Variable] = {}
    for layer in flatten_layers(model):
        weights = own_trainable_weights(layer)
        if layer.trainable:
            weights = [weight for weight in weights if not weight.trainable]
        if not layer.trainable or id(layer) in inference:
            weights = weights + own_state(layer)
        constant.update({id(weight): weight for weight in weights})
    for weight in model.trainable_weights:
        constant.pop(id(weight), None)
    return list(constant.values())


def _wrappers(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in flatten_layers(model) if isinstance(layer, FrozenBackbone)]


def _ids(layers: Iterable[keras.Layer]) -> set[int]:
    return {id(layer) for layer in layers}
