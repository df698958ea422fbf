"""An optimizer of named parameter groups, each with an optimizer of its own."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import keras

from keras_tl.internals.imported import clip_by_global_norm
from keras_tl.internals.optimizers import (
    averages_of_all,
    copy_optimizer_state,
    optimizer_weights,
    scale_learning_rates,
    variable_key,
)
from keras_tl.optimizers.assignment import (
    Assignment,
    check_assign,
    from_config,
    membership,
    to_config,
)
from keras_tl.optimizers.learning_rates import LayerwiseLearningRates


@keras.saving.register_keras_serializable(package="keras_tl")
class GroupOptimizer(keras.optimizers.MultiOptimizer):
    """Trains named groups of variables, each with its own optimizer.

    Each group trains bit for bit as if its optimizer were the only one and all other variables were
    constants: it has its own class, learning rate or schedule, weight decay, step count and state.

    `learning_rate` is that of the last group. Setting it, as `ReduceLROnPlateau` and
    `LearningRateScheduler` do, scales the rates of all groups alike. `UnfreezeAtConvergence` puts
    the rates of all groups into the logs; without it, a
    `LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(optimizer.logs()))` does.

    Args:
        groups: Dictionary from names to `keras.optimizers.Optimizer` instances, one for each group,
            that are not built. They take the groups' names.
        assign: Dictionary from names of groups to what is in them: a layer (a model, a
            `FrozenBackbone`), for all of its weights; a regular expression that must match a
            variable's whole `path`; a list of these; or a function from a variable to a bool. What
            `layerwise_learning_rates` returns stands for its backbone's weights, and gives each
            layer its learning rate, whatever the group's optimizer was made with. One group may be
            left out, and takes the rest.
        global_clipnorm: Float or None. If set, the gradients of all groups together are clipped to
            this norm. Defaults to `None`.
        loss_scale_factor: Float or None, as in `keras.optimizers.Optimizer`.
        name: String. The optimizer's name.

    Raises:
        ValueError: For groups or assignments that are none; and when it is built, if a variable is
            in no group or in two.

    Example:

    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model = keras.Sequential([backbone, keras.layers.Dense(1)])
    >>> optimizer = GroupOptimizer(
    ...     {"backbone": keras.optimizers.Adam(1e-5), "head": keras.optimizers.Adam(1e-3)},
    ...     assign={"backbone": backbone},
    ... )
    >>> model.compile(optimizer, "mse")
    >>> optimizer.build(model.trainable_variables)
    >>> optimizer.group_of(model.layers[-1].kernel)
    'head'

    References:

    - Howard and Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification"
    """

    def __init__(
        self,
        groups: Mapping[str, keras.Optimizer],
        *,
        assign: Mapping[str, Assignment] | None = None,
        global_clipnorm: float | None = None,
        loss_scale_factor: float | None = None,
        name: str | None = None,
    ):
        """Makes an optimizer that is not built."""
        # Without this, `help` and the API reference show the arguments of MultiOptimizer.
        assign = dict(assign or {})
        _check_groups(groups)
        check_assign(groups, assign)
        super().__init__(
            _GroupMap(groups, self._optimizer_of),
            loss_scale_factor=loss_scale_factor,
            name=name or "group_optimizer",
        )
        self._groups = dict(groups)
        for group, optimizer in groups.items():
            optimizer.name = group
        self._assign = assign
        for group, given in assign.items():
            if isinstance(given, LayerwiseLearningRates):
                _set_learning_rate(group, groups[group], given)
        self._names: dict[Any, str] = {}
        self._scales: dict[Any, float] = {}
        self._kept: dict[Any, tuple[str, float]] = {}
        # The path, group and scale of each variable that it was built with, maybe before saving.
        self._members: list[tuple[str | None, str, float]] = []
        # The same by path, of an optimizer from a file.
        self._recorded: dict[str, tuple[str, float]] | None = None
        self._ratios = {group: 1.0 for group in groups}
        self.global_clipnorm = _check_clipnorm(global_clipnorm, groups)
        self._note_ratios()

    # Groups.

    @property
    def groups(self) -> dict[str, keras.Optimizer]:
        """The optimizers by the groups' names."""
        return dict(self._groups)

    @property
    def assign(self) -> dict[str, Assignment]:
        """What is in the groups, as it was given."""
        return dict(self._assign)

    @property
    def scales(self) -> dict[Any, tuple[str, float]]:
        """Each variable's group, and the multiple of its rate at which the variable learns."""
        return {key: (group, self._scales[key]) for key, group in self._names.items()}

    def group_of(self, variable: keras.Variable) -> str:
        """Returns the name of the group that a variable is in.

        Args:
            variable: One of those that the optimizer was built with.

        Returns:
            String.

        Raises:
            KeyError: If the optimizer is not built, or not with that variable.
        """
        return self._names[variable_key(self, variable)]

    def rates(self, variables: Sequence[keras.Variable]) -> list[float]:
        """Returns the learning rate of each of some variables.

        Args:
            variables: List of them. Before the optimizer is built, any; then those that it was
                built with.

        Returns:
            A list of floats.
        """
        if self.built:
            groups = [self.group_of(variable) for variable in variables]
            scales = [self._scale_of(variable) for variable in variables]
        else:
            groups, scales = self.resolve(variables), self._resolve_scales(variables)
        rates = self._rates_of_groups()
        return [rates[group] * scale for group, scale in zip(groups, scales, strict=True)]

    def logs(self) -> dict[str, float]:
        """Returns the learning rates of the groups, as a callback can put them into the logs.

        Returns:
            A dictionary from `learning_rate_<group>` to a float, which is 0 if nothing is in the
            group.
        """
        used = set(self._names.values())
        return {
            f"learning_rate_{group}": rate if group in used else 0.0
            for group, rate in self._rates_of_groups().items()
        }

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        keys = [variable_key(self, variable) for variable in variables]
        # Before anything is noted: what cannot be resolved leaves the optimizer as it was.
        scales = self._resolve_scales(variables)
        groups = self.resolve(variables)
        self._names = dict(zip(keys, groups, strict=True))
        self._scales = dict(zip(keys, scales, strict=True))
        paths = [variable.path for variable in variables]
        self._members = list(zip(paths, groups, scales, strict=True))
        if self._recorded is not None:
            self._recorded |= _by_path(self._members)
        super().build(variables)
        # Only now: Keras counts the variables of an optimizer when it builds it.
        for group, optimizer in self._groups.items():
            if any(self._scale_of(v) != 1.0 for v in variables if self.group_of(v) == group):
                scale_learning_rates(optimizer, self._scale_of)

    def build_from(
        self,
        variables: Sequence[keras.Variable],
        before: GroupOptimizer | Mapping[str, keras.Optimizer],
    ) -> None:
        """Builds the optimizer such that groups keep their state, if nothing joins them.

        Args:
            variables: The variables to update.
            before: Built optimizers by the names of groups, each of the same class as the group's;
                or a `GroupOptimizer`, whose learning rates by layer are kept too. A group takes
                over the state there if that has all of the group's variables; otherwise it starts
                anew: a step count that old and new variables shared would be wrong for one of them.
        """
        if isinstance(before, GroupOptimizer):
            self._kept = before.scales
            before = before.groups
        self.build(variables)
        for group, old in before.items():
            known = {id(variable) for variable in optimizer_weights(old) or ()}
            members = [variable for variable in variables if self.group_of(variable) == group]
            if members and all(id(variable) in known for variable in members):
                copy_optimizer_state(old, self._groups[group])

    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[keras.Variable] | None = None
    ) -> None:
        if self.global_clipnorm:
            # The gradients are still scaled: the groups' optimizers divide by it after this.
            norm = self.global_clipnorm * (self.loss_scale_factor or 1.0)
            grads = clip_by_global_norm(list(grads), norm)
        super().apply(grads, trainable_variables)

    # The learning rate, as callbacks read and set it.

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the last group. Setting it scales those of all groups alike."""
        return list(self._groups.values())[-1].learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        # A callback may have set the rate of one group by itself since.
        self._note_ratios()
        for group, optimizer in self._groups.items():
            optimizer.learning_rate = float(value) * self._ratios[group]

    @property
    def optimizers(self) -> list[keras.Optimizer]:
        """Not there: `LearningRateScheduler` would set one rate for all. See `groups`."""
        raise AttributeError("A GroupOptimizer has `groups`, a dictionary of optimizers by name.")

    @property
    def _model_variables_moving_average(self) -> list[keras.Variable]:
        """What `SwapEMAWeights` swaps, if all groups keep averages: it swaps all or nothing."""
        averages = averages_of_all(self)
        if averages is None:
            raise AttributeError("Not all groups have `use_ema=True`.")
        return averages

    # Saving.

    def get_config(self) -> dict[str, Any]:
        return {
            "groups": {
                group: keras.saving.serialize_keras_object(optimizer)
                for group, optimizer in self._groups.items()
            },
            "assign": {
                group: to_config(group, assignment, settled=bool(self._members))
                for group, assignment in self._assign.items()
            },
            "paths": [path for path, _, _ in self._members],
            "assigned": [group for _, group, _ in self._members],
            "scales": [scale for _, _, scale in self._members],
            "global_clipnorm": self.global_clipnorm,
            "loss_scale_factor": self.loss_scale_factor,
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> GroupOptimizer:
        config = dict(config)
        # An optimizer that was saved before it was built lists no variables.
        assigned = config.pop("assigned", None) or []
        paths = config.pop("paths", None) or [None] * len(assigned)
        scales = config.pop("scales", None) or [1.0] * len(assigned)
        assign = {
            group: from_config(saved, custom_objects)
            for group, saved in (config.pop("assign", None) or {}).items()
        }
        groups = {
            group: keras.saving.deserialize_keras_object(optimizer, custom_objects=custom_objects)
            for group, optimizer in config.pop("groups").items()
        }
        optimizer = cls(groups, assign=assign, **config)
        optimizer._members = list(zip(paths, assigned, scales, strict=True))
        optimizer._recorded = _by_path(optimizer._members)
        return optimizer

    def renewed(self, groups: Mapping[str, keras.Optimizer]) -> GroupOptimizer:
        """Returns an optimizer with the same assignments and settings, and other optimizers.

        Args:
            groups: Optimizers by the groups' names, not built.

        Returns:
            A `GroupOptimizer`, not built.
        """
        new = GroupOptimizer(
            groups,
            assign=self._assign,
            global_clipnorm=self.global_clipnorm,
            loss_scale_factor=self.loss_scale_factor,
            name=self.name,
        )
        if self._recorded is not None:
            # Of a file, which may know more of its variables than `assign` does.
            new._recorded, new._members = dict(self._recorded), list(self._members)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupOptimizer:
        """Keeps functions and layers in `assign`, which no file holds: Keras copies by a file."""
        if self.built:
            function, arguments, *_ = cast(tuple, self.__reduce__())
            return function(*arguments)
        return self.renewed({name: copy.deepcopy(one, memo) for name, one in self._groups.items()})

    # Which variable is in which group.

    def _optimizer_of(self, variable: keras.Variable) -> keras.Optimizer:
        return self._groups[self.group_of(variable)]

    def resolve(self, variables: Sequence[keras.Variable]) -> list[str]:
        """Returns the name of the group that each variable would be in.

        Args:
            variables: List of the variables to update.

        Returns:
            A list of strings.

        Raises:
            ValueError: If a variable is in no group or in two.
        """
        known = self._known(variables)
        rest = [group for group in self._groups if group not in self._assign]
        belongs = {group: membership(given) for group, given in self._assign.items()}
        names, wrong = [], []
        for variable, recorded in zip(variables, known, strict=True):
            if recorded is not None:
                names.append(recorded[0])
                continue
            inside = [group for group, member in belongs.items() if member(variable)] or rest
            if len(inside) != 1:
                wrong.append(f"{variable.path} is in {_listed(inside)}")
            names.append(inside[0] if inside else "")
        if wrong:
            raise ValueError(
                f"Every trainable variable must be in one group of {list(self._groups)}. "
                f"{'; '.join(wrong[:_SHOWN])}{_more(len(wrong))}. Change `assign`, or leave one "
                "group out of it to take the rest."
            )
        return names

    def _resolve_scales(self, variables: Sequence[keras.Variable]) -> list[float]:
        """Returns the multiple of its group's learning rate at which each variable learns."""
        groups, known = self.resolve(variables), self._known(variables)
        return [
            self._resolve_scale(variable, group) if recorded is None else recorded[1]
            for variable, group, recorded in zip(variables, groups, known, strict=True)
        ]

    def _known(self, variables: Sequence[keras.Variable]) -> list[tuple[str, float] | None]:
        """Returns the group and scale that a file records of each variable, if it does."""
        if self._recorded is None:
            return [None] * len(variables)
        if _same_order(self._members, variables):
            # Some have other paths: loading counts layers' names up, or leaves the model's out.
            return [(group, scale) for _, group, scale in self._members]
        return [self._recorded.get(variable.path) for variable in variables]

    def _resolve_scale(self, variable: keras.Variable, group: str) -> float:
        group_before, scale = self._kept.get(variable_key(self, variable), (None, 1.0))
        if group_before == group:
            return scale
        given = self._assign.get(group)
        if isinstance(given, LayerwiseLearningRates):
            return given.of(variable) / given.learning_rate
        return 1.0

    def _scale_of(self, variable: keras.Variable) -> float:
        return self._scales[variable_key(self, variable)]

    def _rates_of_groups(self) -> dict[str, float]:
        return {
            group: float(keras.ops.convert_to_numpy(optimizer.learning_rate))
            for group, optimizer in self._groups.items()
        }

    def _note_ratios(self) -> None:
        """Keeps how the rates relate: once all are 0, as in a warm-up, they would not tell."""
        rates = self._rates_of_groups()
        reference = list(rates.values())[-1]
        # At a rate of 0 there are no ratios: the last ones stay, by which the rates come back.
        if reference > 0:
            self._ratios = {group: rate / reference for group, rate in rates.items()}


_SHOWN = 5


class _GroupMap(keras.optimizers.OptimizerMap):
    """Which optimizer updates a variable, as Keras asks for it: by the variable, not its path.

    Its values are the groups' optimizers, in their order, those of empty groups too.
    """

    def __init__(
        self,
        groups: Mapping[str, keras.Optimizer],
        optimizer_of: Callable[[keras.Variable], keras.Optimizer],
    ):
        super().__init__(next(iter(groups.values())), dict(groups))
        self._optimizer_of = optimizer_of

    def __call__(self, variable: keras.Variable) -> keras.Optimizer:
        return self._optimizer_of(variable)


def _by_path(members: Sequence[tuple[str | None, str, float]]) -> dict[str, tuple[str, float]]:
    """Returns groups and scales by path, without paths that several variables share."""
    count = Counter(path for path, _, _ in members)
    return {
        path: (group, scale)
        for path, group, scale in members
        if path is not None and count[path] == 1
    }


def _same_order(
    members: Sequence[tuple[str | None, str, float]], variables: Sequence[keras.Variable]
) -> bool:
    """Whether variables are those of a file in its order, as far as their paths tell."""
    paths = [path for path, _, _ in members]
    if len(paths) != len(variables):
        return False
    known = set(paths)
    return all(
        path in (None, variable.path)
        or (variable.path not in known and path.split("/")[-1] == variable.name)
        for path, variable in zip(paths, variables, strict=True)
    )


def _set_learning_rate(
    group: str, optimizer: keras.Optimizer, rates: LayerwiseLearningRates
) -> None:
    try:
        optimizer.learning_rate = rates.learning_rate
    except TypeError as error:
        raise ValueError(
            f'The optimizer of the group "{group}" has a schedule or function for a learning rate, '
            "and layer-wise learning rates would replace it. Make it with a number, and use the "
            "callback `LearningRateScheduler`, which scales all rates alike."
        ) from error


def _check_groups(groups: Any) -> None:
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(
            "`groups` must be a dictionary from names to optimizers, such as "
            f'`{{"backbone": Adam(1e-5), "head": Adam(1e-3)}}`. Received: groups={groups!r}.'
        )
    for group, optimizer in groups.items():
        if not isinstance(group, str) or not re.fullmatch(r"\w+", group):
            raise ValueError(
                "The name of a group must be a string of letters, digits and underscores, for "
                f"logs and variables are named after it. Received: {group!r}."
            )
        if isinstance(optimizer, _WITHOUT_RATE) or not isinstance(optimizer, keras.Optimizer):
            raise ValueError(
                f'The optimizer of the group "{group}" must be a Keras optimizer with a learning '
                "rate of its own, not one that wraps others: put a LossScaleOptimizer around the "
                f"GroupOptimizer. Received: {optimizer!r}."
            )
        if optimizer.built:
            raise ValueError(
                f'The optimizer of the group "{group}" is built already, and can only update the '
                "variables it was built with. Pass a fresh instance."
            )
    if len({id(optimizer) for optimizer in groups.values()}) < len(groups):
        raise ValueError("Each group needs an optimizer instance of its own; one is given twice.")


_WITHOUT_RATE = (keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer)


def _check_clipnorm(
    global_clipnorm: float | None, groups: Mapping[str, keras.Optimizer]
) -> float | None:
    if global_clipnorm is None:
        return None
    if global_clipnorm <= 0:
        raise ValueError(
            f"`global_clipnorm` must be above 0. Received: global_clipnorm={global_clipnorm!r}."
        )
    accumulating = [name for name, one in groups.items() if one.gradient_accumulation_steps]
    if accumulating:
        raise ValueError(
            f"`global_clipnorm` cannot clip what the groups {accumulating} accumulate: it would "
            "clip each step's gradients and not their mean. Leave out one of the two."
        )
    return float(global_clipnorm)


def _listed(groups: list[str]) -> str:
    return " and ".join(f'"{group}"' for group in groups) or "none"


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""
