"""The record of a switch from one stage to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_tl.messages import some


@dataclasses.dataclass(frozen=True)
class Transition:
    """A switch from one stage to the next.

    Attributes:
        epoch: Int. The first epoch of the new stage, counted from 0.
        stage: Int. The new stage.
        reason: String. `"converged"`, `"early_stopping"` (another callback's),
            `"max_frozen_epochs"`, or `"epochs"` (those of the stage that ended).
        value: Float or None. The best monitored value of the stage that ended.
        learning_rate_before: Float. The learning rate at the end of that stage.
        learning_rate_after: Float. The learning rate of the new stage.
        trainable_before: Int. How many parameters were trainable before.
        trainable_after: Int. How many are trainable after.
        layers: Tuple of strings. The names of the layers that became trainable, from input to
            output.
        frozen: Tuple of strings. The names of those that are frozen again.
        cannot_train: Tuple of strings. The paths of the weights of layers that train now which stay
            frozen whatever is unfrozen: quantized kernels, and kernels under LoRA.
    """

    epoch: int
    stage: int
    reason: str
    value: float | None
    learning_rate_before: float
    learning_rate_after: float
    trainable_before: int
    trainable_after: int
    layers: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    cannot_train: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Transition:
        """Returns the record that `dataclasses.asdict` and JSON have made a dictionary of."""
        fields: dict[str, Any] = {
            key: tuple(one) if isinstance(one, list) else one for key, one in values.items()
        }
        return cls(**fields)

    def describe(self, what: str, why: str, then: str, rates: Mapping[str, float]) -> str:
        """Returns a block of lines for the user.

        Args:
            what: String. What the callback does, after its name.
            why: String. What the reason means.
            then: String. What happens next.
            rates: Dictionary. The learning rates of the parameter groups in the new stage, if there
                are any, by their names.
        """
        best = "" if self.value is None else f" (best {self.value:.4g})"
        groups = ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())
        rate = f"{self.learning_rate_before:.4g} -> {self.learning_rate_after:.4g}"
        lines = {
            "because": why + best,
            "joining": _layers(self.layers),
            "frozen again": _layers(self.frozen),
            "cannot train": some(self.cannot_train),
            "parameters": f"{self.trainable_before:,} -> {self.trainable_after:,} trainable",
            "learning rate": f"{rate} ({groups})" if groups else rate,
            "next": then,
        }
        shown = [f"  {label:<15}{text}" for label, text in lines.items() if text]
        return "\n".join([f"Epoch {self.epoch + 1}: UnfreezeAtConvergence {what}", *shown])


def _layers(names: tuple[str, ...]) -> str:
    count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    return f"{count}: {some(names)}" if names else ""
