"""The best weights of a training run, kept in the host's memory, to be put back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.internals.values import on_host


class Snapshot:
    """A copy of the values of some weights, in the host's memory.

    Args:
        weights: The weights to copy, each a `keras.Variable` of any shape and dtype.

    Example:

    >>> layer = keras.layers.Dense(1)
    >>> layer.build((None, 2))
    >>> snapshot = Snapshot(layer.weights)
    >>> _ = layer.bias.assign([5.0])
    >>> snapshot.restore()
    >>> float(layer.bias[0])
    0.0
    """

    def __init__(self, weights: Iterable[keras.Variable]):
        self._copies = [(weight, on_host(weight)) for weight in weights]

    @property
    def copies(self) -> list[tuple[keras.Variable, np.ndarray]]:
        """List of pairs of a weight and its copy."""
        return self._copies

    @property
    def nbytes(self) -> int:
        """Int. The number of bytes copied."""
        return sum(copy.nbytes for _, copy in self._copies)

    def restore(self) -> None:
        """Gives the weights the values they had."""
        for weight, copy in self._copies:
            weight.assign(copy)

    def get_state(self, variables: Sequence[keras.Variable]) -> tuple[list[int], list[np.ndarray]]:
        """Returns the positions of its weights in a model's variables, and their values."""
        position = {id(variable): index for index, variable in enumerate(variables)}
        return (
            [position[id(weight)] for weight, _ in self._copies],
            [copy for _, copy in self._copies],
        )

    @classmethod
    def from_state(
        cls,
        positions: Sequence[int],
        values: Sequence[np.ndarray],
        variables: Sequence[keras.Variable],
    ) -> Snapshot:
        """Returns the snapshot of which these are positions and values."""
        snapshot = cls([])
        snapshot._copies = [
            (variables[position], value) for position, value in zip(positions, values, strict=True)
        ]
        return snapshot

    def extended(self, weights: Iterable[keras.Variable]) -> Snapshot:
        """Returns a snapshot of more weights: these as copied here, or else as they are now."""
        copied = {id(weight) for weight, _ in self._copies}
        wider = Snapshot(weight for weight in weights if id(weight) not in copied)
        wider._copies = self._copies + wider._copies
        return wider


class BestWeights:
    """The weights with the best value so far, in the stage and in the whole run.

    The best of a stage is what `EarlyStopping` would restore (it honours `min_delta` and
    `start_from_epoch`). The best of the run is the best value of all.

    Args:
        mode: `"min"` or `"max"`. Whether lower or higher values are better.

    Attributes:
        value: Float or None. The best value of the run, in terms of the current stage.
        epoch: Int or None. Its epoch.
        measured: Float or None. The value as it was at that epoch.
    """

    def __init__(self, mode: str):
        self._mode = mode
        self._stage: Snapshot | None = None
        self._run: Snapshot | None = None
        self._start: Snapshot | None = None
        self.value: float | None = None
        self.epoch: int | None = None
        self.measured: float | None = None

    def update(
        self, epoch: int, value: float, weights: Iterable[keras.Variable], *, best_of_stage: bool
    ) -> None:
        """Copies `weights` if their value is the best. NaN and infinite values never are."""
        best_of_run = math.isfinite(value) and self._beats(value, self.value)
        if not (best_of_run or (best_of_stage and math.isfinite(value))):
            return
        # One copy for both: it is as large as all that trains.
        snapshot = Snapshot(weights)
        if best_of_stage:
            self._stage = snapshot
        if best_of_run:
            self._run, self.value, self.epoch, self.measured = snapshot, value, epoch, value

    def restore_stage(self) -> None:
        """Gives the weights their best values of the stage, if there were any."""
        # A stage of only a warm start or of NaN has no best: what was best before it serves.
        best = self._stage or self._run
        if best is not None:
            best.restore()

    def restore_run(self) -> None:
        """Gives the weights their best values of the run, if there were any."""
        if self._run is not None:
            self._run.restore()

    def begin_stage(self, weights: Iterable[keras.Variable], value_offset: float) -> None:
        """Starts a new stage.

        Args:
            weights: The weights that can change in it; those that could not until now are kept
                with the best of the run as they are.
            value_offset: What the same weights' value differs by in the new stage.
        """
        self._stage = None
        # Weights that join had these values at the best epoch too, for they were frozen then.
        if self._run is not None and self.value is not None:
            self._run = self._run.extended(weights)
            self.value += value_offset

    def keep_start(self, weights: Iterable[keras.Variable]) -> None:
        """Keeps the weights that fine-tuning starts from; later ones as they are when they join.

        Args:
            weights: The weights that can change from now on.
        """
        self._start = Snapshot(weights) if self._start is None else self._start.extended(weights)

    @property
    def start(self) -> Snapshot | None:
        """`Snapshot` of the weights that fine-tuning has started from, if they are kept."""
        return self._start

    def get_state(
        self, variables: Sequence[keras.Variable]
    ) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
        """Returns all of it for `set_state`: what JSON can hold, and arrays.

        Args:
            variables: Those of the model, by whose positions weights are told.
        """
        # Mostly they are one, and are written once.
        same = self._stage is self._run
        kept = {"run": self._run, "stage": None if same else self._stage, "start": self._start}
        positions, arrays = {}, {}
        for name, snapshot in kept.items():
            if snapshot is not None:
                positions[name], arrays[f"best_of_{name}"] = snapshot.get_state(variables)
        numbers = {"value": self.value, "epoch": self.epoch, "measured": self.measured}
        return {**numbers, "same": same, **positions}, arrays

    def set_state(
        self,
        state: Mapping[str, Any],
        arrays: Mapping[str, Sequence[np.ndarray]],
        variables: Sequence[keras.Variable],
    ) -> None:
        """Becomes what `get_state` returned."""
        self.value, self.epoch = state["value"], state["epoch"]
        self.measured = state["measured"]
        kept = {
            name: Snapshot.from_state(state[name], arrays[f"best_of_{name}"], variables)
            for name in ("run", "stage", "start")
            if name in state
        }
        self._run, self._start = kept.get("run"), kept.get("start")
        self._stage = self._run if state["same"] else kept.get("stage")

    def _beats(self, value: float, best: float | None) -> bool:
        if best is None:
            return True
        return value > best if self._mode == "max" else value < best
