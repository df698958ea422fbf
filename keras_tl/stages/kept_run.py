"""The run in a backup folder: this `fit` continues it, and adds each of its epochs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable

import keras

from keras_tl.backup.run_backup import RunBackup
from keras_tl.backup.run_identity import identity_of
from keras_tl.internals.models import set_initial_epoch
from keras_tl.stages.staged_model import StagedModel
from keras_tl.stages.training_state import TrainingState

_TRIAL = "{trial}"


class KeptRun:
    """Keeps a run in a folder, and resumes it from there.

    Args:
        folder: Path of the folder.
        callback: The callback whose run it is, in a running `fit` that has made no step yet.
        staged: The `StagedModel`.
        state: The `TrainingState` of the run.
        exactly: Bool. Whether in each stage just its layers train.

    Attributes:
        epochs_done: Int. How many epochs were done before this `fit`.

    Raises:
        ValueError: If nothing can be written there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        callback: keras.callbacks.Callback,
        staged: StagedModel,
        state: TrainingState,
        *,
        exactly: bool,
    ):
        self.epochs_done = 0
        self._model = callback.model
        self._state = state
        self._epochs = (callback.params or {}).get("epochs")
        self._backup = RunBackup(folder, self._model)
        # What the run began with, so before anything of a snapshot is restored.
        self._identity = identity_of(
            callback,
            staged.stages,
            staged.backbones,
            exactly=exactly,
            stage=state.progress.stage,
            goes_on=self._backup.has_snapshots(),
        )

    def resume(self, say: Callable[[str], None]) -> None:
        """Continues after the last epoch that is kept, if there is one, and says so.

        Args:
            say: Function that tells the user.

        Raises:
            ValueError: If what is kept is of another run, or of no use.
        """
        self.epochs_done = done = self._backup.resume(self._identity, self._state.restore)
        if not done:
            return
        epochs = self._epochs or 0
        stopped = self._state.progress.stop_reason is not None
        # A run that has stopped has no next epoch: `fit` is told that all are done.
        set_initial_epoch(self._model, max(done, epochs) if stopped else done)
        say(
            f"UnfreezeAtConvergence resumes after epoch {done}, in stage "
            f"{self._state.progress.stage}, from {self._backup.folder!r}."
        )
        if self._has_more_done():
            warnings.warn(
                f"UnfreezeAtConvergence: the run in {self._backup.folder!r} has {done} epochs "
                f"done, and `epochs={epochs}`, so nothing is trained. The model gets the weights "
                "of that run, and its backup is kept. Pass more `epochs` to continue.",
                stacklevel=4,
            )

    def save(self, epochs_done: int) -> None:
        """Makes a snapshot, or warns once that it cannot."""
        self._backup.save(epochs_done, *self._state.to_data(), self._identity)

    def delete(self) -> None:
        """Deletes what is kept, unless that run is further than this `fit` was to go."""
        if not self._has_more_done():
            self._backup.delete()

    def _has_more_done(self) -> bool:
        return self._epochs is not None and self.epochs_done > self._epochs


def folder_of_trial(folder: str, callbacks: Iterable[keras.callbacks.Callback]) -> str:
    """Returns the folder of a run, with the trial of KerasTuner's search in place of `{trial}`.

    Args:
        folder: String. The `backup_dir`.
        callbacks: The callbacks of the `fit`. KerasTuner adds one that knows the trial.

    Raises:
        ValueError: If there is no trial to put in its place.
    """
    if _TRIAL not in folder:
        return folder
    trials = [one.trial.trial_id for one in callbacks if hasattr(one, "trial")]
    if not trials:
        raise ValueError(
            f"`{_TRIAL}` in `backup_dir` is the trial of a KerasTuner search, but none calls this "
            f"`fit`. Received: backup_dir={folder!r}. Pass a folder without it, or the callbacks "
            "that `HyperModel.fit` gets to `model.fit`."
        )
    return folder.replace(_TRIAL, trials[0])
