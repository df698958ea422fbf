"""The graph of a model with the graphs of the models in it, as one row of steps."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_tl.backbone.selecting import batchnorm_layers, flatten_layers
from keras_tl.internals.graphs import GraphCall, calls_in_graph, graph_inputs, graph_outputs
from keras_tl.internals.layers import seed_states
from keras_tl.internals.models import own_methods
from keras_tl.layers import FrozenBackbone


@dataclasses.dataclass(eq=False)
class Step:
    """A call of a layer, or of an operation, that is not split further.

    Attributes:
        call: The `GraphCall`.
        inputs: List of the tensors that it takes, each as it was first returned.
        outputs: List of the tensors that it returns.
        around: List of the tensors that the models around it take.
        inference: Bool. Whether a `FrozenBackbone` around it calls it in inference mode.
    """

    call: GraphCall
    inputs: list[Any]
    outputs: list[Any]
    around: list[Any]
    inference: bool


@dataclasses.dataclass(eq=False)
class Call:
    """A call in a graph: a step, or a model whose own graph can be split.

    Attributes:
        call: The `GraphCall`.
        steps: List of its steps: itself, or those of the model.
        inner: The `Level` of the model, or None.
    """

    call: GraphCall
    steps: list[Step]
    inner: Level | None


@dataclasses.dataclass(eq=False)
class Level:
    """The graph of one model.

    Attributes:
        model: The Functional or Sequential model.
        calls: List of `Call`.
    """

    model: keras.Model
    calls: list[Call]


class Unrolled:
    """A model as a row of steps, through nested models and `FrozenBackbone`s.

    Args:
        model: A Functional or built Sequential model.
        moving: Weights that change although they do not train.

    Attributes:
        top: The `Level` of the model.
        steps: List of `Step`, each after those whose outputs it takes.
        inputs: List of the model's symbolic inputs.
        outputs: List of its symbolic outputs, each as a step returns it.
    """

    def __init__(self, model: keras.Model, *, moving: Iterable[keras.Variable] = ()):
        self.steps: list[Step] = []
        self.inputs = keras.tree.flatten(graph_inputs(model))
        self._first = {id(x): x for x in self.inputs}
        self._seen: set[int] = set(self._first)
        self._changing = {id(weight) for weight in [*model.trainable_weights, *moving]}
        self.top = self._level(model, [], inference=False)
        self.outputs = [self._first[id(x)] for x in keras.tree.flatten(graph_outputs(model))]

    def _level(self, model: keras.Model, around: list[Any], *, inference: bool) -> Level:
        calls = calls_in_graph(model)
        self._seen.update(id(x) for call in calls for x in call.outputs)
        return Level(model, [self._call(call, around, inference) for call in calls])

    def _call(self, call: GraphCall, around: list[Any], inference: bool) -> Call:
        inputs = [self._first[id(x)] for x in call.inputs]
        inner = self._inner_model(call)
        if inner is None:
            step = Step(call, inputs, call.outputs, around, inference)
            self.steps.append(step)
            self._first.update((id(x), x) for x in call.outputs)
            return Call(call, [step], None)
        start = len(self.steps)
        for x, given in zip(keras.tree.flatten(graph_inputs(inner)), inputs, strict=True):
            self._seen.add(id(x))
            self._first[id(x)] = given
        level = self._level(
            inner,
            [*around, *inputs],
            inference=inference or calls_in_inference(call.operation),
        )
        for x, found in zip(call.outputs, keras.tree.flatten(graph_outputs(inner)), strict=True):
            self._first[id(x)] = self._first[id(found)]
        return Call(call, self.steps[start:], level)

    def _inner_model(self, call: GraphCall) -> keras.Model | None:
        """Returns the model whose graph a call runs, if it does that and nothing else."""
        inner = graph_in(call.operation)
        if inner is None or not _takes(inner, call):
            return None
        # The graphs of two models may share tensors, which could not be told apart here. A model on
        # the inputs of the one in it, as KerasHub's tasks are, gives it the tensors that it shares.
        pairs = zip(keras.tree.flatten(graph_inputs(inner)), call.inputs, strict=True)
        own = [x for x, given in pairs if self._first[id(given)] is not x]
        own += [x for one in calls_in_graph(inner) for x in one.outputs]
        return None if any(id(x) in self._seen for x in own) else inner

    def is_constant(self, step: Step, *, random: bool) -> bool:
        """Whether a step returns the same for the same inputs as long as the flags are as now.

        Args:
            step: The `Step`.
            random: Bool. Whether it may be random.
        """
        layer = step.call.operation
        if not isinstance(layer, keras.Layer):
            return True
        if any(id(weight) in self._changing for weight in layer.weights):
            return False
        if step.inference:
            return True
        if any(one.trainable for one in batchnorm_layers(layer)):
            return False  # Its statistics move, whether or not it has weights to train.
        return random or not any(seed_states(one) for one in flatten_layers(layer))

    def shapes(self, inputs: Any) -> dict[int, tuple[int | None, ...]]:
        """Returns the shape of each tensor by its id, without the batch.

        Args:
            inputs: Shapes and dtypes of the data, for dimensions that the model leaves open.
        """
        known = {id(x): tuple(x.shape)[1:] for x in self.inputs}
        known.update({id(x): tuple(x.shape)[1:] for step in self.steps for x in step.outputs})
        if any(None in shape for shape in known.values()):
            # What cannot be called on shapes alone has none that are known.
            with contextlib.suppress(Exception):
                known.update(self._shapes_on(keras.tree.flatten(inputs)))
        return known

    def _shapes_on(self, specs: list[Any]) -> Iterator[tuple[int, tuple[int | None, ...]]]:
        found = {
            id(x): keras.KerasTensor((None, *spec.shape[1:]), x.dtype)
            for x, spec in zip(self.inputs, specs, strict=True)
        }
        yield from ((key, tuple(one.shape)[1:]) for key, one in found.items())
        for step in self.steps:
            given = {id(x): found[id(y)] for x, y in zip(step.call.inputs, step.inputs)}
            args, kwargs = step.call.on(given)
            returned = step.call.operation.compute_output_spec(*args, **kwargs)
            for x, one in zip(step.outputs, keras.tree.flatten(returned), strict=True):
                found[id(x)] = one
                yield id(x), tuple(one.shape)[1:]


def graph_in(layer: Any) -> keras.Model | None:
    """Returns the model whose graph a layer runs when it is called, None if it does otherwise."""
    if not isinstance(layer, keras.Layer):
        return None
    wraps = isinstance(layer, FrozenBackbone)
    if wraps and type(layer) is not FrozenBackbone:
        return None  # A class of one's own may do more.
    inner = layer.backbone if wraps else layer
    if graph_outputs(inner) is None or {"call", "__call__"} & set(own_methods(inner)):
        return None
    return inner if inner.activity_regularizer is None else None


def calls_in_inference(layer: keras.Layer) -> bool:
    """Whether a layer calls all that is in it in inference mode, with the flags as they are."""
    if not isinstance(layer, FrozenBackbone):
        return False
    return layer.inference_mode == "always" or not any(
        weight.trainable for weight in layer.backbone.weights
    )


def _takes(model: keras.Model, call: GraphCall) -> bool:
    """Whether a call has nothing but the inputs of a model as arguments."""
    # Of several inputs Keras notes the mask of each, also where none has one.
    given = {
        name
        for name, value in call.settings.items()
        if any(one is not None for one in keras.tree.flatten(value))
    }
    if len(call.unnamed) != 1 or given - {"training"}:
        return False
    inputs, unnamed = graph_inputs(model), call.unnamed[0]
    if len(keras.tree.flatten(inputs)) == len(keras.tree.flatten(unnamed)) == 1:
        return True
    try:
        keras.tree.assert_same_structure(inputs, unnamed)
    except (ValueError, TypeError):
        return False
    return True


def multiplications(step: Step, shapes: dict[int, tuple[int | None, ...]]) -> float:
    """Returns about how many multiplications a step takes for one sample.

    Each number in a kernel is used once at every place in the output; and what has no kernel takes
    about one operation for every number that it returns.
    """
    shape = shapes[id(step.outputs[0])] if step.outputs else ()
    layer = step.call.operation
    count = float(size_of(shape))
    if isinstance(layer, keras.Layer) and not isinstance(layer, keras.layers.Embedding):
        kernels = sum(math.prod(weight.shape) for weight in layer.weights if len(weight.shape) > 1)
        first = getattr(layer, "data_format", None) == "channels_first"
        count += kernels * size_of(shape[1:] if first else shape[:-1])
    return count


def size_of(shape: tuple[int | None, ...]) -> int:
    """Returns how many numbers a tensor of that shape has, open dimensions counted as 1."""
    return math.prod(n or 1 for n in shape)
