"""Has a series of numbers converged? `keras.callbacks.EarlyStopping`'s answer, without Keras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_tl.arguments import check_count, check_min_delta


class ConvergenceMonitor:
    """Says when a monitored value has not improved for `patience` epochs.

    For any series of values it answers at the epoch at which `keras.callbacks.EarlyStopping` with
    the same arguments would stop; like it, it compares in the precision of the backend's floats. A
    custom training loop can use it directly.

    Args:
        mode: `"min"` or `"max"`. Whether the value improves by falling or by rising. Defaults to
            `"min"`.
        min_delta: Float. Smallest change that counts as an improvement; its sign is ignored.
            Defaults to `0.0`.
        patience: Int, at least 0. Number of epochs without improvement after which the series has
            converged. Defaults to `3`.
        start_from_epoch: Int. Values of earlier epochs are ignored. Defaults to `0`.
        dtype: String, the float type to compare in. Defaults to `"float32"`, the default of
            `keras.config.floatx()`.

    Attributes:
        best: The best value so far, or None.
        best_epoch: Its epoch, or None.
        wait: Number of epochs since then.

    Raises:
        ValueError: If `mode` is unknown, or `patience` or `start_from_epoch` is not an int of at
            least 0.

    Example:

    >>> monitor = ConvergenceMonitor(patience=2)
    >>> [monitor.update(epoch, loss) for epoch, loss in enumerate([0.9, 0.5, 0.6, 0.7])]
    [False, False, False, True]
    >>> monitor.best_epoch
    1
    """

    def __init__(
        self,
        *,
        mode: str = "min",
        min_delta: float = 0.0,
        patience: int = 3,
        start_from_epoch: int = 0,
        dtype: str = "float32",
    ):
        if mode not in ("min", "max"):
            raise ValueError(f'`mode` must be "min" or "max". Received: mode={mode!r}.')
        check_count("patience", patience)
        check_count("start_from_epoch", start_from_epoch)
        check_min_delta(min_delta)
        self.mode = mode
        self.min_delta = abs(min_delta)
        self.patience = patience
        self.start_from_epoch = start_from_epoch
        self.dtype = np.dtype(dtype)
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.wait = 0

    def update(self, epoch: int, value: float) -> bool:
        """Records one epoch's value.

        Args:
            epoch: Int. The epoch, counted from 0.
            value: Float. The monitored value at its end; may be NaN or infinite.

        Returns:
            Bool. Whether the series has converged.
        """
        if epoch < self.start_from_epoch:
            return False
        if self._improves(value):
            self.best = value
            self.best_epoch = epoch
            self.wait = 0
            return False
        self.wait += 1
        return self.wait >= self.patience

    def get_state(self) -> dict[str, Any]:
        """Returns what it has seen, for `set_state`.

        Returns:
            A dictionary that JSON can hold.
        """
        best = None if self.best is None else float(self.best)
        return {"best": best, "best_epoch": self.best_epoch, "wait": self.wait}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where another monitor was.

        Args:
            state: What its `get_state` returned.
        """
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.wait = state["wait"]

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        with np.errstate(over="ignore"):
            best = self.dtype.type(self.best)
            if self.mode == "min":
                return bool(self.dtype.type(value + self.min_delta) < best)
            return bool(self.dtype.type(value - self.min_delta) > best)


def min_delta_to_converge(values: Sequence[float], **settings: Any) -> tuple[float, int] | None:
    """Returns a `min_delta` with which a series would have converged in its first half.

    For a series that goes on improving by a hair, which never converges with a `min_delta` of 0.

    Args:
        values: List of floats, one for each epoch.
        **settings: Other arguments of `ConvergenceMonitor`.

    Returns:
        A tuple of the smallest such `min_delta` of the form 1, 2 or 5 times a power of ten, up to
        a hundredth of the first value, and the epoch, counted from 0; or None where none is, as
        the series still improves by more.

    Example:

    >>> losses = [1.0, 0.6, 0.5, 0.499, 0.498, 0.497, 0.496, 0.495, 0.494, 0.493]
    >>> min_delta_to_converge(losses, patience=2)
    (0.002, 4)
    """
    if not values or not np.all(np.isfinite(values)):
        return None
    for min_delta in _round_numbers(abs(values[0]) / 100):
        monitor = ConvergenceMonitor(min_delta=min_delta, **settings)
        for epoch, value in enumerate(values[: len(values) // 2]):
            if monitor.update(epoch, value):
                return min_delta, epoch
    return None


def _round_numbers(largest: float) -> list[float]:
    """Returns 1, 2 and 5 times powers of ten, up to the largest and down to a millionth of it."""
    if largest <= 0:
        return []
    top = int(np.floor(np.log10(largest)))
    numbers = [float(f"{n}e{power}") for power in range(top - 6, top + 1) for n in (1, 2, 5)]
    return [number for number in numbers if number <= largest]
