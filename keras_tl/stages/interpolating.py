"""The end of a run between the weights that fine-tuning has started from and the best ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import keras

from keras_tl.backbone.changeable import changeable_weights
from keras_tl.backbone.selecting import batchnorm_layers
from keras_tl.features.same_epochs import starts_over
from keras_tl.internals.evaluating import evaluated
from keras_tl.internals.layers import own_state
from keras_tl.internals.randomness import random_state
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


def interpolate_from_start(
    model: keras.Model, best: BestWeights, fraction: float, data: Mapping[str, Any], monitor: str
) -> tuple[float, float] | None:
    """Gives weights that have their best values those between these and the start's.

    Args:
        model: The model.
        best: Its `BestWeights`.
        fraction: Float. How far from the start's to the best ones.
        data: What `data_of_fit` returns.
        monitor: String. The monitored quantity.

    Returns:
        The monitored value before and after, None where it cannot be told.
    """
    restore_random_state = random_state()  # On torch, to read data draws from it.
    before = _measured(model, data, monitor)
    if best.start is not None:
        for weight, start in best.start.copies:
            weight.assign(between(start, on_host(weight), fraction))
    after = _measured(model, data, monitor) if same_value(before, best.value) else None
    restore_random_state()
    return None if before is None or after is None else (before, after)


def _measured(model: keras.Model, data: Mapping[str, Any], monitor: str) -> float | None:
    """Returns the monitored value, None with a warning where that fails: the run is done."""
    try:
        return validated(model, data, monitor)
    except Exception as error:  # noqa: BLE001  Whatever it is, the user's weights are whole.
        warnings.warn(
            "UnfreezeAtConvergence interpolated, and could not measure what that changes: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None


def held_out_data(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what `fit` validates on, as `evaluate` takes it; None if it cannot be read again.

    Args:
        data: What `data_of_fit` returns.
    """
    held_out = data.get("validation_data")
    given = held_out if isinstance(held_out, (tuple, list)) else (held_out,)
    steps = data.get("validation_steps")
    if held_out is None or not starts_over(given[0], steps):
        return None
    batch_size = data.get("validation_batch_size") or data.get("batch_size")
    arguments = dict(zip(("x", "y", "sample_weight"), given, strict=False))
    return {**arguments, "batch_size": batch_size, "steps": steps}


def validated(model: keras.Model, data: Mapping[str, Any], monitor: str) -> float | None:
    """Returns the monitored value on the validation data of `fit`, None if it cannot be told.

    Args:
        model: The model.
        data: What `data_of_fit` returns.
        monitor: String. The monitored quantity.
    """
    held_out = held_out_data(data)
    if held_out is None or not monitor.startswith("val_"):
        return None
    found = evaluated(model, prepared=data["prepared"], **held_out)
    value = found.get(monitor.removeprefix("val_"))
    return None if value is None else float(value)


def same_value(value: float | None, measured: float | None) -> bool:
    """Whether the validation of this module measures what that of `fit` has measured.

    It may not, as of data that comes in another order, or is other data, each time. Sums over the
    same data differ by rounding alone.
    """
    if value is None or measured is None:
        return False
    return math.isclose(value, measured, rel_tol=1e-3, abs_tol=1e-6)
