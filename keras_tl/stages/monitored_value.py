"""The quantity in an epoch's logs that a callback monitors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_tl.internals.processes import of_chief
from keras_tl.messages import did_you_mean


class MonitoredValue:
    """Reads the monitored quantity from the logs, and knows which way it improves.

    Args:
        monitor: String. Its name in the logs.
        mode: `"auto"`, `"min"` or `"max"`, as in `keras.callbacks.EarlyStopping`.
        model: The compiled model, whose metrics say which way they improve. Only needed for the
            mode `"auto"`.

    Attributes:
        name: String. The quantity's name in the logs.
    """

    def __init__(self, monitor: str, mode: str, model: keras.Model | None = None):
        self.name = monitor
        self._mode = mode
        self._model = model
        self._read = False
        self._seen = False
        self._warned = False

    @property
    def mode(self) -> str:
        """`"min"` or `"max"`: for `"auto"` what EarlyStopping makes of a rise from 0 to 1.

        Raises:
            ValueError: If Keras cannot tell for this quantity.
        """
        if self._mode == "auto":
            probe = keras.callbacks.EarlyStopping(self.name, patience=2)
            probe.set_model(self._model)
            try:
                probe.on_train_begin()
                probe.on_epoch_end(0, {self.name: 0.0})
                probe.on_epoch_end(1, {self.name: 1.0})
            except ValueError as error:
                raise ValueError(
                    f"Cannot tell whether {self.name!r} improves by rising or by falling. Pass "
                    '`mode="max"` or `mode="min"`.'
                ) from error
            self._mode = "max" if probe.best == 1.0 else "min"
        return self._mode

    @property
    def seen(self) -> bool:
        """Whether the logs have had it."""
        return self._seen

    def read(self, logs: Mapping[str, Any], *, validates: bool | None = None) -> float | None:
        """Returns the value, or None in an epoch in which `fit` did not validate.

        Of several processes that train one model, the first one's: all must decide the same, and
        what another callback puts into the logs may differ, as may rounding on unlike machines.

        Args:
            logs: The epoch's logs.
            validates: Bool or None. Whether `fit` has data to validate on; None if that is not
                known.

        Raises:
            ValueError: In the first epoch, if it is sure that the logs never have the quantity (the
                message lists what they have); and if it is not one number.
        """
        first, self._read = not self._read, True
        if self.name in logs:
            self._seen = True
            return float(of_chief(_number(self.name, logs[self.name])))
        if self._seen:
            return None
        validated = any(name.startswith("val_") for name in logs)
        of_validation = self.name.startswith("val_")
        alike = [name for name in logs if name.startswith("val_") == of_validation]
        or_data = "" if validated else ", or validation data to `fit`"
        message = (
            f"`monitor={self.name!r}` is not in the logs. Available: {', '.join(sorted(logs))}."
            f"{did_you_mean(self.name, alike)} Pass one of these{or_data}; a callback that adds "
            "it to the logs must come before this one."
        )
        if first and (validated or self._never_comes(logs, validates)):
            raise ValueError(message)
        # Later an error would lose what was trained: `fit` goes on to its normal end.
        if not self._warned and (validated or not validates):
            self._warned = True
            waiting = "" if validated else " Waiting for an epoch with validation."
            warnings.warn(f"{message}{waiting}", stacklevel=2)
        return None

    def _never_comes(self, logs: Mapping[str, Any], validates: bool | None) -> bool:
        """Whether no later epoch has it either, after one without validation.

        What `fit` does not measure itself may be of a callback that validates now and then.
        """
        if not self.name.startswith("val_"):
            return True
        return validates is False and self.name.removeprefix("val_") in logs


def _number(monitor: str, value: Any) -> float:
    """Returns the number that a metric's result is, which may be an array of one element."""
    array = np.asarray(keras.ops.convert_to_numpy(value))
    if array.size != 1 or array.dtype.kind not in "fiub":
        raise ValueError(
            f"`monitor={monitor!r}` is not one number in the logs, but {value!r} (shape "
            f"{array.shape}, dtype {array.dtype}). Monitor a metric that is one number, such as "
            '`F1Score(average="macro")`.'
        )
    return float(array.reshape(()))
