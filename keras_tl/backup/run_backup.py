"""The backup of a run: what of a model and its training is kept, and for whom it is of use."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_tl.backbone.selecting import is_built, variables_of
from keras_tl.backup.run_identity import doubt, why_another_run
from keras_tl.backup.snapshots import Backup, OtherRunError
from keras_tl.internals.layers import name_without_count
from keras_tl.internals.processes import in_all, is_chief, of_all, of_chief
from keras_tl.internals.values import on_host


@dataclasses.dataclass(frozen=True)
class RunSnapshot:
    """What a run resumes from.

    Attributes:
        epoch: Int. How many epochs are done.
        state: Dictionary of what the caller kept besides.
        arrays: Dictionary from names to lists of arrays; "model" and "optimizer" are the values of
            their variables.
    """

    epoch: int
    state: dict[str, Any]
    arrays: dict[str, list[np.ndarray]]


class RunBackup:
    """Keeps the state of a `fit` in a folder.

    Of several processes that train one model, the first writes, and all load: they must see one
    folder. Each must call every method.

    Args:
        folder: Path of the folder.
        model: The model.

    Raises:
        ValueError: If nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike[str], model: keras.Model):
        # No process loads before the first has deleted what an earlier `fit` has left.
        self._backup = in_all(lambda: Backup(folder, writes=is_chief()))
        self._model = model
        self._failed = False

    @property
    def folder(self) -> str:
        """String. The folder."""
        return str(self._backup.folder)

    def has_snapshots(self) -> bool:
        """Whether there is anything to resume from, as the first process sees it."""
        return bool(of_chief(bool(self._backup)))

    def save(
        self,
        epoch: int,
        state: dict[str, Any],
        arrays: dict[str, list[np.ndarray]],
        identity: dict[str, Any],
    ) -> None:
        """Makes a snapshot, or warns once that it cannot.

        Args:
            epoch: Int. How many epochs are done.
            state: Dictionary of what JSON can hold.
            arrays: Dictionary from names to lists of arrays.
            identity: What `identity_of` returned.
        """
        arrays = {
            **arrays,
            "model": [on_host(one) for one in variables_of(self._model)],
            "optimizer": [on_host(one) for one in self._model.optimizer.variables],
        }
        if not is_chief():
            return
        content = {"identity": identity, "variables": self._variables(), "run": state}
        try:
            self._backup.save(epoch, content, arrays)
        except (OSError, RuntimeError) as error:
            if not self._failed:
                warnings.warn(
                    f"UnfreezeAtConvergence could not back up epoch {epoch}: {error}. Training "
                    "continues; the last backup stays as it is.",
                    stacklevel=2,
                )
            self._failed = True

    def resume(self, identity: dict[str, Any], apply: Callable[[RunSnapshot], None]) -> int:
        """Goes on from the newest snapshot that is of use, and warns of newer ones.

        Args:
            identity: What `identity_of` returned.
            apply: Function that has the model and the caller resume from a snapshot, or raises a
                ValueError and leaves both as they were. Then the one before is tried.

        Returns:
            How many epochs are done: 0 without snapshots.

        Raises:
            ValueError: If there are snapshots, and none is of use; if they are of another run; and
                if another process sees others.
        """
        failed: list[tuple[int, ValueError]] = []
        while True:
            before = failed[-1][0] if failed else None
            found = in_all(functools.partial(self._load, identity, before))
            self._check_all_see(0 if found is None else found[0]["epoch"])
            if found is None:
                if failed:
                    raise failed[0][1]
                return 0
            state, arrays, refused = found
            snapshot = RunSnapshot(state["epoch"], state["run"], arrays)
            try:
                apply(snapshot)
            except ValueError as error:
                failed.append((snapshot.epoch, error))
                continue
            reasons = [f"epoch-{epoch:06d}: {error}" for epoch, error in failed]
            for reason in [*reasons, *refused]:
                self._warn(f"a backup is not used: {reason}")
            if "identity" not in state:
                self._warn(
                    "the backup was made by keras_tl 0.1, which did not note of which run it is. "
                    "If the settings or the data are others now, delete the folder and start over."
                )
            elif is_chief():
                doubtful = doubt(state["identity"], identity)
                if doubtful:
                    self._warn(doubtful)
            return snapshot.epoch

    def delete(self) -> None:
        """Removes the snapshots, or warns that it cannot: the run itself is done."""
        if is_chief():
            try:
                self._backup.delete()
            except OSError as error:
                self._warn(
                    f"the backup in {self.folder!r} could not be deleted: {error}. Delete the "
                    "folder, or the next run that is given it may resume from there."
                )

    def _load(self, identity: dict[str, Any], before: int | None) -> Any:
        def why_not(state: dict[str, Any], arrays: dict[str, list[np.ndarray]]) -> str | None:
            # Data and random numbers of other processes are their own; the first has written.
            if "identity" in state and is_chief():
                differs = why_another_run(state["identity"], identity)
                if differs:
                    raise OtherRunError(
                        f"`backup_dir={self.folder!r}` cannot be used: {differs}To start over, "
                        "delete the folder or pass another: each run needs one of its own."
                    )
            return self._why_not(state, arrays)

        return self._backup.load(why_not, before=before)

    def _warn(self, message: str) -> None:
        warnings.warn(f"UnfreezeAtConvergence: {message}", stacklevel=3)

    def _check_all_see(self, epoch: int) -> None:
        """Raises a ValueError in all processes unless they would resume after the same epoch."""
        epochs = of_all(epoch).tolist()
        if len(set(epochs)) > 1:
            seen = [f"epoch {one}" if one else "none" for one in epochs]
            raise ValueError(
                f"`backup_dir={self.folder!r}` is not the same folder for all processes that train "
                f"this model. They see, from the first on: {', '.join(seen)}. Pass a folder on a "
                "disk that all machines share."
            )

    def _variables(self) -> list[list[Any]]:
        """What tells models apart: not the whole names, which count up in a process."""
        return [
            [name_without_count(one), list(one.shape), keras.backend.standardize_dtype(one.dtype)]
            for one in variables_of(self._model)
        ]

    def _why_not(self, state: dict[str, Any], arrays: dict[str, list[np.ndarray]]) -> str | None:
        if not is_built(self._model):
            return (
                f'the model "{self._model.name}" is not built, so nothing can be restored. Call it '
                "on a batch before `fit`."
            )
        here, there = self._variables(), state["variables"]
        if len(here) != len(there):
            return f"it is of another model, with {len(there)} variables and not {len(here)}."
        for one, other in zip(here, there, strict=True):
            if one != other:
                return f"it is of another model, with {other} where this one has {one}."
        kept = [[list(value.shape), value.dtype.name] for value in arrays["model"]]
        if kept != [one[1:] for one in here] or "optimizer" not in arrays:
            return "its arrays are not those of the model."
        return None if isinstance(state["run"], dict) else "it has no state of the run."
