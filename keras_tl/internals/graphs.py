"""The graph of a Functional or Sequential model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.imported import Function
from keras_tl.internals.values import itemsize


@checked(SINCE_3_15)
def graph_of(layer: keras.Layer) -> Any:
    """Returns the graph of a Functional or built Sequential model, None of anything else."""
    graph = layer._functional if isinstance(layer, keras.Sequential) else layer
    return graph if isinstance(graph, Function) else None


@checked(SINCE_3_15)
def _nodes_of(layer: keras.Layer) -> dict[int, list[Any]]:
    """Returns the calls in a layer's graph by their distance from the outputs."""
    graph = graph_of(layer)
    return {} if graph is None else graph._nodes_by_depth


@checked(SINCE_3_15)
def nodes_in_graph(layer: keras.Layer) -> list[Any]:
    """Returns the calls in a layer's graph in the order in which Keras makes them, less inputs."""
    depths = _nodes_of(layer)
    nodes = (node for depth in sorted(depths, reverse=True) for node in depths[depth])
    return [node for node in nodes if not node.is_input]


def sizes_of(graph: keras.Layer) -> tuple[list[float], list[float]]:
    """Returns how many bytes each call in a graph makes of a sample, and those that are carried.

    Of a layer that is made of layers, it is as if each returned as much as it does. An unknown
    dimension counts as one.

    Returns:
        A pair of lists, for `cheapest_cuts`.
    """
    calls = nodes_in_graph(graph)
    last = {id(x): place for place, call in enumerate(calls) for x in call.input_tensors}
    last |= {id(x): len(calls) for x in graph.outputs}
    carried = [0.0] * len(calls)
    returned = []
    for place, call in enumerate(calls):
        for x in call.outputs:
            for later in range(place + 1, min(last.get(id(x), place) + 1, len(calls))):
                carried[later] += _size(x)
        returned.append(sum(map(_size, call.outputs)) * _layers_in(call.operation))
    return returned, carried


def _size(x: Any) -> float:
    return itemsize(x.dtype) * math.prod(dimension or 1 for dimension in x.shape[1:])


@checked(SINCE_3_15)
def _layers_in(operation: Any) -> int:
    """How many layers an operation is made of that are made of none."""
    layers = operation._flatten_layers() if isinstance(operation, keras.Layer) else []
    return max(1, sum(not one._layers for one in layers))


@checked(SINCE_3_15)
def outputs_in_graph(model: keras.Model, layer: keras.Layer) -> list[Any]:
    """Returns what the layer returns each time the graph of a Functional or Sequential calls it.

    `layer.output` is that of its first call, which may be in the graph of another model.
    """
    nodes = [node for depth in _nodes_of(model).values() for node in depth]
    calls = [node.outputs for node in nodes if node.operation is layer]
    return [outputs[0] if len(outputs) == 1 else outputs for outputs in calls]


@checked(SINCE_3_15)
def called_in_inference_mode(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the layers that the graph of a model always calls with `training=False`.

    The layer may be any; only Functional and Sequential models have a graph.
    """
    modes: dict[keras.Layer, list[Any]] = {}
    for node in (node for depth in _nodes_of(layer).values() for node in depth):
        if isinstance(node.operation, keras.Layer):
            training = node.arguments.kwargs.get("training")
            modes.setdefault(node.operation, []).append(training)
    return [layer for layer, given in modes.items() if all(mode is False for mode in given)]


@checked(SINCE_3_15)
def operations_in_graph(model: keras.Model) -> list[Any] | None:
    """Returns the layers of a model's graph, and what else it calls, from input to output.

    None if the model is no Functional or Sequential model, and so has no graph.
    """
    graph = graph_of(model)
    return None if graph is None else list(graph._operations)


@dataclasses.dataclass(frozen=True, eq=False)
class GraphCall:
    """A call in the graph of a model.

    Attributes:
        operation: The layer, or what else is called.
        inputs: List of the symbolic tensors among its arguments.
        outputs: List of those that it returns.
        arguments: What Keras keeps of the arguments.
    """

    operation: Any
    inputs: list[Any]
    outputs: list[Any]
    arguments: Any

    @property
    def settings(self) -> dict[str, Any]:
        """Dictionary of the arguments by name, but for those that are None, as a missing mask."""
        return {key: value for key, value in self.arguments.kwargs.items() if value is not None}

    @property
    def unnamed(self) -> tuple[Any, ...]:
        """Tuple of the arguments that were passed by position."""
        return tuple(self.arguments.args)

    def on(self, tensors: Mapping[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns its arguments with others in place of tensors, by the ids of these."""
        args, kwargs = self.arguments.fill_in(tensors)
        return args, kwargs


@checked(SINCE_3_15)
def calls_in_graph(layer: keras.Layer) -> list[GraphCall]:
    """Returns the calls in the graph of a model, each after those whose outputs it takes.

    None of them if the layer is no Functional or built Sequential model.
    """
    return [
        GraphCall(node.operation, node.input_tensors, node.outputs, node.arguments)
        for node in nodes_in_graph(layer)
    ]


@checked(SINCE_3_15)
def bottlenecks(layer: keras.Layer) -> list[Any] | None:
    """Returns the operations of a model's graph through whose output alone everything passes.

    Not only layers: `x[:, 0]` and `x + y` are none. What no weights have gone into, such as a mask
    that each block reads, may pass by. None if the layer is no Functional or Sequential model, and
    so has no graph.
    """
    depths = _nodes_of(layer)
    if not depths:
        return None
    weighted = _after_weights(depths)
    depth_of = {id(node): depth for depth, nodes in depths.items() for node in nodes}
    spanned: set[int] = set()
    for depth, nodes in depths.items():
        for parent in (parent for node in nodes for parent in node.parent_nodes):
            if id(parent) in weighted:
                spanned.update(range(depth + 1, depth_of.get(id(parent), depth)))
    alone = {
        depth: [node.operation for node in nodes if id(node) in weighted]
        for depth, nodes in depths.items()
        if depth not in spanned
    }
    return [operations[0] for operations in alone.values() if len(operations) == 1]


@checked(SINCE_3_15)
def _after_weights(depths: dict[int, list[Any]]) -> set[int]:
    """The calls whose outputs weights have gone into, by their ids."""
    weighted: set[int] = set()
    for depth in sorted(depths, reverse=True):
        for node in depths[depth]:
            parents = any(id(parent) in weighted for parent in node.parent_nodes)
            # What is no layer, such as `x + y`, has no weights.
            own = isinstance(node.operation, keras.Layer) and node.operation.weights
            if parents or own:
                weighted.add(id(node))
    return weighted


@checked(SINCE_3_15)
def graph_outputs(model: keras.Model) -> Any | None:
    """Returns the symbolic outputs of a Functional or built Sequential, as they are nested.

    None if the model is neither, and so has no graph.
    """
    graph = graph_of(model)
    return None if graph is None else graph._outputs_struct


@checked(SINCE_3_15)
def graph_inputs(model: keras.Model) -> Any:
    """Returns the symbolic inputs of a Functional or built Sequential, as they are nested."""
    return graph_of(model)._inputs_struct


@checked(SINCE_3_15)
def cut_after(model: keras.Model, operations: Sequence[Any]) -> list[Any]:
    """Returns the symbolic tensors that go from the one side of a graph to the other.

    The one side is the given operations and all that leads to them. Inputs of the model that the
    other side uses are among the tensors.

    Args:
        model: A Functional or built Sequential model.
        operations: Operations of its graph.
    """
    depths = _nodes_of(model)
    nodes = [node for depth in sorted(depths) for node in depths[depth]]
    given = {id(operation) for operation in operations}
    before: set[int] = set()
    for node in nodes:
        if id(node.operation) in given or id(node) in before:
            before.add(id(node))
            before.update(id(parent) for parent in node.parent_nodes)
    produced = {
        id(x) for node in nodes if id(node) in before or node.is_input for x in node.outputs
    }
    used = [x for node in reversed(nodes) if id(node) not in before for x in node.input_tensors]
    return list({id(x): x for x in [*used, *model.outputs] if id(x) in produced}.values())


@checked(SINCE_3_15)
def called_again(
    tensors: Sequence[Any],
    replacements: Sequence[Any],
    outputs: Any,
    *,
    operation: Callable[[Any], Any] | None = None,
    call: Callable[..., Any] | None = None,
) -> Any:
    """Returns the outputs of the part of a graph after some tensors, called on others.

    The layers are the same; the calls are new. `keras.Model(tensors, outputs)` does so too, but
    gives no hand in the new inputs' names and masks.

    Args:
        tensors: Symbolic tensors of the graph.
        replacements: Symbolic tensors in their place.
        outputs: Symbolic outputs of the graph, as they are nested.
        operation: A function from an operation of the graph to the one that takes its place.
        call: A function that is called instead of an operation, with it and its arguments.
    """
    part = Function(inputs=list(tensors), outputs=outputs)
    return part._run_through_graph(
        list(replacements), operation_fn=operation or (lambda one: one), call_fn=call
    )


@checked(SINCE_3_15)
def moved_graph(model: keras.Model) -> Callable[[Sequence[Any]], Any]:
    """Returns a function that calls the graph of a Functional or built Sequential on other tensors.

    Its calls count as the first ones of the layers, whose `output` is what the first one returns.
    The model is of no use afterwards.
    """
    part = Function(inputs=keras.tree.flatten(graph_inputs(model)), outputs=graph_outputs(model))
    for operation in part.operations:
        operation._inbound_nodes.clear()

    return functools.partial(_call_graph, part)


@checked(SINCE_3_15)
def _call_graph(graph: Any, tensors: Sequence[Any]) -> Any:
    return graph._run_through_graph(list(tensors))


@checked(SINCE_3_15)
def operation_of(x: Any) -> Any:
    """Returns the operation that a symbolic tensor is an output of."""
    return x._keras_history.operation
