"""The errors that keras_tl raises, with what a debugger wants to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from keras_tl.messages import format_table, some

_ROWS_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Moment:
    """A moment of training, counted from 0.

    Attributes:
        epoch: Int or None. The epoch; None outside `fit`.
        batch: Int or None. The last batch of that epoch that was trained on, -1 at its start; None
            if it is not known, at the end of an epoch of unknown length, and outside `fit`.
        check: Int. How many checks there had been.
    """

    epoch: int | None
    batch: int | None
    check: int

    def __str__(self) -> str:
        if self.epoch is None:
            return f"check {self.check}" if self.check else "the start"
        if self.batch is None:
            return f"epoch {self.epoch + 1}, end"
        if self.batch < 0:
            return f"epoch {self.epoch + 1}, start"
        return f"epoch {self.epoch + 1}, batch {self.batch + 1}"


@dataclasses.dataclass(frozen=True)
class WeightChange:
    """A weight that must not change and has.

    Attributes:
        path: String. The weight's path.
        cause: String. `"stale compile"`, `"BatchNormalization in training mode"`, `"overwritten"`,
            `"optimizer side effect"`, `"trained in between, or overwritten"` if the optimizer was
            renewed in between, or `"trained"` for a trainable layer that the guard was asked to
            watch.
        remedy: String. What to do about it.
        largest_change: Float. The largest absolute difference.
        difference: Float64 NumPy array of the weight's shape: the new value less the old one.
        last_clean: `Moment` of the last check at which the weight was what it should be.
        detected: `Moment` of the check that found the change.
    """

    path: str
    cause: str
    remedy: str
    largest_change: float
    difference: np.ndarray
    last_clean: Moment
    detected: Moment


class FrozenWeightsChangedError(RuntimeError):
    """Weights that must not change have changed. The model is left as it was found.

    Attributes:
        changes: Tuple of `WeightChange`, one for each weight: its `path`; the `cause`, and the
            `remedy`; the `largest_change`, and the whole `difference` as an array; the moments
            `last_clean`, of the last check without it, and `detected`, each with an `epoch`, a
            `batch` and a number of the `check`.

    Example:

    >>> import keras
    >>> from keras_tl import FreezeGuard
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="head")])
    >>> model.trainable = False
    >>> try:
    ...     with FreezeGuard(verbose=0).watching(model):
    ...         _ = model.layers[0].bias.assign([1.0])
    ... except FrozenWeightsChangedError as error:
    ...     print(error.changes[0].cause, error.changes[0].difference)
    overwritten [1.]
    """

    def __init__(self, message: str, changes: Sequence[WeightChange] = ()):
        super().__init__(message)
        self.changes = tuple(changes)

    @property
    def paths(self) -> list[str]:
        """The paths of the weights that have changed."""
        return [change.path for change in self.changes]

    @property
    def differences(self) -> dict[str, np.ndarray]:
        """The new value less the old one, by the path of each weight that has changed.

        Paths need not be unique; `changes` has every weight.
        """
        return {change.path: change.difference for change in self.changes}


class StaleCompileError(FrozenWeightsChangedError):
    """The optimizer or train step was made for other weights than are trainable now.

    Raised before a step is lost, or once a weight has changed.

    Attributes:
        changes: Tuple of `WeightChange`, as in `FrozenWeightsChangedError`. Empty before a step is
            lost.
        still_training: Tuple of strings. Paths of weights that are frozen now, and that the
            optimizer was made to train.
        not_training: Tuple of strings. Paths of weights that are trainable now, and that the
            optimizer does not know.

    Example:

    >>> import keras, numpy as np
    >>> from keras_tl import FreezeGuard
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    >>> model.layers[0].trainable = False
    >>> try:
    ...     model.fit(np.ones((4, 2)), np.ones((4, 1)), callbacks=[FreezeGuard()], verbose=0)
    ... except StaleCompileError as error:
    ...     print(len(error.still_training))
    2
    """

    def __init__(
        self,
        message: str,
        changes: Sequence[WeightChange] = (),
        *,
        still_training: Sequence[str] = (),
        not_training: Sequence[str] = (),
    ):
        super().__init__(message, changes)
        self.still_training = tuple(still_training)
        self.not_training = tuple(not_training)


def describe_changes(changes: Sequence[WeightChange]) -> str:
    """Returns the message of a `FrozenWeightsChangedError`: a table, and what to do."""
    header = ("weight", "largest change", "last clean check", "detected", "cause")
    rows = [
        (c.path, f"{c.largest_change:.4g}", str(c.last_clean), str(c.detected), c.cause)
        for c in changes[:_ROWS_SHOWN]
    ]
    have = (
        "weight that must not change has"
        if len(changes) == 1
        else ("weights that must not change have")
    )
    lines = [f"FreezeGuard: {len(changes)} {have} changed.", "", *format_table(header, rows)]
    if len(changes) > _ROWS_SHOWN:
        lines.append(f"... and {len(changes) - _ROWS_SHOWN} more, in `changes` of the error.")
    remedies = {change.cause: change.remedy for change in changes}
    return "\n".join([*lines, "", *(f"{cause}: {text}" for cause, text in remedies.items())])


def describe_stale_compile(
    still_training: Sequence[str], not_training: Sequence[str], remedy: str
) -> str:
    """Returns the message of a `StaleCompileError` that is raised before a step is lost."""
    parts = []
    if still_training:
        parts.append(f"frozen now, but made to be trained: {some(still_training)}")
    if not_training:
        parts.append(f"trainable now, but unknown to the optimizer: {some(not_training)}")
    return (
        "FreezeGuard: stale compile. The optimizer was made for other weights than are trainable "
        f"now ({'; '.join(parts)}). {remedy}"
    )


class StaleCacheError(ValueError):
    """Recorded features are not of this backbone or of this data.

    Example:

    >>> import keras, tempfile
    >>> import numpy as np
    >>> from keras_tl import FeatureCache, FrozenBackbone, StaleCacheError
    >>> pretrained = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model = keras.Sequential([FrozenBackbone(pretrained), keras.layers.Dense(1)])
    >>> x, folder = np.ones((32, 8)), tempfile.mkdtemp()
    >>> cache = FeatureCache(model, cache_dir=folder)
    >>> features = cache(x, name="training", verbose=0)
    >>> try:
    ...     features = cache(2 * x, name="training", verbose=0)
    ... except StaleCacheError as error:
    ...     print(str(error).split("Changed: ")[1][:10])
    the inputs
    """


class UncacheableError(ValueError):
    """The features of this model or of this data cannot be recorded, as they may change.

    `fine_tune` then trains the head through the backbone instead.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_tl import FeatureCache, FrozenBackbone, UncacheableError
    >>> pretrained = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> augmentation = keras.layers.GaussianNoise(0.1)
    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), augmentation, FrozenBackbone(pretrained), keras.layers.Dense(1)]
    ... )
    >>> try:
    ...     features = FeatureCache(model)(np.ones((32, 8)), verbose=0)
    ... except UncacheableError as error:
    ...     print("views" in str(error))
    True
    """
