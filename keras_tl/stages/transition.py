"""The record of a switch from one stage to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_tl.backup.configurations import shown
from keras_tl.messages import some


@dataclasses.dataclass(frozen=True)
class Transition:
    """A switch from one stage to the next.

    Attributes:
        epoch: Int. The first epoch of the new stage, counted from 0.
        stage: Int. The new stage.
        reason: String. `"converged"`, `"early_stopping"` (another callback's),
            `"max_frozen_epochs"`, or `"epochs"` (those of the stage that ended). With
            `learning_rate="auto"` also `"not_improved"` (the rate of the stage that ended, and
            those before it, have not improved on the head) and `"diverged"`.
        value: Float or None. The best monitored value of the stage that ended.
        learning_rate_before: Float. The learning rate at the end of that stage.
        learning_rate_after: Float. The learning rate of the new stage.
        group_learning_rates: Dictionary from the names of the parameter groups in the new stage, if
            there are any, to the lowest and highest learning rate in each.
        trainable_before: Int. How many parameters were trainable before.
        trainable_after: Int. How many are trainable after.
        layers: Tuple of strings. The names of the layers that became trainable, from input to
            output.
        frozen: Tuple of strings. The names of those that are frozen again.
        cannot_train: Tuple of strings. The paths of the weights of layers that train now which stay
            frozen whatever is unfrozen: quantized kernels, and kernels under LoRA.
        unfrozen_early: Tuple of strings. The names of the layers that something else has unfrozen
            in the stage that ended. Not all backends train such before the model is compiled again.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_tl import FrozenBackbone, UnfreezeAtConvergence
    >>> pretrained = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="top")])
    >>> model = keras.Sequential([FrozenBackbone(pretrained), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> callback = UnfreezeAtConvergence(monitor="loss", max_frozen_epochs=1, verbose=0)
    >>> x, y = np.ones((32, 8)), np.ones((32, 1))
    >>> history = model.fit(x, y, epochs=2, callbacks=[callback], verbose=0)
    >>> transition = callback.transitions[0]
    >>> transition.epoch, transition.reason, transition.layers
    (1, 'max_frozen_epochs', ('top',))
    """

    epoch: int
    stage: int
    reason: str
    value: float | None
    learning_rate_before: float
    learning_rate_after: float
    trainable_before: int
    trainable_after: int
    layers: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    cannot_train: tuple[str, ...] = ()
    unfrozen_early: tuple[str, ...] = ()
    group_learning_rates: Mapping[str, tuple[float, float]] = dataclasses.field(
        default_factory=dict, hash=False
    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Transition:
        """Returns the record that `dataclasses.asdict` and JSON have made a dictionary of.

        Args:
            values: The dictionary.

        Returns:
            A `Transition`.

        Raises:
            ValueError: If it is no such dictionary.
        """
        try:
            found = cls(**{key: _with_tuples(value) for key, value in values.items()})
        except (AttributeError, TypeError):
            raise ValueError("its 'transitions' are not switches.") from None
        for field in dataclasses.fields(cls):
            value = getattr(found, field.name)
            if not _is(value, str(field.type)):
                raise ValueError(f"its 'transitions' have the {field.name} {shown(value)}.")
        return found

    def in_short(self) -> dict[str, str]:
        """Returns what fits into a row of a table.

        Returns:
            A dictionary from the titles of its columns to strings.
        """
        return {
            "epoch": f"{self.epoch + 1}",
            "stage": f"{self.stage}",
            "reason": self.reason,
            "best value before": "" if self.value is None else f"{self.value:.4g}",
            "learning rate": f"{self.learning_rate_before:.4g} -> {self.learning_rate_after:.4g}",
            "parameters": _parameters(self.trainable_before, self.trainable_after),
        }

    def describe(self, what: str, why: str, then: str, memory: str = "") -> str:
        """Returns a block of lines for the user.

        Args:
            what: String. What the callback does, after its name.
            why: String. What the reason means.
            then: String. What happens next.
            memory: String. How much memory the new stage takes.

        Returns:
            A string of several lines.
        """
        of = " of the stage" if self.stage > 1 else ""  # That of the run may be another.
        best = "" if self.value is None else f" (best{of} {self.value:.4g})"
        changed = self.layers or self.frozen or self.unfrozen_early
        rates = self.group_learning_rates.items()
        groups = ", ".join(f"{name} {_range(*ends)}" for name, ends in rates)
        rate = f"{self.learning_rate_before:.4g} -> {self.learning_rate_after:.4g}"
        lines = {
            "because": why + best,
            "joining": _layers(self.layers) or ("nothing" if self.unfrozen_early else ""),
            "unfrozen early": _early(self.unfrozen_early),
            "frozen again": _layers(self.frozen),
            "cannot train": some(self.cannot_train),
            "parameters": _parameters(self.trainable_before, self.trainable_after),
            "learning rate": f"{rate} ({groups})" if groups else rate,
            "memory": memory if changed else "",  # Else it is that of the last stage.
            "next": then,
        }
        block = [f"  {label:<15}{text}" for label, text in lines.items() if text]
        return "\n".join([f"Epoch {self.epoch + 1}: UnfreezeAtConvergence {what}", *block])


def _with_tuples(value: Any) -> Any:
    """Returns a value that JSON has made lists of tuples in."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(one) for key, one in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _range(lowest: float, highest: float) -> str:
    return f"{highest:.4g}" if lowest == highest else f"{lowest:.4g} to {highest:.4g}"


def _early(names: tuple[str, ...]) -> str:
    return f"{_layers(names)}; by something else, since the last stage began" if names else ""


def _parameters(before: int, after: int) -> str:
    if before == after:
        return f"{after:,} trainable, as before"
    return f"{before:,} -> {after:,} trainable"


def _layers(names: tuple[str, ...]) -> str:
    count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    return f"{count}: {some(names)}" if names else ""


def _is(value: Any, annotation: str) -> bool:
    """Whether a value is what the annotation of an attribute says."""
    if annotation.endswith(" | None"):
        return value is None or _is(value, annotation.removesuffix(" | None"))
    if annotation in _SIMPLE:
        return isinstance(value, _SIMPLE[annotation]) and not isinstance(value, bool)
    if annotation == "tuple[str, ...]":
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    return isinstance(value, Mapping) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(_is(one, "float") for one in pair)
        for pair in value.values()
    )


_SIMPLE: dict[str, Any] = {"int": int, "float": (int, float), "str": str}
