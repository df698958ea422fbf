"""Naming layers of a backbone: the selections that `FrozenBackbone.unfreeze` takes.

A backbone is any Keras layer or model, or a list of layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import keras

from keras_tl.backbone.lora import is_lora, lora_weights
from keras_tl.backbone.scales import is_scales, scale_weights
from keras_tl.internals.layers import own_trainable_weights, sublayers
from keras_tl.internals.own_fit import preparing_layers
from keras_tl.internals.unlisted_state import unlisted_state
from keras_tl.messages import did_you_mean, how_to_get_a_model

Backbone: TypeAlias = keras.Layer | Sequence[keras.Layer]
Selection: TypeAlias = str | int | re.Pattern | Sequence[str] | Callable[[keras.Layer], bool]
Choice: TypeAlias = Selection | keras.Layer | Sequence[keras.Layer | str]

_NAMES_SHOWN = 3

ALLOWED = (
    'Pass "all", an int, "lora", "scales", a regular expression for whole layer names, a list of '
    "names, or a function from a layer to a bool."
)


def flatten_layers(backbone: Backbone) -> list[keras.Layer]:
    """Returns the layers at every depth, containers before what is in them, each layer once."""
    found: dict[int, keras.Layer] = {}

    def visit(layer: keras.Layer) -> None:
        if id(layer) not in found:
            found[id(layer)] = layer
            for sublayer in sublayers(layer):
                visit(sublayer)

    for layer in roots(backbone):
        visit(layer)
    return list(found.values())


def unlisted_in(backbone: Backbone) -> list[keras.Variable]:
    """Returns the state at every depth that Keras does not list, such as a torch module's."""
    return [one for layer in flatten_layers(backbone) for one in unlisted_state(layer)]


def weights_of(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the weights of a layer, and the state in it that Keras does not list."""
    return [*layer.weights, *unlisted_in(layer)]


def variables_of(model: keras.Model) -> list[keras.Variable]:
    """Returns all variables of a model, those too that Keras does not list, which are last."""
    return [*model.variables, *unlisted_in(model)]


def named_layers(backbone: Backbone) -> list[tuple[str, keras.Layer]]:
    """Returns pairs of a layer's name in the backbone and the layer, from input to output.

    Args:
        backbone: A layer, a model, or a list of layers.

    Returns:
        A list of `(name, layer)`. Nested layers are named `outer/inner`. The backbone itself is in
        it only if it has no sublayers, or is one of a list.

    Example:

    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="features")])
    >>> [name for name, _ in named_layers(backbone)]
    ['features']
    """
    named = []

    def visit(layer: keras.Layer, prefix: str) -> None:
        if not isinstance(layer, keras.layers.InputLayer):
            named.append((prefix + layer.name, layer))
            for sublayer in sublayers(layer):
                visit(sublayer, f"{prefix}{layer.name}/")

    for layer in top_layers(backbone):
        visit(layer, "")
    return named


def layer_units(backbone: Backbone) -> list[keras.Layer]:
    """Returns the layers as a user counts them, from input to output.

    Models are opened; a layer that is made of layers (LSTM, attention, a block) is one.
    """

    def visit(layer: keras.Layer) -> list[keras.Layer]:
        if not isinstance(layer, keras.Model):
            return [layer]
        return [unit for sublayer in sublayers(layer) for unit in visit(sublayer)]

    return _unique(unit for layer in top_layers(backbone) for unit in visit(layer))


def check_selection(layers: Selection, argument: str = "layers") -> None:
    """Raises a ValueError unless `layers` is of a kind that can select layers."""
    # A layer can be called too, but it is no function from a layer to a bool.
    given: list[Any] = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    if given and all(isinstance(one, keras.Layer) for one in given):
        received = [layer.name for layer in given]
        raise ValueError(
            f"`{argument}` goes by names, and not by the layers themselves. Received the layers "
            f"{received}: pass `{argument}={received}`; nested layers are named `outer/inner`. "
            f"{ALLOWED}"
        )
    kinds = (str, int, re.Pattern)
    names = isinstance(layers, Sequence) and all(isinstance(name, str) for name in layers)
    if isinstance(layers, bool) or not (isinstance(layers, kinds) or names or callable(layers)):
        raise ValueError(f"`{argument}={layers!r}` is not a selection of layers. {ALLOWED}")


def select_layers(
    backbone: Backbone,
    layers: Selection = "all",
    *,
    count_batchnorm: bool = False,
    not_counted: Iterable[keras.Layer] = (),
    argument: str = "layers",
) -> list[keras.Layer]:
    """Returns the layers of the backbone that a selection names.

    Args:
        backbone: A layer, a model, or a list of layers.
        layers: Which layers. `"all"`; `"lora"`, those with weights that `enable_lora` added;
            `"scales"`, those with biases or scales; an int n, the n layers nearest the output that
            have weights to train; a regular expression that must match a layer's whole name
            (nested layers are named `outer/inner`); a list of such names; or a function from a
            layer to a bool. A selected layer brings the layers in it.
        count_batchnorm: Bool. Whether an int n counts BatchNormalization layers.
        not_counted: Layers that an int n passes over, at every depth.
        argument: String. What the caller calls `layers`, for messages.

    Returns:
        The selected layers, without those that they bring, from input to output.

    Raises:
        ValueError: If `layers` is none of these, selects nothing, or is an int above the number of
            layers. The message lists the closest names.

    Example:

    >>> layers = [keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")]
    >>> backbone = keras.Sequential([keras.Input((4,)), *layers])
    >>> [layer.name for layer in select_layers(backbone, 1)]
    ['b']
    """
    check_selection(layers, argument)
    if isinstance(layers, str) and layers == "all":
        selected = roots(backbone)
    elif is_lora(layers):
        selected = _with_lora(backbone, argument)
    elif is_scales(layers):
        selected = _with_scales(backbone, argument)
    elif isinstance(layers, int):
        selected = _nearest_output(backbone, layers, count_batchnorm, not_counted, argument)
    elif isinstance(layers, (str, re.Pattern)):
        selected = _matching(backbone, layers, argument)
    elif isinstance(layers, Sequence):
        selected = _named(backbone, layers, argument)
    else:
        selected = [layer for _, layer in named_layers(backbone) if layers(layer)]
    if not selected:
        raise ValueError(
            f"`{argument}={layers!r}` selects no layer of the backbone {describe(backbone)}. "
            f"{ALLOWED}"
        )
    return _unique(selected)


def check_choice(layers: Choice, argument: str) -> None:
    """Raises a ValueError unless `layers` is of a kind that `choose_layers` takes."""
    given = [layers] if isinstance(layers, keras.Layer) else layers
    if isinstance(given, Sequence) and any(isinstance(one, keras.Layer) for one in given):
        given = [one for one in given if not isinstance(one, keras.Layer)]
    check_selection(given, argument)


def choose_layers(model: keras.Model, layers: Choice, argument: str) -> list[keras.Layer]:
    """Returns the layers of a model that are given themselves, or that a selection names.

    Args:
        model: The model.
        layers: As for `select_layers`; or a layer, or a list of layers and names.
        argument: String. What the caller calls `layers`, for messages.

    Raises:
        ValueError: If a layer is not one of the model, or the selection is none or selects nothing.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> [layer.name for layer in choose_layers(model, model.layers[0], "exclude")]
    ['head']
    """
    if isinstance(layers, keras.Layer):
        layers = [layers]
    if not isinstance(layers, Sequence) or not any(isinstance(one, keras.Layer) for one in layers):
        return select_layers(model, layers, count_batchnorm=True, argument=argument)
    known = {id(layer) for layer in flatten_layers(model)}
    chosen: list[keras.Layer] = []
    for one in layers:
        if not isinstance(one, keras.Layer):
            chosen += select_layers(model, [one], argument=argument)
        elif id(one) in known:
            chosen.append(one)
        else:
            raise ValueError(
                f'`{argument}` has the layer "{one.name}", which is not one of the model '
                f'"{model.name}". A copied or loaded model has layers of its own: pass one of '
                f"this model, or its name, as in `{argument}={one.name!r}`."
            )
    return _unique(chosen)


def is_built(backbone: Backbone) -> bool:
    """Whether all layers have made their weights, which a subclassed model does when called.

    Layers that prepare data are not called with the model, and may not have been yet.
    """
    preparing = [layer for root in roots(backbone) for layer in preparing_layers(root)]
    besides = {id(layer) for layer in flatten_layers(preparing)}
    return all(layer.built for layer in flatten_layers(backbone) if id(layer) not in besides)


def is_batchnorm(layer: keras.Layer) -> bool:
    """Whether the layer keeps moving statistics of batches."""
    return isinstance(layer, keras.layers.BatchNormalization)


def batchnorm_layers(backbone: Backbone) -> list[keras.Layer]:
    """Returns the BatchNormalization layers in the backbone, at every depth."""
    return [layer for layer in flatten_layers(backbone) if is_batchnorm(layer)]


def describe(backbone: Backbone) -> str:
    """Returns the backbone's name for a message."""
    names = [f'"{layer.name}"' for layer in roots(backbone)]
    if len(names) > _NAMES_SHOWN:
        return f"{names[0]} to {names[-1]} ({len(names)} layers)"
    return ", ".join(names)


def no_such_layer(backbone: Backbone, asked: str, argument: str = "layers") -> str:
    """Returns the start of an error message, with the names that may have been meant."""
    names = [name for name, _ in named_layers(backbone)]
    hint = did_you_mean(asked, names)
    return f'`{argument}="{asked}"` matches no layer of the backbone {describe(backbone)}.{hint}'


def roots(backbone: Backbone) -> list[keras.Layer]:
    """Returns a backbone as a list of layers, which it may be already."""
    if isinstance(backbone, keras.Layer):
        return [backbone]
    several = isinstance(backbone, Iterable) and not isinstance(backbone, str)
    layers = list(backbone) if several else [backbone]
    wrong = [one for one in layers if not isinstance(one, keras.Layer)]
    if wrong:
        raise ValueError(
            "A Keras model, a layer or a list of layers is needed. Received: "
            f"{wrong[0]!r} (of type {type(wrong[0]).__name__}).{how_to_get_a_model(wrong[0])}"
        )
    return layers


def top_layers(backbone: Backbone) -> list[keras.Layer]:
    """Returns the layers that names start at: those in a backbone, which itself is no choice."""
    if isinstance(backbone, keras.Layer) and sublayers(backbone):
        return sublayers(backbone)
    return roots(backbone)


def _unique(layers: Iterable[keras.Layer]) -> list[keras.Layer]:
    return list({id(layer): layer for layer in layers}.values())


def _with_lora(backbone: Backbone, argument: str) -> list[keras.Layer]:
    selected = [layer for layer in flatten_layers(backbone) if lora_weights(layer)]
    if not selected:
        raise ValueError(
            f'`{argument}="lora"`: no layer of the backbone {describe(backbone)} has LoRA weights. '
            "Call `enable_lora(rank)` of the backbone (KerasHub) or of its layers first, also of a "
            f"model that was saved and loaded: its file has them in the kernels. {ALLOWED}"
        )
    return selected


def _with_scales(backbone: Backbone, argument: str) -> list[keras.Layer]:
    selected = [layer for layer in flatten_layers(backbone) if scale_weights(layer)]
    if not selected:
        raise ValueError(
            f'`{argument}="scales"`: no layer of the backbone {describe(backbone)} has biases or '
            "scales, which are weights to train with one dimension, or named `bias`, `gamma` or "
            f"`beta`; layers that are not built have no weights yet. {ALLOWED}"
        )
    return selected


def _nearest_output(
    backbone: Backbone,
    n: int,
    count_batchnorm: bool,
    not_counted: Iterable[keras.Layer],
    argument: str,
) -> list[keras.Layer]:
    if n < 1:
        raise ValueError(
            f"`{argument}={n}` must be at least 1, the layer nearest the output. {ALLOWED}"
        )

    passed_over = {id(layer) for layer in not_counted}

    def counts(unit: keras.Layer) -> bool:
        return any(
            own_trainable_weights(layer)
            for layer in flatten_layers(unit)
            if id(layer) not in passed_over and (count_batchnorm or not is_batchnorm(layer))
        )

    counted = [unit for unit in layer_units(backbone) if counts(unit)]
    if counted and n > len(counted):
        raise ValueError(
            f"`{argument}={n}`: the backbone {describe(backbone)} has {len(counted)} layers with "
            f'weights to train. Pass an int from 1 to {len(counted)}, or "all". {ALLOWED}'
        )
    return counted[-n:]


def _matching(backbone: Backbone, pattern: str | re.Pattern, argument: str) -> list[keras.Layer]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{argument}={pattern!r}` is not a regular expression: {error}. {ALLOWED}"
        ) from error
    selected = [layer for name, layer in named_layers(backbone) if compiled.fullmatch(name)]
    if not selected:
        raise ValueError(f"{no_such_layer(backbone, compiled.pattern, argument)} {ALLOWED}")
    return selected


def _named(backbone: Backbone, names: Sequence[str], argument: str) -> list[keras.Layer]:
    named = named_layers(backbone)
    known = {name for name, _ in named}
    for name in names:
        if name not in known:
            raise ValueError(f"{no_such_layer(backbone, name, argument)} {ALLOWED}")
    return [layer for name, layer in named if name in names]
