"""How far a run is, as data that a snapshot can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.best_weights import BestWeights
from keras_tl.callbacks.transition import Transition
from keras_tl.convergence import ConvergenceMonitor


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
        stage: Int. The stage that the model is in.
        stage_epochs: Int. How many epochs of it are done.
        judge: The `ConvergenceMonitor` of the stage, once it has seen a value.
        best: The `BestWeights`, if they are kept.
        switch_reason: String or None. Why the next epoch begins with a switch.
        stop_reason: String or None. Why training was stopped.
        transitions: List of the switches made.
    """

    stage: int = 0
    stage_epochs: int = 0
    judge: ConvergenceMonitor | None = None
    best: BestWeights | None = None
    switch_reason: str | None = None
    stop_reason: str | None = None
    transitions: list[Transition] = dataclasses.field(default_factory=list)

    def begin_stage(self, stage: int) -> None:
        """Goes to a stage, of which nothing has been seen yet."""
        self.stage = stage
        self.stage_epochs = 0
        self.judge = None
        self.switch_reason = None

    def to_data(
        self, variables: Sequence[keras.Variable]
    ) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
        """Returns what JSON can hold, and arrays.

        Args:
            variables: Those of the model; best weights are told by their positions in it.
        """
        state = {
            "stage": self.stage,
            "stage_epochs": self.stage_epochs,
            "switch_reason": self.switch_reason,
            "stop_reason": self.stop_reason,
            "transitions": [dataclasses.asdict(one) for one in self.transitions],
            "judge": None if self.judge is None else self.judge.get_state(),
        }
        if self.best is None:
            return {**state, "best": None}, {}
        best, arrays = self.best.get_state(variables)
        return {**state, "best": best}, arrays

    def read(
        self,
        state: Mapping[str, Any],
        arrays: Mapping[str, Sequence[np.ndarray]],
        variables: Sequence[keras.Variable],
        judge: ConvergenceMonitor,
        best: BestWeights,
    ) -> None:
        """Becomes what `to_data` returned.

        Args:
            state: The state.
            arrays: The arrays.
            variables: Those of the model.
            judge: A new `ConvergenceMonitor` for the stage.
            best: New `BestWeights`.
        """
        self.stage = state["stage"]
        self.stage_epochs = state["stage_epochs"]
        self.switch_reason = state["switch_reason"]
        self.stop_reason = state["stop_reason"]
        self.transitions = [Transition.from_dict(one) for one in state["transitions"]]
        if state["judge"] is not None:
            judge.set_state(state["judge"])
            self.judge = judge
        if state["best"] is not None:
            best.set_state(state["best"], arrays, variables)
            self.best = best
