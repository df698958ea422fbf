"""The same model without the layers and optimizers of keras_tl, to deploy."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_tl.arguments import check_model
from keras_tl.backbone.selecting import flatten_layers
from keras_tl.internals.graphs import (
    called_again,
    graph_inputs,
    graph_outputs,
    moved_graph,
    operation_of,
)
from keras_tl.internals.layers import (
    own_trainable_weights,
    set_layer_flag,
    set_weight_flag,
    sublayers,
)
from keras_tl.layers import FrozenBackbone
from keras_tl.optimizers.groups import group_optimizer


def unwrap(model: keras.Model, *, flatten: bool = False) -> keras.Model:
    """Returns a copy of a model without any class of keras_tl, to deploy or to look into.

    The file that `save` writes of it loads where keras_tl is not installed. Outputs, names and
    `trainable` flags are equal, and so is what the model is compiled with; the optimizer starts
    anew, without its state. LoRA updates of a KerasHub backbone are merged into its kernels.

    It is a copy to deploy, not to train: without `FrozenBackbone` a backbone updates its
    BatchNormalization statistics in `fit` where such layers are trainable, and its Dropout is
    active.

    Args:
        model: A built model. A Functional model of a class of its own, such as a KerasHub task, is
            returned as a `keras.Model`, and a preprocessor is not in it.
        flatten: Bool. Whether a Functional or Sequential backbone becomes part of the model's own
            graph, so that `keras.Model(plain.input, plain.get_layer("conv5").output)` reaches
            its layers, as Grad-CAM needs. Only for Functional and Sequential models. Defaults to
            `False`: the backbone is one layer, with the name of the pretrained model.

    Returns:
        A model with weights of its own, compiled if `model` is.

    Raises:
        ValueError: If it is no model or is not built, a layer cannot be made again from its
            configuration, or the model is to be flattened and is not Functional or Sequential, or
            two layers then have one name.

    Example:

    >>> pretrained = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="features")])
    >>> model = keras.Sequential([FrozenBackbone(pretrained), keras.layers.Dense(1, name="head")])
    >>> [layer.name for layer in unwrap(model, flatten=True).layers[1:]]
    ['features', 'head']
    """
    check_model(model, "unwrap")
    if not model.built:
        raise ValueError(
            f'The model "{model.name}" is not built, so it has no weights to return. Call it on a '
            "batch, or `fit` it, first."
        )
    if flatten and graph_outputs(model) is None:
        raise ValueError(
            f'`flatten=True` needs a Functional or Sequential model. Received "{model.name}" of '
            f"type {type(model).__name__}. Leave `flatten` out."
        )
    copies = _Copies(flatten)
    plain = copies.of(model)
    if graph_outputs(plain) is not None:
        plain(graph_inputs(plain))  # Keras exports some formats only of models that were called.
    copies.copy_states()
    if model.compiled:
        _compile_alike(plain, model, copies.variables)
    return plain


class _Copies:
    """Copies of layers without wrappers, one of each.

    Models that hold a wrapper are made of the copies of their layers, along their graphs; all else
    is made again from its configuration.

    Attributes:
        variables: List of pairs, a weight that was made to be trained and its copy.
    """

    def __init__(self, flatten: bool):
        self.variables: list[tuple[keras.Variable, keras.Variable]] = []
        self._flatten = flatten
        self._made: dict[int, Any] = {}
        self._graphs: dict[int, Callable[[Sequence[Any]], Any]] = {}
        self._made_anew: list[tuple[keras.Layer, keras.Layer]] = []

    def of(self, operation: Any) -> Any:
        """Returns the copy of a layer. What has no weights to copy, such as `x + y`, is itself."""
        if not isinstance(operation, keras.Layer):
            return operation
        if id(operation) not in self._made:
            self._made[id(operation)] = self._make(operation)
        return self._made[id(operation)]

    def _make(self, layer: keras.Layer) -> keras.Layer:
        if isinstance(layer, FrozenBackbone):
            return layer if self._is_inlined(layer) else self.of(layer.backbone)
        if graph_outputs(layer) is None or not _holds_wrapper(layer):
            return self._made_again(layer)
        if isinstance(layer, keras.Sequential) and not self._flatten:
            inputs = [_input_like(one) for one in layer.inputs]
            copies = [self.of(one) for one in layer.layers]
            plain = keras.Sequential([*inputs, *copies], name=layer.name)
        else:
            plain = self._made_of_copies(layer)
        set_layer_flag(plain, layer.trainable)
        return plain

    def _made_of_copies(self, model: keras.Model) -> keras.Model:
        inputs = keras.tree.map_structure(_input_like, graph_inputs(model))
        outputs = called_again(
            keras.tree.flatten(graph_inputs(model)),
            keras.tree.flatten(inputs),
            graph_outputs(model),
            operation=self.of,
            call=self._call,
        )
        return keras.Model(inputs, outputs, name=model.name)

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._is_inlined(operation):
            return operation(*args, **kwargs)
        # Copied as a whole: not every layer of a backbone of KerasHub can be made again alone.
        if id(operation) not in self._graphs:
            self._graphs[id(operation)] = moved_graph(self.of(operation.backbone))
        return self._graphs[id(operation)](keras.tree.flatten(args))

    def _is_inlined(self, operation: Any) -> bool:
        inlined = self._flatten and isinstance(operation, FrozenBackbone)
        return inlined and graph_outputs(operation.backbone) is not None

    def _made_again(self, layer: keras.Layer) -> keras.Layer:
        config = keras.saving.serialize_keras_object(layer)
        config.pop("compile_config", None)
        with _explained(layer):
            # What is in memory already is as safe as it was: a Lambda, a module of torch.
            plain = keras.saving.deserialize_keras_object(
                _map_config(config, _without_wrapper), safe_mode=False
            )
        with contextlib.suppress(ValueError):  # A layer may make others when it is first called.
            for old, new in _pairs(layer, plain):
                # Another layer of the model may be this one too, as with tied embeddings.
                self._made.setdefault(id(old), new)
        self._made_anew.append((layer, plain))
        return plain

    def copy_states(self) -> None:
        """Gives the copies the state of the layers, once all are built, some by their call."""
        for layer, plain in self._made_anew:
            with _explained(layer):
                for old, new in _pairs(layer, plain):
                    self._copy_state(old, new)

    def _copy_state(self, old: keras.Layer, new: keras.Layer) -> None:
        store: dict[str, Any] = {}
        # Writes the kernels of LoRA and of quantized layers in a form that loads.
        old.save_own_variables(store)
        # On JAX a function that is given an array may delete it: two layers must not share one.
        new.load_own_variables({name: keras.ops.copy(value) for name, value in store.items()})
        if hasattr(old, "save_assets"):  # What is no variable, such as an adapted vocabulary.
            with tempfile.TemporaryDirectory() as folder:
                old.save_assets(folder)
                new.load_assets(folder)
        set_layer_flag(new, old.trainable)
        weights = {weight.name: weight for weight in own_trainable_weights(new)}
        for weight in own_trainable_weights(old):
            if weight.name in weights:
                set_weight_flag(weights[weight.name], weight.trainable)
                self.variables.append((weight, weights[weight.name]))


@contextlib.contextmanager
def _explained(layer: keras.Layer) -> Iterator[None]:
    """Says of an error that a layer cannot be made again, and what to do."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f'The layer "{layer.name}" (a {type(layer).__name__}) cannot be made again from '
            "its configuration, for the reason in the error above. Give each layer of your own "
            "in it a `get_config` from which it is whole, and decorate its class with "
            "`keras.saving.register_keras_serializable`; so too the function of a Lambda that "
            "uses names of your module."
        ) from error


def _holds_wrapper(layer: keras.Layer) -> bool:
    return any(isinstance(one, FrozenBackbone) for one in flatten_layers(layer))


def _input_like(x: Any) -> Any:
    name = operation_of(x).name
    return keras.Input(batch_shape=x.shape, dtype=x.dtype, sparse=x.sparse, name=name)


def _pairs(old: keras.Layer, new: keras.Layer) -> Iterator[tuple[keras.Layer, keras.Layer]]:
    """Pairs of each layer and the one in its place, at every depth."""
    if isinstance(old, FrozenBackbone):
        old = old.backbone
    yield old, new
    old_parts, new_parts = sublayers(old), sublayers(new)
    if len(old_parts) != len(new_parts) and not old.variables:
        return  # A preprocessor of KerasHub makes its layers, without weights, when first called.
    for old_part, new_part in zip(old_parts, new_parts, strict=True):
        yield from _pairs(old_part, new_part)


def _map_config(config: Any, function: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns a configuration with each serialized object in it mapped, the inner ones first."""
    if isinstance(config, (list, tuple)):
        return type(config)(_map_config(one, function) for one in config)
    if not isinstance(config, dict):
        return config
    mapped = {name: _map_config(one, function) for name, one in config.items()}
    return function(mapped) if "class_name" in mapped and "config" in mapped else mapped


def _without_wrapper(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("registered_name") != "keras_tl>FrozenBackbone":
        return config
    backbone = config["config"]["backbone"]
    backbone.setdefault("build_config", config.get("build_config"))
    return backbone


def _compile_alike(
    plain: keras.Model,
    model: keras.Model,
    copied: Sequence[tuple[keras.Variable, keras.Variable]],
) -> None:
    """Compiles a model as another one is, with an optimizer of its own."""
    try:
        config = model.get_compile_config()
        if model.optimizer is not None:
            optimizer = _plain_optimizer(model.optimizer, copied)
            config["optimizer"] = keras.optimizers.serialize(optimizer)
        config = _map_config(config, _without_shift)
        before = getattr(plain, "optimizer", None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*compile\(\)` was not called")
            plain.compile_from_config(config)
        # Keras does nothing then for a class with a `compile` of its own, as KerasHub's tasks are.
        if plain.optimizer is before:
            plain.compile(**keras.saving.deserialize_keras_object(config))
            if plain.optimizer is not None:
                plain.optimizer.build(plain.trainable_variables)
    except (TypeError, ValueError) as error:
        warnings.warn(
            f'The plain model "{plain.name}" is not compiled, because what "{model.name}" is '
            f"compiled with cannot be written down: {error} Compile it to train or evaluate it.",
            stacklevel=3,
        )


def _plain_optimizer(
    optimizer: keras.Optimizer, copied: Sequence[tuple[keras.Variable, keras.Variable]]
) -> keras.Optimizer:
    """Returns an optimizer of Keras' own in place of a `GroupOptimizer`, others as they are."""
    grouped = group_optimizer(optimizer)
    if grouped is None:
        return optimizer
    if any(factor != 1.0 for _, factor in grouped.scales.values()):
        warnings.warn(
            "The plain model is compiled without learning rates by layer, which no optimizer of "
            "Keras has: each parameter group has one.",
            stacklevel=4,
        )
    *_, last = grouped.groups
    trainable = [(old, new) for old, new in copied if old.trainable]
    by_path = {
        new.path: grouped.groups[group]
        for (_, new), group in zip(
            trainable, grouped.resolve([old for old, _ in trainable]), strict=True
        )
        if group != last
    }
    by_group = keras.optimizers.OptimizerMap(grouped.groups[last], by_path)
    return keras.optimizers.MultiOptimizer(by_group, name=grouped.name)


def _without_shift(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("registered_name") != "keras_tl>ShiftedSchedule":
        return config
    return config["config"]["schedule"]
