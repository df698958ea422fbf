"""Learning rates: what counts as one, and one for each layer of a backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras

from keras_tl.arguments import check_number
from keras_tl.backbone.blocks import split_into_blocks, warn_of_one_block
from keras_tl.backbone.model_backbones import unwrapped
from keras_tl.backbone.selecting import Backbone, describe, named_layers, no_such_layer, roots
from keras_tl.internals.layers import own_trainable_weights

LearningRate: TypeAlias = (
    float | keras.optimizers.schedules.LearningRateSchedule | Callable[[], float]
)


def layerwise_learning_rates(
    backbone: Backbone, learning_rate: float, decay: float
) -> LayerwiseLearningRates:
    """Returns a learning rate for each layer: the deeper its block, the lower.

    The block nearest the output gets `learning_rate`, the one before it `learning_rate * decay`,
    and so on to the input. Blocks are read from layers' names such as `block3_conv1` or
    `conv4_block2_1_conv`, or else from where everything goes through one layer.

    Pass the result to `GroupOptimizer(assign=...)`, or as `learning_rate` to
    `UnfreezeAtConvergence` or a `Stage`. There is one optimizer for all rates.

    Args:
        backbone: A built layer, model (a `FrozenBackbone` too) or list of layers.
        learning_rate: Float above 0. That of the block nearest the output.
        decay: Float above 0 and at most 1. The factor from one block to the one before it.

    Returns:
        A `LayerwiseLearningRates`, a read-only dictionary from names of layers to floats, from
        input to output.

    Raises:
        ValueError: If an argument is out of range, or the backbone has no weights to train.

    Example:

    >>> backbone = keras.applications.VGG16(include_top=False, weights=None)
    >>> rates = layerwise_learning_rates(backbone, 1e-4, decay=0.5)
    >>> rates["block5_conv3"], rates["block4_conv1"]
    (0.0001, 5e-05)
    >>> from keras_tl import GroupOptimizer
    >>> optimizer = GroupOptimizer(
    ...     {"backbone": keras.optimizers.AdamW(), "head": keras.optimizers.AdamW(1e-3)},
    ...     assign={"backbone": rates},
    ... )

    References:

    - Howard and Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification"
    - Clark et al., 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than
      Generators"
    - Bao et al., 2022, "BEiT: BERT Pre-Training of Image Transformers"
    """
    rate = check_number(learning_rate, "learning_rate")
    if isinstance(decay, (bool, str)) or not 0 < decay <= 1:
        raise ValueError(f"`decay` must be above 0 and at most 1. Received: decay={decay!r}.")
    backbone = unwrapped(backbone)
    if decay < 1:
        warn_of_one_block(backbone, "Pass a dictionary of learning rates that names layers")
    blocks = list(split_into_blocks(backbone).values())[::-1]
    rates = {name: rate * decay**depth for depth, block in enumerate(blocks) for name in block}
    rates |= _of_containers(backbone, rates)
    names = [name for name, _ in named_layers(backbone)]
    return LayerwiseLearningRates(backbone, {name: rates[name] for name in names if name in rates})


def _of_containers(backbone: Backbone, rates: Mapping[str, float]) -> dict[str, float]:
    """Rates for weights of layers whose parts have rates: the lowest, as what comes first has."""
    found = {}
    for name, layer in named_layers(backbone):
        parts = [rate for part, rate in rates.items() if part.startswith(f"{name}/")]
        if parts and name not in rates and own_trainable_weights(layer):
            found[name] = min(parts)
    return found


class LayerwiseLearningRates(Mapping[str, float]):
    """Learning rates by the names of a backbone's layers. See `layerwise_learning_rates`.

    Args:
        backbone: A built layer, model (a `FrozenBackbone` too) or list of layers.
        learning_rates: Dictionary from names of its layers to floats above 0; nested layers are
            named `outer/inner`. A layer brings the layers in it that have no rate themselves.

    Attributes:
        backbone: The backbone.
        weights: List of the weights that the learning rates are for: all of the backbone's.

    Raises:
        ValueError: If a name is not that of a layer, or a rate is not one.
    """

    def __init__(self, backbone: Backbone, learning_rates: Mapping[str, float]):
        self.backbone = unwrapped(backbone)
        self._rates = {
            name: check_number(rate, f"learning_rate[{name!r}]")
            for name, rate in learning_rates.items()
        }
        if not self._rates:
            raise ValueError("The learning rates by layer are empty. Name at least one layer.")
        named = named_layers(self.backbone)
        unknown = set(self._rates) - {name for name, _ in named}
        if unknown:
            raise ValueError(
                f"{no_such_layer(self.backbone, min(unknown), 'learning_rate')} Learning "
                "rates go by whole names of layers; nested ones are `outer/inner`."
            )
        self.weights = _weights_of(self.backbone)
        self._of_weight = self._rates_of_weights()

    def _rates_of_weights(self) -> dict[int, float]:
        return {
            id(weight): self._rates[name]
            for name, layer in named_layers(self.backbone)
            if name in self._rates
            for weight in layer.weights
        }

    @property
    def learning_rate(self) -> float:
        """Float. The highest of the rates."""
        return max(self._rates.values())

    def of(self, variable: keras.Variable) -> float:
        """Returns the learning rate of a variable.

        Raises:
            ValueError: If it is in no layer that has a rate.
        """
        try:
            return self._of_weight[id(variable)]
        except KeyError:
            raise ValueError(
                f"There is no learning rate for {variable.path!r}. Name its layer in the learning "
                f"rates of the backbone {describe(self.backbone)}, or do not train it. Rates are "
                "of one backbone: if this one was made anew, make them anew for it."
            ) from None

    def for_backbone(self, backbone: Backbone) -> LayerwiseLearningRates:
        """Returns the same learning rates by name for another backbone, such as a later fold's.

        Raises:
            ValueError: If that has no layer of one of the names.
        """
        return LayerwiseLearningRates(backbone, self._rates)

    def is_for(self, weights: Sequence[keras.Variable]) -> bool:
        """Whether the learning rates are for any of these weights."""
        return any(id(weight) in self._of_weight for weight in weights)

    def restricted_to(self, weights: Sequence[keras.Variable]) -> LayerwiseLearningRates:
        """Returns the same learning rates, meant for some of the backbone's weights only."""
        narrower = copy.copy(self)
        narrower.weights = list(weights)
        return narrower

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerwiseLearningRates:
        # They cannot change, and are for the weights of this backbone: of a copy they know none.
        return self

    def __getstate__(self) -> dict[str, Any]:
        chosen = {id(weight) for weight in self.weights}
        state = {**self.__dict__, "weights": [id(w) in chosen for w in _weights_of(self.backbone)]}
        del state["_of_weight"]  # Which goes by identity, and is another one where it is loaded.
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        weights = zip(_weights_of(self.backbone), state["weights"], strict=True)
        self.weights = [weight for weight, is_chosen in weights if is_chosen]
        self._of_weight = self._rates_of_weights()

    def __contains__(self, name: object) -> bool:
        return name in self._rates

    def __getitem__(self, name: str) -> float:
        return self._rates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rates)

    def __len__(self) -> int:
        return len(self._rates)

    def __repr__(self) -> str:
        return repr(self._rates)


def _weights_of(backbone: Backbone) -> list[keras.Variable]:
    return [weight for layer in roots(backbone) for weight in layer.weights]
