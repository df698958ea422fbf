"""When a stage ends, and when training does: decided from each epoch's logs, without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_tl.stages.annealing import PATIENT_RATES, brings_nothing, only_hurts
from keras_tl.stages.convergence import ConvergenceMonitor, min_delta_to_converge
from keras_tl.stages.monitored_value import MonitoredValue
from keras_tl.stages.progress import Progress
from keras_tl.stages.stage import Stage
from keras_tl.stages.words import what_it_waits_for, what_next, why_ended


class Decisions:
    """Decides at each epoch's end whether the stage continues, ends, or ends training.

    Args:
        stages: List of `Stage`, those after stage 0.
        monitored: The `MonitoredValue` that convergence is judged by.
        min_delta: Float. Smallest change that counts as an improvement. Defaults to `0.0`.
        patience: Int. Epochs without improvement after which stage 0 ends, and any stage but the
            last that has no limit of its own. Defaults to `3`.
        start_from_epoch: Int. Epochs before it are not judged. Defaults to `0`.
        max_frozen_epochs: Int or None. Epochs after which stage 0 ends at the latest.
        fine_tune_patience: Int or None. The patience of the last stage, if it has no limit of its
            own. None: it lasts to the last epoch. Defaults to `3`.
        first_annealed: Int or None. The number of the first of the stages that try one learning
            rate each, which are the last ones, and all have the patience of the last. None: there
            are none.

    Attributes:
        least_patience: Int. Epochs without improvement that a stage that tries one of the first
            rates has at least.

    Example:

    >>> decisions = Decisions([Stage("all", 1e-5)], MonitoredValue("val_loss", "min"), patience=1)
    >>> progress = Progress()
    >>> for epoch, loss in enumerate([0.5, 0.6]):
    ...     _ = decisions.decide(progress, epoch, {"val_loss": loss})
    >>> progress.switch_reason
    'converged'
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        monitored: MonitoredValue,
        *,
        min_delta: float = 0.0,
        patience: int = 3,
        start_from_epoch: int = 0,
        max_frozen_epochs: int | None = None,
        fine_tune_patience: int | None = 3,
        first_annealed: int | None = None,
    ):
        self.monitored = monitored
        self._stages = stages
        self._min_delta = min_delta
        self._patience = patience
        self._start_from_epoch = start_from_epoch
        self._max_frozen_epochs = max_frozen_epochs
        self._fine_tune_patience = fine_tune_patience
        self._first_annealed = len(stages) + 1 if first_annealed is None else first_annealed
        self.least_patience = 0

    def limits(self, stage: int) -> tuple[int | None, int | None]:
        """Returns after how many epochs without improvement, and of all, a stage ends."""
        if stage == 0:
            return self._patience, self._max_frozen_epochs
        patience, epochs = self._stages[stage - 1].patience, self._stages[stage - 1].epochs
        if patience is None and epochs is None:
            of_the_last = stage >= min(self._first_annealed, len(self._stages))
            patience = self._fine_tune_patience if of_the_last else self._patience
        patient = range(self._first_annealed, self._first_annealed + PATIENT_RATES)
        if patience is not None and stage in patient:
            patience = max(patience, self.least_patience)
        return patience, epochs

    def new_judge(self, stage: int) -> ConvergenceMonitor:
        """Returns a judge of a stage's convergence that has seen nothing yet."""
        patience, _ = self.limits(stage)
        return ConvergenceMonitor(
            mode=self.monitored.mode,
            min_delta=self._min_delta,
            patience=patience or 0,
            start_from_epoch=self._start_from_epoch,
            dtype=keras.config.floatx(),
        )

    def decide(
        self,
        progress: Progress,
        epoch: int,
        logs: Mapping[str, Any],
        *,
        stopped_early: bool = False,
        validates: bool | None = None,
    ) -> float | None:
        """Records one epoch's logs, and notes in `progress` what follows from them.

        Args:
            progress: The `Progress` of the run. Gets a `switch_reason` if the next stage is to
                start, a `stop_reason` if training is to end.
            epoch: Int. The epoch, counted from 0.
            logs: Its logs.
            stopped_early: Bool. Whether EarlyStopping has stopped training in it, which ends any
                stage but the last.
            validates: As `MonitoredValue.read` takes it.

        Returns:
            The monitored value, or None in an epoch without it.
        """
        value = self.monitored.read(logs, validates=validates)
        progress.stage_epochs += 1
        ended = self._why_ended(progress, epoch, value)
        # Stage 0 is as any other `fit`, which EarlyStopping or TerminateOnNaN may stop.
        if progress.stage > 0 and value is not None and not math.isfinite(value):
            if self._has_lower_rate(progress):
                progress.switch_reason = "diverged"
            else:
                progress.stop_reason = _stopped(epoch, f"{self.monitored.name} is {value}")
        elif not self._is_last(progress.stage):
            ended = ended or ("early_stopping" if stopped_early else None)
            self._end_stage(progress, epoch, ended)
        elif ended is not None:
            progress.stop_reason = _stopped(epoch, self.explained(progress, ended))
        return value

    def _end_stage(self, progress: Progress, epoch: int, ended: str | None) -> None:
        if ended is not None and progress.stage >= self._first_annealed:
            if brings_nothing(progress, self._first_annealed):
                why = f"{self.explained(progress, ended)}, and two lower rates have not helped"
                progress.stop_reason = _stopped(epoch, why)
                return
            if only_hurts(progress, self._first_annealed):
                ended = "not_improved"
        progress.switch_reason = ended

    def _has_lower_rate(self, progress: Progress) -> bool:
        return self._first_annealed <= progress.stage < len(self._stages)

    def explained(self, progress: Progress, reason: str) -> str:
        """Returns for the user why the current stage ends."""
        patience, _ = self.limits(progress.stage)
        return why_ended(
            reason, self.monitored.name, patience, progress.stage, progress.stage_epochs
        )

    def min_delta_to_converge(self, values: Sequence[float]) -> tuple[float, int] | None:
        """Returns with which `min_delta`, and when, stage 0 would have ended in half the epochs."""
        return min_delta_to_converge(
            values,
            mode=self.monitored.mode,
            patience=self._patience,
            start_from_epoch=self._start_from_epoch,
        )

    def waiting(self, progress: Progress) -> str | None:
        """Returns for the user how long the stage has waited in vain, or None if it has not."""
        patience, _ = self.limits(progress.stage)
        if progress.switch_reason or progress.stop_reason or patience is None:
            return None
        if progress.judge is None or progress.judge.wait == 0:
            return None
        return what_it_waits_for(self.monitored.name, progress.judge.wait, patience)

    def what_next(self, stage: int, *, falls: int | None = None) -> str:
        """Returns for the user what will end a stage, and what comes then.

        Args:
            stage: Int. The stage.
            falls: As `words.what_next` takes it.
        """
        last = self._is_last(stage)
        lower = self._first_annealed <= stage and not last
        limits = self.limits(stage)
        return what_next(self.monitored.name, *limits, last=last, lower=lower, falls=falls)

    def _why_ended(self, progress: Progress, epoch: int, value: float | None) -> str | None:
        patience, epochs = self.limits(progress.stage)
        if value is not None:
            # Also with no patience at all: the judge knows which weights are a stage's best.
            progress.judge = progress.judge or self.new_judge(progress.stage)
            progress.judge.patience = patience or 0
            if progress.judge.update(epoch, value) and patience is not None:
                return "converged"
        if epochs is not None and progress.stage_epochs >= epochs:
            return "max_frozen_epochs" if progress.stage == 0 else "epochs"
        return None

    def _is_last(self, stage: int) -> bool:
        return stage == len(self._stages)


def _stopped(epoch: int, why: str) -> str:
    return f"Epoch {epoch + 1}: UnfreezeAtConvergence stopped: {why}."
