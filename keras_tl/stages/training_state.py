"""What changes in a model and its run as the stages go by, and what a snapshot must hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_tl.backbone import freezing
from keras_tl.backbone.changeable import changeable_weights
from keras_tl.backbone.selecting import variables_of
from keras_tl.backup.run_backup import RunSnapshot
from keras_tl.internals.processes import of_chief
from keras_tl.optimizers.groups import learning_rate_of, newest_group
from keras_tl.stages import switching
from keras_tl.stages.best_weights import BestWeights
from keras_tl.stages.calibrating import Calibration, calibrate
from keras_tl.stages.deciding import Decisions
from keras_tl.stages.falling import has_fallen, rate_before, rise
from keras_tl.stages.progress import Progress, read
from keras_tl.stages.rate_watch import RateWatch, rates_set
from keras_tl.stages.staged_model import StagedModel
from keras_tl.stages.transition import Transition
from keras_tl.stages.warm_up import WarmUp, give_full_rates


class TrainingState:
    """The state of a model that trains in stages, between its switches too.

    Args:
        model: The compiled model.
        staged: The `StagedModel` of it.
        decisions: The `Decisions` about its stages.
        rates: The `RateWatch` that is told which rates a switch has set.
        warmup_steps: Int. Steps of warm-up after a switch.
        keeps_start: Bool. Whether the weights that fine-tuning starts from are kept.

    Attributes:
        progress: The `Progress`.
        warm_up: The `WarmUp` of the last switch, or None once it is over.
        renewed_optimizer: The optimizer that the last switch has made, or None.
        calibration: The `Calibration` of the last switch, or None.
        updates: Float or None. How many updates of the weights the last epoch had, if known.
        falls: Int or None. In how many epochs, all that are left, the rate falls, if it does.
    """

    def __init__(
        self,
        model: keras.Model,
        staged: StagedModel,
        decisions: Decisions,
        rates: RateWatch,
        *,
        warmup_steps: int,
        keeps_start: bool = False,
    ):
        self.progress = Progress()
        self.warm_up: WarmUp | None = None
        self.renewed_optimizer: keras.Optimizer | None = None
        self.calibration: Calibration | None = None
        self.updates: float | None = None
        self.falls: int | None = None
        self._tries_since: int | None = None  # The first epoch of a stage that tries a rate.
        self._model = model
        self._staged = staged
        self._decisions = decisions
        self._rates = rates
        self._warmup_steps = warmup_steps
        self._keeps_start = keeps_start
        self._note_weights()

    def begin_stage(self, stage: int) -> None:
        """Notes that the model is in a stage, of which nothing has been seen yet."""
        self.progress.begin_stage(stage)
        self._note_weights()

    def _note_weights(self) -> None:
        self._changeable = changeable_weights(self._model)
        self._trained = list(self._model.trainable_weights)

    def finish_rates(self) -> None:
        """Gives the model the rates of its stage, as a warm-up or the end of `fit` lowers them."""
        give_full_rates(self._staged.optimizers())
        self.warm_up = None
        for optimizer in self._staged.optimizers():
            rise(optimizer)

    def keep_best(self, epoch: int, value: float) -> None:
        """Copies the weights if those of this epoch are the best of the stage or of the run."""
        progress = self.progress
        progress.best = progress.best or BestWeights(self._decisions.monitored.mode)
        best_of_stage = progress.judge is not None and progress.judge.best_epoch == epoch
        progress.best.update(epoch, value, self._changeable, best_of_stage=best_of_stage)

    # The switch.

    def switch(
        self,
        epoch: int,
        reason: str,
        data: Mapping[str, Any],
        *,
        epochs_left: int | None,
        warmup_steps: int,
    ) -> Transition:
        """Goes to the next stage, or raises and changes nothing.

        Args:
            epoch: Int. The first epoch of the new stage.
            reason: String. Why the old one has ended.
            data: What `fit` trains and validates with, by argument.
            epochs_left: Int or None. How many epochs `fit` still has, if that is known.
            warmup_steps: Int. Steps of warm-up.

        Returns:
            The `Transition`, which is noted too.
        """
        self.finish_rates()  # Groups that go on keep those they have.
        # Flags and optimizer are others after the switch: what they were is read before it.
        before = list(self._model.trainable_weights)
        rate = learning_rate_of(self._model.optimizer)
        epoch_restored, value = self.progress.best_of_stage()
        stage = self.progress.stage + 1
        self._staged.enter(stage, self.progress.best)
        self.lower_rate(stage, epoch, epochs_left)
        self.renewed_optimizer = self._model.optimizer
        # Right after the switch: a warm-up lowers the rates, which are no longer the stage's then.
        self._rates.begin(rates_set(self._model))
        transition = self._record(epoch, reason, before, rate)
        self.progress.transitions.append(transition)
        self.begin_stage(transition.stage)
        offset = self._carry_best_over(before)
        self.calibration = None
        if epoch_restored is not None and value is not None:
            self.calibration = self._calibrate(before, data, epoch_restored, value + offset)
        self._keep_start()
        if warmup_steps:
            self.warm_up = WarmUp(self._staged.optimizers(), warmup_steps)
        return transition

    def lower_rate(self, stage: int, epoch: int, epochs_left: int | None) -> None:
        """Lowers the rate of a stage that tries one, if `fit` ends soon.

        Args:
            stage: Int. The stage.
            epoch: Int. The epoch that begins.
            epochs_left: Int or None. How many epochs `fit` still has, if that is known.
        """
        self.falls = None
        if epochs_left is None or stage < self._staged.first_annealed:
            return
        if self._tries_since is None:
            self._tries_since = epoch
        of = epochs_left + epoch - self._tries_since
        self.falls = self._staged.lower_rate(epochs_left, of)

    def _record(
        self, epoch: int, reason: str, before: list[keras.Variable], rate: float
    ) -> Transition:
        after = self._model.trainable_weights
        backbones, judge = self._staged.backbones, self.progress.judge
        return Transition(
            epoch=epoch,
            stage=self.progress.stage + 1,
            reason=reason,
            value=None if judge is None else judge.best,
            learning_rate_before=rate,
            learning_rate_after=learning_rate_of(self._model.optimizer),
            trainable_before=freezing.count_params(before),
            trainable_after=freezing.count_params(after),
            layers=backbones.names_of(freezing.without(after, before)),
            frozen=backbones.names_of(freezing.without(before, after)),
            cannot_train=tuple(weight.path for weight in backbones.cannot_train()),
            group_learning_rates=self._staged.group_learning_rates(),
            unfrozen_early=backbones.names_of(freezing.without(before, self._trained)),
        )

    def _carry_best_over(self, before: list[keras.Variable]) -> float:
        """Makes the best value comparable: regularizers count for weights that train only.

        Returns what the same weights' value differs by in the new stage.
        """
        if self.progress.best is None:
            return 0.0
        offset = 0.0
        if self._decisions.monitored.name in ("loss", "val_loss"):
            # Of the weights as they are now, also where the best of the run has others: so values
            # of two stages compare as if all regularizers counted in both.
            after = self._model.trainable_weights
            offset += switching.regularization_loss(freezing.without(after, before))
            offset -= switching.regularization_loss(freezing.without(before, after))
        # All processes must choose the same best weights, and rounding may differ between them.
        offset = float(of_chief(offset))
        self.progress.best.begin_stage(self._changeable, offset)
        return offset

    def _calibrate(
        self, trained: list[keras.Variable], data: Mapping[str, Any], epoch: int, value: float
    ) -> Calibration | None:
        """Calibrates the head before rates are tried, where the validation loss judges them.

        Args:
            trained: List of the weights that the head's stage has trained.
            data: What `fit` trains and validates with, by argument.
            epoch: Int. The epoch of which the model has the weights.
            value: Float. What `fit` has measured of them.
        """
        best, tries = self.progress.best, self.progress.stage == self._staged.first_annealed
        if not tries or best is None or self._decisions.monitored.name != "val_loss":
            return None
        done = calibrate(self._model, data, trained, measured=value)
        if done is not None:
            best.update(epoch, done.after, self._changeable, best_of_stage=False)
        return done

    def _keep_start(self) -> None:
        if not self._keeps_start:
            return
        best = self.progress.best = self.progress.best or BestWeights(
            self._decisions.monitored.mode
        )
        # A model that was loaded in a later stage has not started from what it has now.
        if self.progress.stage == 1 or best.start is not None:
            best.keep_start(self._changeable)

    # Snapshots.

    def to_data(self) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
        """Returns what JSON can hold, and arrays, besides the values of model and optimizer."""
        state, arrays = self.progress.to_data(variables_of(self._model))
        if self.warm_up is None:
            state["warm_up"] = None
        else:
            state["warm_up"], state["warmup_steps"] = self.warm_up.get_state(), self.warm_up.steps
        state["updates"] = self.updates
        state["rate_before_fall"] = rate_before(newest_group(self._model.optimizer))
        state["schedule_starts"] = switching.schedule_starts(self._model)
        return state, arrays

    def restore(self, snapshot: RunSnapshot) -> None:
        """Becomes what a snapshot says, or raises a ValueError and changes nothing."""
        progress = Progress.from_data(
            snapshot.state,
            snapshot.arrays,
            variables_of(self._model),
            stages=len(self._staged.stages),
            mode=self._decisions.monitored.mode,
        )
        with switching.all_or_nothing(self._model, variables_of(self._model)):
            rates = self._enter_stages_up_to(progress.stage)
            # Flags and groups first: the optimizer's variables are those of what trains.
            switching.restore_training(
                self._model, snapshot.arrays["model"], snapshot.arrays["optimizer"]
            )
            switching.set_schedule_starts(self._model, self._schedule_starts(snapshot.state))
            warm_up = self._warm_up_of(snapshot.state)
        if progress.judge_state is not None:
            progress.judge = self._decisions.new_judge(progress.stage)
            progress.judge.set_state(progress.judge_state)
        self.progress = progress
        tries = [one for one in progress.transitions if one.stage == self._staged.first_annealed]
        self._tries_since = tries[-1].epoch if tries else None
        self.warm_up = warm_up
        if "updates" in snapshot.state:  # Not in one of version 0.2.
            self.updates = read(snapshot.state, "updates", float, type(None))
            full = read(snapshot.state, "rate_before_fall", float, type(None))
            if full is not None:
                has_fallen(newest_group(self._model.optimizer), full)
        self._note_weights()
        self._rates.begin(rates)
        self._rates.follow_schedules(self._model)
        self.renewed_optimizer = self._model.optimizer

    def _enter_stages_up_to(self, stage: int) -> dict[str, Any]:
        """Goes through the switches of a run again. Returns the rates that the last one has set."""
        now = self.progress.stage
        if now > stage:
            self._staged.go_back()
            now = 0
        switching.build_optimizer(self._model)
        rates: dict[str, Any] = {}
        for number in range(now + 1, stage + 1):
            self._staged.enter(number)
            # As the switch has set them: those of the snapshot may be lower.
            rates = rates_set(self._model)
        return rates

    def _schedule_starts(self, state: Mapping[str, Any]) -> dict[str, int]:
        known = switching.schedule_starts(self._model)
        if "schedule_starts" not in state:
            return known  # A snapshot of version 0.1.
        starts = read(state, "schedule_starts", dict)
        if starts.keys() != known.keys():
            raise ValueError("its 'schedule_starts' are of other parameter groups.")
        # Below 0 where a schedule began before its group's step count did.
        return {group: read(starts, group, int) for group in starts}

    def _warm_up_of(self, state: Mapping[str, Any]) -> WarmUp | None:
        rates = read(state, "warm_up", dict, type(None))
        if rates is None:
            return None
        # Of version 0.2, the number is always that of the callback.
        steps = read(state, "warmup_steps", int) if "warmup_steps" in state else self._warmup_steps
        optimizers = self._staged.optimizers()
        known = {str(index) for index in range(len(optimizers) if self._warmup_steps else 0)}
        for index in rates:
            if index not in known or read(rates, index, float) <= 0:
                raise ValueError("its 'warm_up' is not that of such a run.")
        if not 0 < steps <= self._warmup_steps:
            raise ValueError(f"its 'warmup_steps' is {steps}.")
        warm_up = WarmUp(optimizers, steps)
        warm_up.set_state(rates)
        return warm_up
