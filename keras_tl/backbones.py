"""The backbones of a model, wrapped or plain, as one thing to freeze and unfreeze."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from keras_tl import freezing, internals
from keras_tl.layers import FrozenBackbone
from keras_tl.selecting import (
    Backbone,
    Selection,
    batchnorm_layers,
    describe,
    flatten_layers,
    is_built,
)


class Backbones:
    """The backbones of a model that are unfrozen together, and which of their layers.

    Args:
        model: A model. One that is not built has no selection yet.
        backbone: A layer, model or list of layers of that model. None means each `FrozenBackbone`.
        layers: Which layers of each are to be unfrozen; see `selecting.select_layers`.
        train_batchnorm: Bool. Whether BatchNormalization layers train their gamma and beta.

    Raises:
        ValueError: If there is no such backbone in the model.
    """

    def __init__(
        self,
        model: keras.Model,
        backbone: Backbone | None,
        layers: Selection,
        train_batchnorm: bool,
    ):
        self._layers = layers
        self._train_batchnorm = train_batchnorm
        wrappers = _wrappers(model)
        given = wrappers if backbone is None else _given(model, backbone, wrappers)
        if not given:
            raise ValueError(
                f'The model "{model.name}" has no FrozenBackbone. Wrap the pretrained model in '
                "keras_tl.FrozenBackbone (best), or pass `backbone=` with a layer, a nested model "
                "or a list of layers of this model."
            )
        self.wrapped = [layer for layer in given if isinstance(layer, FrozenBackbone)]
        self.plain = [layer for layer in given if not isinstance(layer, FrozenBackbone)]
        if self.plain and train_batchnorm:
            raise ValueError(
                "`train_batchnorm=True` needs a FrozenBackbone: in the plain backbone "
                f"{describe(self.plain)}, trainable BatchNormalization layers would "
                "update their moving statistics. Wrap it in keras_tl.FrozenBackbone, or leave "
                "`train_batchnorm` out."
            )

    @property
    def names(self) -> str:
        """String. The backbones' names, for a message."""
        return describe([wrapper.backbone for wrapper in self.wrapped] + self.plain)

    def still_frozen(self) -> list[keras.Variable]:
        """Returns the weights that `unfreeze` would make trainable and that are frozen now.

        Raises:
            ValueError: If `layers` selects nothing in any backbone.
        """
        return [
            weight
            for target in self._selecting()
            for weight in freezing.would_unfreeze(
                _unwrapped(target),
                self._layers,
                train_batchnorm=self._train_batchnorm,
                keep_frozen=target.hand_frozen if isinstance(target, FrozenBackbone) else (),
            )
        ]

    def untouched(self) -> bool:
        """Whether there are plain backbones in which nothing has been frozen yet."""
        flags = freezing.get_trainable_flags(self.plain)
        return bool(self.plain) and all(flags.weights) and all(p.trainable for p in self.plain)

    def freeze(self) -> None:
        """Freezes all of every backbone."""
        for wrapper in self.wrapped:
            wrapper.freeze()
        if self.plain:
            freezing.freeze(self.plain)

    def unfreeze(self) -> list[keras.Layer]:
        """Unfreezes the selected layers. Returns those that became trainable, input to output."""
        unfrozen = []
        for target in self._selecting():
            if isinstance(target, FrozenBackbone):
                unfrozen += target.unfreeze(self._layers, train_batchnorm=self._train_batchnorm)
            else:
                unfrozen += freezing.unfreeze(target, self._layers)
        return unfrozen

    def _selecting(self) -> list[Backbone]:
        """The backbones in which `layers` selects something: it need not in every one."""
        targets: list[Backbone] = [*self.wrapped]
        if self.plain:
            targets.append(self.plain[0] if len(self.plain) == 1 else self.plain)
        selecting = []
        errors = []
        for target in targets:
            try:
                freezing.would_unfreeze(
                    _unwrapped(target), self._layers, train_batchnorm=self._train_batchnorm
                )
                selecting.append(target)
            except ValueError as error:
                errors.append(error)
        if not selecting:
            raise errors[0]
        return selecting


def changeable_weights(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights that training can change as the flags stand now.

    Statistics in a `FrozenBackbone` are not among them, even where BatchNormalization trains.
    """
    constant = [layer for wrapper in _wrappers(model) for layer in batchnorm_layers(wrapper)]
    return freezing.changeable_weights(model, inference_only=constant)


def constant_weights(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights that training must not change as the flags stand now.

    Besides frozen weights, the moving statistics in every `FrozenBackbone` and in every layer that
    a Functional model calls with `training=False`, which `fit` overrides up to Keras 3.15.
    """
    layers = flatten_layers(model)
    called = [held for layer in layers for held in internals.called_in_inference_mode(layer)]
    constant = batchnorm_layers([*_wrappers(model), *called])
    return freezing.constant_weights(model, inference_only=constant)


def _wrappers(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in flatten_layers(model) if isinstance(layer, FrozenBackbone)]


def _unwrapped(target: Backbone) -> Backbone:
    return target.backbone if isinstance(target, FrozenBackbone) else target


def _given(
    model: keras.Model, backbone: Backbone, wrappers: Sequence[keras.Layer]
) -> list[keras.Layer]:
    """The layers passed as `backbone`; a `FrozenBackbone` in place of the model that it wraps."""
    given = [backbone] if isinstance(backbone, keras.Layer) else list(backbone)
    if not given or not all(isinstance(layer, keras.Layer) for layer in given):
        raise ValueError(
            "`backbone` must be a Keras layer, a model or a list of layers. "
            f"Received: backbone={backbone!r}."
        )
    wrapper_of = {id(wrapper.backbone): wrapper for wrapper in wrappers}
    given = [wrapper_of.get(id(layer), layer) for layer in given]
    if not is_built(model):
        return given
    known = {id(weight) for weight in model.weights}
    for layer in given:
        if not layer.weights or not all(id(weight) in known for weight in layer.weights):
            nested = [
                sublayer.name
                for sublayer in model.layers
                if isinstance(sublayer, (keras.Model, FrozenBackbone))
            ]
            raise ValueError(
                f'`backbone` "{layer.name}" is not part of the model "{model.name}", or has no '
                f"weights. Models nested in it: {', '.join(nested) or 'none'}. Pass a layer, a "
                "model or a list of layers that this model is made of."
            )
    return given
