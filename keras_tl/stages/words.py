"""How `UnfreezeAtConvergence` says what it does and why."""

from __future__ import annotations


def why_ended(reason: str, monitor: str, patience: int | None, stage: int, epochs: int) -> str:
    """Returns what a `Transition.reason` means.

    Args:
        reason: String.
        monitor: String. The monitored quantity.
        patience: Int or None. The patience of the stage that ended.
        stage: Int. Which stage that was.
        epochs: Int. How many epochs it had.
    """
    return {
        "converged": f"{monitor} has not improved for {_patiently(patience)}",
        "early_stopping": "EarlyStopping has seen no improvement",
        "max_frozen_epochs": f"it was frozen for {_epochs(epochs)}",
        "epochs": f"stage {stage} has had its {_epochs(epochs)}",
        "not_improved": f"this learning rate has not improved {monitor} in {_epochs(epochs)}",
        "diverged": f"{monitor} is not finite at this learning rate",
    }[reason]


def what_it_waits_for(monitor: str, waited: int, patience: int) -> str:
    """Returns how far a stage is from its end.

    Args:
        monitor: String. The monitored quantity.
        waited: Int. Epochs without improvement so far.
        patience: Int. The patience of the stage.

    Example:

    >>> what_it_waits_for("val_loss", 2, 3)
    'val_loss has not improved for 2 of 3 epochs'
    """
    return f"{monitor} has not improved for {waited} of {_epochs(patience)}"


def what_next(
    monitor: str,
    patience: int | None,
    epochs: int | None,
    *,
    last: bool,
    lower: bool = False,
    falls: int | None = None,
) -> str:
    """Returns what will end a fine-tuning stage, and what comes then.

    Args:
        monitor: String. The monitored quantity.
        patience: Int or None. The patience of the stage.
        epochs: Int or None. How many epochs it has at most.
        last: Bool. Whether it is the last stage.
        lower: Bool. Whether the next stage is the same at a lower learning rate.
        falls: Int or None. In how many epochs, all that `fit` has left, the learning rate falls.
    """
    ends = []
    if patience is not None:
        ends.append(f"until {monitor} stops improving for {_patiently(patience)}")
    if epochs is not None:
        ends.append(f"for at most {_epochs(epochs)}")
    if not ends:
        return "fine-tuning to the last epoch"
    then = "the end" if last else "a third of the rate" if lower else "the next stage"
    falling = "" if falls is None else f"; it falls to the end of fit, in {_epochs(falls)}"
    return f"fine-tuning {' and '.join(ends)}, then {then}{falling}"


def why_still_frozen(
    monitor: str,
    patience: int,
    *,
    stopped: bool,
    decided: bool,
    seen: bool = True,
    hint: str = "",
) -> str:
    """Returns the warning about a run that ended in stage 0.

    Args:
        monitor: String. The monitored quantity.
        patience: Int. The patience of stage 0.
        stopped: Bool. Whether another callback has stopped training.
        decided: Bool. Whether stage 0 ended with the last epoch.
        seen: Bool. Whether the monitored quantity was in the logs.
        hint: String. What `what_would_converge` returned.
    """
    message = "UnfreezeAtConvergence: training ended with the backbone still frozen, because "
    if stopped:
        return message + (
            "another callback stopped it. Place an EarlyStopping before UnfreezeAtConvergence, "
            "and its stop counts as convergence."
        )
    if decided:
        return message + (
            "stage 0 ended with the last epoch. Pass more `epochs` to `fit` to fine-tune."
        )
    if not seen:
        return message + (
            f"{monitor} was never in the logs. Pass validation data to `fit`, a `monitor` that is "
            "in the logs, or `max_frozen_epochs`."
        )
    return message + (
        f"{monitor} had not converged by the last epoch (patience={patience}). {hint}Pass more "
        "`epochs` to `fit`; or a larger `min_delta`, a smaller `patience` or `max_frozen_epochs`."
    )


def nothing_was_judged(monitor: str) -> str:
    """Returns the warning about a run that ended in a later stage, of which nothing was seen."""
    return (
        f"UnfreezeAtConvergence: {monitor} was never in the logs, so no epoch was judged: the "
        "model has its last weights, which may not be its best. Validate more often "
        "(`validation_freq`), or pass a `monitor` that is in the logs."
    )


def what_would_converge(monitor: str, found: tuple[float, int] | None) -> str:
    """Returns what is to be said of a series that improves by a hair, with a space after it.

    Args:
        monitor: String. The monitored quantity.
        found: What `min_delta_to_converge` returned.

    Example:

    >>> what_would_converge("val_loss", (0.002, 30))
    'val_loss still improves, but slowly: `min_delta=0.002` would have unfrozen after epoch 31. '
    """
    if found is None:
        return ""
    min_delta, epoch = found
    return (
        f"{monitor} still improves, but slowly: `min_delta={min_delta:g}` would have unfrozen "
        f"after epoch {epoch + 1}. "
    )


def _patiently(patience: int | None) -> str:
    # As in EarlyStopping, a patience of 0 is as patient as one of 1.
    return _epochs(max(1, patience or 0))


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"
