"""The backbones of a model, wrapped or plain, as one thing to freeze and unfreeze."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeAlias

import keras

from keras_tl.backbone import freezing
from keras_tl.backbone.hand_frozen import (
    NOTHING,
    HandFrozen,
    hand_frozen_beside_scales,
    hand_frozen_weights,
    held_layers,
)
from keras_tl.backbone.selecting import (
    Backbone,
    Selection,
    describe,
    flatten_layers,
    is_built,
    layer_units,
    named_layers,
    roots,
)
from keras_tl.internals.layers import set_layer_flag
from keras_tl.internals.models import functions_kept
from keras_tl.layers import FrozenBackbone
from keras_tl.messages import did_you_mean, some

# What `backbone=` takes: layers, their names in the model, or a function that finds them in it.
BackboneOf: TypeAlias = (
    keras.Layer
    | str
    | Sequence[keras.Layer | str]
    | Callable[[keras.Model], "keras.Layer | str | Sequence[keras.Layer | str]"]
)


class Backbones:
    """The backbones of a model that are frozen and unfrozen together.

    Args:
        model: A model.
        backbone: A layer, model or list of layers of that model, their names, or a function that
            returns them for the model. None means each `FrozenBackbone`, or if there is none
            `model.backbone`, as KerasHub's tasks have it.
        beyond_lora: Bool. Whether `"all"` selects also what `enable_lora` froze, since `"lora"`
            selects the rest.
        knows_scales: Bool. Whether a stage selects `"scales"`, so that kernels of a plain backbone
            that are frozen beside them are not taken for frozen by hand.

    Raises:
        ValueError: If there is no such backbone in the model.
    """

    def __init__(
        self,
        model: keras.Model,
        backbone: BackboneOf | None,
        *,
        beyond_lora: bool = False,
        knows_scales: bool = False,
    ):
        wrappers = _wrappers(model)
        if backbone is None:
            given = wrappers or _named_backbone(model)
        else:
            given = _given(model, backbone, wrappers)
        if not given:
            raise ValueError(
                f'The model "{model.name}" has no FrozenBackbone. Wrap the pretrained model in '
                "keras_tl.FrozenBackbone (best), or pass `backbone=` with a layer, a nested model "
                "or a list of layers of this model, or with names of these. A layer of the model "
                "that is its attribute `backbone` is found without."
            )
        self.wrapped = [layer for layer in given if isinstance(layer, FrozenBackbone)]
        self.plain = [layer for layer in given if not isinstance(layer, FrozenBackbone)]
        self._beyond_lora = beyond_lora
        # A whole layer that is frozen says nothing: in a plain backbone that is how stage 0 looks.
        frozen_in = hand_frozen_beside_scales if knows_scales else hand_frozen_weights
        self._hand_frozen = HandFrozen(weights=frozen_in(self.plain))

    @property
    def names(self) -> str:
        """String. The backbones' names, for a message."""
        return describe([wrapper.backbone for wrapper in self.wrapped] + self.plain)

    @property
    def layers(self) -> Backbone:
        """The backbones without wrappers: one layer or model, or a list."""
        layers = [wrapper.backbone for wrapper in self.wrapped] + self.plain
        return layers[0] if len(layers) == 1 else layers

    @property
    def members(self) -> list[keras.Layer]:
        """List of the backbones, wrapped and plain."""
        return [*self.wrapped, *self.plain]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """List of the weights in the backbones that are trainable now."""
        return [
            weight for layer in [*self.wrapped, *self.plain] for weight in layer.trainable_weights
        ]

    def check(self, layers: Selection, train_batchnorm: bool) -> None:
        """Raises a ValueError if these layers cannot be unfrozen, or `layers` selects nothing."""
        if self.plain and train_batchnorm:
            raise ValueError(
                "`train_batchnorm=True` needs a FrozenBackbone: in the plain backbone "
                f"{describe(self.plain)}, trainable BatchNormalization layers would "
                "update their moving statistics. Wrap it in keras_tl.FrozenBackbone, or leave "
                "`train_batchnorm` out."
            )
        if all(is_built(target) for target in self._targets()):
            self.still_frozen(layers, train_batchnorm)  # Raises if the selection is empty.

    def still_frozen(self, layers: Selection, train_batchnorm: bool) -> list[keras.Variable]:
        """Returns the weights that `unfreeze` would make trainable and that are frozen now.

        Args:
            layers: Which layers of each backbone; see `selecting.select_layers`. They need not be
                in every one.
            train_batchnorm: Bool. Whether BatchNormalization layers train their gamma and beta.

        Raises:
            ValueError: If `layers` selects nothing in any backbone.
        """
        return [
            weight
            for target in self._selecting(layers, train_batchnorm)
            for weight in freezing.would_unfreeze(
                unwrapped(target),
                layers,
                train_batchnorm=train_batchnorm,
                hand_frozen=self._hand_frozen_in(target),
            )
        ]

    def trains_only(self, layers: Selection, train_batchnorm: bool) -> bool:
        """Whether the selected layers of the backbones train now, and no others."""
        with freezing.trainable_flags_kept([*self.wrapped, *self.plain]):
            now = {id(weight) for weight in self.trainable_weights}
            self.freeze()
            self.unfreeze(layers, train_batchnorm)
            return now == {id(weight) for weight in self.trainable_weights}

    def untouched(self) -> bool:
        """Whether there are plain backbones, and all of them trains but what LoRA has frozen.

        Nor do single weights count that were frozen by hand, as long as others train.
        """
        trains = bool(self.plain) and all(layer.trainable for layer in self.plain)
        # A backbone that is not built has no weights yet: its flags are all that it says.
        built = all(is_built(layer) for layer in self.plain)
        trains = trains and (bool(self.trainable_weights) or not built)
        return trains and freezing.is_thawed(self.plain, self._hand_frozen)

    def freeze(self) -> None:
        """Freezes all of every backbone. What is compiled is the caller's to renew."""
        with functions_kept():
            for wrapper in self.wrapped:
                wrapper.freeze()
        if self.plain:
            freezing.freeze(self.plain)

    def unfreeze(self, layers: Selection, train_batchnorm: bool) -> None:
        """Unfreezes the selected layers. What is compiled is the caller's to renew."""
        for target in self._selecting(layers, train_batchnorm):
            freezing.unfreeze(
                unwrapped(target),
                layers,
                train_batchnorm=train_batchnorm,
                hand_frozen=self._hand_frozen_in(target),
            )
            if isinstance(target, FrozenBackbone):
                set_layer_flag(target, True)

    def names_of(self, weights: Iterable[keras.Variable]) -> tuple[str, ...]:
        """Returns the names of the layers that have any of these weights, input to output."""
        given = {id(weight) for weight in weights}
        units = layer_units([unwrapped(layer) for layer in [*self.wrapped, *self.plain]])
        return tuple(layer.name for layer in units if any(id(w) in given for w in layer.weights))

    def cannot_train(self) -> list[keras.Variable]:
        """Returns the weights that no unfreezing makes trainable, in layers that train."""
        return freezing.cannot_train([*self.wrapped, *self.plain])

    def _targets(self) -> list[Backbone]:
        plain = [self.plain[0] if len(self.plain) == 1 else self.plain] if self.plain else []
        return [*self.wrapped, *plain]

    def _hand_frozen_in(self, target: Backbone) -> HandFrozen:
        """What was frozen by hand, and stays so."""
        if isinstance(target, FrozenBackbone):
            hand_frozen: HandFrozen = target.hand_frozen
        else:
            hand_frozen = self._hand_frozen
        return hand_frozen.beyond_lora(unwrapped(target)) if self._beyond_lora else hand_frozen

    def _selecting(self, layers: Selection, train_batchnorm: bool) -> list[Backbone]:
        """The backbones in which `layers` selects something: it need not in every one."""
        selecting = []
        errors = []
        for target in self._targets():
            try:
                freezing.would_unfreeze(
                    unwrapped(target),
                    layers,
                    train_batchnorm=train_batchnorm,
                    hand_frozen=self._hand_frozen_in(target),
                )
                selecting.append(target)
            except ValueError as error:
                errors.append(error)
        # A name may be in one backbone only. A number of layers is meant for each.
        if errors and (not selecting or isinstance(layers, int)):
            raise errors[0]
        return selecting


def unwrapped(backbone: Backbone) -> Backbone:
    """Returns the model that a `FrozenBackbone` wraps; of other backbones, what they are."""
    if isinstance(backbone, keras.Layer):
        return backbone.backbone if isinstance(backbone, FrozenBackbone) else backbone
    return [unwrapped(layer) for layer in roots(backbone)]


def stay_frozen(backbone: Backbone) -> list[keras.Layer]:
    """Returns the layers of a backbone that stay frozen where a selection does not name them."""
    if not isinstance(backbone, keras.Layer):
        return [layer for one in backbone for layer in stay_frozen(one)]
    wrapped = isinstance(backbone, FrozenBackbone)
    return held_layers(unwrapped(backbone), backbone.hand_frozen if wrapped else NOTHING)


def names_of_layers(backbone: BackboneOf | None) -> Any:
    """Returns names in place of layers, which mean the same in a model that is read from a file."""
    if isinstance(backbone, keras.Layer):
        return backbone.name
    if isinstance(backbone, (list, tuple)):
        # An input, as in `model.layers[:-1]`, is no layer that a name finds.
        layers = [one for one in backbone if not isinstance(one, keras.layers.InputLayer)]
        return [names_of_layers(one) for one in layers]
    return backbone


def _wrappers(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in flatten_layers(model) if isinstance(layer, FrozenBackbone)]


def _named_backbone(model: keras.Model) -> list[keras.Layer]:
    """The layer that a model calls its backbone, if it does."""
    backbone = getattr(model, "backbone", None)
    return [layer for layer in flatten_layers(model)[1:] if layer is backbone]


def _given(
    model: keras.Model, backbone: BackboneOf, wrappers: Sequence[keras.Layer]
) -> list[keras.Layer]:
    """The layers passed as `backbone`; a `FrozenBackbone` in place of the model that it wraps."""
    found: Any = backbone
    makes_anew = _makes_anew(backbone)
    if callable(backbone) and not (makes_anew or isinstance(backbone, keras.Layer)):
        found = backbone(model)
    several = isinstance(found, Sequence) and not isinstance(found, str)
    given: list[Any] = list(found) if several else [found]
    if not given or not all(isinstance(one, (keras.Layer, str)) for one in given):
        returned = "" if found is backbone else f", which returns {found!r}"
        hint = " That does not take the model: pass the layer it has made." if makes_anew else ""
        raise ValueError(
            "`backbone` must be a Keras layer, a model or a list of layers, their names, or a "
            f"function from the model to these. Received: backbone={backbone!r}{returned}."
            f"{hint}"
        )
    wrapper_of = {id(wrapper.backbone): wrapper for wrapper in wrappers}
    layers = [_named(model, one) if isinstance(one, str) else one for one in given]
    layers = [wrapper_of.get(id(layer), layer) for layer in layers]
    if is_built(model):
        _check_part_of(model, layers)
    return [layer for layer in layers if not isinstance(layer, keras.layers.InputLayer)]


def _makes_anew(backbone: BackboneOf) -> bool:
    """Whether this is a class, or a function that needs no model, as in `keras.applications`.

    One of these would take the model for its first argument, and load weights by network.
    """
    if not inspect.isfunction(backbone):
        return isinstance(backbone, type)
    first = next(iter(inspect.signature(backbone).parameters.values()), None)
    return first is None or first.default is not first.empty


def _check_part_of(model: keras.Model, layers: Sequence[keras.Layer]) -> None:
    """Raises a ValueError unless the model is made of these layers, of which one has weights."""
    known = {id(weight) for weight in model.weights}
    # A list such as `model.layers[:-1]` has layers without weights too.
    within = {id(layer) for layer in flatten_layers(model)} if len(layers) > 1 else set()
    for layer in layers:
        ids = {id(weight) for weight in layer.weights}
        if not (ids <= known if ids else id(layer) in within):
            _raise_not_part_of(model, layer)
    if not any(layer.weights for layer in layers):
        _raise_not_part_of(model, layers[0])


def _raise_not_part_of(model: keras.Model, layer: keras.Layer) -> NoReturn:
    kinds = (keras.Model, FrozenBackbone)
    nested = [sublayer.name for sublayer in model.layers if isinstance(sublayer, kinds)]
    raise ValueError(
        f'`backbone` "{layer.name}" is not part of the model "{model.name}", or has no weights. '
        f"Models nested in it: {', '.join(nested) or 'none'}. Pass a layer, a model or a list of "
        "layers that this model is made of; or, where the model is made later or several times, a "
        "name or a function of the model."
    )


def _named(model: keras.Model, name: str) -> keras.Layer:
    """The layer of a model that a name means: of the path from the model, or of the layer alone."""
    named = named_layers(model)
    found = {id(layer): layer for path, layer in named if path == name}
    found = found or {id(layer): layer for _, layer in named if layer.name == name}
    if len(found) == 1:
        return next(iter(found.values()))
    paths = [path for path, layer in named if id(layer) in found]
    if paths:
        hint = f"names several layers: {', '.join(paths)}. Pass one of these, or the layer."
    else:
        names = [known for path, layer in named for known in (path, layer.name)]
        hint = "matches no layer." + did_you_mean(name, names)
        hint += f" It has {some([layer.name for layer in model.layers])}."
        if name.endswith((".keras", ".h5")):
            hint += (
                " No file is read here: load it with `keras.saving.load_model`, and make this "
                "model with the layer that returns."
            )
    raise ValueError(f'`backbone="{name}"`: in the model "{model.name}" that name {hint}')
