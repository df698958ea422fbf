"""Weights on the line between two sets of weights (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.arguments import check_model
from keras_tl.backbone.selecting import flatten_layers
from keras_tl.internals.layers import own_state
from keras_tl.internals.values import on_host
from keras_tl.messages import some


def interpolate_weights(
    model: keras.Model,
    start: keras.Model | Sequence[Any],
    end: keras.Model | Sequence[Any],
    fraction: float = 0.5,
) -> None:
    """Gives a model the weights on the line between two sets of weights.

    Between the weights of a trained head on a frozen backbone and those after fine-tuning, a model
    is often better on other data than either, and loses little on its own. That is so where both
    have one start, as two stages of a run have, and where the moving statistics are the same, as a
    `FrozenBackbone` keeps them. Weights that are not floats are those of `end`.

    Args:
        model: A built model, which gets the weights. What it is compiled with stays.
        start: A list of arrays, as `model.get_weights()` returns it, or a model of the same
            architecture.
        end: The same.
        fraction: Float from 0 to 1. How far from `start` to `end`. Defaults to `0.5`.

    Raises:
        ValueError: If `model` is not a model, if `fraction` is out of range, if the weights are not
            those of such a model, or if moving statistics differ: between them, they would be of
            neither model.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> start = model.get_weights()
    >>> _ = model.layers[0].bias.assign([2.0])
    >>> interpolate_weights(model, start, model, 0.25)
    >>> model.get_weights()[1].tolist()
    [0.5]

    References:

    - Wortsman et al., 2022, "Robust fine-tuning of zero-shot models"
    """
    check_model(model, "interpolate_weights")
    fraction = check_fraction(fraction, "fraction")
    given = {"start": _values(start), "end": _values(end)}
    for argument, values in given.items():
        _check_fits(argument, values, model.weights)
    moved = moved_statistics(model, zip(model.weights, *given.values(), strict=True))
    if moved:
        raise ValueError(
            f"`start` and `end` have other moving statistics in {some(moved)}, and those between "
            "are of neither. Fine-tune with the backbone in a keras_tl.FrozenBackbone, which keeps "
            "them, or estimate them anew and set them in both."
        )
    for weight, first, second in zip(model.weights, *given.values(), strict=True):
        weight.assign(between(first, second, fraction))


def check_fraction(fraction: Any, argument: str) -> float:
    """Returns a fraction as a float. Raises a ValueError unless it is a number from 0 to 1."""
    number = isinstance(fraction, (int, float, np.number)) and not isinstance(fraction, bool)
    if number and 0 <= fraction <= 1:
        return float(fraction)
    raise ValueError(
        f"`{argument}` must be a number from 0 (the first weights) to 1 (the last ones). Received: "
        f"{argument}={fraction!r}."
    )


def between(start: np.ndarray, end: np.ndarray, fraction: float) -> np.ndarray:
    """Returns what is a fraction of the way from one array to another, in the dtype of `end`.

    Arrays that do not hold floats, such as quantized kernels, counters and seeds, have nothing
    between them: of these it is `end`.
    """
    if not _holds_floats(end):
        return end
    first, second = np.asarray(start, "float64"), np.asarray(end, "float64")
    # So that what is the same stays so, bit for bit.
    return (second - (1.0 - fraction) * (second - first)).astype(end.dtype)


def moved_statistics(model: keras.Model, triples: Any) -> list[str]:
    """Returns the paths of the weights that training moves without a gradient, and has moved.

    Args:
        model: The model.
        triples: An iterable of a weight of the model, its value before and its value after.
    """
    state = {id(weight) for layer in flatten_layers(model) for weight in own_state(layer)}
    return [
        weight.path
        for weight, start, end in triples
        if id(weight) in state and _holds_floats(end) and not np.array_equal(start, end)
    ]


def _holds_floats(values: np.ndarray) -> bool:
    return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(values.dtype)))


def _values(weights: keras.Model | Sequence[Any]) -> list[np.ndarray]:
    if isinstance(weights, keras.Model):
        return [on_host(weight) for weight in weights.weights]
    return [np.asarray(value) for value in weights]


def _check_fits(
    argument: str, values: Sequence[np.ndarray], weights: Sequence[keras.Variable]
) -> None:
    shapes = [value.shape for value in values]
    expected = [tuple(weight.shape) for weight in weights]
    if shapes != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(shapes, expected, strict=False)) if a != b), None
        )
        what = (
            f"{len(shapes)} arrays for {len(expected)} weights"
            if at is None
            else f"an array of shape {shapes[at]} for {weights[at].path!r} of shape {expected[at]}"
        )
        raise ValueError(
            f"`{argument}` must have the weights of the model, in the order of "
            f"`model.get_weights()`. Received: {what}."
        )
