"""How far a run is, as data that a snapshot can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.backup.configurations import shown
from keras_tl.stages.best_weights import BestWeights
from keras_tl.stages.convergence import ConvergenceMonitor
from keras_tl.stages.transition import Transition


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
        judge_state: Dictionary or None. What the judge of a snapshot has seen.
    """

    stage: int = 0
    stage_epochs: int = 0
    judge: ConvergenceMonitor | None = None
    best: BestWeights | None = None
    switch_reason: str | None = None
    stop_reason: str | None = None
    transitions: list[Transition] = dataclasses.field(default_factory=list)
    judge_state: dict[str, Any] | None = None

    def begin_stage(self, stage: int) -> None:
        """Goes to a stage, of which nothing has been seen yet."""
        self.stage = stage
        self.stage_epochs = 0
        self.judge = None
        self.switch_reason = None

    def best_of_stage(self) -> tuple[int | None, float | None]:
        """Returns the epoch and the value of the best of the stage, as `BestWeights` restores it.

        Of a stage without one, they are those of the best of the run.
        """
        best, judge = self.best, self.judge
        if judge is not None and judge.best is not None and math.isfinite(judge.best):
            return judge.best_epoch, judge.best
        return (None, None) if best is None else (best.epoch, best.value)

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

    @classmethod
    def from_data(
        cls,
        state: Mapping[str, Any],
        arrays: Mapping[str, Sequence[np.ndarray]],
        variables: Sequence[keras.Variable],
        *,
        stages: int,
        mode: str,
    ) -> Progress:
        """Returns what `to_data` wrote down, but for the judge, whose state is in `judge_state`.

        Args:
            state: The state.
            arrays: The arrays.
            variables: Those of the model.
            stages: Int. How many stages there are after stage 0.
            mode: String. The mode of the `BestWeights`.

        Raises:
            ValueError: If it cannot be what `to_data` wrote for such a run.
        """
        stage = read_count(state, "stage")
        if stage > stages:
            raise ValueError(f"it is in stage {stage}, and the run has {stages}.")
        progress = cls(
            stage=stage,
            stage_epochs=read_count(state, "stage_epochs"),
            switch_reason=read(state, "switch_reason", str, type(None)),
            stop_reason=read(state, "stop_reason", str, type(None)),
            transitions=[Transition.from_dict(one) for one in read(state, "transitions", list)],
        )
        judge = read(state, "judge", dict, type(None))
        if judge is not None:
            progress.judge_state = {
                "best": read(judge, "best", float, type(None)),
                "best_epoch": read(judge, "best_epoch", int, type(None)),
                "wait": read_count(judge, "wait"),
            }
        best = read(state, "best", dict, type(None))
        if best is not None:
            _check_best(best, arrays, variables)
            progress.best = BestWeights(mode)
            progress.best.set_state(best, arrays, variables)
        return progress


def read(state: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """Returns a value of a snapshot.

    Raises:
        ValueError: If it is not there, or of none of these classes.
    """
    if name not in state:
        raise ValueError(f"it has no {name!r}.")
    value = state[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"its {name!r} is {shown(value)}.")
    return value


def read_count(state: Mapping[str, Any], name: str) -> int:
    """Returns a whole number of at least 0. Raises a ValueError if it is none."""
    count: int = read(state, name, int)
    if count < 0:
        raise ValueError(f"its {name!r} is {count}.")
    return count


def _check_best(
    best: Mapping[str, Any],
    arrays: Mapping[str, Sequence[np.ndarray]],
    variables: Sequence[keras.Variable],
) -> None:
    read(best, "value", float, type(None))
    read(best, "epoch", int, type(None))
    read(best, "measured", float, type(None))
    if read(best, "same", bool) and "stage" in best:
        raise ValueError("its best weights of the stage are those of the run, and others.")
    for name in ("run", "stage", "start"):
        if name in best:
            kept = arrays.get(f"best_of_{name}", [])
            positions = read(best, name, list)
            known = [one for one in positions if type(one) is int and 0 <= one < len(variables)]
            there = [_described(variables[one].shape, variables[one].dtype) for one in known]
            if len(set(known)) != len(positions) or there != [
                _described(value.shape, value.dtype.name) for value in kept
            ]:
                raise ValueError(f"its best weights of the {name} are not those of the model.")


def _described(shape: Sequence[int], dtype: Any) -> tuple[Any, ...]:
    return tuple(shape), keras.backend.standardize_dtype(dtype)
