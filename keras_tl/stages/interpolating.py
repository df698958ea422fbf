"""The end of a run between the weights that fine-tuning has started from and the best ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from keras_tl.backbone.changeable import changeable_weights
from keras_tl.backbone.selecting import batchnorm_layers
from keras_tl.features.same_epochs import never_ends
from keras_tl.internals.layers import own_state
from keras_tl.internals.values import on_host
from keras_tl.interpolation import between, moved_statistics
from keras_tl.messages import some
from keras_tl.stages.best_weights import BestWeights


def check_statistics(model: keras.Model) -> None:
    """Raises a ValueError if training moves statistics: before the first step, and not at the end.

    Args:
        model: A built model, with the flags of stage 0 or of the stage it is in.
    """
    changing = {id(weight) for weight in changeable_weights(model)}
    moving = [
        layer.name
        for layer in batchnorm_layers([model])
        if any(id(weight) in changing for weight in own_state(layer))
    ]
    if moving:
        raise ValueError(
            "`interpolate` needs moving statistics that stay constant: between those of two models "
            f"they are of neither. These layers move theirs: {some(moving)}. Wrap the backbone in "
            "keras_tl.FrozenBackbone, use LayerNormalization in the head, or leave `interpolate` "
            "out."
        )


def why_not_interpolated(model: keras.Model, best: BestWeights) -> str | None:
    """Returns why the best weights, which the model has, are to stay; None if they need not."""
    if best.start is None:
        return (
            "the run has no weights that fine-tuning started from. It ended in stage 0, or the "
            "model was in a later stage when it started."
        )
    moved = moved_statistics(
        model, [(weight, copy, on_host(weight)) for weight, copy in best.start.copies]
    )
    if moved:
        return (
            f"the statistics in {some(moved)} have moved, and those between are of neither model. "
            "The model has its best weights."
        )
    return None


def interpolate_from_start(best: BestWeights, fraction: float) -> None:
    """Gives weights that have their best values those between these and the start's."""
    if best.start is not None:
        for weight, start in best.start.copies:
            weight.assign(between(start, on_host(weight), fraction))


def held_out_data(data: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
    """Returns the validation data of `fit`, None where there is none that can be read again.

    Args:
        data: What `fit` trains and validates with, by argument.
    """
    held_out = data.get("validation_data")
    given = held_out if isinstance(held_out, (tuple, list)) else (held_out,)
    if held_out is None or never_ends(given[0]):
        return None
    return (*given, None, None)[:3]


def validated(model: keras.Model, data: Mapping[str, Any], monitor: str) -> float | None:
    """Returns the monitored value on the validation data of `fit`, None if it cannot be told.

    Args:
        model: The model.
        data: What `fit` trains and validates with, by argument.
        monitor: String. The monitored quantity.
    """
    held_out = held_out_data(data)
    if held_out is None or not monitor.startswith("val_"):
        return None
    x, y, sample_weight = held_out
    results = model.evaluate(x=x, y=y, sample_weight=sample_weight, return_dict=True, verbose=0)
    value = results.get(monitor.removeprefix("val_"))
    return None if value is None else float(value)
