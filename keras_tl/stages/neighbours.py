"""What `UnfreezeAtConvergence` has to say about the callbacks beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import keras


def check_neighbours(
    beside: Sequence[keras.callbacks.Callback],
    position: int,
    *,
    monitor: str,
    patience: int,
    backup: bool,
    restores: bool,
) -> None:
    """Warns of callbacks that would fight ours, and raises if no order of them works.

    Args:
        beside: The callbacks of the running `fit`, ours too.
        position: Int. Where ours is in it.
        monitor: String. What ours monitors.
        patience: Int. Ours, in stage 0.
        backup: Bool. Whether ours keeps a backup.
        restores: Bool. Whether ours restores best weights.

    Raises:
        ValueError: If two of ours are there, or one that cannot be together with a backup.
    """
    ours = beside[position]
    if sum(isinstance(one, type(ours)) for one in beside) > 1:
        raise ValueError(
            "`fit` has two UnfreezeAtConvergence callbacks, which would unfreeze against each "
            "other. Pass one; for several switches give it `stages`."
        )
    for index, one in enumerate(beside):
        before = index < position
        alike = getattr(one, "monitor", None) == monitor
        if isinstance(one, keras.callbacks.BackupAndRestore):
            _check_backup_and_restore(backup)
        elif isinstance(one, keras.callbacks.SwapEMAWeights):
            _check_swap_ema_weights(one, before, backup, restores)
        elif isinstance(one, keras.callbacks.EarlyStopping) and not before:
            _check_early_stopping(one, patience, alike, restores)
        elif isinstance(one, keras.callbacks.ReduceLROnPlateau) and alike:
            _check_plateau(one.patience, patience)


def _check_backup_and_restore(backup: bool) -> None:
    if backup:
        raise ValueError(
            "`fit` has a BackupAndRestore beside `UnfreezeAtConvergence(backup_dir=...)`. Drop "
            "BackupAndRestore: `backup_dir` alone restores weights, epoch, stage and optimizer, in "
            "any order of the callbacks."
        )
    _warn(
        "BackupAndRestore restores weights and epoch, but not the stage: a run resumed in a "
        "fine-tuning stage would continue frozen, at the head's learning rate. Drop it and pass "
        "`UnfreezeAtConvergence(backup_dir=...)`."
    )


def _check_swap_ema_weights(
    one: keras.callbacks.SwapEMAWeights, before: bool, backup: bool, restores: bool
) -> None:
    if one.swap_on_epoch and before and backup:
        raise ValueError(
            "SwapEMAWeights(swap_on_epoch=True) before UnfreezeAtConvergence(backup_dir=...) has "
            "the averages in the model when the backup is made. Place it after "
            "UnfreezeAtConvergence, with `restore_best_weights=False`."
        )
    if restores and not (one.swap_on_epoch and before):
        _warn(
            "SwapEMAWeights has the model validated with averaged weights, but "
            "UnfreezeAtConvergence would keep the others as the best ones. Make it with "
            "`swap_on_epoch=True` and place it before UnfreezeAtConvergence, or pass "
            "`restore_best_weights=False`."
        )


def _check_early_stopping(
    one: keras.callbacks.EarlyStopping, ours: int, alike: bool, restores: bool
) -> None:
    if restores and one.restore_best_weights:
        _warn(
            "EarlyStopping(restore_best_weights=True) is after UnfreezeAtConvergence, so at the "
            "end it puts its own best weights in place of those that this one has restored. Place "
            "it before UnfreezeAtConvergence, or make it without `restore_best_weights`."
        )
    if alike and one.patience <= ours:
        _warn(
            f"EarlyStopping (patience={one.patience}) is after UnfreezeAtConvergence "
            f"(patience={ours}), and will stop training while the backbone is frozen. Place it "
            "before UnfreezeAtConvergence, and its stop counts as convergence; or drop it and pass "
            "`fine_tune_patience`."
        )


def _check_plateau(its: int, ours: int) -> None:
    if its < ours:
        _warn(
            f"ReduceLROnPlateau (patience={its}) lowers the learning rate of the head before "
            f"UnfreezeAtConvergence (patience={ours}) sees that it has converged. Give it a "
            f"patience of {ours} or more, unless that is meant."
        )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)
