"""Several fits, of models that share layers, that are one `fit` to the callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_tl.internals.models import initial_epoch, unset_initial_epoch
from keras_tl.internals.optimizers import not_averaged


class JointFits(keras.callbacks.CallbackList):
    """Has callbacks see one `fit` of one model, whichever models are trained.

    Each callback has the model as its `model`, and sees one begin and one end of training.

    Args:
        callbacks: List of callbacks.
        model: The model.
        epochs: Int. The last epoch of all fits.
        verbose: As in `fit`.
        batch_size: Int or None. The samples in a batch, if that is known.
    """

    def __init__(
        self,
        callbacks: Sequence[keras.callbacks.Callback],
        model: keras.Model,
        *,
        epochs: int,
        verbose: Any,
        batch_size: int | None = None,
    ):
        super().__init__(
            list(callbacks),
            add_history=True,
            add_progbar=verbose != 0,
            model=model,
            verbose=verbose,
            epochs=epochs,
            steps=None,
        )
        self._settings = {"epochs": epochs, "verbose": verbose}
        self._batch_size = batch_size
        # On JAX, reading `model` of a callback gives the variables the values that `fit` has.
        self._trainer = keras.callbacks.Callback()
        self._until: Callable[[], bool] = bool
        self._epoch = 0
        self._begun: int | None = None
        self._stops = False
        self._asked = False

    @property
    def history(self) -> keras.callbacks.History:
        """The `History` of all fits."""
        return next(one for one in self.callbacks if isinstance(one, keras.callbacks.History))

    @property
    def epochs_left(self) -> int:
        """Int. How many epochs may still be trained, 0 if training was stopped."""
        return 0 if self.model.stop_training else max(0, self._settings["epochs"] - self._epoch)

    def begin(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        validation_data: Any = None,
        class_weight: Any = None,
    ) -> None:
        """Calls `on_train_begin` of the callbacks.

        The arguments are those of `fit`, which `data_of_fit` finds here: no `fit` runs.
        """
        self.model.stop_training = False
        try:
            super().on_train_begin()
            self._epoch = initial_epoch(self.model) or 0
        finally:
            # Each fit is told its first epoch, and one that is never reached is not to be left.
            unset_initial_epoch(self.model)

    def begin_epoch(
        self,
        *,
        steps: int | None,
        validation_data: Any = None,
        batch_size: int | None = None,
        validation_steps: int | None = None,
    ) -> None:
        """Calls `on_epoch_begin` of the callbacks before the fit that trains that epoch.

        For what must be known before that fit starts, such as what a switch makes trainable.

        Args:
            steps: Int or None. How many steps an epoch has, for the progress bar.
            validation_data: As for `begin`, and for the same reason.
            batch_size: Int or None. Of `fit`, as are the next.
            validation_steps: Int or None.
        """
        self._set_steps(steps)
        super().on_epoch_begin(self._epoch)
        self._begun = self._epoch
        # Which the fit resets, and then heeds after its first batch.
        self._stops, self.model.stop_training = self.model.stop_training, False

    def fit(
        self,
        trainer: keras.Model,
        *data: Any,
        steps: int | None,
        until: Callable[[], bool] = bool,
        **settings: Any,
    ) -> None:
        """Trains a model from the epoch on that the last fit has ended with.

        Args:
            trainer: The model to train.
            *data: What its `fit` takes first.
            steps: Int or None. How many steps an epoch has, for the progress bar.
            until: Function without arguments that says after each epoch whether to stop.
            **settings: Further arguments of its `fit`.
        """
        if self.model.stop_training:
            return
        self._trainer.set_model(trainer)
        self._until = until
        # `fit` takes a ready CallbackList as it is, and so neither gives the callbacks its own
        # model nor adds a History: what a fit of its own would tell them is set here.
        self._set_steps(steps)
        trainer.history = self.history  # Which `fit` returns.
        with not_averaged(trainer.optimizer):
            trainer.fit(
                *data, callbacks=self, initial_epoch=self._epoch, **self._settings, **settings
            )
        # Where the model itself trained, only for that fit was it told to stop by `until`.
        self.model.stop_training = self._asked

    def _set_steps(self, steps: int | None) -> None:
        self.set_params({**self._settings, "steps": steps, "batch_size": self._batch_size})

    def end(
        self,
        *,
        validation_data: Any = None,
        batch_size: int | None = None,
        validation_steps: int | None = None,
    ) -> None:
        """Calls `on_train_end` of the callbacks.

        Args:
            validation_data: As for `begin`, and for the same reason.
            batch_size: Int or None. Of `fit`, as are the next.
            validation_steps: Int or None.
        """
        self.model.history = self.history
        if self.model.optimizer.built:
            self.model.optimizer.finalize_variable_values(self.model.trainable_weights)
        super().on_train_end()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Does nothing: to the callbacks training starts once, in `begin`, before the first fit."""

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Does nothing: to the callbacks training ends once, in `end`, after the last fit."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._begun == epoch:
            self._begun = None  # They were told before the fit started.
            self._trainer.model.stop_training = self.model.stop_training = self._stops
            return
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        _ = self._trainer.model
        super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        trainer = self._trainer.model
        super().on_train_batch_end(batch, logs)
        # Callbacks stop their model, and it is another one that has to stop.
        trainer.stop_training |= self.model.stop_training

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        trainer = self._trainer.model
        super().on_epoch_end(epoch, logs)
        self._epoch = epoch + 1
        self._asked = self.model.stop_training
        trainer.stop_training |= self._asked or self._until()
