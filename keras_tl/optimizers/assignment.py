"""Which variables a parameter group is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import keras

from keras_tl.optimizers.learning_rates import LayerwiseLearningRates

Assignment: TypeAlias = (
    keras.Layer
    | str
    | re.Pattern
    | LayerwiseLearningRates
    | Callable[[keras.Variable], bool]
    | Sequence["keras.Layer | str | re.Pattern | Callable[[keras.Variable], bool]"]
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


class SavedFunction:
    """Stands for a function that a file names and this process does not have.

    It raises where it is asked, and not on loading: what the file records needs no function.

    Args:
        name: String. The function's name.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self, variable: keras.Variable) -> bool:
        raise ValueError(
            f"The file of this GroupOptimizer says that the function {self.name!r} assigns "
            f"variables to a group, but not whether it assigns {variable.path!r}. Define it under "
            "`@keras.saving.register_keras_serializable()` before loading, pass it as "
            "`custom_objects`, or compile the model anew."
        )


def to_config(group: str, assignment: Assignment, *, settled: bool) -> list[Any]:
    """Returns what is meant as a file can hold it.

    Args:
        group: String. The name of the group.
        assignment: What is in it.
        settled: Bool. Whether the file also records the group of each variable. Then a function
            that no file can hold is missed only where other variables join, and raises there.

    Returns:
        A list of regular expressions, and of dictionaries that name functions.

    Raises:
        ValueError: If it would be forgotten.
    """
    if isinstance(assignment, (keras.Layer, LayerwiseLearningRates)):
        if isinstance(assignment, keras.Layer) and not (assignment.built or settled):
            raise _unsavable(
                group, f"the layer {assignment.name!r}, which is not built", "Build the model first"
            )
        return [re.escape(weight.path) for weight in assignment.weights]
    if isinstance(assignment, (str, re.Pattern)):
        return [assignment if isinstance(assignment, str) else _with_flags(assignment)]
    if not callable(assignment):
        return [one for part in assignment for one in to_config(group, part, settled=settled)]
    if isinstance(assignment, SavedFunction):
        name, kept = assignment.name, settled
    else:
        name = keras.saving.get_registered_name(assignment)
        kept = settled or keras.saving.get_registered_object(name) is assignment
    if not kept:
        raise _unsavable(
            group,
            f"the function {name!r}",
            "Register it with `@keras.saving.register_keras_serializable()`, assign a layer or a "
            "regular expression on variable paths",
        )
    return [{"function": name}]


def from_config(saved: Any, custom_objects: Mapping[str, Any] | None = None) -> Assignment:
    """Returns the assignment that `to_config` wrote down."""
    if not isinstance(saved, list):
        return saved

    def function(name: str) -> Any:
        return keras.saving.get_registered_object(name, custom_objects) or SavedFunction(name)

    return [function(one["function"]) if isinstance(one, Mapping) else one for one in saved]


def _unsavable(group: str, what: str, do: str) -> ValueError:
    return ValueError(
        f"A GroupOptimizer that is not built cannot be saved: its group {group!r} is assigned by "
        f"{what}, which no file can hold, and its variables would be in another group after "
        f"loading. {do}, or call `optimizer.build(model.trainable_variables)` before saving."
    )


def _with_flags(pattern: re.Pattern) -> str:
    """Returns a pattern's text, with the flags that it was compiled with in it."""
    letters = "".join(letter for letter, flag in _FLAGS.items() if pattern.flags & flag)
    text = f"(?{letters}:{pattern.pattern})" if letters else pattern.pattern
    try:
        re.compile(text)
    except re.error:
        return pattern.pattern  # It starts with the flags itself.
    return text


_FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}


def check_assign(groups: Mapping[str, Any], assign: Mapping[str, Any]) -> None:
    """Raises a ValueError unless `assign` says for all groups but one what is in them."""
    unknown = [group for group in assign if group not in groups]
    if unknown:
        raise ValueError(
            f"`assign` names unknown groups: {unknown}. The groups are {list(groups)}."
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
