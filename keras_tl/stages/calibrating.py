"""A head that is surer than right, calibrated before rates are tried on the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras

from keras_tl.backbone.freezing import without
from keras_tl.calibration import layer_and_loss, scaled
from keras_tl.errors import UncacheableError
from keras_tl.features.preparation import prepared
from keras_tl.internals.graphs import graph_outputs
from keras_tl.internals.optimizers import without_loss_scale
from keras_tl.internals.processes import process_count
from keras_tl.internals.randomness import random_state
from keras_tl.stages.best_weights import Snapshot
from keras_tl.stages.interpolating import held_out_data, same_value, validated

# By less it is not worth to change what the user has trained.
_LEAST_GAIN = 0.1
# A head that is best at the limit knows next to nothing, and would be erased.
_MOST = 10.0


class Calibration(NamedTuple):
    """What calibrating a head has changed.

    Attributes:
        layer: String. The name of the last layer.
        temperature: Float. What its logits were divided by.
        before: Float. The validation loss before.
        after: Float. The validation loss after.
    """

    layer: str
    temperature: float
    before: float
    after: float


def calibrate(
    model: keras.Model,
    data: Mapping[str, Any],
    trained: Sequence[keras.Variable],
    *,
    measured: float,
) -> Calibration | None:
    """Divides the logits of an over-confident classifier by the temperature that fits its data.

    A network that is only less sure has a lower loss than a head that is too sure, however much
    less it knows: held against the calibrated head, it does not pass for a better one.

    Args:
        model: A compiled model.
        data: What `data_of_fit` returns.
        trained: List of the weights that the head's stage has trained.
        measured: Float. The validation loss of the model as `fit` has measured it.

    Returns:
        A `Calibration`; None where the model is as it was: it is no classifier as
        `scale_temperature` takes it, its validation data cannot be read again or measures another
        loss than in `fit`, that would fall by less than a tenth, or the temperature is 10 or more.
    """
    layer = _layer_to_scale(model, trained)
    held_out = held_out_data(data)
    if layer is None or held_out is None:
        return None
    restore_random_state = random_state()  # On torch, to read data draws from it.
    weights = Snapshot(layer.weights)
    done = None
    try:
        done = _calibrated(model, layer, data, held_out, measured)
    except Exception as error:  # noqa: BLE001  The switch is done, and training can go on.
        warnings.warn(
            f"UnfreezeAtConvergence did not calibrate the head: {type(error).__name__}: {error}",
            stacklevel=2,
        )
    finally:
        if done is None:
            weights.restore()
        model.reset_metrics()  # An epoch begins.
        restore_random_state()
    return done


def _calibrated(
    model: keras.Model,
    layer: keras.layers.Dense,
    data: Mapping[str, Any],
    held_out: Mapping[str, Any],
    measured: float,
) -> Calibration | None:
    """Calibrates a model, and says what that was worth; None where it is to be undone."""
    before = validated(model, data, "val_loss")
    if before is None or not same_value(before, measured):
        return None
    try:
        arguments = _prepared(model, data, held_out)
    except UncacheableError:
        return None  # It is not known what the model's own `fit` makes of it.
    temperature = scaled(model, **arguments)
    after = validated(model, data, "val_loss")
    if after is None or temperature is None or not 1 < temperature < _MOST:
        return None
    gains = after < (1 - _LEAST_GAIN) * before
    return Calibration(layer.name, temperature, before, after) if gains else None


def _prepared(
    model: keras.Model, data: Mapping[str, Any], held_out: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what a model is validated on, as its own `fit` hands it on."""
    if data["prepared"]:
        return {**held_out}
    x, y, sample_weight = (held_out.get(name) for name in ("x", "y", "sample_weight"))
    found = prepared(model, x, y, sample_weight, batch_size=held_out["batch_size"], training=False)
    return {**held_out, **dict(zip(("x", "y", "sample_weight"), found, strict=True))}


def _layer_to_scale(
    model: keras.Model, trained: Sequence[keras.Variable]
) -> keras.layers.Dense | None:
    """Returns the head's last layer, if it is a classifier's and scaling it breaks nothing."""
    if process_count() > 1 or without_loss_scale(model.optimizer).use_ema:
        return None
    try:
        layer, _ = layer_and_loss(model)
    except ValueError:
        return None
    bound = layer.kernel_constraint or layer.bias_constraint or layer.lora_enabled
    # Of one prediction a sample: those of each word of a text would not fit in memory.
    plain = len(keras.tree.flatten(graph_outputs(model))[0].shape) == 2
    return layer if plain and not bound and not without(layer.weights, trained) else None
