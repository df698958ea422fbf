"""A model in two: up to its frozen backbone, or what of it is frozen, and the head after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_tl.backbone.model_backbones import BackboneOf, Backbones
from keras_tl.backbone.selecting import describe, flatten_layers
from keras_tl.errors import UncacheableError
from keras_tl.features.agreement import difference
from keras_tl.features.cuts import Cut, Halves
from keras_tl.features.unrolled import Unrolled
from keras_tl.features.worth import deepest
from keras_tl.internals.batches import predictions
from keras_tl.internals.graphs import (
    called_again,
    cut_after,
    graph_inputs,
    graph_outputs,
    operation_of,
)
from keras_tl.internals.layers import mask_of
from keras_tl.internals.models import (
    compile_arguments,
    compile_call,
    functions_set_aside,
    losses_of,
    own_methods,
    strategy_scope,
)
from keras_tl.messages import some
from keras_tl.stages import switching


class SplitModel:
    """A model split after its frozen backbone. Both parts share its layers.

    Where some of the backbone trains, it is split before that, in the middle of the backbone.

    Args:
        model: A Functional or built Sequential model, compiled or not.
        backbone: A layer, model or list of layers of the model, names of these, or a function of
            the model. None means each `FrozenBackbone`, or else `model.backbone`.
        cut: The `Cut` to split it at. None: after the backbone, or as deep as all before is frozen.
        known: Bool. Whether the model is known to do nothing with this data but call its layers, as
            another split of it has shown. Only the place to split at is left to be checked then.

    Attributes:
        head: A model from the features to the outputs, compiled as the model is.
        features: Dictionary from the features' names to their symbolic tensors: the backbone's
            outputs or those of layers in it, inputs that bypass it, and masks that they carry.
        model: The model.
        bypassing: Set of the names of those that are inputs of the model.

    Raises:
        ValueError: If there is no such backbone, or it is not frozen.
        UncacheableError: If the model has no graph to split, or other weights before the split
            train.
    """

    def __init__(
        self,
        model: keras.Model,
        backbone: BackboneOf | None,
        *,
        cut: Cut | None = None,
        known: bool = False,
    ):
        check_has_graph(model)
        inputs = graph_inputs(model)
        self.model = model
        self._known, self._agrees = known, False
        self._twin: tuple[Any, keras.Model] | None = None
        self._backbones = Backbones(model, backbone)
        tensors, second = self._halves(cut)
        named = _named(tensors)
        self.bypassing = {
            name for name, x in named.items() if any(x is one for one in keras.tree.flatten(inputs))
        }
        with strategy_scope(model):
            self._graph = keras.Model(inputs, tensors)
            self.check_constant()
            self._extractors = {
                training: self._extractor(list(named), training) for training in (True, False)
            }
            symbolic = keras.tree.map_structure(_placeholder, inputs)
            try:
                spec = self._extractors[True](symbolic)
            except Exception as error:  # Each backend has its own.
                why = f"{error} Train"
                if any(None in x.shape[1:] for x in keras.tree.flatten(inputs)):
                    why = (
                        "its layers need sizes that its inputs leave open. Give its inputs whole "
                        "shapes, or train"
                    )
                raise UncacheableError(
                    f'The shapes of the features of "{model.name}" cannot be known before it is '
                    f"called on data: {why} through the backbone."
                ) from error
            self.features = dict(spec)
            self._check_no_loss(symbolic)
            self.head = _head(model, named, spec, second)
        if cut is not None:
            self._check_order()

    def _halves(self, cut: Cut | None) -> tuple[list[Any], Callable[[list[Any]], Any]]:
        """Returns the tensors to split at, and a function from others to the model's outputs."""
        if cut is None and self._backbones.trainable_weights:
            cut = deepest(Unrolled(self.model))
        if cut is not None:
            with strategy_scope(self.model):
                halves = Halves(cut.unrolled.top, cut.before)
            return halves.tensors, halves.second
        tensors = cut_after(self.model, _operations(self.model, self._backbones))
        outputs = graph_outputs(self.model)
        return tensors, lambda values: called_again(tensors, values, outputs)

    def _check_order(self) -> None:
        """Raises an UncacheableError if the head has its weights in another order than the model.

        By which the optimizer knows them on JAX, and sums gradients to clip them.
        """
        ours = [id(weight) for weight in self.head.trainable_variables]
        if ours != [id(weight) for weight in self.model.trainable_variables]:
            raise UncacheableError(
                f'The layers of "{self.model.name}" that train are not all after the place to '
                "split it at, or come in another order there. Train through the backbone."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Tuple of strings. The features' names."""
        return tuple(self.features)

    def extractor(self, training: bool) -> keras.Model:
        """Returns a model from the inputs to a dictionary of the features.

        Args:
            training: Bool. Whether its layers are called as in `fit`, or as in `evaluate`.
        """
        return self._extractors[training]

    @property
    def layers(self) -> list[keras.Layer]:
        """List of the layers up to the split, at every depth."""
        return flatten_layers(self._graph)

    @property
    def graph(self) -> keras.Model:
        """The model from the inputs to the list of features without masks."""
        return self._graph

    def check_constant(self) -> None:
        """Raises a ValueError if weights up to the split train."""
        training = [weight.path for weight in self._graph.trainable_weights]
        if not training:
            return
        in_backbone = {weight.path for weight in self._backbones.trainable_weights}
        if in_backbone.intersection(training):
            raise ValueError(
                f"The backbone {self._backbones.names} is not frozen ({some(training)} "
                "train), so its outputs change from step to step. Freeze it and compile the model "
                "again."
            )
        raise UncacheableError(
            f"{some(training)} come before the outputs of the backbone "
            f"{self._backbones.names} and train, so what is recorded would not stay right. Freeze "
            "their layers and compile the model again, or train through the backbone."
        )

    def check_agrees(self, batch: Any, features: dict[str, Any] | None, *, arrays: bool) -> None:
        """Raises an UncacheableError if the model gives something else for a batch than its head.

        Args:
            batch: A batch of the data, as `fit` takes it.
            features: Dictionary of its features as they are recorded. Where these are not those of
                `evaluate`, or None, those are extracted.
            arrays: Bool. Whether the data is arrays.
        """
        if self._known and self._agrees:
            return
        differs: str | None = "predict"
        if features is not None:
            differs = self._differs(batch, features, arrays=arrays)
        if differs is not None:
            # Compiled, the extractor may round another way than the model does in the check.
            with functions_set_aside(self._extractors[False], eager=True):
                ((_, features),) = predictions(self._extractors[False], [batch])
            differs = self._differs(batch, features, arrays=arrays, eager=True)
        if differs is not None:
            raise UncacheableError(
                f'`{differs}` of the model "{self.model.name}" (a {type(self.model).__name__}) '
                "gives something else for the first batch of the data than its layers do: it does "
                "more than to call them, such as preparing the data first, which would be left "
                "out of the record. Train through the backbone."
            )
        self._agrees = True

    def _differs(self, batch: Any, features: dict[str, Any], **settings: bool) -> str | None:
        given = features if len(features) > 1 else next(iter(features.values()))
        return difference(
            self.model, self._twin_of_head(), batch, given, outputs_only=self._known, **settings
        )

    def _twin_of_head(self) -> keras.Model:
        """Returns a model that does what the head does, made once for each `compile` of the model.

        Not the head itself, whose metrics would be built then: `fit` builds them by a call of the
        model, for which torch draws random numbers.
        """
        compiled = compile_call(self.model) if self.model.compiled else None
        if self._twin is None or self._twin[0] is not compiled:
            with strategy_scope(self.head):
                twin = keras.Model(self.head.input, self.head.output, name=self.head.name)
                if compiled is not None:
                    twin.compile(**compile_arguments(self.model))
            self._twin = (compiled, twin)
        return self._twin[1]

    def _check_no_loss(self, inputs: Any) -> None:
        """Raises an UncacheableError if layers up to the split add to the loss."""
        if losses_of(self._extractors[True], inputs):
            raise UncacheableError(
                f"Layers up to the outputs of the backbone {self._backbones.names} add to the loss "
                "(`activity_regularizer` or `add_loss`), which training on features would leave "
                "out. Train through the backbone."
            )

    def _extractor(self, names: list[str], training: bool) -> Extractor:
        extractor = Extractor(self._graph, names, training)
        if self.model.compiled:
            # The arithmetic of `fit`, of which a compiler may round another way.
            extractor.compile(
                jit_compile=self.model.jit_compile, run_eagerly=self.model.run_eagerly
            )
        return extractor


class Extractor(keras.Model):
    """Calls a model in a mode of its own, and returns its outputs and their masks by name.

    Args:
        graph: A model with a list of outputs.
        names: Names for them.
        training: Bool. Whether it is called as `fit` does it. A frozen backbone is in inference
            mode all the same; layers that are random are not.
    """

    def __init__(self, graph: keras.Model, names: Sequence[str], training: bool, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.graph = graph
        self.names = list(names)
        self.training = training

    def call(self, inputs: Any) -> dict[str, Any]:
        outputs = keras.tree.flatten(self.graph(inputs, training=self.training))
        named = dict(zip(self.names, outputs, strict=True))
        masks = {_mask_name(name): mask_of(x) for name, x in named.items()}
        return {**named, **{name: mask for name, mask in masks.items() if mask is not None}}


@keras.saving.register_keras_serializable(package="keras_tl")
class WithMask(keras.layers.Layer):
    """Returns the first of two tensors, which then carries the second as its mask."""

    def call(self, inputs: Any) -> Any:
        return inputs[0]

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return inputs[1]

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor(inputs[0].shape, inputs[0].dtype)


def check_has_graph(model: keras.Model) -> None:
    """Raises an UncacheableError if a model cannot be split, wherever that would be."""
    if graph_outputs(model) is None:
        raise UncacheableError(
            f'The model "{model.name}" (a {type(model).__name__}) cannot be split: only a '
            "Functional or a built Sequential model has a graph in which the backbone's "
            "outputs can be found. Write it as one, or train through the backbone."
        )
    own = own_methods(model)
    if own:
        raise UncacheableError(
            f'The model "{model.name}" (a {type(model).__name__}) has its own {some(own)}, '
            "which its head does not have: what that does with the data, such as preparing "
            "it, would be left out of the record. Train through the backbone."
        )


def _head(
    model: keras.Model,
    named: dict[str, Any],
    spec: dict[str, Any],
    second: Callable[[list[Any]], Any],
) -> keras.Model:
    inputs = {
        name: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name) for name, x in spec.items()
    }
    masked = []
    for name in named:
        mask = inputs.get(_mask_name(name))
        masked.append(inputs[name] if mask is None else WithMask()([inputs[name], mask]))
    structure = next(iter(inputs.values())) if len(inputs) == 1 else inputs
    head = keras.Model(structure, second(masked), name=f"{model.name}_head")
    if model.compiled:
        recompile_head(head, model)
    return head


def recompile_head(head: keras.Model, model: keras.Model) -> None:
    """Compiles a head as its model is compiled now, with the same optimizer."""
    switching.build_optimizer(model)
    head.compile(**compile_arguments(model))


def _operations(model: keras.Model, backbones: Backbones) -> list[keras.Layer]:
    """The layers of a model's graph that the backbones are, are in, or are made of.

    Not those that share a part with one, as the head of a masked language model does.
    """
    whole = [*backbones.wrapped, *backbones.plain]
    wanted, parts = {id(one) for one in whole}, {id(one) for one in flatten_layers(whole)}
    found = [
        layer
        for layer in model.layers
        if (id(layer) in parts or any(id(one) in wanted for one in flatten_layers(layer)))
        and not isinstance(layer, keras.layers.InputLayer)
    ]
    if not found:
        raise ValueError(
            f"The backbone {describe(backbones.plain)} is not called in the graph of the model "
            f'"{model.name}". Its layers: {", ".join(layer.name for layer in model.layers)}.'
        )
    return found


def _named(tensors: Sequence[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for x in tensors:
        name = base = operation_of(x).name
        count = 1
        while name in named:
            name, count = f"{base}_{count}", count + 1
        named[name] = x
    return named


def _mask_name(name: str) -> str:
    return f"{name}_mask"


def _placeholder(x: Any) -> Any:
    return keras.KerasTensor(x.shape, x.dtype)
