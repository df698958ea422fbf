"""The record of a switch from one stage to the next."""

from __future__ import annotations

import dataclasses


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

    def describe(self, what: str, why: str) -> str:
        """Returns one line for the user: what the callback does, and why."""
        best = "" if self.value is None else f" (best {self.value:.4g})"
        moves = f"{_layers(self.layers)} {'joins' if len(self.layers) == 1 else 'join'}, "
        if self.frozen:
            moves += f"{_layers(self.frozen)} {'is' if len(self.frozen) == 1 else 'are'} frozen, "
        return (
            f"Epoch {self.epoch + 1}: UnfreezeAtConvergence {what}: {why}{best}. "
            f"{moves}{self.trainable_before:,} -> {self.trainable_after:,} trainable parameters, "
            f"learning rate {self.learning_rate_before:.4g} -> {self.learning_rate_after:.4g}."
        )


def _layers(names: tuple[str, ...]) -> str:
    return "1 layer" if len(names) == 1 else f"{len(names)} layers"
