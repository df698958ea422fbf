"""A callback that fine-tunes a backbone once the head on it has converged, in one `fit`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_tl.arguments import check_can_be_set, check_count, check_min_delta, check_monitor
from keras_tl.backbone import freezing
from keras_tl.backbone.backbones import BackboneOf, changeable_weights, names_of_layers
from keras_tl.backbone.selecting import Selection, is_built
from keras_tl.backup.run_backup import RunBackup, RunSnapshot
from keras_tl.backup.run_identity import identity_of
from keras_tl.internals.callback_list import callbacks_beside, data_of_fit
from keras_tl.internals.models import keeps_no_optimizer, set_initial_epoch, unset_initial_epoch
from keras_tl.internals.processes import of_chief
from keras_tl.messages import say
from keras_tl.optimizers.learning_rates import LearningRate
from keras_tl.stages import early_stops, observers, switching, tensorboard
from keras_tl.stages.best_weights import BestWeights
from keras_tl.stages.convergence import ConvergenceMonitor
from keras_tl.stages.monitored_value import MonitoredValue
from keras_tl.stages.neighbours import check_neighbours
from keras_tl.stages.optimizer_use import OptimizerUse
from keras_tl.stages.progress import Progress, read
from keras_tl.stages.rate_watch import RateWatch, rates_set
from keras_tl.stages.stage import DEFAULT_RATE, Stage, check_rate_is_default, check_stages
from keras_tl.stages.staged_model import GO_ON, StagedModel
from keras_tl.stages.transition import Transition
from keras_tl.stages.warm_up import WarmUp, learning_rate_of
from keras_tl.stages.words import what_next, why_ended, why_still_frozen


class UnfreezeAtConvergence(keras.callbacks.Callback):
    """Unfreezes the backbone when the head has converged, and goes on with a low learning rate.

    In one `fit`: the head trains on the frozen backbone (stage 0) until `monitor` stops improving.
    Then the best weights of the stage are restored, the backbone's layers are unfrozen, optimizer
    and train step are renewed with `learning_rate`, and fine-tuning (stage 1) goes on. The best
    weights of the whole run are what remains.

    The epoch's logs, and so `History`, get `learning_rate` and `stage`. Place other callbacks that
    stop training before this one: an `EarlyStopping` before it that stops training in stage 0
    counts as convergence, and starts over in stage 1. A stop by any other callback ends training.

    A schedule that is given for a stage, also to the head, begins at that stage's switch; one that
    the model was compiled with goes on. A callback that sets learning rates of its own undoes those
    of the switch, and is warned of.

    Without a `FrozenBackbone`, pass `backbone`. A plain backbone that is wholly trainable when
    `fit` starts is frozen first. Its BatchNormalization layers are then never unfrozen: in a plain
    model `trainable=False` is all that keeps Keras from updating their moving statistics, since
    `fit` overrides a `training=False` with which a Functional model called them. Only a
    `FrozenBackbone` can train their gamma and beta.

    A model whose layers in question are trainable already, such as one loaded after the switch,
    starts in stage 1; with `stages` in the first in which just the layers that are trainable train.
    A plain backbone without BatchNormalization is trainable then as it was before it was ever
    frozen: it goes on if the optimizer has trained it. A loaded KerasHub task knows neither, and
    starts in stage 0.

    A model compiled with a `GroupOptimizer` keeps its groups: what is unfrozen joins the group that
    `assign` says, with that group's learning rate, and groups that nothing joins keep their state.

    Args:
        learning_rate: Float, `LearningRateSchedule` or callable, as an optimizer takes it; or a
            dictionary from names of layers to floats, such as `layerwise_learning_rates` returns.
            The learning rate of stage 1. Defaults to `1e-5`.
        backbone: The layer, model or list of layers to unfreeze; their names in the model (of
            nested ones `outer/inner`); or a function of the model that returns them. Names and
            functions also serve where the model is made later, as in a KerasTuner search. Defaults
            to every `FrozenBackbone` in the model.
        layers: Which layers of the backbone are unfrozen; see `FrozenBackbone.unfreeze`. Defaults
            to `"all"`.
        train_batchnorm: Bool. Whether BatchNormalization layers in a `FrozenBackbone` train their
            gamma and beta. Their moving statistics never move. Defaults to `False`.
        stages: List of `Stage`, or of dictionaries from `Stage.to_dict`: what trains in stages 1,
            2 and so on, instead of `layers`, `learning_rate`, `train_batchnorm` and
            `head_learning_rate`. Defaults to `None`.
        monitor: String. The quantity in the logs to judge convergence by. Defaults to `"val_loss"`.
        mode: One of `"auto"`, `"min"`, `"max"`, as in `keras.callbacks.EarlyStopping`.
        min_delta: Float. Smallest change that counts as an improvement when convergence is judged.
            Weights of a smaller improvement are kept as the best of the run all the same. Defaults
            to `0.0`.
        patience: Int. Epochs without improvement after which the head has converged; and any
            stage but the last that has neither `patience` nor `epochs` itself. Defaults to `3`.
        start_from_epoch: Int. Epochs before it are not judged. Defaults to `0`.
        max_frozen_epochs: Int or None. Epochs of `fit` after which stage 0 ends even if the head
            has not converged. Defaults to `None`.
        optimizer: A `keras.optimizers.Optimizer` that is not built, whose copy is for stage 1, with
            its own learning rate (`learning_rate` is then to be left out). It stays as it is, so
            each `fit` begins with what was given. Defaults to a copy of the compiled one's
            configuration. Each of `stages` takes a copy, with its learning rate.
        head_learning_rate: Float, `LearningRateSchedule` or callable. The learning rate in stage 1
            of what trains in stage 0, which then keeps its optimizer's state, as the group "head"
            of a `GroupOptimizer`; the backbone joins as the group "backbone", with `learning_rate`.
            The logs get `learning_rate_head` and `learning_rate_backbone` (0 while it is frozen;
            with `stages`, `learning_rate_backbone_1` and so on, for what joined in each).
            Defaults to `None`: one new optimizer with `learning_rate` for all.
        warmup_steps: Int. Steps after a switch in which the learning rate of what is new rises
            linearly from zero to the stage's. Defaults to `0`.
        fine_tune_patience: Int or None. Epochs without improvement in the last stage after which
            training stops. Defaults to `None`: training goes on to the last epoch.
        restore_best_weights: Bool. Whether the best weights of a stage are restored before the
            next, and those of the whole run at its end. Values are compared across a switch after
            adding what regularizers of the unfrozen layers put on the loss. Defaults to `True`.
        backup_dir: String or path. A folder in which the whole state of the run is kept after each
            epoch: weights, optimizer, stage, counters, best weights. The same `fit`, started again
            after it was interrupted or killed, goes on from there with the next epoch. Weights and
            random seeds of the model are restored bit for bit; data that is shuffled at random
            starts over. `BackupAndRestore` is not needed. Of several processes that train together,
            all must see the folder; the first writes. A relative path is taken from the folder that
            is current when the callback is made. Defaults to `None`: no backup.

            A backup knows its run, and another run does not go on from it: that is an error that
            says what differs. Compared are the model's configuration; optimizer, loss and metrics;
            the settings of this callback and which weights train in each stage; the seed of
            `keras.utils.set_random_seed`, if both have set one, and then also what a frozen
            backbone has learnt, which is otherwise no more than a warning;
            the number of steps in an epoch, and of arrays (also those, and the file names, that a
            `tf.data.Dataset` is made from) the shapes and the samples in any order; the backend and
            the number of processes. Not compared are initial weights that are drawn at random,
            names that Keras counts up, `epochs`, `backbone`, `delete_checkpoint`, `verbose`, other
            callbacks, and data that only reading shows, such as a generator's.
        save_freq: `"epoch"`, the only one of `BackupAndRestore`'s settings from which a run can go
            on exactly. Defaults to `"epoch"`.
        delete_checkpoint: Bool. Whether the backup is deleted when training has ended. Defaults to
            `True`.
        verbose: 0 or 1. Whether a switch and the end are reported. Defaults to `1`.

    Attributes:
        stage: Int. The stage that the model is in: 0 while the backbone is frozen, then 1, ...
        stages: List of `Stage`, those after stage 0.
        transitions: List of `Transition`, the switches of the last `fit`.
        decided: Bool. Whether the next epoch begins with a switch.
        best_epoch: Int or None. The epoch, counted from 0, whose weights the last `fit` ended with
            because they were the best.
        history: The `History` of the last `fit`, or None before the first.
        logged_epochs: Dictionary from the names in the logs to the epochs of the last `fit`,
            counted from 0, in which they were logged. `validation_freq` makes these differ.

    Raises:
        ValueError: For an argument that is out of range; when `fit` starts, if the model has no
            `FrozenBackbone` and `backbone` is None, if `backbone` is not in the model, or if
            `layers` selects nothing in it; and at the first epoch's end, if `monitor` is not in the
            logs.

    Example:

    >>> import numpy as np
    >>> from keras_tl import FrozenBackbone
    >>> pretrained = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model = keras.Sequential([FrozenBackbone(pretrained), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> fine_tuning = UnfreezeAtConvergence(learning_rate=1e-5, max_frozen_epochs=2, verbose=0)
    >>> x, y = np.ones((32, 8)), np.ones((32, 1))
    >>> history = model.fit(
    ...     x, y, epochs=4, validation_split=0.5, callbacks=[fine_tuning], verbose=0
    ... )
    >>> history.history["stage"]
    [0, 0, 1, 1]

    References:

    - [Transfer learning and fine-tuning](https://keras.io/guides/transfer_learning/)
    - Kumar et al., 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
      Out-of-Distribution"
    """

    # Of one `fit`, set when it begins: a copy has none of it.
    _beside: list[keras.callbacks.Callback]
    _staged: StagedModel
    _monitored: MonitoredValue
    _optimizer_use: OptimizerUse | None
    _backup: RunBackup | None
    _changeable: list[keras.Variable]
    _trained: list[keras.Variable]
    _prepared: bool
    _rates: RateWatch
    _done_before: int
    _identity: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Has the hook of a subclass do what ours does, whether or not it calls `super()`."""
        super().__init_subclass__(**kwargs)
        hook = cls.on_train_batch_begin

        @functools.wraps(hook)
        def on_train_batch_begin(
            self: UnfreezeAtConvergence, batch: int, logs: dict[str, Any] | None = None
        ) -> None:
            self._before_step(batch)
            hook(self, batch, logs)

        cls.on_train_batch_begin = on_train_batch_begin  # type: ignore[method-assign]

    def __init__(
        self,
        learning_rate: LearningRate | Mapping[str, float] = DEFAULT_RATE,
        *,
        backbone: BackboneOf | None = None,
        layers: Selection = "all",
        train_batchnorm: bool = False,
        stages: Sequence[Stage | Mapping[str, Any]] | None = None,
        monitor: str = "val_loss",
        mode: str = "auto",
        min_delta: float = 0.0,
        patience: int = 3,
        start_from_epoch: int = 0,
        max_frozen_epochs: int | None = None,
        optimizer: keras.Optimizer | None = None,
        head_learning_rate: LearningRate | None = None,
        warmup_steps: int = 0,
        fine_tune_patience: int | None = None,
        restore_best_weights: bool = True,
        backup_dir: str | os.PathLike[str] | None = None,
        save_freq: str = "epoch",
        delete_checkpoint: bool = True,
        verbose: int = 1,
    ):
        super().__init__()
        only = Stage(
            layers,
            learning_rate,
            head_learning_rate=head_learning_rate,
            train_batchnorm=train_batchnorm,
        )
        self.stages = [only] if stages is None else check_stages(stages, instead_of=only)
        if optimizer is not None:
            switching.check_fresh(optimizer)
            if stages is None:
                check_rate_is_default(only, optimizer)
        check_count("warmup_steps", warmup_steps)
        if warmup_steps:
            rates = [stage.learning_rate for stage in self.stages]
            check_can_be_set("warmup_steps", *rates, optimizer)
        check_monitor(monitor, mode)
        check_min_delta(min_delta)
        check_count("patience", patience)
        check_count("start_from_epoch", start_from_epoch)
        if max_frozen_epochs is not None:
            check_count("max_frozen_epochs", max_frozen_epochs, at_least=1)
        if fine_tune_patience is not None:
            check_count("fine_tune_patience", fine_tune_patience)
        if save_freq != "epoch":
            raise ValueError(
                '`save_freq` must be "epoch": a run can go on only from the end of an epoch. '
                f"Received: save_freq={save_freq!r}."
            )
        self.backbone = backbone
        self.monitor = monitor
        self.mode = mode
        self.min_delta = min_delta
        self.patience = patience
        self.start_from_epoch = start_from_epoch
        self.max_frozen_epochs = max_frozen_epochs
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.fine_tune_patience = fine_tune_patience
        self.restore_best_weights = restore_best_weights
        # Of a relative path, a `chdir` would make another folder.
        self.backup_dir = None if backup_dir is None else os.path.abspath(backup_dir)
        self.delete_checkpoint = delete_checkpoint
        self.verbose = verbose
        self.best_epoch: int | None = None
        self.history: keras.callbacks.History | None = None
        self.logged_epochs: dict[str, list[int]] = {}
        self._progress = Progress()
        self._warm_up: WarmUp | None = None
        self._scheduled = stages is not None
        self._renewed_optimizer: keras.Optimizer | None = None
        self._as_new = {name: one for name, one in vars(self).items() if name not in _SETTINGS}

    @property
    def stage(self) -> int:
        """The stage that the model is in."""
        return self._progress.stage

    @property
    def transitions(self) -> list[Transition]:
        """The switches of the last `fit`."""
        return self._progress.transitions

    @property
    def decided(self) -> bool:
        """Whether the next epoch begins with a switch."""
        return self._progress.switch_reason is not None

    # Copies, as KerasTuner and scikit-learn make them: with these settings, and of no run.

    def __getstate__(self) -> dict[str, Any]:
        state = self._copied_attributes()
        # Names, for a file holds no layer of a model that is somewhere else.
        state["backbone"] = names_of_layers(self.backbone)
        state["stages"] = [
            dataclasses.replace(one, learning_rate=dict(one.learning_rate))
            if isinstance(one.learning_rate, Mapping)
            else one
            for one in self.stages
        ]
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> UnfreezeAtConvergence:
        state = self._copied_attributes()
        # The layers are those of a model that is not copied, unless it has been just now.
        backbone = state.pop("backbone")
        several = isinstance(backbone, (list, tuple))
        layers = [memo.get(id(one), one) for one in (backbone if several else [backbone])]
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(state, memo))
        new.backbone = layers if several else layers[0]
        return new

    def _copied_attributes(self) -> dict[str, Any]:
        """Settings as they are now, and what a subclass has added; the rest as in a new one."""
        of_a_run = UnfreezeAtConvergence.__annotations__
        kept = {name: one for name, one in vars(self).items() if name not in of_a_run}
        return {**kept, **self._as_new}

    # Hooks, in the order in which `fit` calls them.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        unset_initial_epoch(self.model)  # Of a fit that ended before its first epoch.
        self._beside = callbacks_beside(self)
        histories = (one for one in self._beside if isinstance(one, keras.callbacks.History))
        self.history = next(histories, None)
        self.logged_epochs = {}
        check_neighbours(
            self._beside,
            self._beside.index(self),
            monitor=self.monitor,
            patience=self.patience,
            backup=self.backup_dir is not None,
            restores=self.restore_best_weights,
        )
        self._staged = StagedModel(
            self.model,
            self.stages,
            exactly=self._scheduled,
            backbone=self.backbone,
            optimizer=self.optimizer,
        )
        self._monitored = MonitoredValue(self.monitor, self.mode, self.model)
        self._progress = Progress()
        self.best_epoch = None
        if self._warm_up is not None:
            # Of a fit that was interrupted.
            self._warm_up.finish()
            self._warm_up = None
        self._rates = RateWatch(self._beside)
        observers.place(
            self, [*early_stops.observers(self._early_stopping()), *self._rates.observers()]
        )
        self._prepared = is_built(self.model)
        switched = self.model.optimizer is self._renewed_optimizer
        if not switched and self._staged.freeze_untouched():
            message = f"UnfreezeAtConvergence froze {self._staged.names}, which was trainable."
            if keeps_no_optimizer(self.model):
                message += (
                    f" If this {type(self.model).__name__} was saved in a fine-tuning stage, its "
                    f"file does not tell. {GO_ON}"
                )
            self._say(message)
        self._begin_stage(0)
        if self._prepared:
            self._find_stage()
        if self.stage == 0:
            self._staged.check_renewable(self.warmup_steps)
        self._staged.try_switches(self.stage)
        self._optimizer_use = OptimizerUse(self.model)
        self._backup = None
        self._done_before = 0
        if self.backup_dir is not None:
            self._backup = RunBackup(self.backup_dir, self.model)
            self._resume(self._backup)
        if self._prepared and not self._done_before:
            self._say_stage()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        unset_initial_epoch(self.model)
        if self._progress.switch_reason is not None:
            self._switch(epoch, self._progress.switch_reason)
        self._rates.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_train_batch_begin(batch, logs)  # Calls `on_batch_begin` of a subclass.
        self._before_step(batch)

    def _before_step(self, batch: int) -> None:
        """What a step needs. May be called twice for one, by a subclass that calls `super()`."""
        if batch > 0:
            self._prepare()
        # On JAX, reading `model` has `fit` give it its values, and wait for them: only if needed.
        if self._warm_up is not None and self.model and self._warm_up.before_step():
            self._warm_up = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        stopped_early = early_stops.stopped_early(self.model)
        self._prepare()
        if self._optimizer_use is not None:
            self._optimizer_use.check(self.model)
            self._optimizer_use = None
        data = data_of_fit(self)
        validates = "validation_data" in data if data else None
        value = self._monitored.read(logs, validates=validates)
        logs.update(self._staged.learning_rates(self.stage))
        logs["stage"] = self.stage
        for name in logs:
            self.logged_epochs.setdefault(name, []).append(epoch)
        self._rates.check(self.model)
        tensorboard.write_parameters(self._beside, epoch, self.model)
        self._progress.stage_epochs += 1
        ended = self._why_ended(epoch, value)
        if self.stage > 0 and value is not None and not math.isfinite(value):
            self._stop(epoch, f"{self.monitor} is {value}")
        elif self.stage < len(self.stages):
            self._decide_switch(ended, stopped_early and math.isfinite(logs.get("loss", 0.0)))
        elif ended is not None:
            self._stop(epoch, self._described(ended))
        if self._backup is not None:
            self._save(self._backup, epoch + 1)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        unset_initial_epoch(self.model)
        observers.remove(self)
        if self._warm_up is not None:
            self._warm_up.finish()
            self._warm_up = None
        if self._progress.stop_reason is not None:
            self._say(self._progress.stop_reason)
        if self.stage == 0:
            stopped = self.model.stop_training
            message = why_still_frozen(
                self.monitor,
                self.patience,
                stopped=stopped,
                decided=self.decided,
                seen=self._monitored.seen,
            )
            warnings.warn(message, stacklevel=2)
        elif self.stage < len(self.stages):
            self._say(
                f"UnfreezeAtConvergence: training ended in stage {self.stage} of "
                f"{len(self.stages)}. Pass more `epochs` to `fit` for the others."
            )
        best = self._progress.best
        if best is not None and best.epoch is not None:
            best.restore_run()
            self.best_epoch = best.epoch
            self._say(
                "UnfreezeAtConvergence restored the best weights, of epoch "
                f"{best.epoch + 1}: {self.monitor} {best.measured:.4g}."
            )
            self._progress.best = None
        if self._backup is not None and self.delete_checkpoint and not self._has_more_done():
            self._backup.delete()

    # Before the first step.

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
        self._begin_stage(self._staged.stage())

    def _say_stage(self) -> None:
        training = self._staged.backbones.names_of(self.model.trainable_weights)
        if self.stage == 0 and training:
            self._say(
                f"UnfreezeAtConvergence: of {self._staged.names} these layers train in stage 0 "
                f"already: {', '.join(training)}."
            )
        if self.stage > 0:
            rate = learning_rate_of(self.model.optimizer)
            self._say(
                f"UnfreezeAtConvergence goes on fine-tuning {self._staged.names}, which is "
                f"trainable already, with learning rate {rate:.4g}."
            )

    def _begin_stage(self, stage: int) -> None:
        self._progress.begin_stage(stage)
        self._changeable = changeable_weights(self.model)
        self._trained = list(self.model.trainable_weights)

    # The backup.

    def _save(self, backup: RunBackup, epoch: int) -> None:
        state, arrays = self._progress.to_data(self.model.variables)
        state["warm_up"] = None if self._warm_up is None else self._warm_up.get_state()
        state["schedule_starts"] = switching.schedule_starts(self.model)
        backup.save(epoch, state, arrays, self._identity)

    def _resume(self, backup: RunBackup) -> None:
        """Goes on where the last snapshot was made, if there is one."""
        self._identity = identity_of(
            self,
            self.stages,
            self._staged.backbones,
            exactly=self._scheduled,
            stage=self.stage,
            goes_on=backup.has_snapshots(),
        )
        self._done_before = backup.resume(self._identity, self._go_on_from)
        if not self._done_before:
            return
        epochs = (self.params or {}).get("epochs", 0)
        stopped = self._progress.stop_reason is not None
        set_initial_epoch(
            self.model, max(self._done_before, epochs) if stopped else self._done_before
        )
        self._say(
            f"UnfreezeAtConvergence goes on after epoch {self._done_before}, in stage "
            f"{self.stage}, from {backup.folder!r}."
        )
        if self._has_more_done():
            warnings.warn(
                f"UnfreezeAtConvergence: the run in {backup.folder!r} has {self._done_before} "
                f"epochs done, and `epochs={epochs}`, so nothing is trained. The model gets the "
                "weights of that run, and its backup is kept. Pass more `epochs` to go on.",
                stacklevel=2,
            )

    def _has_more_done(self) -> bool:
        """Whether the run that was backed up is further than this `fit` is to go."""
        return self._done_before > (self.params or {}).get("epochs", self._done_before)

    def _go_on_from(self, snapshot: RunSnapshot) -> None:
        """Becomes what a snapshot says, or raises a ValueError and changes nothing."""
        variables = self.model.variables
        progress = Progress.from_data(
            snapshot.state,
            snapshot.arrays,
            variables,
            stages=len(self.stages),
            mode=self._monitored.mode,
        )
        stage = self.stage
        rates: dict[str, Any] = {}
        with switching.all_or_nothing(self.model, variables):
            if stage > progress.stage:
                self._staged.go_back()
                stage = 0
            switching.build_optimizer(self.model)
            for number in range(stage + 1, progress.stage + 1):
                self._staged.enter(number)
                # As the switch has set them: those of the snapshot may be lower.
                rates = rates_set(self.model)
            switching.restore_training(
                self.model, snapshot.arrays["model"], snapshot.arrays["optimizer"]
            )
            switching.set_schedule_starts(self.model, self._read_schedule_starts(snapshot.state))
            warm_up = self._read_warm_up(snapshot.state)
        judge = progress.judge_state
        self._progress = progress
        if judge is not None:
            progress.judge = self._new_judge()
            progress.judge.set_state(judge)
        self._warm_up = warm_up
        self._changeable = changeable_weights(self.model)
        self._trained = list(self.model.trainable_weights)
        self._rates.begin(rates)
        self._rates.follow_schedules(self.model)
        self._renewed_optimizer = self.model.optimizer

    def _read_schedule_starts(self, state: Mapping[str, Any]) -> dict[str, int]:
        known = switching.schedule_starts(self.model)
        if "schedule_starts" not in state:
            return known  # A snapshot of version 0.1.
        starts = read(state, "schedule_starts", dict)
        if starts.keys() != known.keys():
            raise ValueError("its 'schedule_starts' are of other parameter groups.")
        # Below 0 where a schedule began before its group's step count did.
        return {group: read(starts, group, int) for group in starts}

    def _read_warm_up(self, state: Mapping[str, Any]) -> WarmUp | None:
        rates = read(state, "warm_up", dict, type(None))
        if rates is None:
            return None
        optimizers = self._staged.optimizers()
        known = {str(index) for index in range(len(optimizers) if self.warmup_steps else 0)}
        for index in rates:
            if index not in known or read(rates, index, float) <= 0:
                raise ValueError("its 'warm_up' is not that of such a run.")
        warm_up = WarmUp(optimizers, self.warmup_steps)
        warm_up.set_state(rates)
        return warm_up

    # At an epoch's end.

    def _limits(self) -> tuple[int | None, int | None]:
        """After how many epochs without improvement, and of all, the stage ends."""
        if self.stage == 0:
            return self.patience, self.max_frozen_epochs
        stage = self.stages[self.stage - 1]
        patience = stage.patience
        if patience is None and stage.epochs is None:
            last = self.stage == len(self.stages)
            patience = self.fine_tune_patience if last else self.patience
        return patience, stage.epochs

    def _why_ended(self, epoch: int, value: float | None) -> str | None:
        """Takes an epoch in, and says why the stage has ended, if it has."""
        patience, limit = self._limits()
        if value is not None and self._converged(epoch, value, patience):
            return "converged"
        if limit is not None and self._progress.stage_epochs >= limit:
            return "max_frozen_epochs" if self.stage == 0 else "epochs"
        return None

    def _converged(self, epoch: int, value: float, patience: int | None) -> bool:
        progress = self._progress
        progress.judge = judge = progress.judge or self._new_judge()
        converged = judge.update(epoch, value) and patience is not None
        if self.restore_best_weights:
            progress.best = progress.best or BestWeights(self._monitored.mode)
            best_of_stage = judge.best_epoch == epoch
            progress.best.update(epoch, value, self._changeable, best_of_stage=best_of_stage)
        return converged

    def _new_judge(self) -> ConvergenceMonitor:
        patience, _ = self._limits()
        return ConvergenceMonitor(
            mode=self._monitored.mode,
            min_delta=self.min_delta,
            patience=patience or 0,
            start_from_epoch=self.start_from_epoch,
            dtype=keras.config.floatx(),
        )

    def _decide_switch(self, ended: str | None, stopped_early: bool) -> None:
        self._progress.switch_reason = ended
        if stopped_early:
            self._progress.switch_reason = ended or "early_stopping"
            self.model.stop_training = False

    def _early_stopping(self) -> list[keras.callbacks.EarlyStopping]:
        """The EarlyStopping callbacks before this one, which run in stages as it does."""
        before = self._beside[: self._beside.index(self)]
        return [
            callback for callback in before if isinstance(callback, keras.callbacks.EarlyStopping)
        ]

    def _restarting(self) -> list[keras.callbacks.Callback]:
        """The callbacks that judge each stage by itself."""
        plateau = keras.callbacks.ReduceLROnPlateau
        return self._early_stopping() + [one for one in self._beside if isinstance(one, plateau)]

    def _stop(self, epoch: int, why: str) -> None:
        self._progress.stop_reason = f"Epoch {epoch + 1}: UnfreezeAtConvergence stopped: {why}."
        self.model.stop_training = True

    # The switch.

    def _switch(self, epoch: int, reason: str) -> None:
        before = list(self.model.trainable_weights)
        rate = learning_rate_of(self.model.optimizer)
        self._staged.enter(self.stage + 1, self._progress.best)
        self._renewed_optimizer = self.model.optimizer
        self._rates.begin(rates_set(self.model))
        after = self.model.trainable_weights
        transition = Transition(
            epoch=epoch,
            stage=self.stage + 1,
            reason=reason,
            value=None if self._progress.judge is None else self._progress.judge.best,
            learning_rate_before=rate,
            learning_rate_after=learning_rate_of(self.model.optimizer),
            trainable_before=freezing.count_params(before),
            trainable_after=freezing.count_params(after),
            layers=self._staged.backbones.names_of(freezing.without(after, before)),
            frozen=self._staged.backbones.names_of(freezing.without(before, after)),
            cannot_train=tuple(weight.path for weight in self._staged.backbones.cannot_train()),
            group_learning_rates=self._staged.group_learning_rates(),
            unfrozen_early=self._staged.backbones.names_of(freezing.without(before, self._trained)),
        )
        self.transitions.append(transition)
        why = self._described(reason)
        self._begin_stage(transition.stage)
        self._say_switch(transition, why)
        self._carry_best_over(before)
        if self.warmup_steps:
            self._warm_up = WarmUp(self._staged.optimizers(), self.warmup_steps)
        for callback in self._restarting():
            callback.on_train_begin()

    def _carry_best_over(self, before: list[keras.Variable]) -> None:
        """Makes the best value comparable: regularizers count for weights that train only."""
        if self._progress.best is None:
            return
        offset = 0.0
        if self.monitor in ("loss", "val_loss"):
            # Of the weights as they are now, also where the best of the run has others: so values
            # of two stages compare as if all regularizers counted in both.
            after = self.model.trainable_weights
            offset += switching.regularization_loss(freezing.without(after, before))
            offset -= switching.regularization_loss(freezing.without(before, after))
        self._progress.best.begin_stage(self._changeable, float(of_chief(offset)))

    # Messages.

    def _say_switch(self, transition: Transition, why: str) -> None:
        what = f"begins stage {transition.stage} of" if self._scheduled else "unfreezes"
        then = what_next(self.monitor, *self._limits(), last=self.stage == len(self.stages))
        block = transition.describe(f"{what} {self._staged.names}", why, then)
        self._say(block)
        tensorboard.write_switch(self._beside, transition.epoch, block)

    def _described(self, reason: str) -> str:
        patience, _ = self._limits()
        progress = self._progress
        return why_ended(reason, self.monitor, patience, progress.stage, progress.stage_epochs)

    def _say(self, message: str) -> None:
        if self.verbose:
            say(message)


_SETTINGS = frozenset(inspect.signature(UnfreezeAtConvergence.__init__).parameters)
