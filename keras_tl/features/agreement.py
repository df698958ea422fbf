"""Whether a head on recorded features gives what the model gives for the data itself.

What a model does with data before its layers see it can be anywhere: in a method of its class, of
its instance, or in Keras, patched. So one batch tells, through the methods that a user calls.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tl.backbone.selecting import flatten_layers
from keras_tl.features.probe import same_array
from keras_tl.internals.layers import own_state, rounds_coarsely, seed_states
from keras_tl.internals.models import functions_set_aside
from keras_tl.internals.own_fit import keras_method
from keras_tl.internals.randomness import random_state
from keras_tl.stages.best_weights import Snapshot

# A loss near 0 is the difference of numbers that are rounded: it differs by more than they do.
_LOSS_TOLERANCE, _SMALLEST_LOSS = 5e-2, 1e-6


def difference(
    model: keras.Model,
    head: keras.Model,
    batch: Any,
    features: Any,
    *,
    arrays: bool,
    eager: bool = False,
    outputs_only: bool = False,
) -> str | None:
    """Returns the method in which a model and its head differ by more than rounding, or None.

    It leaves weights, metrics, seeds and compiled functions as they are. As in `fit`, the metrics
    of the model are built then, by which callbacks tell in which direction they improve.

    Args:
        model: The model.
        head: Its head.
        batch: A batch of the data, as Keras' `fit` takes it: prepared, if the model's own does so.
        features: What the head takes instead of the batch's inputs.
        arrays: Bool. Whether the data is arrays; otherwise both get a `tf.data.Dataset`.
        eager: Bool. Whether both are evaluated without a compiler, wherever that is possible.
        outputs_only: Bool. Whether `predict` alone is compared.
    """
    x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
    on_features = {"x": _dataset(features, y, weight)}
    coarse = rounds_coarsely(flatten_layers(model)) or any(
        x.dtype.name in ("float16", "bfloat16") for x in keras.tree.flatten(features)
    )
    methods: dict[str, Callable[[Any, Any], bool]] = {
        "predict": functools.partial(_same_outputs, coarse=coarse)
    }
    if y is not None and model.compiled and not outputs_only:
        methods["evaluate"] = _same_loss
    with _left_alone(model, head, eager) as put_back:
        for method, same in methods.items():
            data = _arrays(x, y, weight, method) if arrays else {"x": _dataset(x, y, weight)}
            expected = _outcome(model, method, data)
            put_back()
            found = _outcome(head, method, on_features)
            put_back()
            if type(found) is not type(expected):
                return method
            # What neither can do is no difference: training raises it too.
            if not isinstance(found, Exception) and not same(expected, found):
                return method
    return None


def _outcome(model: keras.Model, method: str, data: dict[str, Any]) -> Any:
    """Returns outputs or the loss, or the exception that the method raises."""
    try:
        if method == "predict":
            return keras_method(model, method)(**data, verbose=0)
        logs = keras_method(model, method)(**data, verbose=0, return_dict=True)
        return float(logs["loss"])
    except Exception as error:  # noqa: BLE001  The method may be the user's, and raise anything.
        return error


def _arrays(x: Any, y: Any, weight: Any, method: str) -> dict[str, Any]:
    """A batch as the arguments that give it as arrays."""
    data = {"x": x} if method == "predict" else {"x": x, "y": y, "sample_weight": weight}
    data = keras.tree.map_structure(
        lambda one: None if one is None else one.numpy(), data, none_is_leaf=True
    )
    return {**data, "batch_size": len(keras.tree.flatten(x)[0])}


def _dataset(x: Any, y: Any, weight: Any) -> tf.data.Dataset:
    whole = (x,) if y is None else (x, y) if weight is None else (x, y, weight)
    return tf.data.Dataset.from_tensors(whole)


def _same_outputs(expected: Any, found: Any, *, coarse: bool) -> bool:
    pairs = zip(keras.tree.flatten(expected), keras.tree.flatten(found), strict=True)
    return all(
        same_array(np.asarray(one), np.asarray(other), coarse=coarse) for one, other in pairs
    )


def _same_loss(expected: float, found: float) -> bool:
    near = np.isclose(found, expected, rtol=_LOSS_TOLERANCE, atol=_SMALLEST_LOSS, equal_nan=True)
    return bool(near)


@contextlib.contextmanager
def _left_alone(model: keras.Model, head: keras.Model, eager: bool) -> Iterator[Callable[[], None]]:
    """A context in which models can be evaluated, with a function that puts back what changes."""
    layers = flatten_layers([model, head])
    state = [one for layer in layers for one in own_state(layer)]
    state += [one for layer in layers for one in seed_states(layer)]
    known = [*model.metrics_variables, *head.metrics_variables]
    values = Snapshot([*state, *known])
    put_back_random_state = random_state()

    def put_back() -> None:
        for metric in [*model.metrics, *head.metrics]:
            metric.reset_state()  # Those that are built here have no values to put back.
        values.restore()
        put_back_random_state()

    aside = functools.partial(functions_set_aside, eager=eager)
    with aside(model), aside(head):
        yield put_back
