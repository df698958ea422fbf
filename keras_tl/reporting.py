"""What of a model trains and what is frozen, as a table."""

from __future__ import annotations

import dataclasses

import keras

from keras_tl.backbone.freezing import count_params
from keras_tl.backbone.selecting import batchnorm_layers, flatten_layers
from keras_tl.guard import diagnosis
from keras_tl.internals.layers import sublayers
from keras_tl.internals.optimizers import optimizer_weights
from keras_tl.internals.values import itemsize
from keras_tl.layers import FrozenBackbone
from keras_tl.messages import format_table, html_table

_HEADER = ("layer", "trainable", "frozen", "dtype", "bytes", "inference mode", "compiled")
_NUMBERS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer of a `TrainableReport`, with all that is in it.

    Attributes:
        name: String. The layer's name; nested layers are named `outer/inner`.
        trainable: Int. How many parameters train.
        frozen: Int. How many do not, moving statistics included.
        dtypes: Tuple of strings. The dtypes of the weights.
        nbytes: Int. The bytes that the weights take.
        inference_mode: `"all"`: the layer runs in inference mode in `fit`; `"batchnorm"`: all
            BatchNormalization layers in it do; or `"none"`.
        compiled: Bool or None. Whether the optimizer trains those of the weights that are
            trainable; None for a model that is not compiled or has not trained yet.
    """

    name: str
    trainable: int
    frozen: int
    dtypes: tuple[str, ...]
    nbytes: int
    inference_mode: str
    compiled: bool | None


@dataclasses.dataclass(frozen=True, repr=False)
class TrainableReport:
    """What of a model trains. It prints, and shows in a notebook, as a table.

    See `trainable_report`.

    Attributes:
        layers: Tuple of `LayerReport`, one for each layer, with its `name`; how many parameters are
            `trainable` and `frozen`; the `dtypes` and `nbytes` of its weights; its
            `inference_mode`, which is `"all"`, `"batchnorm"` or `"none"`; and `compiled`, whether
            the optimizer trains what is trainable in it.
        total: `LayerReport` of the whole model, in which shared weights count once.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> report = trainable_report(model)
    >>> report.total.trainable
    3
    """

    layers: tuple[LayerReport, ...]
    total: LayerReport

    def __repr__(self) -> str:
        return "\n".join(format_table(_HEADER, self._rows(), right=_NUMBERS))

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), right=_NUMBERS)

    def _rows(self) -> list[tuple[str, ...]]:
        agrees = {True: "agrees", False: "STALE", None: "not yet"}
        modes = {"all": "all", "batchnorm": "BatchNormalization", "none": "no"}
        return [
            (
                row.name,
                f"{row.trainable:,}",
                f"{row.frozen:,}",
                ", ".join(row.dtypes),
                f"{row.nbytes:,}",
                modes[row.inference_mode],
                agrees[row.compiled],
            )
            for row in (*self.layers, self.total)
        ]


def trainable_report(model: keras.Model, *, expand_nested: bool = False) -> TrainableReport:
    """Reports what of a model trains, layer by layer.

    Args:
        model: A built model, compiled or not.
        expand_nested: Bool. Whether layers in nested models are listed, rather than the models.
            Defaults to `False`.

    Returns:
        A `TrainableReport`: print it for a table, or read its `layers`, a tuple of `LayerReport`,
        and its `total`.

    Example:

    >>> layers = [keras.layers.Dense(3, name="body"), keras.layers.Dense(1, name="head")]
    >>> model = keras.Sequential([keras.Input((2,)), *layers], name="model")
    >>> model.layers[0].trainable = False
    >>> print(trainable_report(model))
    layer  trainable  frozen  dtype    bytes  inference mode  compiled
    body           0       9  float32     36  no              not yet
    head           4       0  float32     16  no              not yet
    model          4       9  float32     52  no              not yet
    """
    mismatch = diagnosis.stale_compile(model)
    stale = {id(weight) for weight in mismatch.still_training + mismatch.not_training}
    trained_before = optimizer_weights(getattr(model, "optimizer", None)) is not None
    inference = _in_inference_mode(model)

    def report(name: str, layer: keras.Layer) -> LayerReport:
        weights = list({id(weight): weight for weight in layer.weights}.values())
        trainable = count_params(weight for weight in weights if id(weight) in training)
        return LayerReport(
            name=name,
            trainable=trainable,
            frozen=count_params(weights) - trainable,
            dtypes=tuple(sorted({weight.dtype for weight in weights})),
            nbytes=sum(count_params([weight]) * itemsize(weight.dtype) for weight in weights),
            inference_mode=_mode(layer, inference),
            compiled=not any(id(w) in stale for w in weights) if trained_before else None,
        )

    training = {id(weight) for weight in model.trainable_weights}
    rows = [report(name, layer) for name, layer in _rows(model, expand_nested)]
    return TrainableReport(tuple(rows), report(model.name, model))


def _rows(layer: keras.Layer, expand: bool, prefix: str = "") -> list[tuple[str, keras.Layer]]:
    rows = []
    for sublayer in sublayers(layer):
        if expand and isinstance(sublayer, (keras.Model, FrozenBackbone)):
            rows += _rows(sublayer, expand, f"{prefix}{sublayer.name}/")
        elif sublayer.weights:
            rows.append((prefix + sublayer.name, sublayer))
    return rows


def _in_inference_mode(model: keras.Model) -> set[int]:
    """The identities of the layers that run in inference mode in `fit`."""
    layers = [layer for layer in batchnorm_layers(model) if not layer.trainable]
    for wrapper in flatten_layers(model):
        if isinstance(wrapper, FrozenBackbone):
            every = wrapper.inference_mode == "always" or not wrapper.trainable_weights
            layers += flatten_layers(wrapper) if every else batchnorm_layers(wrapper)
    return {id(layer) for layer in layers}


def _mode(layer: keras.Layer, inference: set[int]) -> str:
    if id(layer) in inference:
        return "all"
    statistics = batchnorm_layers(layer)
    held = bool(statistics) and all(id(norm) in inference for norm in statistics)
    return "batchnorm" if held else "none"
