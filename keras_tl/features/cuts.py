"""Where a model can be cut in two, such that the first part returns the same in every epoch."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import keras

from keras_tl.backbone.freezing import trainable_flags_kept
from keras_tl.features.unrolled import (
    Call,
    Level,
    Step,
    Unrolled,
    calls_in_inference,
    multiplications,
)
from keras_tl.internals.graphs import graph_inputs, graph_outputs
from keras_tl.internals.layers import set_layer_flag
from keras_tl.layers import FrozenBackbone

Shapes = dict[int, tuple[int | None, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A place to cut a model in two.

    Attributes:
        unrolled: The `Unrolled` model.
        constant: List of the `Step`s of the first part, and further ones.
        count: Int. How many of these are of the first part.
        tensors: List of the tensors that go from the first part, or from the inputs, to the second.
        has_weights: Bool. Whether there are weights in the first part.
        multiplications: Float. About how many the first part takes for a sample.
        of_all: Float. About how many the whole model takes.
    """

    unrolled: Unrolled
    constant: Sequence[Step]
    count: int
    tensors: list[Any]
    has_weights: bool
    multiplications: float
    of_all: float

    @property
    def before(self) -> frozenset[Step]:
        """Set of the `Step`s of the first part."""
        return frozenset(self.constant[: self.count])

    @property
    def name(self) -> str:
        """String. The layers after which it is, for a message."""
        ids = {id(x) for x in self.tensors}
        names = [
            step.call.operation.name
            for step in self.constant[: self.count]
            if any(id(x) in ids for x in step.outputs)
        ]
        return " and ".join(f'"{name}"' for name in names) or "the inputs"


def cuts(unrolled: Unrolled, shapes: Shapes, *, random: bool) -> Iterator[Cut]:
    """Yields cuts before all that changes from epoch to epoch, from the input on.

    Each one has a step more in its first part than the one before. All places through which
    everything passes are among them, and the deepest cut there is is the last.

    Args:
        unrolled: The `Unrolled` model.
        shapes: What `Unrolled.shapes` returns.
        random: Bool. Whether layers before the cut may be random.
    """
    taken = {step: multiplications(step, shapes) for step in unrolled.steps}
    of_all, so_far, has_weights = sum(taken.values()), 0.0, False
    uses = collections.Counter(id(x) for step in unrolled.steps for x in step.inputs)
    uses.update(id(x) for x in unrolled.outputs)
    crossing = {id(x): x for x in unrolled.inputs}
    there = set(crossing)
    before: list[Step] = []
    for step in unrolled.steps:
        needed = [*step.inputs, *step.around]
        if not all(id(x) in there for x in needed) or not unrolled.is_constant(step, random=random):
            continue
        before.append(step)
        so_far += taken[step]
        has_weights = has_weights or bool(getattr(step.call.operation, "weights", ()))
        there.update(id(x) for x in step.outputs)
        uses.subtract(id(x) for x in step.inputs)
        crossing.update((id(x), x) for x in step.outputs)
        crossing = {key: x for key, x in crossing.items() if uses[key]}
        tensors = list(crossing.values())
        yield Cut(unrolled, before, len(before), tensors, has_weights, so_far, of_all)


class Halves:
    """The two halves of a model at a cut. They share its layers.

    Args:
        level: The `Level` of the model.
        before: Set of the `Step`s of the first half.

    Attributes:
        model: The model.
        tensors: List of symbolic tensors, the outputs of the first half, computed from the inputs
            of the model.
    """

    def __init__(self, level: Level, before: Collection[Step]):
        self.model = level.model
        self._inputs = keras.tree.flatten(graph_inputs(level.model))
        self._outputs = graph_outputs(level.model)
        # What the first half returns for tensors of the model's graph, by their ids.
        self._known = {id(x): x for x in self._inputs}
        self._later: list[tuple[Call, Halves | None, list[Any]]] = []
        crossing: list[Any] = []
        for call in level.calls:
            crossing += self._add(call, before)
        crossing += [self._known.get(id(x)) for x in keras.tree.flatten(self._outputs)]
        self.tensors = list({id(x): x for x in crossing if x is not None}.values())

    def _add(self, call: Call, before: Collection[Step]) -> list[Any]:
        """Puts a call in the half where it belongs. Returns what it takes from the first one."""
        there = all(id(x) in self._known for x in call.call.inputs)
        if there and all(step in before for step in call.steps):
            self._call_before(call)
            return []
        if call.inner is None or not any(step in before for step in call.steps):
            self._later.append((call, None, []))
            return [self._known.get(id(x)) for x in call.call.inputs]
        halves = Halves(call.inner, before)
        values = self._call_half(call, halves)
        self._later.append((call, halves, values))
        return values

    def _call_before(self, call: Call) -> None:
        inputs, outputs = call.call.inputs, call.call.outputs
        if not all(self._known[id(x)] is x for x in inputs):
            args, kwargs = call.call.on(self._known)
            outputs = keras.tree.flatten(call.call.operation(*args, **kwargs))
        self._known.update((id(x), y) for x, y in zip(call.call.outputs, outputs, strict=True))

    def _call_half(self, call: Call, halves: Halves) -> list[Any]:
        """Calls the first half of a model in this one. Returns what it returns."""
        (given,), _ = call.call.on(self._known)
        # An input of the inner model that passes by is one of this model's tensors already.
        values = dict(zip(map(id, halves._inputs), keras.tree.flatten(given), strict=True))
        inner = [x for x in halves.tensors if id(x) not in values]
        part = _like(call.call.operation, halves.first(inner), before=True)
        values.update(
            zip(map(id, inner), keras.tree.flatten(part(given, **call.call.settings)), strict=True)
        )
        for x, y in zip(call.call.outputs, keras.tree.flatten(halves._outputs), strict=True):
            known = halves._known.get(id(y))
            if known is not None:
                self._known[id(x)] = values[id(known)]
        return [values[id(x)] for x in halves.tensors]

    def first(self, tensors: list[Any]) -> keras.Model:
        """Returns a model from the inputs to some of the tensors, as a list."""
        inputs = graph_inputs(self.model)
        return keras.Model(inputs, tensors, name=f"{self.model.name}_frozen")

    def second(self, values: list[Any]) -> Any:
        """Calls the second half on symbolic tensors. Returns the outputs of the model.

        Args:
            values: One for each of `tensors`.
        """
        given = dict(zip(map(id, self.tensors), values, strict=True))
        tensors = {
            key: given[id(known)] for key, known in self._known.items() if id(known) in given
        }
        for call, halves, crossing in self._later:
            operation = call.call.operation
            if halves is None:
                args, kwargs = call.call.on(tensors)
            else:
                operation = _like(operation, halves.second_model(), before=False)
                own = [given[id(x)] for x in crossing]
                args, kwargs = (own[0] if len(own) == 1 else own,), call.call.settings
            returned = keras.tree.flatten(operation(*args, **kwargs))
            tensors.update((id(x), y) for x, y in zip(call.call.outputs, returned, strict=True))
        outputs = [tensors[id(x)] for x in keras.tree.flatten(self._outputs)]
        return keras.tree.pack_sequence_as(self._outputs, outputs)

    def second_model(self) -> keras.Model:
        """Returns a model from the tensors to the outputs."""
        inputs = [keras.Input(batch_shape=x.shape, dtype=x.dtype) for x in self.tensors]
        outputs = self.second(inputs)
        return keras.Model(inputs[0] if len(inputs) == 1 else inputs, outputs, name=self.model.name)


def _like(layer: keras.Layer, model: keras.Model, *, before: bool) -> keras.Layer:
    """Returns a layer that calls a part of a layer's graph as the layer does."""
    set_layer_flag(model, layer.trainable)
    if not isinstance(layer, FrozenBackbone) or (before and not calls_in_inference(layer)):
        return model  # All that is frozen: its BatchNormalization is in inference mode by itself.
    with trainable_flags_kept(layer.backbone):
        part = FrozenBackbone(
            model,
            inference_mode=layer.inference_mode,
            rematerialize=layer.rematerialize and not before,
            name=f"{layer.name}_frozen" if before else layer.name,
        )
    set_layer_flag(model, layer.trainable)
    set_layer_flag(part, layer.trainable)
    return part
