"""Temperature scaling: how sure a trained model says it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_tl.arguments import check_model
from keras_tl.features.preparation import prepared
from keras_tl.internals.batches import batches_of, predictions
from keras_tl.internals.graphs import graph_of, graph_outputs, operation_of

_CROSSENTROPIES = (
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.SparseCategoricalCrossentropy,
)
_LEAST, _MOST, _HALVINGS = 1 / 50, 50, 40
# Below it, Keras' crossentropies do not tell probabilities apart either.
_SMALLEST = 1e-7


def scale_temperature(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
) -> float:
    """Scales the last layer of a classifier, so that it is as sure as it is right on held-out data.

    A fine-tuned model is often too sure of what it predicts. One number mends most of that: all
    logits are divided by a temperature, the one with the lowest loss on data that the model was not
    trained on. The kernel and the bias of the last `Dense` layer are divided by it, so the model
    that is saved has it. What the model predicts as most likely stays the same. With a model's
    validation data it is a last step after `fine_tune` or `fit`.

    Args:
        model: A Functional or Sequential model that ends in a `Dense` layer with a linear, softmax
            or sigmoid activation, compiled with a crossentropy.
        x: Held-out data, as `evaluate` takes it: arrays, a `tf.data.Dataset`, a `PyDataset`.
        y: Targets, if they are not in `x`.
        batch_size: Int or None. For arrays; None is Keras' default.

    Returns:
        A float: the temperature, above 1 where the model was too sure.

    Raises:
        ValueError: If the model does not end in such a layer, or is not compiled with one
            crossentropy, or if its predictions are not finite.

    Example:

    >>> keras.utils.set_random_seed(0)
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax")])
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> _ = model.layers[0].kernel.assign([[5.0, 0.0], [0.0, 5.0]])
    >>> x = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    >>> temperature = scale_temperature(model, x, np.array([0, 0, 1, 1]))
    >>> round(temperature, 2)  # Right 3 times of 4: log(3) in place of 5.
    4.55
    >>> model.predict(x[:1], verbose=0).round(2).tolist()
    [[0.75, 0.25]]

    References:

    - Guo et al., 2017, "On Calibration of Modern Neural Networks"
    """
    check_model(model, "scale_temperature")
    layer, loss = layer_and_loss(model)
    data = prepared(model, x, y, batch_size=batch_size, training=False)
    dataset, _, close = batches_of(*data, batch_size, None)
    try:
        found = [
            (keras.utils.unpack_x_y_sample_weight(batch)[1], outputs)
            for batch, outputs in predictions(model, dataset)
        ]
    finally:
        close()
    targets = np.concatenate([np.asarray(labels) for labels, _ in found])
    logits = _logits(np.concatenate([outputs for _, outputs in found]), layer.activation)
    if not np.isfinite(logits).all():
        raise ValueError(f'The predictions of the model "{model.name}" are not finite.')

    def loss_at(exponent: float) -> float:
        scaled = keras.ops.convert_to_tensor(logits / math.exp(exponent), "float32")
        return float(keras.ops.mean(loss(targets, layer.activation(scaled))))

    temperature = math.exp(_lowest(loss_at, math.log(_LEAST), math.log(_MOST)))
    for weight in layer.weights:
        weight.assign(weight / temperature)
    return temperature


def layer_and_loss(model: keras.Model) -> tuple[keras.layers.Dense, Callable[[Any, Any], Any]]:
    """Returns the layer that a classifier's logits come from, and its crossentropy.

    Args:
        model: A model.

    Raises:
        ValueError: If it does not end in such a layer, or is not compiled with such a loss.
    """
    return _last_layer(model), _loss(model)


def _last_layer(model: keras.Model) -> keras.layers.Dense:
    layer: Any = model
    while graph_of(layer) is not None:
        outputs = keras.tree.flatten(graph_outputs(layer))
        layer = operation_of(outputs[0]) if len(outputs) == 1 else None
    known = (keras.activations.linear, keras.activations.softmax, keras.activations.sigmoid)
    if type(layer) is keras.layers.Dense and layer.activation in known:
        return layer
    ends = "has no such graph" if layer in (model, None) else f"ends in {layer.name!r}"
    raise ValueError(
        "`scale_temperature` needs a Functional or Sequential model with one output, of a `Dense` "
        f'layer with a linear, softmax or sigmoid activation. "{model.name}" {ends}.'
    )


def _loss(model: keras.Model) -> Callable[[Any, Any], Any]:
    loss = keras.losses.get(model.loss) if model.compiled else None
    functions = [
        keras.losses.binary_crossentropy,
        keras.losses.categorical_crossentropy,
        keras.losses.sparse_categorical_crossentropy,
    ]
    if loss is not None and (isinstance(loss, _CROSSENTROPIES) or loss in functions):
        return loss
    received = f"the loss {model.loss!r}" if model.compiled else "a model that is not compiled"
    raise ValueError(
        "`scale_temperature` needs a model that is compiled with one crossentropy of Keras, such "
        f'as "sparse_categorical_crossentropy". Received {received}.'
    )


def _logits(outputs: np.ndarray, activation: Callable[[Any], Any]) -> np.ndarray:
    """Returns what the activation was given, but for a constant of each sample."""
    outputs = outputs.astype("float64")
    if activation is keras.activations.linear:
        return outputs
    low = np.clip(outputs, _SMALLEST, None)
    if activation is keras.activations.softmax:
        return np.log(low)
    return np.log(low) - np.log(np.clip(1 - outputs, _SMALLEST, None))


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Returns where a function with one minimum is lowest, by golden sections."""
    part = (math.sqrt(5) - 1) / 2
    left, right = high - part * (high - low), low + part * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(_HALVINGS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - part * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + part * (high - low)
            at_right = function(right)
    return (low + high) / 2
