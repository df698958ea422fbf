"""A callback that fine-tunes a backbone once the head on it has converged, in one `fit`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import html
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_tl.arguments import check_can_be_set, check_count, check_min_delta, check_monitor
from keras_tl.backbone.model_backbones import BackboneOf, names_of_layers
from keras_tl.backbone.selecting import Selection, is_built
from keras_tl.interpolation import check_fraction
from keras_tl.messages import html_table
from keras_tl.optimizers.learning_rates import LearningRate
from keras_tl.stages import switching
from keras_tl.stages.annealing import AUTO, is_auto
from keras_tl.stages.run import Run
from keras_tl.stages.stage import DEFAULT_RATE, Stage, check_one_rate, check_stages
from keras_tl.stages.staged_model import StagedModel
from keras_tl.stages.transition import Transition


class UnfreezeAtConvergence(keras.callbacks.Callback):
    """Unfreezes the backbone once the head has converged, and keeps training at a low rate.

    In one `fit`: the head trains on the frozen backbone (stage 0) until `monitor` stops improving.
    Then the best weights of the stage are restored, the backbone's layers are unfrozen, optimizer
    and train step are renewed with `learning_rate`, and fine-tuning (stage 1) starts. The best
    weights of the whole run are what remains.

    The epoch's logs, and so `History`, get `learning_rate` and `stage`. Place other callbacks that
    stop training before this one: an `EarlyStopping` before it that stops training in stage 0
    counts as convergence, and starts over in stage 1. A stop by any other callback ends training.

    A schedule that is given for a stage, also to the head, starts at that stage's switch. One that
    the model was compiled with lasts until the switch; in a parameter group that goes on, it goes
    on. A callback that sets learning rates of its own undoes those of the switch, and is warned of.

    Without a `FrozenBackbone`, pass `backbone`; that of a KerasHub task is found. A plain backbone
    that is wholly trainable when `fit` starts is frozen first. Its BatchNormalization layers are
    then never unfrozen: in a plain model `trainable=False` is all that keeps Keras from updating
    their moving statistics, since `fit` overrides a `training=False` with which a Functional model
    called them. Only a `FrozenBackbone` can train their gamma and beta.

    A model whose layers in question are trainable already, such as one loaded after the switch,
    starts in stage 1; with `stages` in the first in which just the layers that are trainable train.
    A plain backbone without BatchNormalization is trainable then as it was before it was ever
    frozen: fine-tuning continues if the optimizer has trained it. The file of a KerasHub task with
    a plain backbone tells neither what trained nor at which rate: the task loads wholly trainable,
    and starts in stage 0 unless `enter_stage` is called before. One on a `FrozenBackbone` loads as
    it was.

    A model compiled with a `GroupOptimizer` keeps its groups: what is unfrozen joins the group that
    `assign` says, with that group's learning rate, and groups that nothing joins keep their state.

    Args:
        learning_rate: Float, `LearningRateSchedule` or callable, as an optimizer takes it; or a
            dictionary from names of layers to floats, such as `layerwise_learning_rates` returns.
            The learning rate of stage 1. Or `"auto"`, which finds it: stage 1 has the default rate
            of the optimizer's class (1e-3 of Adam), and each stage after it a third of the one
            before (down to 1e-5), from the best weights so far. So a rate that only hurts costs its
            epochs and nothing else. Each has `fine_tune_patience`; the first two as many epochs as
            twice `warmup_steps`, where those are more. Once a rate has helped, training stops after
            two lower ones that have not. In the last 20 epochs of `fit`, or all that are left when
            the first rate is tried, no rate is above a limit that falls from the first to nothing:
            so a run of few epochs ends at low rates too. If `"val_loss"` judges, a classifier whose
            head is too sure is calibrated before the first rate, as by `scale_temperature`, where
            that lowers `val_loss` by a tenth or more: a model that is only less sure does not pass
            for a better one. What it predicts as most likely stays the same. Defaults to `None`:
            that of `optimizer`, or those of the model's own `GroupOptimizer`; else `"auto"`
            where fine-tuning is judged on validation data (`monitor` begins with `"val_"`) and
            neither `stages`, `head_learning_rate`, `fine_tune_patience=None` nor
            `restore_best_weights=False` is given; else `1e-5`.
        backbone: The layer, model or list of layers to unfreeze; their names in the model (of
            nested ones `outer/inner`); or a function of the model that returns them. Names and
            functions also serve where the model is made later, as in a KerasTuner search. Defaults
            to every `FrozenBackbone` in the model, or if there is none to the layer that is its
            attribute `backbone`, as in a KerasHub task.
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
            each `fit` starts with what was given. Defaults to a copy of the compiled one's
            configuration. Each of `stages` takes a copy, with its learning rate.
        head_learning_rate: Float, `LearningRateSchedule` or callable. The learning rate in stage 1
            of what trains in stage 0, which then keeps its optimizer's state, as the group "head"
            of a `GroupOptimizer`; the backbone joins as the group "backbone", with `learning_rate`.
            The logs get `learning_rate_head` and `learning_rate_backbone` (0 while it is frozen;
            with `stages`, `learning_rate_backbone_1` and so on, for what joined in each).
            Defaults to `None`: one new optimizer with `learning_rate` for all.
        warmup_steps: Int. Steps after a switch in which the learning rate of what is new rises
            linearly from zero to the stage's. Between epochs it is the stage's, so that this is
            what logs, files and other callbacks have of it. Defaults to `None`: 30 where a rate is
            to be found, or a fifth of what `fit` has left if that is less; else none.
        fine_tune_patience: Int or None. Epochs without improvement in the last stage after which
            training stops. None trains to the last epoch. With `learning_rate="auto"`, that many
            after which a rate is given up. Defaults to `3`.
        restore_best_weights: Bool. Whether the best weights of a stage are restored before the
            next, and those of the whole run at its end. Values are compared across a switch after
            adding what regularizers of the unfrozen layers put on the loss. Defaults to `True`.
        interpolate: Float from 0 to 1, or None. How far from the weights that fine-tuning starts
            from (the head's best on the frozen backbone) to the best of the run the final weights
            are: between them, a model is often better on data from elsewhere, and a little worse on
            its own. It needs `restore_best_weights`, and moving statistics that stay constant. The
            monitored value of before and after is reported, where `fit` has validation data that
            can be read again. See `interpolate_weights`. Defaults to `None`: the best weights.
        backup_dir: String or path. A folder in which the whole state of the run is kept after each
            epoch: weights, optimizer, stage, counters, best weights. The same `fit`, started again
            after it was interrupted or killed, resumes with the next epoch. Weights and
            random seeds of the model are restored bit for bit; data that is shuffled at random
            starts over. `BackupAndRestore` is not needed. Of several processes that train together,
            all must see the folder; the first writes. A relative path is taken from the folder that
            is current when the callback is made. `{trial}` in it becomes the trial of a KerasTuner
            search, so that each has a folder of its own. Defaults to `None`: no backup.

            A backup knows its run. To resume another run from it is an error that says what
            differs. Compared are the model's configuration; optimizer, loss and metrics;
            the settings of this callback and which weights train in each stage; the seed of
            `keras.utils.set_random_seed`, if both have set one, and then also what a frozen
            backbone has learnt, which is otherwise no more than a warning;
            the number of steps in an epoch, and of arrays (also those, and the file names, that a
            `tf.data.Dataset` is made from) the shapes and the samples in any order; the backend and
            the number of processes. Not compared are initial weights that are drawn at random,
            names that Keras counts up, `epochs`, `backbone`, `delete_checkpoint`, `verbose`, other
            callbacks, and data that only reading shows, such as a generator's.
        delete_checkpoint: Bool. Whether the backup is deleted when training has ended. Defaults to
            `True`.
        verbose: 0 or 1. Whether a switch and the end are reported; and after an epoch without
            improvement, unless `fit` itself is silent, how long the stage has waited. Defaults to
            `1`.

    Attributes:
        stage: Int. The stage that the model is in: 0 while the backbone is frozen, then 1, ...
        stages: List of `Stage`, those after stage 0.
        transitions: List of `Transition`, the switches of the last `fit`.
        decided: Bool. Whether the next epoch starts with a switch.
        best_epoch: Int or None. The epoch, counted from 0, whose weights the last `fit` ended with
            because they were the best.
        history: The `History` of the last `fit`, or None before the first.
        logged_epochs: Dictionary from the names in the logs to the epochs of the last `fit`,
            counted from 0, in which they were logged. `validation_freq` makes these differ.

    Raises:
        ValueError: For an argument that is out of range; when `fit` starts, if the model has no
            `FrozenBackbone` and no `backbone`, if `backbone` is not in the model, if `layers`
            selects nothing in it, or if nothing would train in stage 0; and at the first epoch's
            end, if `monitor` is not in the logs.

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
        learning_rate: LearningRate | Mapping[str, float] | str | None = None,
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
        warmup_steps: int | None = None,
        fine_tune_patience: int | None = 3,
        restore_best_weights: bool = True,
        interpolate: float | None = None,
        backup_dir: str | os.PathLike[str] | None = None,
        delete_checkpoint: bool = True,
        verbose: int = 1,
    ):
        super().__init__()
        if warmup_steps is not None:
            check_count("warmup_steps", warmup_steps)
        check_monitor(monitor, mode)
        check_min_delta(min_delta)
        check_count("patience", patience)
        check_count("start_from_epoch", start_from_epoch)
        if max_frozen_epochs is not None:
            check_count("max_frozen_epochs", max_frozen_epochs, at_least=1)
        if fine_tune_patience is not None:
            check_count("fine_tune_patience", fine_tune_patience)
        self.learning_rate = learning_rate
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
        self.interpolate = (
            None if interpolate is None else check_fraction(interpolate, "interpolate")
        )
        if interpolate is not None and not restore_best_weights:
            raise ValueError(
                "`interpolate` is between the best weights, so it needs `restore_best_weights`. "
                f"Received: interpolate={interpolate!r}, restore_best_weights=False."
            )
        # Of a relative path, a `chdir` would make another folder.
        self.backup_dir = None if backup_dir is None else os.path.abspath(backup_dir)
        self.delete_checkpoint = delete_checkpoint
        self.verbose = verbose
        self._run: Run | None = None
        self._entered: weakref.ref[keras.Model] | None = None
        self._schedule: list[Stage] | None = None
        (only,) = self.stages
        if stages is not None:
            self._schedule = check_stages(stages, instead_of=only)
        if optimizer is not None:
            switching.check_fresh(optimizer)
            check_one_rate(learning_rate, optimizer)
        if is_auto(self.stages[-1].learning_rate):
            self._check_auto()
        self.warmup_steps = warmup_steps
        if warmup_steps:
            check_can_be_set("warmup_steps", *[one.learning_rate for one in self.stages], optimizer)

    def _check_auto(self) -> None:
        needed = {
            "restore_best_weights": (self.restore_best_weights, "each rate starts from these"),
            "fine_tune_patience": (self._last_ends, "it says when a rate is given up"),
        }
        for argument, (given, why) in needed.items():
            if not given:
                raise ValueError(
                    f'`learning_rate="{AUTO}"` needs `{argument}`: {why}. '
                    f"Received: {argument}={getattr(self, argument)!r}."
                )

    @property
    def _last_ends(self) -> bool:
        last = self.stages[-1]
        limits = (self.fine_tune_patience, last.patience, last.epochs)
        return any(limit is not None for limit in limits)

    @property
    def default_rate(self) -> float | str:
        """The learning rate where nothing says one."""
        judged = self.monitor.startswith("val_") and self.restore_best_weights and self._last_ends
        plain = self._schedule is None and self.head_learning_rate is None
        return AUTO if judged and plain else DEFAULT_RATE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Has the hook of a subclass do what ours does, whether or not it calls `super()`."""
        super().__init_subclass__(**kwargs)
        hook = cls.on_train_batch_begin

        @functools.wraps(hook)
        def on_train_batch_begin(
            self: UnfreezeAtConvergence, batch: int, logs: dict[str, Any] | None = None
        ) -> None:
            self._running.begin_step(batch)
            hook(self, batch, logs)

        cls.on_train_batch_begin = on_train_batch_begin  # type: ignore[method-assign]

    @property
    def stages(self) -> list[Stage]:
        """The stages after stage 0."""
        if self._schedule is not None:
            return self._schedule
        only = Stage(
            self.layers,
            self.learning_rate,
            head_learning_rate=self.head_learning_rate,
            train_batchnorm=self.train_batchnorm,
        )
        return [only]

    def enter_stage(self, model: keras.Model, stage: int = 1) -> None:
        """Puts a compiled model in a stage, of which nothing else tells.

        Such as a KerasHub task with a plain backbone, loaded from a file that was saved in that
        stage, which does not hold what trains in it; a model made anew, before `load_weights` of a
        file that was saved in that stage; or a language model without a head, of which nothing
        could train in stage 0. The layers of the stage train, and no others of the backbone; the
        optimizer is a new one as after the switch. The next `fit` continues in that stage, with
        this callback or without it.

        Args:
            model: A compiled and built model.
            stage: Int. The number of the stage, from 1. Defaults to `1`.

        Raises:
            ValueError: If there is no such stage, the model is not built, or its backbone does not
                have the stage's layers. The model is then as it was.

        Example:

        >>> base = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)], name="base")
        >>> base.trainable = False
        >>> model = keras.Sequential([base, keras.layers.Dense(1)])
        >>> model.compile("adam", "mse")
        >>> UnfreezeAtConvergence(1e-5, backbone="base").enter_stage(model)
        >>> len(model.trainable_weights), f"{float(model.optimizer.learning_rate):.0e}"
        (4, '1e-05')
        """
        if stage not in range(1, len(self.stages) + 1):
            raise ValueError(
                f"`stage` must be an int from 1 to {len(self.stages)}, the number of stages. "
                f"Received: stage={stage!r}."
            )
        if not is_built(model):
            raise ValueError(
                f'The model "{model.name}" is not built, so it has no layers to train yet. Call it '
                "on a batch first."
            )
        staged = StagedModel(
            model,
            self.stages,
            exactly=self._schedule is not None,
            backbone=self.backbone,
            optimizer=self.optimizer,
            default_rate=self.default_rate,
        )
        staged.enter_directly(stage)
        self._entered = weakref.ref(model)

    # What the last `fit` did.

    @property
    def stage(self) -> int:
        """The stage that the model is in."""
        return 0 if self._run is None else self._run.stage

    @property
    def transitions(self) -> list[Transition]:
        """The switches of the last `fit`."""
        return [] if self._run is None else self._run.state.progress.transitions

    @property
    def decided(self) -> bool:
        """Whether the next epoch starts with a switch."""
        return self._run is not None and self._run.state.progress.switch_reason is not None

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights the last `fit` ended with because they were the best."""
        return None if self._run is None else self._run.best_epoch

    @property
    def history(self) -> keras.callbacks.History | None:
        """The `History` of the last `fit`."""
        return None if self._run is None else self._run.history

    @property
    def logged_epochs(self) -> dict[str, list[int]]:
        """The epochs of the last `fit` by the names that were logged in them."""
        return {} if self._run is None else self._run.logged_epochs

    def __repr__(self) -> str:
        return (
            f"<UnfreezeAtConvergence monitor={self.monitor!r} stage={self.stage} of "
            f"{len(self.stages)}>"
        )

    def _repr_html_(self) -> str:
        title = f"<p>{html.escape(repr(self))}</p>"
        if not self.transitions:
            return title
        rows = [one.in_short() for one in self.transitions]
        return title + html_table(tuple(rows[0]), [tuple(row.values()) for row in rows])

    # Copies, as KerasTuner and scikit-learn make them: with these settings, and of no run.

    def __getstate__(self) -> dict[str, Any]:
        state = self._copied_attributes()
        # Names, for a file holds no layer of a model that is somewhere else.
        state["backbone"] = names_of_layers(self.backbone)
        state["learning_rate"] = _by_name(self.learning_rate)
        if self._schedule is not None:
            state["_schedule"] = [
                dataclasses.replace(one, learning_rate=_by_name(one.learning_rate))
                for one in self._schedule
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
        """Settings as they are now, and what a subclass has added; of no model and no run."""
        return {**vars(self), **vars(keras.callbacks.Callback()), "_run": None, "_entered": None}

    # Hooks, in the order in which `fit` calls them.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        entered = self._entered is not None and self._entered() is self.model
        exactly = self._schedule is not None
        self._run = Run(self, exactly=exactly, last=self._run, entered=entered)
        self._run.begin()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._running.begin_epoch(epoch)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_train_batch_begin(batch, logs)  # Calls `on_batch_begin` of a subclass.
        self._running.begin_step(batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._running.end_epoch(epoch, {} if logs is None else logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._running.end()

    @property
    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError("`on_train_begin` of UnfreezeAtConvergence was not called.")
        return self._run


def _by_name(rate: Any) -> Any:
    """Returns learning rates by layer without the backbone that they know."""
    return dict(rate) if isinstance(rate, Mapping) else rate
