"""Why did a weight change that must not? And will the next step train the right weights?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.backbone.selecting import flatten_layers, is_batchnorm
from keras_tl.guard.watch import Change
from keras_tl.internals.layers import own_state, own_trainable_weights
from keras_tl.internals.models import flags_when_compiled, has_own_train_step
from keras_tl.internals.optimizers import moving_averages, optimizer_weights
from keras_tl.internals.values import on_host


@dataclasses.dataclass(frozen=True)
class Cause:
    """A reason why a weight changed.

    Attributes:
        name: String. The cause.
        remedy: String. What to do about it.
    """

    name: str
    remedy: str


STALE_COMPILE = Cause(
    "stale compile",
    "Call `model.compile(...)` again, with a new optimizer, after the last change of `trainable` "
    "and before `fit`. To change it in a running `fit`, use UnfreezeAtConvergence.",
)
BATCHNORM = Cause(
    "BatchNormalization in training mode",
    "Wrap the backbone in keras_tl.FrozenBackbone and call it through the wrapper only; `fit` "
    "overrides a `training=False` written into a Functional model. Or set `trainable = False` on "
    "the layer, compile again, and trace a `tf.function` of your own again.",
)
OVERWRITTEN = Cause(
    "overwritten",
    "The optimizer does not explain the change. Look for `assign`, `set_weights` or `load_weights` "
    'between the two moments, in other callbacks first; `check="batch"` finds the batch. A layer '
    "that writes its own weights in training mode, such as SpectralNormalization or a torch module "
    "with BatchNorm, belongs in a keras_tl.FrozenBackbone. One that is moved on purpose, such as "
    "an average of another, is left out with `FreezeGuard(exclude=...)`.",
)
RENEWED = Cause(
    "trained in between, or overwritten",
    "The model was compiled between the two moments, or its optimizer renewed, so the weight may "
    'have trained before it was frozen again; `check="batch"` tells. Otherwise look for `assign`, '
    "`set_weights` or `load_weights` in other callbacks.",
)
OPTIMIZER = Cause(
    "optimizer side effect",
    "The optimizer knows this frozen weight. Make a new one and hand it "
    "`model.trainable_variables` only: weight decay, and averages that `use_ema` writes back, "
    "change weights that have no gradient too.",
)
TRAINED = Cause(
    "trained",
    "The layer is trainable, so training changes it. Set `trainable = False` and compile again, or "
    "leave it out of the guard's `layers`.",
)


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """How the weights that an optimizer was built for differ from those to train.

    Attributes:
        still_training: The weights that are frozen now, and were to be trained.
        not_training: The weights that are trainable now, and that the optimizer does not know.
    """

    still_training: list[keras.Variable]
    not_training: list[keras.Variable]

    def __bool__(self) -> bool:
        return bool(self.still_training or self.not_training)


def stale_compile(model: keras.Model) -> Mismatch:
    """Returns what has become trainable or frozen since the optimizer was built.

    A model that has never trained has no stale compile: its step is made for the flags at the first
    step, not for those at `compile`. In a model with a `train_step` of its own an optimizer that
    knows only some of the trainable weights is what was meant, unless flags have changed since
    `compile`. One that was compiled while a weight that it knows was frozen is not stale: Keras'
    train step does not hand it that weight. Unless it has trained before with `use_ema`: it writes
    averages back by position, and so to the wrong weights.
    """
    optimizer = getattr(model, "optimizer", None)
    known = _known(model, optimizer)
    if optimizer is None or known is None:
        return Mismatch([], [])
    flags = flags_when_compiled(model)
    own_step = has_own_train_step(model)
    # Keras' own step alone writes averages back at an epoch's end, to weights by their position.
    averages = bool(moving_averages(optimizer)) and not own_step
    misplaces = averages and on_host(optimizer.iterations) > 0
    frozen = known - {id(weight) for weight in model.trainable_weights}
    still_training = [
        weight
        for layer in flatten_layers(model)
        for weight in own_trainable_weights(layer)
        if id(weight) in frozen and (misplaces or flags.get(layer, True))
    ]
    not_training = [weight for weight in model.trainable_weights if id(weight) not in known]
    unchanged = all(layer.trainable == flag for layer, flag in flags.items())
    if unchanged and own_step:
        not_training = []
    return Mismatch(still_training, not_training)


def _known(model: keras.Model, optimizer: Any) -> set[int] | None:
    """The identities of the weights that the optimizer was built for, or None before that."""
    optimized = optimizer_weights(optimizer)
    if optimized is None:
        return None
    known = {id(one) for one in optimized}
    if all(isinstance(one, keras.Variable) for one in optimized):
        return known
    # A custom training loop may hand it the backend's variables.
    return known | {id(weight) for weight in model.weights if id(weight.value) in known}


def find_causes(
    model: keras.Model,
    changes: Sequence[Change],
    optimizer: Any,
    *,
    own_loop: bool,
    renewed: bool = False,
) -> list[Cause]:
    """Returns the likely cause of each change.

    Args:
        model: The model whose weights have changed.
        changes: The changes found by one check.
        optimizer: The optimizer that trains it, or None if it is not known.
        own_loop: Bool. Whether the steps are not those of `fit`, and so may hand the optimizer any
            weights.
        renewed: Bool. Whether the optimizer is another one than before the changes.

    Returns:
        A list of `Cause`, one for each change.
    """
    owners = {
        id(weight): layer
        for layer in flatten_layers(model)
        for weight in own_trainable_weights(layer) + own_state(layer)
    }
    changed = {id(change.weight) for change in changes}
    # Last, for a statistic that moved beside a weight that was overwritten was so itself.
    statistics = {id(c.weight) for c in changes if _is_statistic(owners.get(id(c.weight)), c)}
    steps = _Steps(model, optimizer, own_loop)
    others = {id(c.weight): steps.cause_of(c) for c in changes if id(c.weight) not in statistics}
    overwritten = OVERWRITTEN in others.values()
    causes = [
        others.get(id(change.weight))
        or _cause_of_statistic(owners[id(change.weight)], steps, changed, overwritten)
        for change in changes
    ]
    return [RENEWED if renewed and cause is OVERWRITTEN else cause for cause in causes]


class _Steps:
    """What the training steps of a model can change."""

    def __init__(self, model: keras.Model, optimizer: Any, own_loop: bool):
        self.flags = flags_when_compiled(model)
        self._trainable = {id(weight) for weight in model.trainable_weights}
        self._stale = {id(weight) for weight in stale_compile(model).still_training}
        self._known = _known(model, optimizer) or set()
        self._averages = [average for _, average in moving_averages(optimizer)]
        self._hands_anything = own_loop or has_own_train_step(model)

    def cause_of(self, change: Change) -> Cause:
        if id(change.weight) in self._trainable:
            return TRAINED
        if id(change.weight) in self._stale:
            return STALE_COMPILE
        # Keras' step hands over what trains and nothing else; another may hand over anything.
        known = id(change.weight) in self._known
        if (known and self._hands_anything) or self._is_average(change.after):
            return OPTIMIZER
        return OVERWRITTEN

    def _is_average(self, value: np.ndarray) -> bool:
        return any(
            tuple(average.shape) == value.shape
            and np.array_equal(keras.ops.convert_to_numpy(average), value)
            for average in self._averages
        )


def _is_statistic(layer: keras.Layer | None, change: Change) -> bool:
    if layer is None or not is_batchnorm(layer):
        return False
    return any(change.weight is weight for weight in own_state(layer))


def _cause_of_statistic(
    layer: keras.Layer, steps: _Steps, changed: set[int], overwritten: bool
) -> Cause:
    """A batch moves mean and variance together, and nothing else that must stay."""
    together = all(id(weight) in changed for weight in own_state(layer))
    if overwritten or not together:
        return OVERWRITTEN
    # A class of one's own may move its statistics whatever its flag says.
    of_keras = type(layer).call is keras.layers.BatchNormalization.call
    if layer.trainable or not of_keras:
        return BATCHNORM
    return STALE_COMPILE if steps.flags.get(layer, False) else OVERWRITTEN
