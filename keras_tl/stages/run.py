"""One `fit` of `UnfreezeAtConvergence`, from its first hook to its last."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import keras

from keras_tl.backbone.selecting import is_built
from keras_tl.internals.callback_list import batch_size_of_fit, callbacks_beside, data_of_fit
from keras_tl.internals.models import keeps_no_optimizer, unset_initial_epoch
from keras_tl.internals.optimizers import steps_in_update, steps_of
from keras_tl.memory import memory_report
from keras_tl.messages import say
from keras_tl.optimizers.groups import learning_rate_of
from keras_tl.stages import early_stops, observers, tensorboard
from keras_tl.stages.annealing import least_patience, shorter_warm_up, warmup_steps
from keras_tl.stages.best_weights import BestWeights
from keras_tl.stages.deciding import Decisions
from keras_tl.stages.interpolating import (
    check_statistics,
    interpolate_from_start,
    why_not_interpolated,
)
from keras_tl.stages.kept_run import KeptRun, folder_of_trial
from keras_tl.stages.monitored_value import MonitoredValue
from keras_tl.stages.neighbours import check_neighbours
from keras_tl.stages.optimizer_use import OptimizerUse
from keras_tl.stages.rate_watch import RateWatch
from keras_tl.stages.staged_model import HOW_TO_CONTINUE, StagedModel
from keras_tl.stages.training_state import TrainingState
from keras_tl.stages.words import nothing_was_judged, what_would_converge, why_still_frozen

if TYPE_CHECKING:
    from keras_tl.callbacks.unfreeze_at_convergence import UnfreezeAtConvergence


class Run:
    """What happens at each hook of one `fit`. Made in `on_train_begin`, so each `fit` has its own.

    It asks `Decisions` when a stage ends, has `TrainingState` enter the next one and `KeptRun` keep
    a backup, and tells the user.

    Args:
        callback: The callback, whose settings it reads.
        exactly: Bool. Whether in each stage just its layers train, or they join those before.
        last: The `Run` of the callback's `fit` before this one, if there was one.
        entered: Bool. Whether the callback has put the model in a stage, so that a plain backbone
            of which all trains is not one that nobody has frozen yet.

    Attributes:
        state: The `TrainingState`.
        best_epoch: Int or None. The epoch whose weights were restored at the end.
        history: The `History` of the `fit`, or None where there is none.
        logged_epochs: Dictionary from names in the logs to the epochs in which they were logged.
    """

    def __init__(
        self,
        callback: UnfreezeAtConvergence,
        *,
        exactly: bool,
        last: Run | None,
        entered: bool = False,
    ):
        model = callback.model
        unset_initial_epoch(model)  # Of a fit that ended before its first epoch.
        self._callback = callback
        self._exactly = exactly
        self._entered = entered
        # Once a run: the stack is walked for it, and Keras has no other way to see who is beside.
        self._beside = callbacks_beside(callback)
        # By identity: a callback may define equality.
        self._position = next(i for i, one in enumerate(self._beside) if one is callback)
        check_neighbours(
            self._beside,
            self._position,
            monitor=callback.monitor,
            patience=callback.patience,
            backup=callback.backup_dir is not None,
            restores=callback.restore_best_weights,
        )
        self._staged = StagedModel(
            model,
            callback.stages,
            exactly=exactly,
            backbone=callback.backbone,
            optimizer=callback.optimizer,
            default_rate=callback.default_rate,
        )
        self._warmup_steps = warmup_steps(callback.warmup_steps, self._staged.finds_rate)
        self._decisions = Decisions(
            self._staged.stages,
            MonitoredValue(callback.monitor, callback.mode, model),
            min_delta=callback.min_delta,
            patience=callback.patience,
            start_from_epoch=callback.start_from_epoch,
            max_frozen_epochs=callback.max_frozen_epochs,
            fine_tune_patience=callback.fine_tune_patience,
            first_annealed=self._staged.first_annealed,
        )
        self._rates = RateWatch(self._beside)
        self.state = TrainingState(
            model,
            self._staged,
            self._decisions,
            self._rates,
            warmup_steps=self._warmup_steps,
            keeps_start=callback.interpolate is not None,
        )
        self.state.finish_rates()  # Of a fit that was interrupted.
        if last is not None:
            self.state.renewed_optimizer = last.state.renewed_optimizer
        self._steps_before = 0
        self._prepared = is_built(model)
        self._optimizer_use: OptimizerUse | None = None
        self._kept: KeptRun | None = None
        self._waiting: str | None = None
        self.best_epoch: int | None = None
        histories = (one for one in self._beside if isinstance(one, keras.callbacks.History))
        self.history = next(histories, None)
        self.logged_epochs: dict[str, list[int]] = {}

    @property
    def stage(self) -> int:
        """Int. The stage that the model is in."""
        return self.state.progress.stage

    @property
    def _model(self) -> keras.Model:
        # Not kept: on JAX, reading it from a callback gives its variables the values that `fit`
        # has. Each hook reads it before it looks at a variable.
        return self._callback.model

    # The hooks.

    def begin(self) -> None:
        """Finds the stage that the model is in, or resumes the run in the backup."""
        first, after = observers.Observer(), observers.Observer()
        first.on_epoch_end = self._pause_warm_up
        around = early_stops.observers(self._early_stopping())
        around = [(self._beside[0], first, after), *around, *self._rates.observers()]
        observers.place(self._callback, around)
        self._freeze_untouched()
        self.state.begin_stage(0)
        if self._prepared:
            self._find_stage()
        if self.stage == 0:
            self._staged.check_renewable(self._warmup_steps)
            self._staged.check_frozen_stage()
        self._staged.try_switches(self.stage)
        self._optimizer_use = OptimizerUse(self._model)
        if self._callback.backup_dir is not None:
            self._kept = KeptRun(
                folder_of_trial(self._callback.backup_dir, self._beside),
                self._callback,
                self._staged,
                self.state,
                exactly=self._exactly,
            )
            self._kept.resume(self._say)
        resumed = self._kept is not None and self._kept.epochs_done > 0
        if self._prepared and not resumed:
            self._say_stage()

    def begin_epoch(self, epoch: int) -> None:
        """Switches, if the last epoch has decided so.

        Not sooner: at that epoch's end the callbacks behind ours still see what was trained.
        """
        unset_initial_epoch(self._model)
        reason = self.state.progress.switch_reason
        if reason is not None:
            self._switch(epoch, reason)
        self.state.lower_rate(self.stage, epoch, self._epochs_left(epoch))
        if self.stage == 0 and epoch == (self._callback.params or {}).get("epochs", 0) // 2:
            self._say_what_would_converge(epoch)
        if self._waiting is not None:
            self._say(f"Epoch {epoch}: UnfreezeAtConvergence waits: {self._waiting}.")
            self._waiting = None
        self._rates.epoch = epoch
        self._steps_before = steps_of(self._model.optimizer)

    def _epochs_left(self, epoch: int) -> int | None:
        epochs = (self._callback.params or {}).get("epochs")
        return None if epochs is None else epochs - epoch

    def begin_step(self, batch: int) -> None:
        """Does what a step needs; a second call for the same one changes nothing."""
        if batch > 0:
            self._prepare()
        warm_up = self.state.warm_up
        # On JAX, reading the model has `fit` give it its values, and wait for them: only if needed.
        if warm_up is not None and self._model and warm_up.before_step():
            self.state.warm_up = None

    def _pause_warm_up(self, *_: Any) -> None:
        """Gives the model its full rates, before any callback reads or scales them."""
        warm_up = self.state.warm_up
        if warm_up is not None and self._model:
            warm_up.pause()

    def end_epoch(self, epoch: int, logs: dict[str, Any]) -> None:
        """Decides what follows from an epoch, and adds to its logs."""
        self._pause_warm_up()  # Where hooks are called by hand, nothing is before this one.
        model, state = self._model, self.state
        stopped_early = early_stops.stopped_early(model, logs)
        self._prepare()
        if self._optimizer_use is not None:
            self._optimizer_use.check(model, frozen=self.stage == 0)
        data = data_of_fit(self._callback)
        validates = "validation_data" in data if data else None
        # Counted, for of a generator nobody else knows.
        steps = steps_of(model.optimizer) - self._steps_before
        accumulated = steps_in_update(self._staged.optimizers())
        state.updates = steps / accumulated if steps else None
        self._decisions.least_patience = least_patience(self._warmup_steps * accumulated, steps)
        value = self._decisions.decide(
            state.progress, epoch, logs, stopped_early=stopped_early, validates=validates
        )
        if value is not None and self._callback.restore_best_weights:
            state.keep_best(epoch, value)
        if value is not None and (self._callback.params or {}).get("verbose"):
            # Said before the next epoch: the progress bar of this one is not finished yet.
            self._waiting = self._decisions.waiting(state.progress)
        logs.update(self._staged.learning_rates(self.stage), stage=self.stage)
        for name in logs:
            self.logged_epochs.setdefault(name, []).append(epoch)
        self._rates.check(model)
        tensorboard.write_parameters(self._beside, epoch, model)
        if stopped_early and state.progress.switch_reason is not None:
            model.stop_training = False
        if state.progress.stop_reason is not None:
            model.stop_training = True
        if self._kept is not None:
            self._kept.save(epoch + 1)

    def end(self) -> None:
        """Restores the best weights of the run, and says how it ended."""
        unset_initial_epoch(self._model)
        observers.remove(self._callback)
        self.state.finish_rates()
        self._say_end()
        self._restore_best()
        if self._kept is not None and self._callback.delete_checkpoint:
            self._kept.delete()

    # Before the first step.

    def _freeze_untouched(self) -> None:
        in_stage = self._model.optimizer is self.state.renewed_optimizer or (
            self._entered and self._prepared and self._staged.stage() > 0
        )
        if in_stage or not self._staged.freeze_untouched():
            return
        message = f"UnfreezeAtConvergence froze {self._staged.names}, which was trainable."
        if keeps_no_optimizer(self._model):
            message += (
                f" If this {type(self._model).__name__} was saved in a fine-tuning stage, its "
                f"file does not tell. {HOW_TO_CONTINUE}"
            )
        self._say(message)

    def _prepare(self) -> None:
        """Does what needs a built model: on TensorFlow the first step builds a subclassed one."""
        if self._prepared:
            return
        self._prepared = True
        self._staged.check_stages()
        self._find_stage()
        self._staged.try_switches(self.stage)
        self._say_stage()

    def _find_stage(self) -> None:
        """Goes on in the stage that the model is in, as one loaded from it."""
        if self._callback.interpolate is not None:
            check_statistics(self._model)
        self.state.begin_stage(self._staged.stage())

    # The switch.

    def _switch(self, epoch: int, reason: str) -> None:
        why = self._decisions.explained(self.state.progress, reason)
        data, left = data_of_fit(self._callback), self._epochs_left(epoch)
        warm_up = self._warmup_steps
        updates = self.state.updates
        if self._callback.warmup_steps is None and left and updates and warm_up:
            warm_up = shorter_warm_up(warm_up, int(left * updates))
        transition = self.state.switch(epoch, reason, data, epochs_left=left, warmup_steps=warm_up)
        if self._optimizer_use is not None:
            self._optimizer_use.begin(self._model)
        if self.stage > self._staged.first_annealed:
            what = "goes back to the best weights, and to a third of the learning rate, for"
        else:
            what = f"begins stage {self.stage} of" if self._exactly else "unfreezes"
        block = transition.describe(
            f"{what} {self._staged.names}",
            why,
            self._decisions.what_next(self.stage, falls=self.state.falls),
            str(memory_report(self._model, batch_size=batch_size_of_fit(self._callback))),
        )
        self._say(block)
        self._say_calibration()
        tensorboard.write_switch(self._beside, epoch, block)
        for callback in self._restarting():
            # In its `on_train_begin` Keras has a callback forget what it has judged so far.
            callback.on_train_begin({})

    def _early_stopping(self) -> list[keras.callbacks.EarlyStopping]:
        """The EarlyStopping callbacks before ours, which run in stages as it does."""
        before = self._beside[: self._position]
        return [one for one in before if isinstance(one, keras.callbacks.EarlyStopping)]

    def _restarting(self) -> list[keras.callbacks.Callback]:
        """The callbacks that judge each stage by itself."""
        plateau = keras.callbacks.ReduceLROnPlateau
        return self._early_stopping() + [one for one in self._beside if isinstance(one, plateau)]

    def _say_calibration(self) -> None:
        done = self.state.calibration
        if done is not None:
            self._say(
                f'UnfreezeAtConvergence calibrates "{done.layer}", which was too sure: logits '
                f"divided by {done.temperature:.3g}, val_loss {done.before:.4g} -> "
                f"{done.after:.4g}."
            )

    # The end.

    def _restore_best(self) -> None:
        best = self.state.progress.best
        if best is None or best.epoch is None:
            return
        best.restore_run()
        self.best_epoch = best.epoch
        self._say(
            "UnfreezeAtConvergence restored the best weights, of epoch "
            f"{best.epoch + 1}: {self._callback.monitor} {best.measured:.4g}."
        )
        if self._callback.interpolate is not None:
            self._interpolate(best, self._callback.interpolate)
        # A copy of the model's weights, which would stay in memory with the callback.
        self.state.progress.best = None

    def _interpolate(self, best: BestWeights, fraction: float) -> None:
        model, monitor = self._model, self._callback.monitor
        why_not = why_not_interpolated(model, best)
        if why_not:
            warnings.warn(f"UnfreezeAtConvergence did not interpolate: {why_not}", stacklevel=5)
            return
        data = data_of_fit(self._callback)
        values = interpolate_from_start(model, best, fraction, data, monitor)
        effect = "" if values is None else f": {monitor} {values[0]:.4g} -> {values[1]:.4g}"
        self._say(
            f"UnfreezeAtConvergence interpolated, {fraction:.4g} of the way from the head's best "
            f"weights to these{effect}."
        )

    # Messages.

    def _say_stage(self) -> None:
        training = self._staged.backbones.names_of(self._model.trainable_weights)
        if self.stage == 0 and training:
            self._say(
                f"UnfreezeAtConvergence: of {self._staged.names} these layers train in stage 0 "
                f"already: {', '.join(training)}."
            )
        if self.stage > 0:
            rate = learning_rate_of(self._model.optimizer)
            self._say(
                f"UnfreezeAtConvergence continues fine-tuning {self._staged.names}, which is "
                f"trainable already, with learning rate {rate:.4g}."
            )
            self._warn_of_rate(rate)

    def _warn_of_rate(self, rate: float) -> None:
        """Warns of a rate that is higher than asked for, as after `compile` between two fits."""
        asked = self._staged.rate_asked_for(self.stage)
        # A lower one may be what ReduceLROnPlateau has left.
        if asked is not None and rate > 1.01 * asked:
            warnings.warn(
                f"UnfreezeAtConvergence continues fine-tuning at {rate:.4g}, the learning rate of "
                f"the model's optimizer, and not at {asked:.4g}, which a switch would set. Compile "
                f"the model with {asked:.4g}, or call this callback's "
                f"`enter_stage(model, {self.stage})` before `fit`.",
                stacklevel=5,
            )

    def _say_end(self) -> None:
        progress, stages = self.state.progress, len(self._staged.stages)
        if progress.stop_reason is not None:
            self._say(progress.stop_reason)
        if progress.stage == 0:
            message = why_still_frozen(
                self._callback.monitor,
                self._callback.patience,
                stopped=self._model.stop_training,
                decided=progress.switch_reason is not None,
                seen=self._decisions.monitored.seen,
                hint=self._what_would_converge(),
            )
            warnings.warn(message, stacklevel=4)
            return
        if not self._decisions.monitored.seen and progress.best is None:
            warnings.warn(nothing_was_judged(self._callback.monitor), stacklevel=4)
        if progress.stage < stages and progress.stop_reason is None:
            where, others = f"in stage {progress.stage} of {stages}", "the others"
            if progress.stage >= self._staged.first_annealed:
                rate = learning_rate_of(self._model.optimizer)
                where, others = f"at learning rate {rate:.4g}", "lower ones"
            self._say(
                f"UnfreezeAtConvergence: training ended {where}. Pass more `epochs` to `fit` for "
                f"{others}."
            )

    def _say_what_would_converge(self, epoch: int) -> None:
        """Says it half way, when there is still time to start again."""
        hint = self._what_would_converge().strip()
        if hint and self._callback.params.get("verbose"):
            self._say(f"Epoch {epoch}: UnfreezeAtConvergence waits, at half of the epochs. {hint}")

    def _what_would_converge(self) -> str:
        """Returns the `min_delta` with which the head would have converged, if there is one."""
        monitor, values = self._callback.monitor, []
        if self.history is not None and self.logged_epochs.get(monitor, [1])[0] == 0:
            values = self.history.history.get(monitor, [])
        found = self._decisions.min_delta_to_converge(values)
        return what_would_converge(monitor, found)

    def _say(self, message: str) -> None:
        if self._callback.verbose:
            say(message)
