"""The quantity in an epoch's logs that a callback monitors."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from keras_tl import internals


class MonitoredValue:
    """Reads the monitored quantity from the logs, and knows which way it improves.

    Args:
        monitor: String. Its name in the logs.
        mode: `"auto"`, `"min"` or `"max"`, as in `keras.callbacks.EarlyStopping`.
        model: The compiled model.
    """

    def __init__(self, monitor: str, mode: str, model: keras.Model):
        self._monitor = monitor
        self._mode = mode
        self._model = model
        self._seen = False
        self._warned = False

    @property
    def mode(self) -> str:
        """`"min"` or `"max"`: for `"auto"` what EarlyStopping makes of a rise from 0 to 1.

        Raises:
            ValueError: If Keras cannot tell for this quantity.
        """
        if self._mode == "auto":
            probe = keras.callbacks.EarlyStopping(self._monitor, patience=2)
            probe.set_model(self._model)
            try:
                probe.on_train_begin()
                probe.on_epoch_end(0, {self._monitor: 0.0})
                probe.on_epoch_end(1, {self._monitor: 1.0})
            except ValueError as error:
                raise ValueError(
                    f"Cannot tell whether {self._monitor!r} improves by rising or by falling. Pass "
                    '`mode="max"` or `mode="min"`.'
                ) from error
            self._mode = "max" if probe.best == 1.0 else "min"
        return self._mode

    def read(self, logs: dict[str, Any], *, last_epoch: bool) -> float | None:
        """Returns the value, or None in an epoch in which `fit` did not validate.

        Of several processes that train one model, the first one's: all must decide the same, and
        what another callback puts into the logs may differ, as may rounding on unlike machines.

        Args:
            logs: The epoch's logs.
            last_epoch: Bool. Whether no epoch comes after it.

        Raises:
            ValueError: If it is sure that the logs never have the quantity. The message lists
                what they have.
        """
        if self._monitor in logs:
            self._seen = True
            return float(internals.of_chief(float(logs[self._monitor])))
        if self._seen:
            return None
        message = (
            f"`monitor={self._monitor!r}` is not in the logs. Available: "
            f"{', '.join(sorted(logs))}. Pass one of these, or validation data to `fit`; a "
            "callback that adds it to the logs must come before this one."
        )
        validated = any(name.startswith("val_") for name in logs)
        if validated or last_epoch or not self._monitor.startswith("val_"):
            raise ValueError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(f"{message} Waiting for an epoch with validation.", stacklevel=2)
        return None


def check_monitor(monitor: str, mode: str) -> None:
    """Raises a ValueError unless these can be the arguments of the callbacks that monitor."""
    if not isinstance(monitor, str):
        raise ValueError(f"`monitor` must be a name in the logs. Received: monitor={monitor!r}.")
    if mode not in ("auto", "min", "max"):
        raise ValueError(f'`mode` must be "auto", "min" or "max". Received: mode={mode!r}.')
