"""What is in a group stays in it when the optimizer is saved, or saving it is refused."""

import re

import keras
import pytest

from keras_tl import FrozenBackbone, GroupOptimizer, UnfreezeAtConvergence
from tests import models
from tests.shared import regression_data, values_of

# What is compiled is not the point: which group a variable is in, is.
pytestmark = pytest.mark.eager

X, Y = regression_data(8)


@keras.saving.register_keras_serializable(package="tests")
def of_the_output(variable):
    return variable.path.startswith("output/")


def not_registered(variable):
    return variable.path.startswith("output/")


ASSIGNMENTS = {
    "layer": lambda model: model.layers[-1],
    "layers": lambda model: [model.layers[-1]],
    "model": lambda model: keras.Sequential([keras.Input((4,)), model.layers[-1]]),
    "pattern": lambda model: "output/.*",
    "flags": lambda model: re.compile("OUTPUT/.*", re.IGNORECASE),
    "inline flags": lambda model: re.compile("(?i)OUTPUT/.*"),
    "function": lambda model: of_the_output,
    "functions": lambda model: ["nothing", of_the_output],
}


def build(frozen=False, assign="layer"):
    keras.utils.set_random_seed(0)
    backbone = FrozenBackbone(models.functional(["dense"]))
    model = models.functional_outer(backbone)
    if not frozen:
        backbone.unfreeze()
    make = ASSIGNMENTS.get(assign, lambda model: assign)
    optimizer = GroupOptimizer(
        {"output": keras.optimizers.SGD(0.1), "rest": keras.optimizers.Adam(0.01)},
        assign={"output": make(model)},
    )
    model.compile(optimizer, "mse")
    return model


def save_and_load(model, tmp_path, **arguments):
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras", **arguments)


def fit(model, *callbacks, epochs=1):
    callbacks = list(callbacks)
    return model.fit(X, Y, epochs=epochs, shuffle=False, callbacks=callbacks, verbose=0).history


def groups(model):
    return [model.optimizer.group_of(variable) for variable in model.trainable_variables]


@pytest.mark.parametrize("assign", ASSIGNMENTS)
def test_saved_before_it_is_built(tmp_path, assign):
    model = build(assign=assign)
    loaded = save_and_load(model, tmp_path)
    for one in (model, loaded):
        one.optimizer.build(one.trainable_variables)
    assert groups(loaded) == groups(model) == ["rest", "rest", "output", "output"]


@pytest.mark.parametrize(
    "assign", ["layer", "function", pytest.param("flags", marks=pytest.mark.slow)]
)
def test_saved_while_the_backbone_is_frozen(tmp_path, assign):
    """What joins after loading joins the group that it would have joined."""
    model = build(frozen=True, assign=assign)
    fit(model)
    loaded = save_and_load(model, tmp_path)
    for one in (model, loaded):
        fit(one, UnfreezeAtConvergence(monitor="loss", max_frozen_epochs=1, verbose=0), epochs=2)
    assert groups(loaded) == groups(model) == ["rest", "rest", "output", "output"]
    assert values_of(loaded) == values_of(model)


@pytest.mark.parametrize("function", [lambda variable: True, not_registered])
def test_a_function_that_no_file_can_hold_is_refused(tmp_path, function):
    model = build(assign=function)
    with pytest.raises(ValueError, match="'output' is assigned by the function .*Register it with"):
        model.save(tmp_path / "model.keras")
    # Built, the groups of its variables are in the file.
    model.optimizer.build(model.trainable_variables)
    expected = groups(model)
    loaded = save_and_load(model, tmp_path)
    assert groups(loaded) == expected
    again = save_and_load(loaded, tmp_path)
    fit(again)
    assert groups(again) == expected


def test_a_layer_that_is_not_built_is_refused():
    layer = keras.layers.Dense(1)
    optimizers = {"one": keras.optimizers.SGD(), "rest": keras.optimizers.SGD()}
    optimizer = GroupOptimizer(optimizers, assign={"one": layer})
    with pytest.raises(ValueError, match="which is not built.*Build the model first"):
        optimizer.get_config()
    layer.build((None, 2))
    optimizer.get_config()


def test_a_function_that_is_gone_is_an_error_where_it_is_needed(tmp_path):
    model = build(frozen=True, assign=not_registered)
    fit(model)
    loaded = save_and_load(model, tmp_path)
    fit(loaded)  # Known from the file.
    unfreeze = UnfreezeAtConvergence(monitor="loss", max_frozen_epochs=1, verbose=0)
    with pytest.raises(ValueError, match="the function 'not_registered' assigns.*custom_objects"):
        fit(loaded, unfreeze, epochs=2)
    custom_objects = {"not_registered": not_registered}
    loaded = save_and_load(model, tmp_path, custom_objects=custom_objects)
    fit(loaded, unfreeze, epochs=2)
    assert groups(loaded) == ["rest", "rest", "output", "output"]


def test_variables_are_told_by_path_and_not_by_position():
    """As many other weights train after loading as before."""
    inputs = keras.Input((4,))
    layers = [keras.layers.Dense(4, name=name) for name in ("one", "two", "three")]
    x = inputs
    for layer in layers:
        x = layer(x)
    model = keras.Model(inputs, x)
    layers[0].trainable = False
    of_two = {"two": keras.optimizers.SGD(), "rest": keras.optimizers.SGD()}
    optimizer = GroupOptimizer(of_two, assign={"two": lambda variable: "two" in variable.path})
    optimizer.build(model.trainable_variables)
    loaded = GroupOptimizer.from_config(optimizer.get_config())
    variables = [*layers[2].weights, *layers[1].weights]
    loaded.build(variables)
    assert [loaded.group_of(one) for one in variables] == ["rest", "rest", "two", "two"]


def test_layers_with_other_numbers_in_their_names_keep_their_groups():
    def make():
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(1)])

    model, other = make(), make()
    of_two = {"one": keras.optimizers.SGD(), "rest": keras.optimizers.SGD()}
    optimizer = GroupOptimizer(of_two, assign={"one": model.layers[0]})
    optimizer.build(model.trainable_variables)
    loaded = GroupOptimizer.from_config(optimizer.get_config())
    loaded.build(other.trainable_variables)
    assert [loaded.group_of(v) for v in other.trainable_variables] == ["one"] * 2 + ["rest"] * 2


def test_a_model_that_is_fine_tuned_with_groups_is_loaded_whatever_its_paths_become(tmp_path):
    """The path of a Sequential model's layer is another one after loading."""
    backbone = FrozenBackbone(models.functional(["dense"]))
    model = keras.Sequential([keras.Input((4,)), backbone, keras.layers.Dense(1, name="head")])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    arguments = {"monitor": "loss", "max_frozen_epochs": 1, "verbose": 0}
    fit(model, UnfreezeAtConvergence(head_learning_rate=0.01, **arguments), epochs=2)
    loaded = save_and_load(model, tmp_path)
    assert groups(loaded) == groups(model) == ["backbone", "backbone", "head", "head"]
