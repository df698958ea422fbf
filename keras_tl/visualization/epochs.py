"""At which epochs the values in the logs of a run were measured."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from keras_tl.arguments import check_count
from keras_tl.messages import some


class LoggedEpochs:
    """The epochs, counted from 1, at which the values in the logs of a run were measured.

    A list in a `History` has no epochs of its own, and is shorter than the run where `fit` does not
    validate in each epoch. Its length alone tells no more than which `validation_freq` it may be.

    Args:
        logs: Dictionary from names to lists of values.
        epochs: List of the run's epochs, counted from 1.
        recorded: Dictionary from names to lists of epochs, counted from 0: what is known.
        validation_freq: As in `fit`, or None where it is not known.

    Raises:
        ValueError: If `validation_freq` is out of range.
    """

    def __init__(
        self,
        logs: Mapping[str, Sequence[float]],
        epochs: Sequence[int],
        recorded: Mapping[str, Sequence[int]],
        validation_freq: int | Collection[int] | None = None,
    ):
        self.all = list(epochs)
        self._logs = logs
        self._recorded = recorded
        self._freq = _checked(validation_freq)
        self._warned = False

    def of(self, name: str) -> list[int]:
        """Returns the epochs of the values with that name, one for each.

        Warns where they are those of the only `validation_freq` that fits, which need not be it.

        Raises:
            ValueError: If they cannot be known, or are not those of `validation_freq`.
        """
        count = len(self._logs[name])
        recorded = [epoch + 1 for epoch in self._recorded.get(name, ())]
        if len(recorded) == count:
            return recorded
        validates = name.startswith("val_")
        if validates and self._freq is not None:
            return self._of_given(name, count, self._freq)
        if count == len(self.all):
            return self.all
        if not validates:
            raise ValueError(
                f"`{name}` has {count} values in {len(self.all)} epochs, and it is not known of "
                "which. Quantities of each epoch can be drawn, and those of validation; others if "
                "a callback before UnfreezeAtConvergence logs them, which is then to be passed."
            )
        return self._of_the_only_one(name, count)

    def _of_given(self, name: str, count: int, freq: int | Collection[int]) -> list[int]:
        validated = self._validated(freq)
        if len(validated) != count:
            raise ValueError(
                f"`{name}` has {count} values, but with `validation_freq={freq!r}` there are "
                f"{len(validated)} in epochs {self.all[0]} to {self.all[-1]}. Pass what `fit` got."
            )
        return validated

    def _of_the_only_one(self, name: str, count: int) -> list[int]:
        fitting = {}
        for freq in range(2, self.all[-1] + 2):
            validated = self._validated(freq)
            if len(validated) == count:
                fitting[tuple(validated)] = freq
        if len(fitting) != 1:
            several = ", ".join(str(freq) for freq in sorted(fitting.values()))
            raise ValueError(
                f"`{name}` has {count} values in {len(self.all)} epochs, and it is not known of "
                f"which: {f'`validation_freq` may be {several}' if several else 'no int fits'}, or "
                "a list. Pass `validation_freq=` as to `fit`, or the UnfreezeAtConvergence."
            )
        ((epochs, freq),) = fitting.items()
        if not self._warned and epochs:
            self._warned = True
            warnings.warn(
                f"`plot_stages` draws the {count} values of `{name}` in {len(self.all)} epochs at "
                f"{some([str(epoch) for epoch in epochs])}, as with `validation_freq={freq}`. "
                "Pass `validation_freq=` as to `fit` to be sure.",
                stacklevel=4,
            )
        return list(epochs)

    def _validated(self, freq: int | Collection[int]) -> list[int]:
        """The epochs in which `fit` validates, which counts them from 1 for this."""
        if isinstance(freq, int):
            return [epoch for epoch in self.all if epoch % freq == 0]
        return [epoch for epoch in self.all if epoch in freq]


def _checked(validation_freq: Any) -> int | list[int] | None:
    if validation_freq is None:
        return None
    if isinstance(validation_freq, (list, tuple, set, frozenset, range, np.ndarray)):
        for epoch in validation_freq:
            check_count("validation_freq", epoch, at_least=1)
        return sorted(int(epoch) for epoch in validation_freq)
    check_count("validation_freq", validation_freq, at_least=1)
    return int(validation_freq)
