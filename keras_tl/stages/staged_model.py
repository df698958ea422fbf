"""A model that is trained in stages: which one it is in, and how it gets into another."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence

import keras

from keras_tl.arguments import check_can_be_set
from keras_tl.backbone import freezing
from keras_tl.backbone.changeable import changeable_weights
from keras_tl.backbone.lora import is_lora
from keras_tl.backbone.model_backbones import BackboneOf, Backbones
from keras_tl.backbone.scales import is_scales
from keras_tl.backbone.selecting import is_built
from keras_tl.internals.optimizers import (
    has_settable_rate,
    optimizer_weights,
    steps_of,
    without_loss_scale,
)
from keras_tl.optimizers import GroupOptimizer
from keras_tl.optimizers.groups import (
    group_optimizer,
    groups_of,
    learning_rate_of,
    newest_group,
)
from keras_tl.optimizers.learning_rates import LayerwiseLearningRates, LearningRate
from keras_tl.stages import annealing, falling, switching
from keras_tl.stages.best_weights import BestWeights
from keras_tl.stages.stage import DEFAULT_RATE, Stage

HOW_TO_CONTINUE = (
    "To continue fine-tuning, put the model back in its stage: call this callback's "
    "`enter_stage(model, stage)` before `fit`."
)


class StagedModel:
    """A compiled model and its stages after stage 0.

    Its stage is read from what trains, and not remembered: a model may be loaded, or unfrozen by
    hand, between fits.

    Args:
        model: A compiled model.
        stages: List of `Stage`.
        exactly: Bool. Whether in each stage just its layers of the backbone train, or they join
            what trains already.
        backbone: A layer, model or list of layers of the model, names of these, or a function of
            the model. None means each `FrozenBackbone`, or else `model.backbone`.
        optimizer: An optimizer to use instead of a copy of the compiled one.
        default_rate: Float or `"auto"`. The learning rate where neither a stage nor an optimizer
            says one. Defaults to `1e-5`.

    Attributes:
        first_annealed: Int. The number of the first of the stages that try one learning rate each,
            or the number after the last stage.

    Raises:
        ValueError: If there is no such backbone, a stage selects nothing in it, or the model has no
            optimizer.
    """

    def __init__(
        self,
        model: keras.Model,
        stages: Sequence[Stage],
        *,
        exactly: bool,
        backbone: BackboneOf | None = None,
        optimizer: keras.Optimizer | None = None,
        default_rate: float | str = DEFAULT_RATE,
    ):
        if model.optimizer is None:
            raise ValueError(
                f'The model "{model.name}" has no `optimizer`, so UnfreezeAtConvergence has none '
                "to renew. Compile it with one; an overridden `compile` must set `self.optimizer`."
            )
        self._model = model
        self._exactly = exactly
        self._optimizer = optimizer
        self._keeps_groups = self._has_groups_of_its_own(stages)
        if not self._keeps_groups and optimizer is None:
            stages = [_with_rate(stage, default_rate) for stage in stages]
        rated = annealing.with_rates(stages, optimizer or model.optimizer)
        self._stages, self.first_annealed = rated
        # A schedule that says "lora" means more than that by "all".
        beyond_lora = any(is_lora(stage.layers) for stage in stages)
        knows_scales = any(is_scales(stage.layers) for stage in stages)
        self.backbones = Backbones(
            model, backbone, beyond_lora=beyond_lora, knows_scales=knows_scales
        )
        self.check_stages()

    @property
    def stages(self) -> list[Stage]:
        """List of `Stage`, each with a learning rate unless the optimizer's is meant."""
        return self._stages

    @property
    def finds_rate(self) -> bool:
        """Bool. Whether the last of the stages try one learning rate each."""
        return self.first_annealed <= len(self._stages)

    @property
    def names(self) -> str:
        """String. The backbones' names, for a message."""
        return self.backbones.names

    def check_stages(self) -> None:
        """Raises a ValueError if a stage cannot be entered, as far as the model is built."""
        for stage in self._stages:
            self.backbones.check(stage.layers, stage.train_batchnorm)
            if is_built(self._model) and isinstance(stage.learning_rate, Mapping):
                self._check_rates(stage, stage.learning_rate)

    def check_renewable(self, warmup_steps: int) -> None:
        """Raises now what would else be raised at the switch from stage 0."""
        compiled = without_loss_scale(self._model.optimizer)
        groups = self._compiled_groups()
        if groups is not None:
            self._check_groups(groups)
            if warmup_steps:
                check_can_be_set("warmup_steps", *groups.groups.values())
        elif isinstance(compiled, keras.optimizers.MultiOptimizer):
            if any(stage.head_learning_rate is not None for stage in self._stages):
                raise ValueError(
                    "`head_learning_rate` needs a model compiled with one optimizer, to go on "
                    f"with. Received: {compiled.name!r}, which has several. Leave "
                    "`head_learning_rate` out and pass `optimizer`, or compile with one."
                )
            if self._optimizer is None:
                switching.renew_optimizer(compiled)

    def try_switches(self, stage: int) -> None:
        """Raises now what the switches after a stage would raise. The model stays as it is.

        Of a model that is not built, only the optimizers are tried.
        """
        if not is_built(self._model):
            self._try_optimizers()
            return
        goes_on = self._keeps_groups or any(
            one.head_learning_rate is not None for one in self._stages
        )
        with switching.only_tried(self._model, built=goes_on):
            for number in range(stage + 1, len(self._stages) + 1):
                self._switch_to(number)

    def _try_optimizers(self) -> None:
        if self._optimizer is None and not self._keeps_groups:
            for stage in self._stages:
                rate = None if isinstance(stage.learning_rate, Mapping) else stage.learning_rate
                switching.renew_optimizer(self._model.optimizer, rate)

    def check_frozen_stage(self) -> None:
        """Raises a ValueError if nothing trains while the backbones are frozen."""
        if is_built(self._model) and not self._model.trainable_weights:
            if any(layer is self._model for layer in self.backbones.members):
                raise ValueError(
                    f'`backbone` is the whole model "{self._model.name}", which leaves no head to '
                    "train in stage 0. Pass what comes before the head, such as "
                    "`backbone=model.layers[:-1]`."
                )
            raise ValueError(
                f'Stage 0 would train nothing: in the model "{self._model.name}" nothing outside '
                f"the backbone {self.names} has weights to train, as in a language model whose "
                "output is its token embedding. Begin with stage 1: call this callback's "
                "`enter_stage(model, 1)` before `fit`."
            )

    def freeze_untouched(self) -> bool:
        """Freezes a plain backbone that nobody has frozen yet. Returns whether there was one.

        Raises:
            ValueError: If nothing is left to train in the model, which is then as it was.
        """
        if not self.backbones.untouched() or self._fine_tuned():
            return False
        if self._compiled_for_fine_tuning():
            warnings.warn(
                f"UnfreezeAtConvergence freezes {self.names}, all of which is trainable, although "
                "the model is compiled with the learning rate of a fine-tuning stage. If it was "
                "saved in that stage and loaded, its file did not tell what was trainable, as that "
                f"of a class of one's own may not. {HOW_TO_CONTINUE}",
                stacklevel=5,
            )
        with switching.all_or_nothing(self._model):
            self.backbones.freeze()
            self.check_frozen_stage()
            if is_built(self._model):
                switching.renew_training(self._model)
        return True

    def _fine_tuned(self) -> bool:
        """Whether the optimizer has trained the backbones, which are as a stage leaves them.

        Of a plain backbone without BatchNormalization nothing is frozen then, as at the start.
        """
        trained = optimizer_weights(self._model.optimizer) or []
        if freezing.without(self.backbones.trainable_weights, trained):
            return False
        return steps_of(self._model.optimizer) > 0 and any(
            self.backbones.trains_only(stage.layers, stage.train_batchnorm)
            for stage in self._stages
        )

    def _compiled_for_fine_tuning(self) -> bool:
        rate = learning_rate_of(self._model.optimizer)
        if math.isclose(rate, annealing.first_rate(self._model.optimizer), rel_tol=1e-6):
            return False  # What a model has to which nobody gave a rate.
        # Those that are tried are common rates of a head too.
        given = [one.learning_rate for one in self._stages[: self.first_annealed - 1]]
        return any(math.isclose(rate, one, rel_tol=1e-6) for one in given if isinstance(one, float))

    def stage(self) -> int:
        """Returns the stage that the model is in: the first of which just the layers train."""
        number = self._first_that_trains()
        if number != self.first_annealed:
            return number
        # The stages from here on differ in nothing but their rates, and those above are tried.
        rate = learning_rate_of(self._model.optimizer)
        tried = [one for one in self._rates_from(number) if one > 1.01 * rate]
        return min(number + len(tried), len(self._stages))

    def _rates_from(self, number: int) -> list[float]:
        rates = [stage.learning_rate for stage in self._stages[number - 1 :]]
        return [rate for rate in rates if isinstance(rate, float)]

    def _first_that_trains(self) -> int:
        if self._exactly:
            for number, stage in enumerate(self._stages, start=1):
                if self.backbones.trains_only(stage.layers, stage.train_batchnorm):
                    return number
            return 0
        only = self._stages[0]
        return 0 if self.backbones.still_frozen(only.layers, only.train_batchnorm) else 1

    def enter(self, number: int, best: BestWeights | None = None) -> None:
        """Goes to a stage, from the best weights of the one before, or changes nothing."""
        lower = best is not None and number > self.first_annealed
        weights = changeable_weights(self._model)
        if lower:
            # Which are written, where the train step stays.
            weights += self._model.optimizer.variables
        with switching.all_or_nothing(self._model, weights):
            if best is not None and lower:
                best.restore_run()
            elif best is not None:
                best.restore_stage()
            self._switch_to(number, same_step=lower)

    def lower_rate(self, epochs_left: int, of: int) -> int | None:
        """Lowers a rate that is tried, if `fit` ends soon.

        Args:
            epochs_left: Int. How many epochs `fit` still has.
            of: Int. How many there were when the first rate was tried.

        Returns:
            `epochs_left` if the rate falls from now on, else None.
        """
        first = self._rates_from(self.first_annealed)[0]
        optimizer = newest_group(self._model.optimizer)
        if not has_settable_rate(optimizer):
            return None
        falling.fall(optimizer, annealing.highest_rate(first, epochs_left, of))
        next_highest = annealing.highest_rate(first, epochs_left - 1, of)
        return epochs_left if learning_rate_of(optimizer) > next_highest else None

    def enter_directly(self, number: int) -> None:
        """Goes to a stage through those before it, wherever the model is, or changes nothing."""
        with switching.all_or_nothing(self._model):
            self.go_back()
            switching.build_optimizer(self._model)
            for one in range(1, number + 1):
                self.enter(one)

    def _switch_to(self, number: int, *, same_step: bool = False) -> None:
        stage = self._stages[number - 1]
        before = list(self._model.trainable_weights)
        if self._exactly:
            self.backbones.freeze()
        self.backbones.unfreeze(stage.layers, stage.train_batchnorm)
        after = self._model.trainable_weights
        # The loss has the regularizers of what trains, so a kept evaluation would be stale.
        changing = [*freezing.without(after, before), *freezing.without(before, after)]
        switching.renew_training(
            self._model,
            # None keeps the rate of `optimizer`, and those of the groups that the user made.
            self._rate_of(stage),
            head_learning_rate=stage.head_learning_rate,
            optimizer=self._optimizer,
            trained=before,
            group=self._group(number),
            keep_evaluation=not any(weight.regularizer for weight in changing),
            same_step=same_step and not changing,
        )

    def go_back(self) -> None:
        """Goes to stage 0, with a new optimizer of the kind that the head had."""
        self.backbones.freeze()
        optimizer = self._model.optimizer
        # A user's own groups may have that name too, and are all of the head's optimizer.
        if self._makes_groups():
            optimizer = groups_of(optimizer).get("head", optimizer)
        optimizer = without_loss_scale(optimizer)
        switching.renew_training(self._model, optimizer=switching.renew_optimizer(optimizer))

    def learning_rates(self, stage: int) -> dict[str, float]:
        """Returns what the logs get in a stage.

        Every key from the first epoch on, or CSVLogger and History drop it.
        """
        rate = learning_rate_of(self._model.optimizer)
        rates = {"learning_rate": rate}
        if self._makes_groups():
            rates["learning_rate_head"] = rate
            for number in range(1, len(self._stages) + 1):
                rates[f"learning_rate_{self._group(number)}"] = rate if number <= stage else 0.0
        groups = group_optimizer(self._model.optimizer)
        return rates if groups is None else rates | groups.logs()

    def rate_asked_for(self, number: int) -> float | None:
        """Returns the learning rate that a stage sets, None where that is not one number."""
        stage = self._stages[number - 1]
        several = stage.head_learning_rate is not None or number >= self.first_annealed
        if several or group_optimizer(self._model.optimizer) is not None:
            return None
        return stage.learning_rate if isinstance(stage.learning_rate, float) else None

    def group_learning_rates(self) -> dict[str, tuple[float, float]]:
        """Returns the lowest and highest learning rate in each parameter group, the head first."""
        groups = group_optimizer(self._model.optimizer)
        if groups is None:
            return {}
        # From the output, so that the head's group is first.
        weights = self._model.trainable_weights[::-1]
        rates: dict[str, list[float]] = {}
        for weight, rate in zip(weights, groups.rates(weights), strict=True):
            rates.setdefault(groups.group_of(weight), []).append(rate)
        return {group: (min(found), max(found)) for group, found in rates.items()}

    def optimizers(self) -> list[keras.Optimizer]:
        """Returns the optimizers of the groups, or the one that there is."""
        return list(groups_of(self._model.optimizer).values())

    def _check_rates(self, stage: Stage, given: Mapping[str, float]) -> None:
        """Raises a ValueError if a weight that joins in a stage has no learning rate."""
        rates = self._layerwise(given)
        with freezing.trainable_flags_kept(self._model):
            before = self._model.trainable_weights
            self.backbones.unfreeze(stage.layers, stage.train_batchnorm)
            for weight in freezing.without(self._model.trainable_weights, before):
                rates.of(weight)

    def _has_groups_of_its_own(self, stages: Sequence[Stage]) -> bool:
        """Whether the model has the groups that it was compiled with, in whichever stage it is.

        Groups that a switch makes come with learning rates, for which `_check_groups` has no place.
        """
        rates = [rate for one in stages for rate in (one.learning_rate, one.head_learning_rate)]
        grouped = self._compiled_groups() is not None
        return grouped and not self._exactly and rates == [None, None]

    def _compiled_groups(self) -> GroupOptimizer | None:
        """The model's own groups, None where a switch does not keep them or there are none."""
        return None if self._optimizer is not None else group_optimizer(self._model.optimizer)

    def _makes_groups(self) -> bool:
        """Whether a switch gives the head and what joins it groups of their own."""
        return any(one.head_learning_rate is not None or one.layerwise for one in self._stages)

    def _check_groups(self, compiled: GroupOptimizer) -> None:
        only = self._stages[0]
        if not self._keeps_groups:
            raise ValueError(
                f"The model is compiled with the GroupOptimizer {compiled.name!r}, whose groups "
                "have their own learning rates, so `learning_rate`, `head_learning_rate` and "
                "`stages` would be lost. Leave them out, or compile with one optimizer."
            )
        if is_built(self._model):
            joining = self.backbones.still_frozen(only.layers, only.train_batchnorm)
            compiled.resolve([*self._model.trainable_weights, *joining])

    def _group(self, stage: int) -> str:
        """The name of the parameter group of what joins in a stage."""
        return f"backbone_{stage}" if self._exactly else "backbone"

    def _rate_of(self, stage: Stage) -> LearningRate | LayerwiseLearningRates | None:
        if isinstance(stage.learning_rate, Mapping):
            return self._layerwise(stage.learning_rate)
        return stage.learning_rate

    def _layerwise(self, rates: Mapping[str, float]) -> LayerwiseLearningRates:
        if not isinstance(rates, LayerwiseLearningRates):
            return LayerwiseLearningRates(self.backbones.layers, rates)
        # A callback may be used again with a model made anew, whose layers have the same names.
        own = [weight for layer in self.backbones.members for weight in layer.weights]
        return rates if rates.is_for(own) else rates.for_backbone(self.backbones.layers)


def _with_rate(stage: Stage, default: float | str) -> Stage:
    """Returns a stage with the default where it says no learning rate."""
    if stage.learning_rate is not None:
        return stage
    return dataclasses.replace(stage, learning_rate=default)
