"""Several stages in one `fit`: what trains in each, how each ends, what its optimizer knows."""

import dataclasses
import functools
import itertools
import json

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    GroupOptimizer,
    Stage,
    UnfreezeAtConvergence,
    layerwise_learning_rates,
)
from keras_tl.stages import switching
from keras_tl.stages.transition import Transition
from tests import models
from tests.shared import Recorder, Scripted, as_bytes, examples, regression_data, values_of

pytestmark = pytest.mark.covers("part: Stage")

X, Y = regression_data()
BLOCKS = ("block1", "block2", "block3")


def make_backbone():
    inputs = keras.Input((4,))
    x = inputs
    for block in BLOCKS:
        x = keras.layers.Dense(4, activation="tanh", name=f"{block}_dense")(x)
        x = keras.layers.BatchNormalization(momentum=0.5, name=f"{block}_norm")(x)
    return keras.Model(inputs, x, name="backbone")


def build(optimizer=None, backbone=None, **compile_arguments):
    keras.utils.set_random_seed(0)
    wrapper = backbone or FrozenBackbone(make_backbone())
    model = models.functional_outer(wrapper, [keras.layers.Dense(4, activation="tanh")])
    model.compile(optimizer or keras.optimizers.SGD(0.01), "mse", **compile_arguments)
    return model, wrapper


def fit(model, *callbacks, epochs=6, batch_size=16, **arguments):
    # Where nothing monitors it, to validate would be one more step to compile.
    if any(getattr(one, "monitor", "").startswith("val_") for one in callbacks):
        arguments |= {"validation_data": (X, Y), "validation_batch_size": len(X)}
    return model.fit(
        X,
        Y,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        callbacks=list(callbacks),
        verbose=0,
        **arguments,
    ).history


# Where what a step does is counted.
fit_in_two_steps = functools.partial(fit, batch_size=8)


def staged(*stages, **arguments):
    settings = {"max_frozen_epochs": 1, "restore_best_weights": False, "verbose": 0}
    return UnfreezeAtConvergence(stages=stages, **{"monitor": "loss"} | settings | arguments)


def blocks_that_moved(wrapper, records):
    """For each two records of the backbone, the names of the blocks that differ."""
    paths = [path for path, _ in as_bytes(wrapper.weights)]
    return [
        sorted(
            {
                next(block for block in BLOCKS if block in path)
                for path, one, other in zip(paths, before, after, strict=True)
                if one != other
            }
        )
        for before, after in itertools.pairwise(records)
    ]


def recorder_of(wrapper):
    return Recorder(lambda _: [value for _, value in as_bytes(wrapper.weights)])


# What trains.


@pytest.mark.eager
def test_just_the_selected_layers_train_in_each_stage():
    model, wrapper = build()
    weights = recorder_of(wrapper)
    callback = staged(
        Stage("block3.*", 1e-2, epochs=1),
        Stage(["block1_dense"], 1e-2, epochs=1),
        Stage("all", 1e-2, epochs=1),
        Stage(1, 1e-2),
    )
    history = fit(model, callback, weights, FreezeGuard(check="batch", verbose=0), epochs=5)

    assert history["stage"] == [0, 1, 2, 3, 4]
    assert blocks_that_moved(wrapper, weights.records) == [
        ["block3"],
        ["block1"],
        list(BLOCKS),
        ["block3"],
    ]
    assert [t.layers for t in callback.transitions] == [
        ("block3_dense",),
        ("block1_dense",),
        ("block2_dense", "block3_dense"),
        (),
    ]
    assert [t.frozen for t in callback.transitions] == [
        (),
        ("block3_dense",),
        (),
        ("block1_dense", "block2_dense"),
    ]
    assert [t.stage for t in callback.transitions] == [1, 2, 3, 4]


@pytest.mark.eager
def test_stages_of_a_plain_backbone_keep_what_was_frozen_by_hand():
    backbone = make_backbone()
    kernel, bias = backbone.get_layer("block3_dense").trainable_weights
    bias.trainable = False
    model, _ = build(backbone=backbone)
    callback = UnfreezeAtConvergence(
        stages=[Stage("block3.*", 1e-2, epochs=1), Stage("all", 1e-2)],
        backbone=backbone,
        max_frozen_epochs=1,
        verbose=0,
    )
    for layer in backbone.layers[:-2]:
        layer.trainable = False
    before = as_bytes([bias])
    fit(model, callback, epochs=3)
    assert callback.stage == 2
    assert not bias.trainable
    assert kernel.trainable
    assert as_bytes([bias]) == before


@pytest.mark.eager
def test_train_batchnorm_is_of_the_stage():
    model, wrapper = build()
    gammas = [weight for weight in wrapper.weights if weight.name == "gamma"]
    trained = Recorder(lambda _: [gamma.trainable for gamma in gammas])
    callback = staged(
        Stage("block3.*", 1e-2, epochs=1, train_batchnorm=True), Stage("block3.*", 1e-2)
    )
    statistics = as_bytes(models.statistics(wrapper))
    fit(model, callback, trained, epochs=3)
    assert trained.records == [[False] * 3, [False, False, True], [False] * 3]
    assert as_bytes(models.statistics(wrapper)) == statistics


@pytest.mark.eager
def test_stages_from_plain_data():
    model, _ = build()
    callback = staged(*[stage.to_dict() for stage in Stage.by_depth(make_backbone(), 2, 1e-3)])
    fit(model, callback, epochs=2)
    assert [t.layers for t in callback.transitions] == [("block3_dense",)]


# When a stage ends.


def scripted_stages(callback, values):
    model, _ = build()
    script = Scripted(callback.monitor, values)
    return fit(model, script, callback, epochs=len(values))["stage"]


def scored(*stages, **arguments):
    settings = {"monitor": "score", "mode": "min", "max_frozen_epochs": None, "patience": 1}
    return staged(*stages, **settings | arguments)


@pytest.mark.eager
def test_a_stage_ends_by_its_own_patience():
    callback = scored(Stage("block3.*", 1e-3, patience=2), Stage("all", 1e-4))
    assert scripted_stages(callback, [5, 5, 4, 4, 4, 4, 4]) == [0, 0, 1, 1, 1, 2, 2]
    assert [t.reason for t in callback.transitions] == ["converged", "converged"]


@pytest.mark.eager
def test_a_stage_ends_by_the_patience_of_the_callback():
    callback = scored(Stage("block3.*", 1e-3), Stage("all", 1e-4))
    assert scripted_stages(callback, [5, 5, 4, 4, 4, 4, 4]) == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.eager
def test_a_stage_ends_after_its_epochs_converged_or_not():
    callback = scored(Stage("block3.*", 1e-3, epochs=3), Stage("all", 1e-4))
    assert scripted_stages(callback, [5, 5, 4, 4, 4, 4]) == [0, 0, 1, 1, 1, 2]
    assert [t.reason for t in callback.transitions] == ["converged", "epochs"]


@pytest.mark.eager
def test_a_stage_ends_by_whichever_comes_first():
    callback = scored(
        Stage("block3.*", 1e-3, epochs=3, patience=1), Stage("all", 1e-4, epochs=2, patience=9)
    )
    assert scripted_stages(callback, [5, 5, 4, 4, 3, 3, 3, 3]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.eager
def test_the_last_stage_ends_by_fine_tune_patience():
    callback = scored(Stage("block3.*", 1e-3), Stage("all", 1e-4), fine_tune_patience=2)
    assert scripted_stages(callback, [5, 5, 4, 4, 3, 3, 3, 3, 3]) == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.eager
def test_the_last_stage_ends_by_its_own_patience():
    callback = scored(Stage("block3.*", 1e-3), Stage("all", 1e-4, patience=1), fine_tune_patience=5)
    assert scripted_stages(callback, [5, 5, 4, 4, 3, 3, 3]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.eager
@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_a_stage_that_diverges_ends_training(bad):
    callback = scored(Stage("block3.*", 1e-3), Stage("all", 1e-4))
    assert scripted_stages(callback, [5, 5, 4, bad, 3, 3]) == [0, 0, 1, 1]


@pytest.mark.eager
def test_early_stopping_before_it_ends_each_stage_but_not_the_last():
    stopping = keras.callbacks.EarlyStopping("score", mode="min", patience=1)
    callback = scored(Stage("block3.*", 1e-3), Stage("all", 1e-4), patience=9)
    model, _ = build()
    values = [5, 5, 4, 4, 3, 3, 3, 3]
    history = fit(model, Scripted("score", values), stopping, callback, epochs=8)
    assert history["stage"] == [0, 0, 1, 1, 2, 2]
    assert [t.reason for t in callback.transitions] == ["early_stopping"] * 2


@pytest.mark.eager
def test_says_in_which_stage_training_ended(capsys):
    callback = scored(Stage("block3.*", 1e-3), Stage("all", 1e-4), verbose=1)
    scripted_stages(callback, [5, 5, 4])
    out = capsys.readouterr().out
    assert 'Epoch 3: UnfreezeAtConvergence begins stage 1 of "backbone"\n' in out
    assert "joining        1 layer: block3_dense\n" in out
    assert "training ended in stage 1 of 2. Pass more `epochs`" in out


@pytest.mark.eager
def test_says_what_is_frozen(capsys):
    callback = scored(Stage("block3.*", 1e-3), Stage("block[12]_dense", 1e-4), verbose=1)
    scripted_stages(callback, [5, 5, 4, 4, 4])
    out = capsys.readouterr().out
    assert "joining        2 layers: block1_dense, block2_dense\n" in out
    assert "frozen again   1 layer: block3_dense\n" in out


# What the optimizer knows.


@pytest.mark.eager
def test_one_new_optimizer_a_stage_without_a_rate_for_the_head():
    model, _ = build()
    seen = Recorder(lambda model: int(model.optimizer.iterations))
    callback = staged(Stage("block3.*", 1e-2, epochs=1), Stage("all", 1e-4))
    history = fit_in_two_steps(model, callback, seen, epochs=4)
    assert seen.records == [2, 2, 2, 4]
    np.testing.assert_allclose(history["learning_rate"], [1e-2, 1e-2, 1e-4, 1e-4], rtol=1e-6)
    assert "learning_rate_head" not in history


@pytest.mark.eager
def test_groups_go_on_and_what_joins_is_new():
    model, _ = build()
    seen = Recorder(
        lambda model: (
            {name: int(one.iterations) for name, one in model.optimizer.groups.items()}
            if isinstance(model.optimizer, GroupOptimizer)
            else int(model.optimizer.iterations)
        )
    )
    stages = Stage.by_depth(make_backbone(), 3, 1e-2, 0.5, head_learning_rate=5e-3, epochs=1)
    history = fit_in_two_steps(model, staged(*stages), seen, epochs=4)
    assert seen.records == [
        2,
        {"head": 4, "backbone_1": 2},
        {"head": 6, "backbone_1": 4, "backbone_2": 2},
        {"head": 8, "backbone_1": 6, "backbone_2": 4, "backbone_3": 2},
    ]
    rates = {key: history[key] for key in history if key.startswith("learning_rate")}
    expected = {
        "learning_rate": [1e-2, 1e-2, 5e-3, 2.5e-3],
        "learning_rate_head": [1e-2, 5e-3, 5e-3, 5e-3],
        "learning_rate_backbone_1": [0, 1e-2, 1e-2, 1e-2],
        "learning_rate_backbone_2": [0, 0, 5e-3, 5e-3],
        "learning_rate_backbone_3": [0, 0, 0, 2.5e-3],
    }
    assert rates.keys() == expected.keys()
    for key, values in rates.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-6)


@pytest.mark.eager
def test_groups_go_on_bit_for_bit():
    # What joins in stage 2 does so at a rate so low that it does not move. Eagerly: compiled,
    # TensorFlow fuses other kernels together, which rounds in other ways.
    head = {"head_learning_rate": 5e-3}
    first = Stage("block3.*", 1e-2, **head)
    model, wrapper = build(keras.optimizers.Adam(0.01), run_eagerly=True)
    fit(model, staged(first, patience=9), epochs=4)
    other, _ = build(keras.optimizers.Adam(0.01), run_eagerly=True)
    second = Stage("all", 1e-30, **head)
    fit(other, staged(Stage("block3.*", 1e-2, epochs=1, **head), second), epochs=4)
    assert len(other.optimizer.groups) == 3
    below = len(wrapper.backbone.layers[-2].weights + wrapper.backbone.layers[-1].weights)
    trained = len(wrapper.weights) - below
    assert values_of(other)[trained:] == values_of(model)[trained:]


@pytest.mark.eager
def test_a_group_that_loses_a_layer_goes_on_with_the_rest():
    head = {"head_learning_rate": 5e-3, "epochs": 1}
    model, wrapper = build(keras.optimizers.Adam(0.01))
    slots = []

    def velocities(model):
        group = model.optimizer.groups["backbone_1"]
        kept = wrapper.backbone.get_layer("block3_dense").kernel
        return np.array(group._velocities[group._get_variable_index(kept)])

    callback = staged(Stage("block[23].*", 1e-2, **head), Stage("block3.*", 1e-2, **head))

    class Switches(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if callback.stage == 1:
                slots.append(velocities(self.model))

        def on_epoch_begin(self, epoch, logs=None):
            if callback.stage == 2:
                slots.append(velocities(self.model))

    fit(model, callback, Switches(), epochs=3)
    assert len(slots) == 2
    assert slots[0].any()
    assert np.array_equal(*slots)


@pytest.mark.eager
def test_rates_by_layer_with_and_without_a_group_for_the_head():
    for head in (None, 5e-3):
        model, wrapper = build(keras.optimizers.SGD(0.01))
        rates = layerwise_learning_rates(wrapper, 1e-2, 0.5)
        callback = staged(
            Stage("block3.*", 1e-3, head_learning_rate=head, epochs=1),
            Stage("all", dict(rates), head_learning_rate=head),
        )
        fit(model, callback, epochs=3)
        optimizer = model.optimizer
        scales = {v.path: optimizer.scales[optimizer._var_key(v)] for v in wrapper.weights[:2]}
        assert {group for group, _ in scales.values()} == {"backbone_2"}
        assert {scale for _, scale in scales.values()} == {0.25}
        group = optimizer.group_of(wrapper.backbone.get_layer("block3_dense").kernel)
        assert group == ("backbone_1" if head else "backbone_2")


@pytest.mark.eager
def test_rates_by_layer_of_a_group_that_goes_on(capsys):
    model, wrapper = build(keras.optimizers.SGD(0.01))
    head = {"head_learning_rate": 5e-3}
    rates = {"block2_dense": 1e-3, "block3_dense": 4e-3}
    stages = Stage("block[23]_dense", rates, epochs=1, **head), Stage("all", 1e-4, **head)
    callback = staged(*stages, verbose=1)
    fit(model, callback, epochs=3)
    optimizer = model.optimizer
    scales = [
        optimizer.scales[optimizer._var_key(wrapper.backbone.get_layer(f"{block}_dense").kernel)]
        for block in BLOCKS
    ]
    assert scales == [("backbone_2", 1.0), ("backbone_1", 0.25), ("backbone_1", 1.0)]
    said = "(head 0.005, backbone_1 0.001 to 0.004, backbone_2 0.0001)"
    assert said in capsys.readouterr().out.split("Epoch 3: ")[1]
    last = callback.transitions[-1]
    assert last.group_learning_rates["backbone_1"] == pytest.approx((1e-3, 4e-3))
    assert Transition.from_dict(json.loads(json.dumps(dataclasses.asdict(last)))) == last


@pytest.mark.eager
def test_rates_by_layer_without_stages():
    model, wrapper = build(keras.optimizers.SGD(0.01))
    rates = layerwise_learning_rates(wrapper, 1e-2, 0.5)
    callback = UnfreezeAtConvergence(rates, max_frozen_epochs=1, verbose=0)
    history = fit(model, callback, epochs=3)
    np.testing.assert_allclose(history["learning_rate_backbone"], [0, 1e-2, 1e-2], rtol=1e-6)
    assert list(model.optimizer.groups) == ["head", "backbone"]


@pytest.mark.eager
def test_a_rate_for_each_layer_that_trains_is_asked_before_the_first_step():
    model, _ = build()
    before = values_of(model)
    callback = staged(Stage("all", {"block3_dense": 1e-3}))
    with pytest.raises(ValueError, match="There is no learning rate for"):
        fit(model, callback)
    assert values_of(model) == before


@pytest.mark.eager
@pytest.mark.parametrize("head", [pytest.param(None, marks=pytest.mark.slow), 5e-3])
def test_mixed_precision_keeps_the_loss_scale(head):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, _ = build()
        counters = Recorder(lambda model: int(model.optimizer.step_counter))
        stages = Stage.by_depth(make_backbone(), 3, 1e-3, head_learning_rate=head, epochs=1)
        fit_in_two_steps(model, staged(*stages), counters, epochs=4)
        assert counters.records == [2, 4, 6, 8]
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.eager
def test_an_optimizer_for_all_stages():
    model, _ = build(keras.optimizers.Adam(0.01))
    callback = staged(
        Stage("block3.*", 1e-2, epochs=1), Stage("all", 1e-4), optimizer=keras.optimizers.SGD(9.0)
    )
    history = fit(model, callback, epochs=3)
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    np.testing.assert_allclose(history["learning_rate"], [1e-2, 1e-2, 1e-4], rtol=1e-6)


# The best of the run.


@pytest.mark.eager
def test_regularizers_count_alike_in_all_stages(capsys):
    # They count in the loss for what trains only: a stage that freezes a layer seems better.
    wrapper = FrozenBackbone(make_backbone())
    kernel = wrapper.backbone.get_layer("block1_dense").kernel
    kernel.regularizer = keras.regularizers.L2(0.5)
    part = switching.regularization_loss([kernel])
    model, _ = build(keras.optimizers.SGD(1e-30), wrapper)
    values = [9.0, 8.0, 8.0 - part / 2]
    callback = staged(
        Stage("all", 1e-30, epochs=1),
        Stage("block3.*", 1e-30),
        monitor="val_loss",
        restore_best_weights=True,
        verbose=1,
    )
    fit(model, Scripted("val_loss", values), callback, epochs=3)
    assert "restored the best weights, of epoch 2: val_loss 8." in capsys.readouterr().out


# A model that is in a stage already.


def schedule(head):
    return [
        Stage("block3.*", 1e-2, epochs=2, head_learning_rate=head),
        Stage("block[23].*", 1e-3, epochs=1, head_learning_rate=head),
        Stage("all", 1e-4, head_learning_rate=head),
    ]


@pytest.mark.eager
@pytest.mark.parametrize("head", [pytest.param(None, marks=pytest.mark.slow), 5e-3])
def test_a_loaded_model_goes_on_in_its_stage(tmp_path, head):
    model, wrapper = build()
    first = staged(*schedule(head))
    fit(model, first, epochs=3)
    assert first.stage == 1
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    second = staged(*schedule(head))
    wrapper = models.frozen_backbone_of(loaded)
    weights = recorder_of(wrapper)
    history = fit(loaded, second, weights, FreezeGuard(verbose=0), epochs=4)
    assert history["stage"] == [1, 1, 2, 3]
    assert blocks_that_moved(wrapper, weights.records)[1:] == [["block2", "block3"], list(BLOCKS)]


@pytest.mark.eager
def test_a_second_fit_goes_on_in_its_stage():
    model, _ = build()
    callback = staged(*schedule(None))
    fit(model, callback, epochs=4)
    assert callback.stage == 2
    assert fit(model, callback, epochs=2)["stage"] == [2, 3]


# A model compiled with groups of the user's own.


@pytest.mark.eager
def test_what_is_unfrozen_joins_the_group_that_the_user_assigned():
    wrapper = FrozenBackbone(make_backbone())
    optimizer = GroupOptimizer(
        {"backbone": keras.optimizers.SGD(1e-3), "head": keras.optimizers.Adam(1e-2)},
        assign={"backbone": wrapper},
    )
    model, _ = build(optimizer, wrapper)
    seen = Recorder(lambda m: {n: int(one.iterations) for n, one in m.optimizer.groups.items()})
    weights = recorder_of(wrapper)
    callback = UnfreezeAtConvergence(max_frozen_epochs=2, restore_best_weights=False, verbose=0)
    history = fit_in_two_steps(model, callback, seen, weights, epochs=4)

    assert seen.records == [
        {"backbone": 0, "head": 2},
        {"backbone": 0, "head": 4},
        {"backbone": 2, "head": 6},
        {"backbone": 4, "head": 8},
    ]
    assert blocks_that_moved(wrapper, weights.records) == [[], list(BLOCKS), list(BLOCKS)]
    np.testing.assert_allclose(history["learning_rate_head"], [1e-2] * 4, rtol=1e-6)
    np.testing.assert_allclose(history["learning_rate_backbone"], [0, 0, 1e-3, 1e-3], rtol=1e-6)


@pytest.mark.eager
def test_a_group_that_gains_variables_starts_anew_and_the_others_go_on():
    wrapper = FrozenBackbone(make_backbone())
    optimizer = GroupOptimizer(
        {"output": keras.optimizers.Adam(1e-2), "rest": keras.optimizers.Adam(1e-3)},
        assign={"output": "output/.*"},
        global_clipnorm=0.5,
    )
    model, _ = build(optimizer, wrapper)
    callback = UnfreezeAtConvergence(max_frozen_epochs=1, restore_best_weights=False, verbose=0)
    fit_in_two_steps(model, callback, epochs=2)
    assert model.optimizer.global_clipnorm == 0.5
    iterations = {name: int(one.iterations) for name, one in model.optimizer.groups.items()}
    assert iterations == {"output": 4, "rest": 2}


@pytest.mark.eager
@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": 1e-3},
        {"head_learning_rate": 1e-3},
        {"stages": [Stage("all", 1e-3)]},
    ],
)
def test_groups_of_the_user_have_their_own_rates(arguments):
    model, _ = build(GroupOptimizer({"all": keras.optimizers.Adam(1e-2)}))
    before = values_of(model)
    with pytest.raises(ValueError, match="whose groups have their own learning rates"):
        fit(model, UnfreezeAtConvergence(**arguments))
    assert values_of(model) == before


@pytest.mark.eager
def test_what_would_join_no_group_is_named_before_the_first_step():
    wrapper = FrozenBackbone(make_backbone())
    optimizer = GroupOptimizer(
        {"output": keras.optimizers.Adam(1e-2), "head": keras.optimizers.Adam(1e-2)},
        assign={"output": "output/.*", "head": r"dense_\d+/.*|dense/.*"},
    )
    model, _ = build(optimizer, wrapper)
    before = values_of(model)
    with pytest.raises(ValueError, match="block1_dense/kernel is in none"):
        fit(model, UnfreezeAtConvergence())
    assert values_of(model) == before


# Warm-up.


class Rates(keras.callbacks.Callback):
    """The rates with which each step is made."""

    def __init__(self, group=None):
        super().__init__()
        self.group = group
        self.rates = []

    def on_train_batch_begin(self, batch, logs=None):
        optimizer = self.model.optimizer
        if self.group is not None and isinstance(optimizer, GroupOptimizer):
            optimizer = optimizer.groups[self.group]
        self.rates.append(float(optimizer.learning_rate))


@pytest.mark.eager
def test_warm_up_is_linear_from_zero_to_the_rate_of_the_stage():
    model, _ = build()
    rates = Rates()
    callback = UnfreezeAtConvergence(1e-3, max_frozen_epochs=1, warmup_steps=3, verbose=0)
    fit_in_two_steps(model, callback, rates, epochs=4)
    np.testing.assert_allclose(
        rates.rates, [0.01, 0.01, 0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3], rtol=1e-5
    )
    assert [t.learning_rate_after for t in callback.transitions] == [float(np.float32(1e-3))]


@pytest.mark.eager
def test_warm_up_is_for_what_is_new():
    model, _ = build()
    head, backbone = Rates("head"), Rates("backbone")
    callback = UnfreezeAtConvergence(
        1e-3, head_learning_rate=5e-3, max_frozen_epochs=1, warmup_steps=4, verbose=0
    )
    fit_in_two_steps(model, callback, head, backbone, epochs=3)
    np.testing.assert_allclose(head.rates, [0.01] * 2 + [5e-3] * 4, rtol=1e-6)
    np.testing.assert_allclose(backbone.rates[2:], [0, 2.5e-4, 5e-4, 7.5e-4], rtol=1e-6)


@pytest.mark.eager
def test_warm_up_in_each_stage():
    model, _ = build()
    rates = Rates()
    callback = staged(Stage("block3.*", 1e-2, epochs=1), Stage("all", 1e-3), warmup_steps=2)
    fit_in_two_steps(model, callback, rates, epochs=4)
    np.testing.assert_allclose(rates.rates, [0.01, 0.01, 0, 5e-3, 0, 5e-4, 1e-3, 1e-3], rtol=1e-5)


@pytest.mark.eager
def test_a_group_that_goes_on_has_the_full_rate_where_its_warm_up_was_cut_short():
    model, _ = build()
    before = Rates("backbone_1")
    rates = {"learning_rate": 1e-3, "head_learning_rate": 5e-3}
    stages = [Stage("block3.*", epochs=1, **rates), Stage("all", **rates)]
    callback = staged(*stages, warmup_steps=8)
    fit_in_two_steps(model, callback, before, epochs=4)
    np.testing.assert_allclose(before.rates[2:], [0, 1.25e-4] + [1e-3] * 4, rtol=1e-5)
    first, second = callback.transitions
    assert second.learning_rate_before == first.learning_rate_after == np.float32(1e-3)


@pytest.mark.eager
def test_warm_up_ends_when_another_callback_sets_the_rate_of_a_step():
    model, _ = build()
    rates, steps = Rates(), itertools.count()

    def sets(batch, logs=None):
        if next(steps) == 3:
            model.optimizer.learning_rate = 0.5

    callback = UnfreezeAtConvergence(1e-3, max_frozen_epochs=1, warmup_steps=10, verbose=0)
    setting = keras.callbacks.LambdaCallback(on_train_batch_begin=sets)
    fit_in_two_steps(model, callback, setting, rates, epochs=4)
    np.testing.assert_allclose(rates.rates[2:], [0, 0.5, 0.5, 0.5, 0.5, 0.5], rtol=1e-5)


@pytest.mark.eager
@pytest.mark.parametrize("after", [False, True])
def test_warm_up_goes_on_to_what_another_callback_makes_of_the_rate(after):
    model, _ = build()
    rates = Rates()
    callback = UnfreezeAtConvergence(1e-3, max_frozen_epochs=1, warmup_steps=4, verbose=0)
    both = [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2), callback]
    history = fit_in_two_steps(model, *(both[::-1] if after else both), rates, epochs=5)
    # The switch, in `on_epoch_begin`, is after the scheduler or before it.
    full = 5e-4 if after else 1e-3
    expected = [full * part for part in (0, 1 / 4, 1 / 4, 3 / 8, 1 / 4, 1 / 4, 1 / 8, 1 / 8)]
    np.testing.assert_allclose(rates.rates[2:], expected, rtol=1e-5)
    np.testing.assert_allclose(
        history["learning_rate"][1:], [full / 2**n for n in range(4)], rtol=1e-6
    )


@pytest.mark.eager
def test_what_sees_the_model_between_epochs_sees_the_full_rate(tmp_path):
    model, _ = build()
    seen = Recorder(lambda model: float(model.optimizer.learning_rate))
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    callback = UnfreezeAtConvergence(1e-3, max_frozen_epochs=1, warmup_steps=50, verbose=0)
    fit_in_two_steps(model, seen, saving, callback, epochs=3)
    np.testing.assert_allclose(seen.records, [0.01, 1e-3, 1e-3], rtol=1e-6)
    loaded = keras.models.load_model(tmp_path / "2.keras")
    assert float(loaded.optimizer.learning_rate) == np.float32(1e-3)


@pytest.mark.eager
def test_the_rate_of_a_step_is_the_one_that_is_used():
    # SGD's step is its rate: at a rate of zero nothing moves.
    model, _ = build(keras.optimizers.SGD(0.1), run_eagerly=True)
    moved = []

    class Moves(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.before = values_of(self.model)

        def on_train_batch_end(self, batch, logs=None):
            moved.append(values_of(self.model) != self.before)

    callback = UnfreezeAtConvergence(
        0.1, max_frozen_epochs=1, warmup_steps=2, restore_best_weights=False, verbose=0
    )
    fit_in_two_steps(model, callback, Moves(), epochs=2)
    assert moved == [True, True, False, True]


@pytest.mark.eager
@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)},
        {"learning_rate": lambda: 0.1},
        {"stages": [Stage("all", lambda: 0.1)]},
    ],
)
def test_warm_up_needs_rates_that_can_be_set(arguments):
    with pytest.raises(ValueError, match="`warmup_steps` needs learning rates that are numbers"):
        UnfreezeAtConvergence(**arguments, warmup_steps=3)


@pytest.mark.eager
def test_warm_up_needs_an_optimizer_whose_rate_can_be_set():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    optimizer = keras.optimizers.SGD(schedule)
    with pytest.raises(ValueError, match="`warmup_steps` needs learning rates that are numbers"):
        UnfreezeAtConvergence(optimizer=optimizer, warmup_steps=3)
    model, _ = build(GroupOptimizer({"all": keras.optimizers.SGD(schedule)}))
    with pytest.raises(ValueError, match="`warmup_steps` needs learning rates that are numbers"):
        fit(model, UnfreezeAtConvergence(warmup_steps=3))


@pytest.mark.eager
@pytest.mark.parametrize("steps", [-1, 1.5])
def test_warm_up_takes_whole_steps(steps):
    with pytest.raises(ValueError, match="`warmup_steps` must be an int of at least 0"):
        UnfreezeAtConvergence(warmup_steps=steps)


# As a property.


@pytest.mark.eager
@given(
    ends=st.lists(st.sampled_from([1, 2]), min_size=2, max_size=3),
    selections=st.lists(
        st.sampled_from(["all", 1, 2, "block1.*", "block[12].*", ["block2_dense"]]),
        min_size=3,
        max_size=3,
    ),
    head=st.sampled_from([None, 1e-3]),
    train_batchnorm=st.booleans(),
    restore=st.booleans(),
)
@settings(max_examples=examples(8))
def test_what_a_stage_freezes_stays_bit_for_bit(ends, selections, head, train_batchnorm, restore):
    model, wrapper = build(run_eagerly=True)
    stages = [
        Stage(
            layers,
            1e-2,
            epochs=epochs,
            head_learning_rate=head,
            train_batchnorm=train_batchnorm,
        )
        for layers, epochs in zip(selections, ends)
    ]
    statistics = as_bytes(models.statistics(wrapper))
    callback = staged(*stages, restore_best_weights=restore)
    changed = []

    class Constant(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            # Not yet after the switch's restoring of the best weights: this callback is after it.
            self.frozen = [w for w in wrapper.weights if not w.trainable]
            self.before = as_bytes(self.frozen)

        def on_epoch_end(self, epoch, logs=None):
            changed.append(as_bytes(self.frozen) != self.before)

    fit(model, callback, Constant(), FreezeGuard(verbose=0), epochs=1 + sum(ends))
    assert not any(changed)
    assert callback.stage == len(stages)
    assert as_bytes(models.statistics(wrapper)) == statistics


@pytest.mark.eager
def test_layerwise_rates_go_by_name_to_a_backbone_made_anew():
    _, first = build()
    rates = layerwise_learning_rates(first, 0.1, decay=0.5)
    callback = UnfreezeAtConvergence(rates, max_frozen_epochs=1, verbose=0)
    model, second = build()

    fit(model, callback, epochs=2)

    weights = second.trainable_weights
    found = dict(zip([w.path for w in weights], model.optimizer.rates(weights), strict=True))
    assert {round(rate, 4) for rate in found.values()} == {0.1, 0.05, 0.025}
    assert callback.stages[0].learning_rate is rates


@pytest.mark.eager
def test_layerwise_rates_of_a_backbone_with_other_layers():
    other = FrozenBackbone(models.functional(["dense", "dense"]))
    callback = UnfreezeAtConvergence(layerwise_learning_rates(other, 0.1, decay=0.5))
    model, _ = build()
    with pytest.raises(ValueError, match="matches no layer of the backbone"):
        fit(model, callback, epochs=1)
