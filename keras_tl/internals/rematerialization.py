"""Running the graph of a model in segments whose activations are computed again for gradients.

`keras.RematScope` is for layers that are made in it. A pretrained model is made already, and its
layers one by one save little: what each returns is what the next one keeps. So here whole segments
of the graph go through `keras.remat`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.graphs import graph_of, nodes_in_graph, sizes_of
from keras_tl.internals.imported import (
    AutocastScope,
    Function,
    get_keras_mask,
    set_keras_mask,
)
from keras_tl.internals.layers import trains
from keras_tl.internals.segments import cheapest_cuts, segments


class Rematerialized:
    """A context in which the graphs of a model are run in segments that are rematerialized.

    Calls before the first weight that trains are run as ever: nothing is kept of them. So is the
    last segment, which would be computed again at once.

    Entries are counted, because threads may overlap.

    Args:
        model: A Functional or built Sequential model. Such models in it have segments of their own.
        within: A context for each segment. On torch and TensorFlow, it is computed again when the
            contexts of the call are left long since.
        add_loss: A function that takes the losses that layers have added.
    """

    _lock = threading.Lock()

    def __init__(
        self,
        model: keras.Model,
        within: contextlib.AbstractContextManager,
        add_loss: Callable[[Any], None],
    ):
        self._graphs = [_Graph(graph, within, add_loss) for graph in _graphs_in(model)]
        self._entered = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._entered == 0:
                for graph in self._graphs:
                    graph.hook()
            self._entered += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                for graph in self._graphs:
                    graph.unhook()


@checked(SINCE_3_15)
def _graphs_in(model: Any) -> list[Any]:
    graph = graph_of(model)
    if graph is None:
        return []
    nested = (inner for one in graph._operations for inner in _graphs_in(one))
    return list({id(one): one for one in [graph, *nested]}.values())


class _Graph:
    """The graph of one model, and how its calls are cut."""

    def __init__(
        self,
        graph: Any,
        within: contextlib.AbstractContextManager,
        add_loss: Callable[[Any], None],
    ):
        self._graph = graph
        self._within = within
        self._add_loss = add_loss
        self._calls = nodes_in_graph(graph)
        self._plans: dict[int, list[tuple[_Part, bool]]] = {}

    @checked(SINCE_3_15)
    def hook(self) -> None:
        """Has the graph run here, if Keras has not renamed the method."""
        assert callable(self._graph._run_through_graph)
        # Not by setting the attribute: Keras and torch would look at what it is.
        self._graph.__dict__["_run_through_graph"] = self.run

    def unhook(self) -> None:
        """Has the graph run as its class does."""
        self._graph.__dict__.pop("_run_through_graph", None)

    @checked(SINCE_3_15)
    def run(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Does what `Function._run_through_graph` does, a segment at a time."""
        tensors = {
            id(x): y for x, y in zip(self._graph.inputs, keras.tree.flatten(inputs), strict=True)
        }
        for part, again in self._plan():
            given = [tensors[id(x)] for x in part.inputs]
            run = part.bound(args, kwargs)
            if again and all(keras.ops.is_tensor(x) for x in given):
                outputs, losses = rematerialize(run, given, part.variables(), self._within)
                for loss in losses:
                    self._add_loss(loss)
            else:
                outputs = run(given)
            tensors.update({id(x): y for x, y in zip(part.outputs, outputs, strict=True)})
        outputs = [tensors[id(x)] for x in self._graph.outputs]
        return keras.tree.pack_sequence_as(self._graph._outputs_struct, outputs)

    def _plan(self) -> list[tuple[_Part, bool]]:
        """The segments, and whether each is to be computed again, as the flags are now."""
        training = (place for place, call in enumerate(self._calls) if trains(call.operation))
        first = next(training, len(self._calls))
        if first not in self._plans:
            self._plans[first] = [
                (_Part(self._graph, self._calls, start, end), again)
                for start, end, again in self._segments(first)
            ]
        return self._plans[first]

    def _segments(self, first: int) -> list[tuple[int, int, bool]]:
        returned, carried = sizes_of(self._graph)
        # Models in it are cut themselves.
        alone = [
            place
            for place, call in enumerate(self._calls)
            if place >= first and graph_of(call.operation) is not None
        ]
        found = [(0, first, False)] if first else []
        start = first
        for place in [*alone, len(self._calls)]:
            if start < place:
                cuts = cheapest_cuts(returned[start:place], carried[start:place])
                cuts = [start + cut for cut in cuts]
                found += [(one, end, True) for one, end in segments(start, place, cuts)]
            if place < len(self._calls):
                found.append((place, place + 1, False))
            start = place + 1
        if found:
            found[-1] = (*found[-1][:2], False)
        return found


class _Part:
    """A segment of a graph.

    Attributes:
        inputs: List of the symbolic tensors that go into it.
        outputs: List of those that it returns and that are used after it.
    """

    def __init__(self, graph: Any, calls: Sequence[Any], start: int, end: int):
        self._calls = calls[start:end]
        own = [x for call in self._calls for x in call.outputs]
        owned = {id(x) for x in own}
        later = {id(x) for call in calls[end:] for x in call.input_tensors}
        later |= {id(x) for x in graph.outputs}
        used = {id(x): x for call in self._calls for x in call.input_tensors}
        self.inputs = [x for key, x in used.items() if key not in owned]
        self.outputs = [x for x in own if id(x) in later]
        self._function = _function(self.inputs, self.outputs, self._calls)

    @checked(SINCE_3_15)
    def bound(self, args: Any, kwargs: Any) -> Callable[[Sequence[Any]], list[Any]]:
        """Returns a function from a list of its inputs to one of its outputs."""
        run = self._function._run_through_graph
        return lambda given: run(list(given), *args, **kwargs)

    def variables(self) -> list[keras.Variable]:
        """Returns the variables of its layers, seeds included."""
        layers = [one.operation for one in self._calls if isinstance(one.operation, keras.Layer)]
        variables = [variable for layer in layers for variable in layer.variables]
        return list({id(variable): variable for variable in variables}.values())


@checked(SINCE_3_15)
def _function(inputs: list[Any], outputs: list[Any], calls: Sequence[Any]) -> Any:
    """A `Function` of calls that there are: made as usual, it would make new ones."""
    function = Function.__new__(Function)
    function._inputs, function._outputs, function._outputs_struct = inputs, outputs, outputs
    function._nodes_by_depth = {-place: [call] for place, call in enumerate(calls)}
    return function


@checked(SINCE_3_15)
def rematerialize(
    run: Callable[[Sequence[Any]], list[Any]],
    tensors: Sequence[Any],
    variables: Sequence[keras.Variable],
    within: contextlib.AbstractContextManager,
) -> tuple[list[Any], list[Any]]:
    """Returns what a function of tensors returns, which for gradients is computed again.

    The second time must be as the first, whenever it comes: so all that the function depends on is
    written down, with masks and seeds. Layers cast variables themselves.

    Args:
        run: A function from a list of tensors to one.
        tensors: What it is called with.
        variables: All variables that it reads or assigns.
        within: A context for each time.

    Returns:
        The tensors, and a list of the losses that layers added.
    """
    masks = [get_keras_mask(x) for x in tensors]
    with AutocastScope(None):
        # TensorFlow's variables themselves: gradients to what was read of one would count twice.
        values = [variable.value for variable in variables]
    # Only what gradients may go to: TensorFlow adds numbers to it, and computes all gradients.
    moving = [place for place, x in enumerate(tensors) if _is_float(x)]
    trained = [place for place, variable in enumerate(variables) if variable.trainable]
    first_time: list[Any] = []

    def compute(*arguments: Any) -> list[Any]:
        given = _replaced(tensors, moving, arguments[: len(moving)])
        read = _replaced(values, trained, arguments[len(moving) :])
        for x, mask in zip(given, masks, strict=True):
            if mask is not None:
                set_keras_mask(x, mask)
        mapping = list(zip(variables, read, strict=True))
        scope = keras.StatelessScope(mapping, collect_losses=True, initialize_variables=False)
        with within, scope:
            before = [scope.get_current_value(variable) for variable in variables]
            outputs = run(given)
            after = [scope.get_current_value(variable) for variable in variables]
        changed = {
            place: new
            for place, (old, new) in enumerate(zip(before, after, strict=True))
            if old is not new
        }
        found = outputs, [get_keras_mask(x) for x in outputs], scope.losses, changed
        return first_time_returned(found)

    def first_time_returned(found: Any) -> list[Any]:
        """The tensors that gradients come to; the others are left aside, where that is allowed."""
        flat = keras.tree.flatten(found)
        if not first_time:
            first_time.append((found, flat))
        return [x for x in flat if _goes_out(x)]

    returned = iter(
        keras.remat(compute)(*[tensors[one] for one in moving], *[values[one] for one in trained])
    )
    found, flat = first_time[0]
    flat = [next(returned) if _goes_out(x) else x for x in flat]
    outputs, masks_after, losses, changed = keras.tree.pack_sequence_as(found, flat)
    for x, mask in zip(outputs, masks_after, strict=True):
        if mask is not None:
            set_keras_mask(x, mask)
    for place, value in changed.items():
        # On torch, assigning would change the value that the second time is to read.
        values[place] = keras.ops.copy(values[place])
        variables[place].assign(value)
    return outputs, losses


def _replaced(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    found = list(values)
    for place, other in zip(places, others, strict=True):
        found[place] = other
    return found


def _is_float(x: Any) -> bool:
    return keras.backend.is_float_dtype(x.dtype)


def _goes_out(x: Any) -> bool:
    """Whether a tensor is returned from what is computed again: on JAX all that is made in it."""
    return x is not None and (keras.backend.backend() == "jax" or _is_float(x))
