"""Which variables a parameter group is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import keras

from keras_tl.learning_rates import LayerwiseLearningRates

Assignment: TypeAlias = (
    keras.Layer
    | str
    | re.Pattern
    | LayerwiseLearningRates
    | Callable[[keras.Variable], bool]
    | Sequence["keras.Layer | str | re.Pattern"]
)


def membership(assignment: Assignment) -> Callable[[keras.Variable], bool]:
    """Returns a function that says whether a variable is meant."""
    if isinstance(assignment, (keras.Layer, LayerwiseLearningRates)):
        weights = {id(weight) for weight in assignment.weights}
        return lambda variable: id(variable) in weights
    if isinstance(assignment, (str, re.Pattern)):
        pattern = re.compile(assignment)
        return lambda variable: pattern.fullmatch(variable.path) is not None
    if callable(assignment):
        return assignment
    parts = [membership(part) for part in assignment]
    return lambda variable: any(part(variable) for part in parts)


def patterns(assignment: Assignment) -> list[str]:
    """Returns regular expressions for what is meant; none for a function."""
    if isinstance(assignment, (keras.Layer, LayerwiseLearningRates)):
        return [re.escape(weight.path) for weight in assignment.weights]
    if isinstance(assignment, (str, re.Pattern)):
        return [assignment if isinstance(assignment, str) else assignment.pattern]
    if callable(assignment):
        return []
    return [pattern for part in assignment for pattern in patterns(part)]


def check_assign(groups: Mapping[str, Any], assign: Mapping[str, Any]) -> None:
    """Raises a ValueError unless `assign` says for all groups but one what is in them."""
    unknown = [group for group in assign if group not in groups]
    if unknown:
        raise ValueError(
            f"`assign` names groups that there are not: {unknown}. The groups are {list(groups)}."
        )
    rest = [group for group in groups if group not in assign]
    if len(rest) > 1:
        raise ValueError(
            f"`assign` leaves out the groups {rest}; only one can take the rest. Assign a layer, a "
            "regular expression on variable paths, a list of these or a function to the others."
        )
    for group, assignment in assign.items():
        _check_assignment(group, assignment)


def _check_assignment(group: str, assignment: Any) -> None:
    if isinstance(assignment, str):
        try:
            re.compile(assignment)
        except re.error as error:
            raise ValueError(
                f'`assign["{group}"]={assignment!r}` is not a regular expression: {error}.'
            ) from error
    elif isinstance(assignment, Sequence):
        for part in assignment:
            _check_assignment(group, part)
    elif not isinstance(
        assignment, (keras.Layer, re.Pattern, LayerwiseLearningRates)
    ) and not callable(assignment):
        raise ValueError(
            f'`assign["{group}"]` must be a layer, a regular expression on variable paths, '
            "layer-wise learning rates, a list of layers and expressions, or a function from a "
            f"variable to a bool. Received: {assignment!r}."
        )
