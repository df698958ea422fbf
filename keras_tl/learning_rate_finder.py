"""The learning-rate range test: which learning rate should a stage start with?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.arguments import check_can_be_set, check_count, check_model, check_number
from keras_tl.backbone.model_backbones import BackboneOf, Backbones
from keras_tl.backbone.selecting import Selection, is_built
from keras_tl.messages import html_table
from keras_tl.optimizers.groups import group_optimizer
from keras_tl.stages import switching


def find_learning_rate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    layers: Selection | None = None,
    backbone: BackboneOf | None = None,
    train_batchnorm: bool = False,
    batch_size: int | None = None,
    sample_weight: Any = None,
    class_weight: dict[int, float] | None = None,
    min_learning_rate: float = 1e-7,
    max_learning_rate: float = 10.0,
    steps: int = 100,
    stop_at: float = 4.0,
    verbose: int = 1,
) -> LearningRateRange:
    """Trains for some steps at a rising learning rate, and suggests one from the loss.

    The model is left as it was found, bit for bit, also when this raises or is interrupted: its
    weights, optimizer, metrics, compiled functions and trainable layers, and the random generators.
    So are arrays and the order of a `PyDataset`; only a `tf.data.Dataset` that shuffles moves on to
    its next order.

    Args:
        model: A compiled and built model.
        x: Training data, anything that `fit` takes but a generator, which would be used up.
        y: Targets, as `fit` takes them.
        layers: Which layers of the backbone train besides the head, to test a stage that is not
            reached yet; see `FrozenBackbone.unfreeze`. Defaults to `None`: what is trainable now.
        backbone: The layer, model or list of layers that `layers` are of, their names, or a
            function of the model that returns them. Defaults to every `FrozenBackbone` in the
            model, or else its attribute `backbone`.
        train_batchnorm: Bool. Whether BatchNormalization layers in a `FrozenBackbone` train their
            gamma and beta in that stage. Defaults to `False`.
        batch_size: Int or None, as in `fit`.
        sample_weight: As in `fit`.
        class_weight: As in `fit`.
        min_learning_rate: Float above 0. The learning rate of the first step. Defaults to `1e-7`.
        max_learning_rate: Float. That of the last step. Defaults to `10.0`.
        steps: Int, at least 10. How many steps, each with a learning rate that is the same factor
            higher. Defaults to `100`.
        stop_at: Float above 1. The test ends early when the smoothed loss is this many times its
            lowest value, and the last losses are as high beyond the noise: the losses at the lowest
            rates tell how far those of batches lie apart. Defaults to `4.0`.
        verbose: 0 or 1. Whether a progress bar is shown. Defaults to `1`.

    Returns:
        A `LearningRateRange`, with the curve, `suggestion` and `plot()`. With a `GroupOptimizer`
        the learning rates are those of its last group, and all groups keep their ratios.

    Raises:
        ValueError: For an argument that is out of range, a model that is not compiled or not built,
            an optimizer whose learning rate cannot be set, or a loss that is not finite from the
            first steps on.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(256, 4))
    >>> found = find_learning_rate(model, x, x.sum(axis=1), batch_size=16, verbose=0)
    >>> 1e-3 < found.suggestion < 1
    True

    References:

    - Smith, 2017, "Cyclical Learning Rates for Training Neural Networks"
    - Howard and Gugger, 2020, "fastai: A Layered API for Deep Learning" (smoothing, suggestions)
    """
    check_model(model, "find_learning_rate")
    low = check_number(min_learning_rate, "min_learning_rate")
    high = check_number(max_learning_rate, "max_learning_rate")
    check_count("steps", steps, at_least=10)
    if low >= high or not stop_at > 1:
        raise ValueError(
            "`min_learning_rate` must be below `max_learning_rate`, and `stop_at` above 1. "
            f"Received: {min_learning_rate!r}, {max_learning_rate!r}, stop_at={stop_at!r}."
        )
    _check_model(model)
    test = _RangeTest(np.geomspace(low, high, steps).tolist(), stop_at, verbose)
    with switching.left_as_found(model):
        if layers is not None:
            backbones = Backbones(model, backbone)
            backbones.check(layers, train_batchnorm)
            backbones.freeze()
            backbones.unfreeze(layers, train_batchnorm)
        grouped = group_optimizer(model.optimizer) is not None
        switching.renew_training(model, None if grouped else low)
        model.fit(
            _untouched(x),
            y,
            batch_size=batch_size,
            sample_weight=sample_weight,
            class_weight=class_weight,
            epochs=steps,
            callbacks=[test],
            verbose=0,
        )
    return LearningRateRange(tuple(test.learning_rates), tuple(test.losses), tuple(test.smoothed))


@dataclasses.dataclass(frozen=True, repr=False)
class LearningRateRange:
    """The loss at each of some rising learning rates.

    Attributes:
        learning_rates: Tuple of floats, one for each step.
        losses: Tuple of floats. The loss of each step's batch.
        smoothed_losses: Tuple of floats. Their exponential moving average.

    Example:

    >>> rates = [10.0**exponent for exponent in range(-9, 1)]
    >>> losses = [1.0, 1.0, 1.0, 0.9, 0.5, 0.1, 0.1, 0.2, 2.0, 9.0]
    >>> found = LearningRateRange(tuple(rates), tuple(losses), tuple(losses))
    >>> f"{found.suggestions['minimum']:.0e}"
    '1e-06'
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed_losses: tuple[float, ...]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {_shown(rate)}" for name, rate in self.suggestions.items())
        return f"{len(self.losses)} learning rates tried; suggestions: {shown}."

    def _repr_html_(self) -> str:
        rows = [(name, _shown(rate)) for name, rate in self.suggestions.items()]
        return html_table(("suggestion", "learning rate"), rows, right=(1,))

    @property
    def suggestion(self) -> float | None:
        """Float or None. The `"valley"` of `suggestions`, or else their `"rise"`."""
        suggestions = self.suggestions
        return suggestions["valley"] or suggestions.get("rise")

    @property
    def suggestions(self) -> dict[str, float | None]:
        """Dictionary from names to learning rates, each None where the loss never falls.

        - `"valley"`: in the middle of the longest stretch in which the loss falls.
        - `"steepest"`: where the loss falls fastest.
        - `"minimum"`: a tenth of the rate at which the loss is lowest.
        - `"rise"`: only where the loss stays as it is, but for noise, until it rises: half the
          rate from which on it does. So it is once the layers that were trained before, such
          as the head, have converged, and the loss has no way to go down.
        """
        skipped = len(self.learning_rates) // 10
        end = max(len(self.learning_rates) - _LAST, skipped + 2)
        rates = np.array(self.learning_rates[skipped:end])
        losses = np.array(self.smoothed_losses[skipped:end])
        none: dict[str, float | None] = dict.fromkeys(("valley", "steepest", "minimum"))
        rise = _rise(self.losses)
        if rise is not None and not _falls(self.losses):
            return {**none, "rise": self.learning_rates[rise] / _BELOW}
        start, stop = _longest_fall(losses.tolist())
        if stop == start:
            return none
        slopes = np.diff(losses) / np.diff(np.log(rates))
        return {
            "valley": float(rates[start + (stop - start) // 2]),
            "steepest": float(rates[np.argmin(slopes)]),
            "minimum": float(rates[np.argmin(losses)] / 10),
        }

    def plot(self, ax: Any = None) -> Any:
        """Draws the curve and the suggestions.

        Args:
            ax: A matplotlib `Axes` to draw on. Defaults to one of a new figure.

        Returns:
            The matplotlib `Figure`.
        """
        from keras_tl.visualization import plot_learning_rate_range

        return plot_learning_rate_range(self, ax)


# At the lowest rates nothing trains: the spread of these first losses is the noise of batches.
_FIRST = 10
# The last losses before the end come from a model that diverges.
_LAST = 5
# A fall of fewer standard errors than this may be noise.
_SURE = 5
# The suggested rate is the one at which the loss starts to rise, divided by this.
_BELOW = 2
_SMOOTHING = 0.98


class _RangeTest(keras.callbacks.Callback):
    """Sets the learning rate of each step and notes the step's loss."""

    def __init__(self, learning_rates: Sequence[float], stop_at: float, verbose: int):
        super().__init__()
        self._planned = learning_rates
        self._stop_at = stop_at
        shown = ["loss", "learning_rate"]
        self._bar = keras.utils.Progbar(
            len(learning_rates), verbose=verbose, stateful_metrics=shown
        )
        self._average = 0.0
        self.learning_rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        # Keras logs the mean over all steps since the last reset, not the loss of the step.
        self.model.reset_metrics()
        self.model.optimizer.learning_rate = self._planned[len(self.losses)]

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        loss = _loss_in(logs or {})
        if not math.isfinite(loss):
            self._end()
            return
        self.learning_rates.append(self._planned[len(self.losses)])
        self.losses.append(loss)
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        self.smoothed.append(self._average / (1 - _SMOOTHING ** len(self.losses)))
        done = len(self.losses)
        values = [("loss", loss), ("learning_rate", self.learning_rates[-1])]
        self._bar.update(done, values, finalize=False)
        if done == len(self._planned) or _diverges(self.losses, self.smoothed, self._stop_at):
            self._end()

    def _end(self) -> None:
        self.model.stop_training = True
        done = len(self.losses)
        if done < 2:
            raise ValueError(
                f"The loss is not finite after {done} steps, at a learning rate of "
                f"{self._planned[done]:.2g} already. Check the data and the loss, or pass a lower "
                "`min_learning_rate`."
            )
        self._bar.update(done, finalize=True)


class _Untouched(keras.utils.PyDataset):
    """The batches of a `PyDataset`, without telling it of epochs, at which it may shuffle."""

    def __init__(self, dataset: keras.utils.PyDataset):
        super().__init__()
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def num_batches(self) -> int | None:
        return self._dataset.num_batches

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


def _shown(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:.2g}"


def _untouched(x: Any) -> Any:
    if isinstance(x, keras.utils.PyDataset):
        return _Untouched(x)
    if hasattr(x, "__next__"):
        raise ValueError(
            "`x` is a generator or iterator, whose batches would be used up. Pass arrays, a "
            "`tf.data.Dataset`, a `PyDataset` or a `DataLoader`."
        )
    return x


def _loss_in(logs: dict[str, Any]) -> float:
    if "loss" not in logs:
        raise ValueError(
            "The model's `train_step` returns no `loss`, which the test goes by. It returns: "
            f"{', '.join(sorted(logs)) or 'nothing'}."
        )
    return float(logs["loss"])


def _check_model(model: keras.Model) -> None:
    if getattr(model, "optimizer", None) is None:
        raise ValueError(f'Compile the model "{model.name}" first: it has no optimizer.')
    if not is_built(model):
        raise ValueError(
            f'The model "{model.name}" is not built, so it has no weights yet that could be put '
            "back. Call it on a batch first."
        )
    groups = group_optimizer(model.optimizer)
    if groups is not None:
        check_can_be_set("find_learning_rate", *groups.groups.values())


def _diverges(losses: Sequence[float], smoothed: Sequence[float], stop_at: float) -> bool:
    """Whether the loss is so much higher than it was that it will not come down again.

    The average alone does not tell: where most losses are tiny, that of one batch lifts it to many
    times its lowest value.
    """
    limit = stop_at * min(smoothed)
    if smoothed[-1] <= limit or len(losses) < _FIRST + _LAST:
        return False
    return float(np.median(losses[-_LAST:])) > limit + 4 * float(np.std(losses[:_FIRST]))


def _falls(losses: Sequence[float]) -> bool:
    """Whether the loss falls further than the noise of batches explains.

    Of the windows of as many losses as those at first, the lowest is held against these, by the
    standard error of the difference. Among a hundred windows of mere noise one lies three of them
    lower now and then, hence `_SURE`.
    """
    first, rest = np.asarray(losses[:_FIRST]), np.asarray(losses[_FIRST:])
    if rest.size < _FIRST:
        return bool(first.mean() > min(losses))
    windows = np.lib.stride_tricks.sliding_window_view(rest, _FIRST)
    falls = first.mean() - windows.mean(axis=1)
    errors = np.sqrt((first.var() + windows.var(axis=1)) / _FIRST)
    return bool((falls > _SURE * errors).any())


def _rise(losses: Sequence[float]) -> int | None:
    """Returns the index from which on losses are higher than at first, if there is one."""
    # Over an odd number of batches, so that a single one tells nothing.
    padded = np.pad(np.asarray(losses), _LAST // 2, mode="edge")
    middle = np.median(np.lib.stride_tricks.sliding_window_view(padded, _LAST), axis=1)
    first = np.asarray(losses[:_FIRST])
    high = middle > max(2 * first.mean(), first.mean() + 4 * first.std())
    if high.all() or not high[-1]:
        return None
    index = int(np.flatnonzero(~high)[-1]) + 1
    return index if index > _FIRST else None


def _longest_fall(losses: list[float]) -> tuple[int, int]:
    """Returns the first and last index of the longest series of ever lower losses, with gaps."""
    length = [1] * len(losses)
    for i, loss in enumerate(losses):
        before = [length[j] for j in range(i) if losses[j] > loss]
        length[i] = 1 + max(before, default=0)
    end = int(np.argmax(length))
    return max(end - length[end] + 1, 0), end
