"""Temperature scaling: how sure a trained model says it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_tl.arguments import check_model
from keras_tl.features.preparation import prepared
from keras_tl.internals.batches import batches_of, predictions
from keras_tl.internals.evaluating import without_activation
from keras_tl.internals.graphs import graph_of, graph_outputs, operation_of
from keras_tl.internals.values import on_host

_CROSSENTROPIES = (
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.SparseCategoricalCrossentropy,
)
# By function, the class that takes targets of another shape too, as `fit` does.
_CLASSES = {
    keras.losses.binary_crossentropy: keras.losses.BinaryCrossentropy,
    keras.losses.categorical_crossentropy: keras.losses.CategoricalCrossentropy,
    keras.losses.sparse_categorical_crossentropy: keras.losses.SparseCategoricalCrossentropy,
}
_LEAST, _MOST, _HALVINGS = 1 / 50, 50, 40


def scale_temperature(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    batch_size: int | None = None,
    steps: int | None = None,
) -> float:
    """Scales the last layer of a classifier, so that it is as sure as it is right on held-out data.

    A fine-tuned model is often too sure of what it predicts. One number mends most of that: all
    logits are divided by a temperature, the one with the lowest loss on data that the model was not
    trained on. The kernel and the bias of the last `Dense` layer are divided by it, so the model
    that is saved has it. What the model predicts as most likely stays the same. With a model's
    validation data it is a last step after `fine_tune` or `fit`. Data of which the model predicts
    all right tells of no temperature, nor does that of which it knows nothing.

    Args:
        model: A Functional or Sequential model that ends in a `Dense` layer with a linear, softmax
            or sigmoid activation, compiled with a crossentropy.
        x: Held-out data, as `evaluate` takes it: arrays, a `tf.data.Dataset`, a `PyDataset`.
        y: Targets, if they are not in `x`.
        sample_weight: Weights, if they are not in `x`.
        batch_size: Int or None. For arrays; None is Keras' default.
        steps: Int or None. How many batches are used, of data that has no end.

    Returns:
        A float: the temperature, above 1 where the model was too sure. 1.0, with a warning and
        nothing changed, where none from 1/50 to 50 has the lowest loss.

    Raises:
        ValueError: If the model does not end in such a layer, or is not compiled with one
            crossentropy, or if its predictions are not finite; if to scale the layer does more than
            to divide the logits, as where it is called twice.

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
    data = prepared(model, x, y, sample_weight, batch_size=batch_size, training=False)
    temperature = scaled(model, *data, batch_size=batch_size, steps=steps)
    if temperature is not None:
        return temperature
    warnings.warn(
        f'`scale_temperature` leaves "{model.name}" as it is: no temperature from {_LEAST} to '
        f"{_MOST} has the lowest loss on this data. Either all of it is predicted right, or what "
        "is predicted has nothing to do with it. Pass more data that the model was not trained on.",
        stacklevel=2,
    )
    return 1.0


def scaled(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
) -> float | None:
    """Does as `scale_temperature`, and returns None in place of warning.

    The arguments are those of `scale_temperature`, but for data that is prepared already.
    """
    layer, loss = layer_and_loss(model)
    activation = layer.activation
    dataset, _, close = batches_of(x, y, sample_weight, batch_size, steps)
    # Around all of it, for each time the model is compiled anew.
    with without_activation(model, layer):
        found, first = [], None
        try:
            for batch, outputs in predictions(model, dataset):
                first = batch if first is None else first  # All inputs may not fit in memory.
                found.append(_Batch.of(batch, outputs))
        finally:
            close()
        if not all(np.isfinite(one.logits).all() for one in found):
            raise ValueError(f'The predictions of the model "{model.name}" are not finite.')
        exponent = _best_exponent(found, lambda y, z, weights: loss(y, activation(z), weights))
        if exponent is None:
            return None
        _divide(model, layer, math.exp(exponent), first, found[0].logits)
    return math.exp(exponent)


def _best_exponent(found: list[_Batch], loss: Callable[..., Any]) -> float | None:
    """Returns the logarithm of the temperature with the lowest loss, None if none has it."""
    logits = np.concatenate([one.logits for one in found])
    targets = np.concatenate([one.targets for one in found])
    weights = None if found[0].weights is None else np.concatenate([one.weights for one in found])

    def loss_at(exponent: float) -> float:
        tensor = keras.ops.convert_to_tensor(logits / math.exp(exponent), "float32")
        return float(keras.ops.mean(loss(targets, tensor, weights)))

    ends = math.log(_LEAST), math.log(_MOST)
    exponent = _lowest(loss_at, *ends)
    return None if min(map(loss_at, ends)) <= loss_at(exponent) else exponent


class _Batch(NamedTuple):
    """The targets of a batch of held-out data, and what the last layer makes of it."""

    targets: np.ndarray
    weights: np.ndarray | None
    logits: np.ndarray

    @classmethod
    def of(cls, batch: Any, outputs: Any) -> _Batch:
        _, y, weights = keras.utils.unpack_x_y_sample_weight(batch)
        targets, *more = keras.tree.flatten(y)
        if more:
            raise ValueError(f"A model with one output has one target. Received {1 + len(more)}.")
        weight = None if weights is None else np.asarray(keras.tree.flatten(weights)[0])
        return cls(np.asarray(targets), weight, _logits_of(outputs))


def _divide(
    model: keras.Model,
    layer: keras.layers.Dense,
    temperature: float,
    batch: Any,
    logits: np.ndarray,
) -> None:
    """Divides a layer's logits, and checks on a batch, of which they are, that it does so."""
    # LoRA adds the product of two matrices.
    second = getattr(layer, "lora_kernel_a", None)
    weights = [weight for weight in layer.weights if weight is not second]
    before = [on_host(weight) for weight in weights]
    # By two, which rounds nothing.
    _assign(weights, before, 2.0)
    now = 2.0 * _logits(model, batch)
    _assign(weights, before, 1.0)
    same = np.allclose(now, logits, rtol=0, atol=1e-3 * abs(logits).max())
    # What is random at all tells nothing here.
    if not same and np.array_equal(_logits(model, batch), logits):
        raise ValueError(
            f"To scale the weights of {layer.name!r} changes more than how sure the model "
            f'"{model.name}" is, as where a layer is called twice. The model is as it was.'
        )
    _assign(weights, before, temperature)


def _assign(weights: list[keras.Variable], values: list[np.ndarray], divisor: float) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.assign(value / divisor)


def _logits(model: keras.Model, batch: Any) -> np.ndarray:
    ((_, outputs),) = predictions(model, [batch])
    return _logits_of(outputs)


def _logits_of(outputs: Any) -> np.ndarray:
    return np.asarray(keras.tree.flatten(outputs)[0]).astype("float64")


def layer_and_loss(model: keras.Model) -> tuple[keras.layers.Dense, Callable[..., Any]]:
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
        if layer.quantization_mode is None:
            return layer
        raise ValueError(
            f"`scale_temperature` cannot divide the weights of {layer.name!r}, which is quantized: "
            f"{layer.quantization_mode!r}. Scale the model first, then quantize it."
        )
    ends = "has no such graph" if layer in (model, None) else f"ends in {layer.name!r}"
    raise ValueError(
        "`scale_temperature` needs a Functional or Sequential model with one output, of a `Dense` "
        f'layer with a linear, softmax or sigmoid activation. "{model.name}" {ends}.'
    )


def _loss(model: keras.Model) -> Callable[..., Any]:
    given = model.loss if model.compiled else None
    several = given.values() if isinstance(given, Mapping) else given
    if isinstance(several, Collection) and not isinstance(several, str):
        given = next(iter(several)) if len(several) == 1 else None
    loss = None if given is None else keras.losses.get(given)
    loss = _CLASSES[loss]() if loss in _CLASSES else loss
    if isinstance(loss, _CROSSENTROPIES):
        return loss
    received = f"the loss {model.loss!r}" if model.compiled else "a model that is not compiled"
    raise ValueError(
        "`scale_temperature` needs a model that is compiled with one crossentropy of Keras, such "
        f'as "sparse_categorical_crossentropy". Received {received}.'
    )


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
