"""A stage as data: what it may hold, its file form, its description."""

import json
import re

import keras
import numpy as np
import pytest

from keras_tl import Stage, UnfreezeAtConvergence
from keras_tl.stages.stage import check_stages

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)


@pytest.mark.parametrize(
    "stage",
    [
        Stage("all", 1e-5),
        Stage(3, 1e-4, head_learning_rate=1e-3, patience=2, epochs=5, train_batchnorm=True),
        Stage(["a", "b"], 1, epochs=1),
        Stage("block[34]_.*", {"block3_conv": 1e-4, "block4_conv": 1e-3}),
    ],
)
def test_goes_through_a_file(stage, tmp_path):
    path = tmp_path / "stages.json"
    path.write_text(json.dumps([stage.to_dict()]))
    assert check_stages(json.loads(path.read_text()), instead_of=Stage("all", None)) == [stage]


def test_schedules_and_patterns_go_through_a_file():
    config = json.loads(json.dumps(Stage(re.compile("a.*"), SCHEDULE).to_dict()))
    loaded = Stage.from_dict(config)
    assert loaded.layers == "a.*"
    assert loaded.learning_rate.get_config() == SCHEDULE.get_config()


def test_numbers_as_yaml_reads_them():
    assert Stage.from_dict({"layers": "all", "learning_rate": "1e-5"}) == Stage("all", 1e-5)
    assert Stage.from_dict({"layers": 1, "learning_rate": {"a": "1e-5"}}) == Stage(1, {"a": 1e-5})


def test_defaults_are_left_out_of_the_file():
    assert Stage("all", 1e-5).to_dict() == {"layers": "all", "learning_rate": 1e-5}


def test_numbers_of_numpy_are_written_as_json_has_them():
    stage = Stage(2, np.float64(0.5), patience=np.int32(3))
    assert json.loads(json.dumps(stage.to_dict())) == {
        "layers": 2,
        "learning_rate": 0.5,
        "patience": 3,
    }


SCHEDULES = keras.optimizers.schedules


@pytest.mark.parametrize(
    ("layers", "learning_rate"),
    [
        ("all", {"a": np.float32(0.5), np.str_("b"): np.int64(1)}),
        ([np.str_("a"), "b"], np.float16(0.5)),
        ("all", SCHEDULES.ExponentialDecay(np.float32(0.5), np.int64(100), np.float64(0.5))),
        ("all", SCHEDULES.PiecewiseConstantDecay([np.int64(5)], [0.5, np.float32(0.25)])),
        ("all", SCHEDULES.PiecewiseConstantDecay(np.array([5]), np.array([0.5, 0.25]))),
    ],
    ids=["rates by layer", "names", "schedule", "lists in a schedule", "arrays in a schedule"],
)
def test_numbers_of_numpy_at_any_depth_go_through_a_file(layers, learning_rate):
    def types(value):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        nested = isinstance(value, (dict, list))
        return {type(value)}.union(*map(types, inner)) if nested else {type(value)}

    stage = Stage(layers, learning_rate)
    config = stage.to_dict()
    loaded = Stage.from_dict(json.loads(json.dumps(config)))

    assert types(config) <= {dict, list, str, int, float, bool, type(None)}
    assert loaded.to_dict() == config
    assert loaded.layers == layers
    if isinstance(learning_rate, SCHEDULES.LearningRateSchedule):
        assert [float(loaded.learning_rate(step)) for step in (0, 5, 6, 150)] == [
            float(learning_rate(step)) for step in (0, 5, 6, 150)
        ]
    else:
        assert loaded == stage


def test_a_stage_keeps_its_rates_when_the_dictionary_changes():
    rates = {"a": 0.5}
    stage = Stage("all", rates)
    rates["a"] = 0.1
    assert stage == Stage("all", {"a": 0.5})


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (Stage("all", 1e-5), "all layers, learning rate 1e-05"),
        (Stage("x.*", SCHEDULE), 'layers "x.*", learning rate ExponentialDecay'),
        (Stage(re.compile("x"), lambda: 0.1), 'layers "x", learning rate of a function'),
        (Stage(3, {"a": 1e-5, "b": 1e-4}), "the last 3 layers, learning rates 1e-05 to 0.0001"),
        (Stage(["a", "b"], 1.0), "layers a and b, learning rate 1"),
        (Stage(["a", "b", "c"], 1.0), "3 layers (a to c), learning rate 1"),
        (
            Stage(
                callable, 1.0, head_learning_rate=2.0, patience=1, epochs=2, train_batchnorm=True
            ),
            (
                "layers that a function selects, learning rate 1, head 2, patience 1, 2 epochs, "
                "BatchNormalization too"
            ),
        ),
    ],
)
def test_says_what_it_is(stage, words):
    assert str(stage) == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": 1.5}, "is not a selection of layers"),
        ({"layers": True}, "is not a selection of layers"),
        ({"layers": [1]}, "is not a selection of layers"),
        ({"learning_rate": -1.0}, "`learning_rate` must be a finite number above 0"),
        ({"learning_rate": "fast"}, "`learning_rate` must be a finite number above 0"),
        ({"learning_rate": {"a": 0.0}}, r"`learning_rate\['a'\]` must be a finite number above 0"),
        ({"learning_rate": {"a": SCHEDULE}}, r"`learning_rate\['a'\]` must be a number here"),
        ({"head_learning_rate": 0.0}, "`head_learning_rate` must be a finite number above 0"),
        ({"patience": -1}, "`patience` must be an int of at least 0"),
        ({"epochs": 0}, "`epochs` must be an int of at least 1"),
        ({"epochs": 1.5}, "`epochs` must be an int of at least 1"),
    ],
)
def test_refuses_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        Stage(**{"layers": "all", "learning_rate": 1e-5, **arguments})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layers": "all"},
        {"layers": "all", "learning_rate": 0.1, "lr": 0.1},
        "all",
    ],
)
def test_refuses_a_file_with_other_keys(config):
    with pytest.raises(ValueError, match="A stage is a dictionary with the keys layers"):
        Stage.from_dict(config)


@pytest.mark.parametrize("layers", [callable, lambda layer: True])
def test_refuses_to_write_down_a_function(layers):
    with pytest.raises(ValueError, match="`layers` is a function, which no file can hold"):
        Stage(layers, 0.1).to_dict()
    with pytest.raises(ValueError, match="`learning_rate` is a function"):
        Stage("all", lambda: 0.1).to_dict()


@pytest.mark.parametrize("stages", [[], {}, "all", 3, {"layers": "all", "learning_rate": 0.1}])
def test_refuses_what_is_no_list_of_stages(stages):
    with pytest.raises(ValueError, match="`stages` must be a list of at least one"):
        UnfreezeAtConvergence(stages=stages)


@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": 1e-3},
        {"layers": 3},
        {"train_batchnorm": True},
        {"head_learning_rate": 1e-3},
    ],
)
def test_refuses_what_the_stages_say_already(arguments):
    with pytest.raises(ValueError, match="`stages` says for each stage what trains"):
        UnfreezeAtConvergence(stages=[Stage("all", 1e-5)], **arguments)


@pytest.mark.parametrize("arguments", [{"learning_rate": SCHEDULE}, {"decay": 0.0}, {"n": 1.5}])
def test_by_depth_refuses_bad_arguments(arguments):
    backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        Stage.by_depth(**{"backbone": backbone, "n": 1, "learning_rate": 0.1, **arguments})
