"""The backup of a run: what of a model and its training is kept, and for whom it is of use."""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

import keras
import numpy as np

from keras_tl import internals
from keras_tl.backup import Backup
from keras_tl.selecting import is_built


@dataclasses.dataclass(frozen=True)
class RunSnapshot:
    """What a run goes on from.

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
        **settings: What must be the same for a snapshot to be of use, by name.

    Raises:
        ValueError: If nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike[str], model: keras.Model, **settings: Any):
        # No process goes on to load before the first has deleted what an earlier `fit` has left.
        self._backup = internals.in_all(lambda: Backup(folder, writes=internals.is_chief()))
        self._model = model
        self._settings = settings
        self._failed = False

    @property
    def folder(self) -> str:
        """String. The folder."""
        return str(self._backup.folder)

    def save(self, epoch: int, state: dict[str, Any], arrays: dict[str, list[np.ndarray]]) -> None:
        """Makes a snapshot, or warns once that it cannot."""
        arrays = {
            **arrays,
            "model": [internals.on_host(one) for one in self._model.variables],
            "optimizer": [internals.on_host(one) for one in self._model.optimizer.variables],
        }
        if not internals.is_chief():
            return
        content = {"settings": self._settings, "variables": self._variables(), "run": state}
        try:
            self._backup.save(epoch, content, arrays)
        except (OSError, RuntimeError) as error:
            if not self._failed:
                warnings.warn(
                    f"UnfreezeAtConvergence could not back up epoch {epoch}: {error}. Training "
                    "goes on; the last backup stays as it is.",
                    stacklevel=2,
                )
            self._failed = True

    def load(self) -> RunSnapshot | None:
        """Returns the newest snapshot that is of use, and warns of newer ones; None without any.

        Raises:
            ValueError: If there are snapshots, and none is of use; and if another process sees
                others.
        """
        found = internals.in_all(lambda: self._backup.load(self._why_not))
        self._check_all_see(0 if found is None else found[0]["epoch"])
        if found is None:
            return None
        state, arrays, refused = found
        for reason in refused:
            warnings.warn(f"UnfreezeAtConvergence: a backup is not used: {reason}", stacklevel=2)
        return RunSnapshot(state["epoch"], state["run"], arrays)

    def delete(self) -> None:
        """Removes the snapshots."""
        if internals.is_chief():
            self._backup.delete()

    def _check_all_see(self, epoch: int) -> None:
        """Raises a ValueError in all processes unless they would go on after the same epoch."""
        epochs = internals.of_all(epoch).tolist()
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
            [one.name, list(one.shape), keras.backend.standardize_dtype(one.dtype)]
            for one in self._model.variables
        ]

    def _why_not(self, state: dict[str, Any]) -> str | None:
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
        for name, value in self._settings.items():
            other = state["settings"].get(name)
            if other != value:
                return f"it is of a run with {name}={other!r}, and not {value!r}."
        return None
