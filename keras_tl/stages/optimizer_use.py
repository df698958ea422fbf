"""Does a model train with the optimizer that a switch renews?"""

from __future__ import annotations

import warnings
from typing import Any

import keras

from keras_tl.internals.models import has_own_train_step, own_optimizers
from keras_tl.internals.optimizers import steps_of
from keras_tl.internals.values import on_host


class OptimizerUse:
    """Notices that a model's own `train_step` leaves `model.optimizer` unused.

    So do many with several optimizers, such as GANs: a switch would renew one that nobody uses, and
    those that are used do not know what it unfreezes.

    Args:
        model: A compiled model, before the first step.

    Raises:
        ValueError: If it is sure already: the model has optimizers of its own, and `optimizer` is
            what `compile` makes if it is given none.
    """

    def __init__(self, model: keras.Model):
        self._own = own_optimizers(model)
        self._looks = has_own_train_step(model)
        self.begin(model)
        if self._own and self._looks and _is_default(model.optimizer):
            raise ValueError(self._message(model, "is the one that Keras makes by default"))

    def begin(self, model: keras.Model) -> None:
        """Begins to look at the optimizer that the model has now."""
        self._optimizer = model.optimizer
        self._before = _state(model.optimizer)

    def check(self, model: keras.Model, *, frozen: bool) -> None:
        """Raises a ValueError if the steps since it began have not used the optimizer.

        Args:
            model: The model, after at least one step.
            frozen: Bool. Whether the backbone is frozen. In a model with several optimizers the
                one of the backbone makes no step then, so this is a warning.
        """
        if not self._looks or model.optimizer is not self._optimizer:
            return
        self._looks = _state(model.optimizer) == self._before
        if not self._looks:
            return
        message = self._message(model, "has made no step in this epoch")
        if not (frozen and self._own):
            raise ValueError(message)
        self._optimizer = None  # Nothing to look at until the switch.
        warnings.warn(
            f"{message} If they do so, all is well: the backbone is frozen, and this is looked at "
            "again once it trains.",
            stacklevel=4,
        )

    def _message(self, model: keras.Model, why: str) -> str:
        own = ", ".join(f"`{name}`" for name in self._own)
        trains = f"optimizers of its own ({own})" if self._own else "another one"
        return (
            f'The `train_step` of the model "{model.name}" trains with {trains}, and not with '
            f"`model.optimizer`, which {why}. A switch renews `model.optimizer`; no other one can "
            "update what it unfreezes. Have `compile` pass the optimizer that trains the "
            "backbone on, as `super().compile(optimizer=...)`, and `train_step` use "
            "`self.optimizer`."
        )


def _is_default(optimizer: keras.Optimizer) -> bool:
    """Whether it is an optimizer such as `compile` makes if it is given none, and is not used."""
    default = keras.optimizers.RMSprop(name=optimizer.name)
    return (
        type(optimizer) is type(default)
        and not _state(optimizer)[0]
        and optimizer.get_config() == default.get_config()
    )


def _state(optimizer: Any) -> tuple[int, ...]:
    """Numbers of which each step changes one; of a step that overflows, those of the loss scale."""
    steps = steps_of(optimizer)
    if not (isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and optimizer.built):
        return (steps,)
    counts = [optimizer.step_counter, optimizer.dynamic_scale]
    return (steps, *(int(on_host(count)) for count in counts))
