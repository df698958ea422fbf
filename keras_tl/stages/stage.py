"""Stages of fine-tuning: what trains in each, how fast, and how long."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.arguments import check_count, check_learning_rate, check_number
from keras_tl.backbone.blocks import split_by_depth
from keras_tl.backbone.model_backbones import stay_frozen, unwrapped
from keras_tl.backbone.selecting import Backbone, Selection, check_selection
from keras_tl.optimizers.learning_rates import (
    LayerwiseLearningRates,
    LearningRate,
)
from keras_tl.stages.annealing import AUTO, is_auto

DEFAULT_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of epochs with one set of trainable layers and one setting of learning rates.

    A list of stages is a schedule for `UnfreezeAtConvergence(stages=...)`. In a stage exactly the
    selected layers of the backbone train, besides the head: what an earlier stage trained and this
    one does not select is frozen again.

    A stage ends when the monitored value has not improved for `patience` epochs, or after `epochs`
    epochs, whichever comes first. If neither is given, the callback's `patience` counts, and in the
    last stage its `fine_tune_patience`.

    Args:
        layers: Which layers of the backbone train; see `FrozenBackbone.unfreeze`. In a schedule
            with a stage `"lora"`, `"all"` selects also what `enable_lora` froze around LoRA.
        learning_rate: Float, `LearningRateSchedule` or callable, as an optimizer takes it; or a
            dictionary from names of layers to floats, such as `layerwise_learning_rates` returns.
            None: that of the callback's `optimizer`, or else `1e-5`. `"auto"`, in the last stage
            of a schedule: several stages at falling rates; see `UnfreezeAtConvergence`.
        head_learning_rate: Float, `LearningRateSchedule` or callable. If given, the head keeps its
            optimizer's state and gets this rate, layers that trained in the stage before keep
            their state and rate, and layers that join get `learning_rate` in a new parameter group.
            Defaults to `None`: one new optimizer with `learning_rate` for all.
        patience: Int or None. Epochs without improvement after which the stage ends.
        epochs: Int or None. Epochs after which the stage ends at the latest.
        train_batchnorm: Bool. Whether selected BatchNormalization layers in a `FrozenBackbone`
            train their gamma and beta. Defaults to `False`.

    Raises:
        ValueError: For an argument that is out of range.

    Example:

    >>> backbone = keras.applications.VGG16(include_top=False, weights=None)
    >>> for stage in Stage.by_depth(backbone, 3, 1e-4, decay=0.5):
    ...     print(stage)
    6 layers (block4_conv1 to block5_conv3), learning rate 0.0001
    9 layers (block3_conv1 to block5_conv3), learning rate 5e-05
    all layers, learning rate 2.5e-05

    References:

    - Howard and Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification"
      (gradual unfreezing)
    - Lee et al., 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts"
    - Ben Zaken et al., 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
      Masked Language-models" (`"scales"`)
    """

    layers: Selection
    learning_rate: LearningRate | Mapping[str, float] | str | None
    _: dataclasses.KW_ONLY
    head_learning_rate: LearningRate | None = None
    patience: int | None = None
    epochs: int | None = None
    train_batchnorm: bool = False

    def __post_init__(self) -> None:
        check_selection(self.layers)
        rate = self.learning_rate
        if isinstance(rate, Mapping):
            rates = {n: check_number(one, f"learning_rate[{n!r}]") for n, one in rate.items()}
            # Those by `layerwise_learning_rates` know their backbone, and are floats already.
            if not isinstance(rate, LayerwiseLearningRates):
                object.__setattr__(self, "learning_rate", rates)
        elif isinstance(rate, str):
            _check_auto(rate, self.head_learning_rate)
        elif rate is not None:
            object.__setattr__(self, "learning_rate", check_learning_rate(rate))
        if self.head_learning_rate is not None:
            rate = check_learning_rate(self.head_learning_rate, "head_learning_rate")
            object.__setattr__(self, "head_learning_rate", rate)
        if self.patience is not None:
            check_count("patience", self.patience)
        if self.epochs is not None:
            check_count("epochs", self.epochs, at_least=1)

    @property
    def layerwise(self) -> bool:
        """Bool. Whether layers have learning rates of their own."""
        return isinstance(self.learning_rate, Mapping)

    @classmethod
    def by_depth(
        cls,
        backbone: Backbone,
        n: int,
        learning_rate: float,
        decay: float = 1.0,
        **arguments: Any,
    ) -> list[Stage]:
        """Returns a schedule that unfreezes a backbone from its output to its input.

        The backbone is split into n parts at the boundaries of blocks, which are read from layers'
        names such as `block3_conv1` or `conv4_block2_1_conv`; without such names at layers through
        which everything goes, evenly by parameter count. Each stage adds a part. Layers that were
        frozen by hand before they were wrapped, or around LoRA, are in none.

        Args:
            backbone: A built layer, model (a `FrozenBackbone` too) or list of layers.
            n: Int. How many stages, at most as many as there are blocks.
            learning_rate: Float above 0. That of the first stage.
            decay: Float above 0. The factor on the learning rate from one stage to the next.
                Defaults to `1.0`.
            **arguments: The other arguments of `Stage`, for each.

        Returns:
            A list of n stages. The last one trains all layers.

        Raises:
            ValueError: If an argument is out of range.

        Example:

        >>> backbone = keras.applications.MobileNetV2(weights=None)
        >>> [stage.learning_rate for stage in Stage.by_depth(backbone, 3, 4e-4, decay=0.5)]
        [0.0004, 0.0002, 0.0001]
        """
        rate = check_number(learning_rate, "learning_rate")
        decay = check_number(decay, "decay")
        check_count("n", n, at_least=1)
        layers: list[str] = []
        stages = []
        for depth, part in enumerate(split_by_depth(unwrapped(backbone), n, stay_frozen(backbone))):
            layers = part + layers
            selection = list(layers) if depth < n - 1 else "all"
            stages.append(cls(selection, rate * decay**depth, **arguments))
        return stages

    def to_dict(self) -> dict[str, Any]:
        """Returns the stage as plain data, for a JSON or YAML file.

        Returns:
            A dictionary of the arguments that are not defaults.

        Raises:
            ValueError: If it has a function for layers or learning rates, which no file can hold.

        Example:

        >>> Stage("block5.*", 1e-4, epochs=3).to_dict()
        {'layers': 'block5.*', 'learning_rate': 0.0001, 'epochs': 3}
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        plain = {name: _plain(name, value) for name, value in values.items()}
        return {name: value for name, value in plain.items() if value is not defaults[name]}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Stage:
        """Returns the stage that `to_dict` wrote down.

        Args:
            config: Dictionary of the arguments. Numbers may be strings, as YAML reads `1e-5`.

        Returns:
            A `Stage`.

        Raises:
            ValueError: If keys are missing or unknown, or a value is out of range.

        Example:

        >>> print(Stage.from_dict({"layers": "block5.*", "learning_rate": "1e-4", "epochs": 3}))
        layers "block5.*", learning rate 0.0001, 3 epochs
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(config, Mapping) or not {"layers", "learning_rate"} <= set(config) <= set(
            names
        ):
            raise ValueError(
                f"A stage is a dictionary with the keys {', '.join(names)}, of which `layers` and "
                f"`learning_rate` are needed. Received: {config!r}."
            )
        rates = ("learning_rate", "head_learning_rate")
        values = {name: _rate(value) if name in rates else value for name, value in config.items()}
        return cls(**values)

    def __str__(self) -> str:
        if isinstance(self.learning_rate, Mapping):
            rates = self.learning_rate.values()
            rate = f"rates {min(rates):.4g} to {max(rates):.4g}"
        else:
            rate = f"rate {_shown(self.learning_rate)}"
        parts = [_layers_shown(self.layers), f"learning {rate}"]
        if self.head_learning_rate is not None:
            parts.append(f"head {_shown(self.head_learning_rate)}")
        if self.patience is not None:
            parts.append(f"patience {self.patience}")
        if self.epochs is not None:
            parts.append(f"{self.epochs} epochs")
        if self.train_batchnorm:
            parts.append("BatchNormalization too")
        return ", ".join(parts)


def _check_auto(learning_rate: str, head_learning_rate: Any) -> None:
    if not is_auto(learning_rate):
        raise ValueError(
            "`learning_rate` must be a finite number above 0, a `LearningRateSchedule`, a callable "
            f'without arguments, a dictionary from names of layers to numbers, or "{AUTO}". '
            f"Received: learning_rate={learning_rate!r}."
        )
    if head_learning_rate is not None:
        raise ValueError(
            f'`learning_rate="{AUTO}"` finds one rate for all that trains. Leave out '
            f"`head_learning_rate`, or pass a number for both. Received: "
            f"head_learning_rate={head_learning_rate!r}."
        )


def check_stages(stages: Any, *, instead_of: Stage) -> list[Stage]:
    """Returns a schedule as a list of stages.

    Args:
        stages: A list of `Stage`, or of dictionaries as `Stage.to_dict` returns them.
        instead_of: The stage that other arguments say, which must all have their defaults.

    Raises:
        ValueError: If it is none, or is empty.
    """
    if instead_of != Stage("all", None):
        raise ValueError(
            "`stages` says for each stage what trains and how fast. Leave out `layers`, "
            "`learning_rate`, `train_batchnorm` and `head_learning_rate`, and give them to each "
            f"`Stage`. Received beside `stages`: {instead_of}."
        )
    if isinstance(stages, (str, Mapping)) or not isinstance(stages, Sequence) or not stages:
        raise ValueError(
            "`stages` must be a list of at least one `keras_tl.Stage`, such as "
            f"`[Stage(5, 1e-4), Stage('all', 1e-5)]`. Received: stages={stages!r}."
        )
    found = [stage if isinstance(stage, Stage) else Stage.from_dict(stage) for stage in stages]
    if any(is_auto(stage.learning_rate) for stage in found[:-1]):
        raise ValueError(
            f'Only the last of `stages` can have `learning_rate="{AUTO}"`. Received: '
            f"{'; '.join(str(stage) for stage in found)}."
        )
    return found


def check_one_rate(learning_rate: Any, optimizer: keras.Optimizer) -> None:
    """Raises a ValueError if there is a learning rate beside an optimizer that has its own."""
    if learning_rate is not None and not is_auto(learning_rate):
        raise ValueError(
            f"`optimizer` brings its own learning rate, so `learning_rate={learning_rate!r}` would "
            "be lost. Leave it out, and make the optimizer with it: "
            f"`{type(optimizer).__name__}({learning_rate!r})`."
        )


def _plain(name: str, value: Any) -> Any:
    """Returns a value as JSON and YAML have it: no NumPy number or array at any depth."""
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return _plain(name, keras.optimizers.schedules.serialize(value))
    if isinstance(value, Mapping):
        if value.get("class_name") == "__numpy__":
            # So Keras writes an array, which the schedule itself cannot read back.
            return value["config"]["value"]
        return {_plain(name, key): _plain(name, one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, one) for one in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if callable(value):
        raise ValueError(
            f"`{name}` is a function, which no file can hold. Pass names or a regular expression "
            "for layers, a number or a `LearningRateSchedule` for learning rates."
        )
    return value


def _rate(value: Any) -> Any:
    """Reads a learning rate from plain data."""
    if isinstance(value, Mapping) and "class_name" in value:
        return keras.optimizers.schedules.deserialize(dict(value))
    if isinstance(value, Mapping):
        return {name: _rate(one) for name, one in value.items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _shown(rate: LearningRate | str | None) -> str:
    if rate is None:
        return "of the optimizer"
    if isinstance(rate, float):
        return f"{rate:.4g}"
    if isinstance(rate, str):
        return f'"{rate}"'
    schedule = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
    return type(rate).__name__ if schedule else "of a function"


def _layers_shown(layers: Selection) -> str:
    if isinstance(layers, str):
        words = {"all": "all layers", "lora": "the LoRA weights", "scales": "biases and scales"}
        return words.get(layers, f'layers "{layers}"')
    if isinstance(layers, re.Pattern):
        return f'layers "{layers.pattern}"'
    if isinstance(layers, int):
        return f"the last {layers} layers"
    if callable(layers):
        return "layers that a function selects"
    if len(layers) < 3:
        return f"layers {' and '.join(layers)}"
    return f"{len(layers)} layers ({layers[0]} to {layers[-1]})"
