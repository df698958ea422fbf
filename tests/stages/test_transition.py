"""The record of a switch, as a snapshot keeps it."""

import dataclasses
import json

import pytest

from keras_tl import Transition

SWITCH = Transition(
    epoch=3,
    stage=1,
    reason="converged",
    value=0.5,
    learning_rate_before=1e-2,
    learning_rate_after=1e-5,
    trainable_before=10,
    trainable_after=100,
    layers=("conv", "dense"),
    group_learning_rates={"head": (1e-3, 1e-3)},
)


def test_a_switch_is_the_same_after_json():
    written = json.loads(json.dumps(dataclasses.asdict(SWITCH)))
    assert Transition.from_dict(written) == SWITCH


@pytest.mark.parametrize(
    "name, value",
    [
        ("epoch", "3"),
        ("epoch", True),
        ("epoch", 3.0),
        ("reason", None),
        ("value", "0.5"),
        ("learning_rate_after", [1e-5]),
        ("layers", "conv"),
        ("layers", [1]),
        ("group_learning_rates", {"head": [1e-3]}),
        ("group_learning_rates", ["head"]),
    ],
)
def test_refuses_what_is_no_switch(name, value):
    with pytest.raises(ValueError, match=f"'transitions' have the {name}|are not switches"):
        Transition.from_dict(dataclasses.asdict(SWITCH) | {name: value})
