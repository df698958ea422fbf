"""A callback that fine-tunes a backbone once the head on it has converged, in one `fit`."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from typing import Any

import keras

from keras_tl import freezing, internals, switching
from keras_tl.backbones import Backbones, changeable_weights
from keras_tl.best_weights import BestWeights
from keras_tl.callbacks.messages import say
from keras_tl.callbacks.monitored_value import MonitoredValue
from keras_tl.convergence import ConvergenceMonitor, check_count, check_min_delta
from keras_tl.optimizers import GroupOptimizer
from keras_tl.selecting import Backbone, Selection, is_built
from keras_tl.switching import LearningRate


@dataclasses.dataclass(frozen=True)
class Transition:
    """A switch from one stage to the next.

    Attributes:
        epoch: Int. The first epoch of the new stage, counted from 0.
        stage: Int. The new stage.
        reason: String. `"converged"`, `"early_stopping"` (another callback's) or
            `"max_frozen_epochs"`.
        value: Float or None. The best monitored value of the stage that ended.
        learning_rate_before: Float. The learning rate at the end of that stage.
        learning_rate_after: Float. The learning rate that the new stage starts with.
        trainable_before: Int. How many parameters were trainable before.
        trainable_after: Int. How many are trainable after.
        layers: Tuple of strings. The names of the layers that became trainable, from input to
            output.
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


class UnfreezeAtConvergence(keras.callbacks.Callback):
    """Unfreezes the backbone when the head has converged, and goes on with a low learning rate.

    In one `fit`: the head trains on the frozen backbone (stage 0) until `monitor` stops improving.
    Then the best weights of the stage are restored, the backbone's layers are unfrozen, optimizer
    and train step are renewed with `learning_rate`, and fine-tuning (stage 1) goes on. The best
    weights of the whole run are what remains.

    The epoch's logs, and so `History`, get `learning_rate` and `stage`. Place other callbacks that
    stop training before this one: an `EarlyStopping` before it that stops training in stage 0
    counts as convergence, and starts over in stage 1.

    Without a `FrozenBackbone`, pass `backbone`. A plain backbone that is wholly trainable when
    `fit` starts is frozen first. Its BatchNormalization layers are then never unfrozen: in a plain
    model `trainable=False` is all that keeps Keras from updating their moving statistics, since
    `fit` overrides a `training=False` with which a Functional model called them. Only a
    `FrozenBackbone` can train their gamma and beta.

    A model whose layers in question are trainable already, such as one loaded after the switch,
    starts in stage 1.

    Args:
        learning_rate: Float, `LearningRateSchedule` or callable, as an optimizer takes it. The
            learning rate of stage 1. Defaults to `1e-5`.
        backbone: The layer, model or list of layers to unfreeze. Defaults to every `FrozenBackbone`
            in the model.
        layers: Which layers of the backbone are unfrozen; see `FrozenBackbone.unfreeze`. Defaults
            to `"all"`.
        train_batchnorm: Bool. Whether BatchNormalization layers in a `FrozenBackbone` train their
            gamma and beta. Their moving statistics never move. Defaults to `False`.
        monitor: String. The quantity in the logs to judge convergence by. Defaults to `"val_loss"`.
        mode: One of `"auto"`, `"min"`, `"max"`, as in `keras.callbacks.EarlyStopping`.
        min_delta: Float. Smallest change that counts as an improvement when convergence is judged.
            Weights of a smaller improvement are kept as the best of the run all the same. Defaults
            to `0.0`.
        patience: Int. Epochs without improvement after which the head has converged. Defaults to
            `3`.
        start_from_epoch: Int. Epochs before it are not judged. Defaults to `0`.
        max_frozen_epochs: Int or None. Epochs of `fit` after which stage 0 ends even if the head
            has not converged. Defaults to `None`.
        optimizer: A `keras.optimizers.Optimizer` that is not built, for stage 1, with its own
            learning rate (`learning_rate` is then to be left out). Defaults to a copy of the
            compiled one's configuration.
        head_learning_rate: Float, `LearningRateSchedule` or callable. The learning rate in stage 1
            of what trains in stage 0, which then keeps its optimizer's state, as the group "head"
            of a `GroupOptimizer`; the backbone joins as the group "backbone", with `learning_rate`.
            The logs get `learning_rate_head` and `learning_rate_backbone` (0 while it is frozen).
            Defaults to `None`: one new optimizer with `learning_rate` for all.
        fine_tune_patience: Int or None. Epochs without improvement in stage 1 after which training
            stops. Defaults to `None`: training goes on to the last epoch.
        restore_best_weights: Bool. Whether the best weights of stage 0 are restored before
            fine-tuning, and those of the whole run at its end. Values are compared across the
            switch after adding what regularizers of the unfrozen layers put on the loss. Defaults
            to `True`.
        verbose: 0 or 1. Whether a switch and the end are reported. Defaults to `1`.

    Attributes:
        stage: Int. The stage that the model is in: 0 while the backbone is frozen, then 1.
        transitions: List of `Transition`, the switches of the last `fit`.

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

    def __init__(
        self,
        learning_rate: LearningRate = 1e-5,
        *,
        backbone: Backbone | None = None,
        layers: Selection = "all",
        train_batchnorm: bool = False,
        monitor: str = "val_loss",
        mode: str = "auto",
        min_delta: float = 0.0,
        patience: int = 3,
        start_from_epoch: int = 0,
        max_frozen_epochs: int | None = None,
        optimizer: keras.Optimizer | None = None,
        head_learning_rate: LearningRate | None = None,
        fine_tune_patience: int | None = None,
        restore_best_weights: bool = True,
        verbose: int = 1,
    ):
        super().__init__()
        self.learning_rate = switching.check_learning_rate(learning_rate)
        if optimizer is not None:
            _check_optimizer(optimizer, self.learning_rate)
        if head_learning_rate is not None:
            head_learning_rate = switching.check_learning_rate(
                head_learning_rate, "head_learning_rate"
            )
        if not isinstance(monitor, str):
            raise ValueError(
                f"`monitor` must be a name in the logs. Received: monitor={monitor!r}."
            )
        if mode not in ("auto", "min", "max"):
            raise ValueError(f'`mode` must be "auto", "min" or "max". Received: mode={mode!r}.')
        check_min_delta(min_delta)
        check_count("patience", patience)
        check_count("start_from_epoch", start_from_epoch)
        if max_frozen_epochs is not None:
            check_count("max_frozen_epochs", max_frozen_epochs, at_least=1)
        if fine_tune_patience is not None:
            check_count("fine_tune_patience", fine_tune_patience)
        self.backbone = backbone
        self.layers = layers
        self.train_batchnorm = train_batchnorm
        self.monitor = monitor
        self.mode = mode
        self.min_delta = min_delta
        self.patience = patience
        self.start_from_epoch = start_from_epoch
        self.max_frozen_epochs = max_frozen_epochs
        self.optimizer = optimizer
        self.head_learning_rate = head_learning_rate
        self.fine_tune_patience = fine_tune_patience
        self.restore_best_weights = restore_best_weights
        self.verbose = verbose
        self.stage = 0
        self.transitions: list[Transition] = []
        self._renewed_optimizer: keras.Optimizer | None = None

    # Hooks, in the order in which `fit` calls them.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._check_optimizer()
        self._beside = internals.callbacks_beside(self)
        self._backbones = Backbones(self.model, self.backbone, self.layers, self.train_batchnorm)
        self._monitored = MonitoredValue(self.monitor, self.mode, self.model)
        self._best: BestWeights | None = None
        self._switch_reason: str | None = None
        self._stop_reason: str | None = None
        self.transitions = []
        self._prepared = is_built(self.model)
        if self._prepared:
            self._backbones.still_frozen()  # Raises if the selection is empty.
        self._freeze_untouched()
        if self._prepared:
            self._find_stage()
        else:
            self._begin_stage(0)
        if self.stage == 0:
            self._check_renewable()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._switch_reason is not None:
            self._switch(epoch, self._switch_reason)
            self._switch_reason = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        if not self._prepared:
            # Keras builds a subclassed model in its first step, on TensorFlow.
            self._prepared = True
            self._find_stage()
        last_epoch = epoch + 1 == (self.params or {}).get("epochs")
        value = self._monitored.read(logs, last_epoch=last_epoch)
        logs.update(self._learning_rates())
        logs["stage"] = self.stage
        self._stage_epochs += 1
        converged = value is not None and self._converged(epoch, value)
        if self.stage == 0:
            self._decide_switch(epoch, converged, logs)
        else:
            self._decide_stop(epoch, converged, value)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._stop_reason is not None:
            self._say(self._stop_reason)
        if self.stage == 0:
            warnings.warn(self._why_still_frozen(), stacklevel=2)
        if self._best is not None and self._best.epoch is not None:
            self._best.restore_run()
            self._say(
                "UnfreezeAtConvergence restored the best weights, of epoch "
                f"{self._best.epoch + 1}: {self.monitor} {self._best.value:.4g}."
            )
            self._best = None

    # Before the first step.

    def _find_stage(self) -> None:
        """Goes on in stage 1 if there is nothing left to unfreeze, as in a model loaded from it."""
        fine_tuning = not self._backbones.still_frozen()
        self._begin_stage(1 if fine_tuning else 0)
        if fine_tuning:
            self._say(
                f"UnfreezeAtConvergence goes on fine-tuning {self._backbones.names}, which is "
                f"trainable already, with learning rate {_learning_rate_of(self.model):.4g}."
            )

    def _check_optimizer(self) -> None:
        if self.model.optimizer is None:
            raise ValueError(
                f'The model "{self.model.name}" has no `optimizer`, so UnfreezeAtConvergence has '
                "none to renew. Compile it with one; an overridden `compile` must set "
                "`self.optimizer`."
            )

    def _check_renewable(self) -> None:
        compiled = internals.without_loss_scale(self.model.optimizer)
        several = isinstance(compiled, keras.optimizers.MultiOptimizer)
        if self.head_learning_rate is not None and several:
            raise ValueError(
                f"`head_learning_rate={self.head_learning_rate!r}` needs a model compiled with one "
                f"optimizer, to go on with. Received: {compiled.name!r}, which has several. Leave "
                "`head_learning_rate` out and pass `optimizer`, or compile with one."
            )
        if self.optimizer is None:
            switching.renew_optimizer(self.model.optimizer, self.learning_rate)

    def _freeze_untouched(self) -> None:
        """Freezes a plain backbone that nobody has frozen yet, unless a switch unfroze it."""
        switched = self.model.optimizer is self._renewed_optimizer
        if not switched and self._backbones.untouched():
            with switching.all_or_nothing(self.model):
                self._backbones.freeze()
                if is_built(self.model):
                    switching.renew_training(self.model)
            self._say(f"UnfreezeAtConvergence froze {self._backbones.names}, which was trainable.")

    def _begin_stage(self, stage: int) -> None:
        self.stage = stage
        self._stage_epochs = 0
        self._judge: ConvergenceMonitor | None = None
        self._changeable = changeable_weights(self.model)

    # At an epoch's end.

    def _learning_rates(self) -> dict[str, float]:
        """What the logs get; every key from the first epoch, or CSVLogger and History drop it."""
        rates = {"learning_rate": _learning_rate_of(self.model)}
        optimizer = internals.without_loss_scale(self.model.optimizer)
        if isinstance(optimizer, GroupOptimizer):
            for group, one in optimizer.groups.items():
                rates[f"learning_rate_{group}"] = _as_float(one.learning_rate)
        elif self.head_learning_rate is not None:
            rates["learning_rate_head"] = rates["learning_rate"]
            rates["learning_rate_backbone"] = 0.0
        return rates

    def _converged(self, epoch: int, value: float) -> bool:
        """Takes a value in, keeps the best weights, and says whether the stage has converged."""
        patience = self.patience if self.stage == 0 else self.fine_tune_patience
        if self._judge is None:
            self._judge = ConvergenceMonitor(
                mode=self._monitored.mode,
                min_delta=self.min_delta,
                patience=patience or 0,
                start_from_epoch=self.start_from_epoch,
                dtype=keras.config.floatx(),
            )
        converged = self._judge.update(epoch, value) and patience is not None
        if self.restore_best_weights:
            self._best = self._best or BestWeights(self._monitored.mode)
            best_of_stage = self._judge.best_epoch == epoch
            self._best.update(epoch, value, self._changeable, best_of_stage=best_of_stage)
        return converged

    def _decide_switch(self, epoch: int, converged: bool, logs: dict[str, Any]) -> None:
        if converged:
            self._switch_reason = "converged"
        elif self.max_frozen_epochs is not None and self._stage_epochs >= self.max_frozen_epochs:
            self._switch_reason = "max_frozen_epochs"
        if self.model.stop_training and self._stopped_early(epoch, logs):
            self._switch_reason = self._switch_reason or "early_stopping"
            self.model.stop_training = False

    def _stopped_early(self, epoch: int, logs: dict[str, Any]) -> bool:
        """Whether an EarlyStopping, and not a callback for broken runs, has stopped training."""
        stopped = any(callback.stopped_epoch == epoch for callback in self._early_stopping())
        return stopped and math.isfinite(logs.get("loss", 0.0))

    def _early_stopping(self) -> list[keras.callbacks.EarlyStopping]:
        """The EarlyStopping callbacks before this one, which run in stages as it does."""
        before = self._beside[: self._beside.index(self)]
        return [
            callback for callback in before if isinstance(callback, keras.callbacks.EarlyStopping)
        ]

    def _decide_stop(self, epoch: int, converged: bool, value: float | None) -> None:
        stopped = f"Epoch {epoch + 1}: UnfreezeAtConvergence stopped: {self.monitor}"
        if value is not None and not math.isfinite(value):
            self._stop_reason = f"{stopped} is {value}."
        elif converged:
            waited = _epochs(self.fine_tune_patience)
            self._stop_reason = f"{stopped} has not improved for {waited} of fine-tuning."
        if self._stop_reason is not None:
            self.model.stop_training = True

    # The switch.

    def _switch(self, epoch: int, reason: str) -> None:
        before = list(self.model.trainable_weights)
        rate = _learning_rate_of(self.model)
        layers = self._fine_tune(before)
        transition = Transition(
            epoch=epoch,
            stage=self.stage + 1,
            reason=reason,
            value=None if self._judge is None else self._judge.best,
            learning_rate_before=rate,
            learning_rate_after=_learning_rate_of(self.model),
            trainable_before=freezing.count_params(before),
            trainable_after=freezing.count_params(self.model.trainable_weights),
            layers=tuple(layer.name for layer in layers),
        )
        self.transitions.append(transition)
        self._say(self._describe(transition))
        self._begin_stage(transition.stage)
        self._carry_best_over(_without(self.model.trainable_weights, before))
        for callback in self._early_stopping():
            callback.on_train_begin()

    def _fine_tune(self, before: list[keras.Variable]) -> list[keras.Layer]:
        """Unfreezes, from the best weights on, and renews the training, or changes nothing."""
        with switching.all_or_nothing(self.model, self._changeable):
            if self._best is not None:
                self._best.restore_stage()
            layers = self._backbones.unfreeze()
            joining = _without(self.model.trainable_weights, before)
            switching.renew_training(
                self.model,
                self.learning_rate if self.optimizer is None else None,
                head_learning_rate=self.head_learning_rate,
                optimizer=self.optimizer,
                keep_evaluation=not any(weight.regularizer for weight in joining),
            )
        self._renewed_optimizer = self.model.optimizer
        return layers

    def _carry_best_over(self, joining: list[keras.Variable]) -> None:
        """Makes the best value comparable: regularizers of weights that join add to the loss."""
        if self._best is not None:
            counts = self.monitor in ("loss", "val_loss")
            offset = switching.regularization_loss(joining) if counts else 0.0
            self._best.begin_stage(self._changeable, offset)

    # Messages.

    def _describe(self, transition: Transition) -> str:
        why = {
            "converged": f"{self.monitor} has not improved for {_epochs(self.patience)}",
            "early_stopping": "EarlyStopping has seen no improvement",
            "max_frozen_epochs": f"it was frozen for {_epochs(self._stage_epochs)}",
        }
        best = "" if transition.value is None else f" (best {transition.value:.4g})"
        return (
            f"Epoch {transition.epoch + 1}: UnfreezeAtConvergence unfreezes "
            f"{self._backbones.names}: {why[transition.reason]}{best}. "
            f"{len(transition.layers)} layers join, {transition.trainable_before:,} -> "
            f"{transition.trainable_after:,} trainable parameters, learning rate "
            f"{transition.learning_rate_before:.4g} -> {transition.learning_rate_after:.4g}."
        )

    def _why_still_frozen(self) -> str:
        message = "UnfreezeAtConvergence: training ended with the backbone still frozen, because "
        if self.model.stop_training:
            return message + (
                "another callback stopped it. Place an EarlyStopping before UnfreezeAtConvergence, "
                "and its stop counts as convergence."
            )
        if self._switch_reason is not None:
            return message + (
                "stage 0 ended with the last epoch. Pass more `epochs` to `fit` to fine-tune."
            )
        return message + (
            f"{self.monitor} had not converged by the last epoch (patience={self.patience}). Pass "
            "more `epochs` to `fit`, a smaller `patience`, or `max_frozen_epochs`."
        )

    def _say(self, message: str) -> None:
        if self.verbose:
            say(message)


def _epochs(count: int | None) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"


def _without(weights: list[keras.Variable], others: list[keras.Variable]) -> list[keras.Variable]:
    known = {id(weight) for weight in others}
    return [weight for weight in weights if id(weight) not in known]


def _learning_rate_of(model: keras.Model) -> float:
    return _as_float(model.optimizer.learning_rate)


def _as_float(value: Any) -> float:
    return float(keras.ops.convert_to_numpy(value))


def _check_optimizer(optimizer: Any, learning_rate: LearningRate) -> None:
    if not isinstance(optimizer, keras.Optimizer):
        raise ValueError(
            "`optimizer` must be a `keras.optimizers.Optimizer` instance. "
            f"Received: optimizer={optimizer!r}."
        )
    if optimizer.built:
        raise ValueError(
            f"`optimizer` {optimizer.name!r} is built already, and can only update the variables "
            "it was built with. Pass a fresh instance."
        )
    default = inspect.signature(UnfreezeAtConvergence).parameters["learning_rate"].default
    if learning_rate != default:
        raise ValueError(
            "`optimizer` brings its own learning rate, so "
            f"`learning_rate={learning_rate!r}` would be lost. Leave it out, and make the "
            f"optimizer with it: `{type(optimizer).__name__}({learning_rate!r})`."
        )
