"""Named parameter groups: each trains as if its optimizer were the only one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone, GroupOptimizer
from tests import models
from tests.shared import (
    SEVERAL_STEPS,
    as_bytes,
    examples,
    forget_compiled,
    regression_data,
    slow_on,
    values_of,
)

pytestmark = pytest.mark.covers("part: GroupOptimizer")

OPTIMIZERS = [
    "SGD",
    "RMSprop",
    "Adam",
    "AdamW",
    "Adadelta",
    "Adagrad",
    "Adamax",
    "Adafactor",
    "Nadam",
    "Ftrl",
    "Lion",
    "Lamb",
    "Muon",
    "ScheduleFreeAdamW",
]
SETTINGS = [
    {},
    {"weight_decay": 0.1},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5},
    {"use_ema": True, "ema_overwrite_frequency": 2},
    {"gradient_accumulation_steps": 2},
]


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)


RATES = [0.01, 0.1, schedule]


@st.composite
def optimizer_makers(draw):
    kind, extra = draw(st.sampled_from(OPTIMIZERS)), draw(st.sampled_from(SETTINGS))
    rate = draw(st.sampled_from(RATES))
    if kind == "ScheduleFreeAdamW":  # Takes no schedule, and averages in its own way.
        extra = {} if "use_ema" in extra else extra
        rate = 0.01 if rate is schedule else rate

    def make():
        return getattr(keras.optimizers, kind)(rate() if rate is schedule else rate, **extra)

    return make


SHAPES = {"backbone": [(3, 4), (4,)], "neck": [(4, 4)], "head": [(4, 1), (1,)]}


def variables(seed):
    random = np.random.default_rng(seed)
    return {
        group: [
            keras.Variable(random.normal(size=shape).astype("float32"), name=f"{group}_{index}")
            for index, shape in enumerate(shapes)
        ]
        for group, shapes in SHAPES.items()
    }


@given(
    makers=st.fixed_dictionaries({group: optimizer_makers() for group in SHAPES}),
    seed=st.integers(0, 100),
    steps=st.integers(1, 4),
)
@settings(max_examples=examples(40))
def test_each_group_trains_as_if_it_were_alone(makers, seed, steps):
    together, alone = variables(seed), variables(seed)
    optimizer = GroupOptimizer(
        {group: make() for group, make in makers.items()},
        assign={group: f"{group}_.*" for group in ("backbone", "neck")},
    )
    every = [variable for group in together.values() for variable in group]
    optimizer.build(every)
    single = {group: make() for group, make in makers.items()}
    random = np.random.default_rng(seed)
    for _ in range(steps):
        gradients = {
            group: [random.normal(size=shape).astype("float32") for shape in shapes]
            for group, shapes in SHAPES.items()
        }
        gradients = keras.tree.map_structure(keras.ops.convert_to_tensor, gradients)
        optimizer.apply([g for group in gradients.values() for g in group], every)
        for group, one in single.items():
            one.apply(gradients[group], alone[group])

    for group in SHAPES:
        assert [b for _, b in as_bytes(together[group])] == [b for _, b in as_bytes(alone[group])]


# Of arrays, each `fit` would trace a pipeline of its own.
DATA = tf.data.Dataset.from_tensor_slices(regression_data()).batch(4)


def build(optimizer=None, **compile_arguments):
    forget_compiled()
    keras.utils.set_random_seed(0)
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
    wrapper.unfreeze()
    model = models.functional_outer(wrapper, [keras.layers.Dense(4, activation="relu")])
    model.compile(optimizer or grouped(wrapper), "mse", **compile_arguments)
    return model, wrapper


def grouped(backbone, rates=(1e-3, 1e-2), **arguments):
    groups = {
        "backbone": keras.optimizers.Adam(rates[0]),
        "head": keras.optimizers.Adam(rates[1]),
    }
    return GroupOptimizer(groups, assign={"backbone": backbone}, **arguments)


def fit(model, *callbacks, epochs=2, **arguments):
    return model.fit(
        DATA, epochs=epochs, shuffle=False, callbacks=list(callbacks), verbose=0, **arguments
    ).history


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="graph", marks=slow_on("tensorflow", "jax")),
        pytest.param({"jit_compile": True}, id="jit", marks=slow_on("torch")),
        pytest.param(
            {"steps_per_execution": 2}, id="steps", marks=[SEVERAL_STEPS, pytest.mark.slow]
        ),
        pytest.param({"run_eagerly": True}, id="eager", marks=pytest.mark.slow),
    ],
)
def test_groups_of_one_kind_train_as_one_optimizer(arguments):
    single, _ = build(keras.optimizers.Adam(0.01), **arguments)
    single.fit(DATA, epochs=2, verbose=0)
    keras.utils.set_random_seed(0)
    model, wrapper = build(**arguments)
    model.compile(grouped(wrapper, (0.01, 0.01)), "mse", **arguments)
    model.fit(DATA, epochs=2, verbose=0)
    assert values_of(model) == values_of(single)


@pytest.mark.eager
def test_all_groups_are_clipped_together():
    single, _ = build(keras.optimizers.Adam(0.01, global_clipnorm=0.01))
    fit(single)
    model, wrapper = build()
    model.compile(grouped(wrapper, (0.01, 0.01), global_clipnorm=0.01), "mse")
    fit(model)
    assert values_of(model) == values_of(single)


@pytest.mark.eager
def test_static_loss_scale():
    # In one compiled step, as on JAX, the clipping is fused with what follows, and rounded with it,
    # unless the division by the scale is between.
    arguments = {"run_eagerly": keras.backend.backend() == "jax"}
    model, wrapper = build()
    optimizer = grouped(wrapper, (0.01, 0.01), global_clipnorm=0.01, loss_scale_factor=64.0)
    model.compile(optimizer, "mse", **arguments)
    fit(model)
    adam = keras.optimizers.Adam(0.01, global_clipnorm=0.01, loss_scale_factor=None)
    single, _ = build(adam, **arguments)
    fit(single)
    assert values_of(model) == values_of(single)


@pytest.mark.eager
def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, _ = build()
        before = values_of(model)
        fit(model)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert values_of(model) != before
        model.optimizer.learning_rate = 1e-3
        rates = [
            float(one.learning_rate) for one in model.optimizer.inner_optimizer.groups.values()
        ]
        np.testing.assert_allclose(rates, [1e-4, 1e-3], rtol=1e-6)
    finally:
        keras.config.set_dtype_policy("float32")


# Which variable is in which group.


@pytest.mark.parametrize(
    "assignment",
    [
        lambda wrapper: wrapper,
        lambda wrapper: wrapper.backbone.layers[1:],
        lambda wrapper: [wrapper.backbone.layers[1], ".*batch_norm.*", wrapper.backbone.layers[3]],
        lambda wrapper: "|".join(f"{layer.name}/.*" for layer in wrapper.backbone.layers[1:]),
        lambda wrapper: lambda variable: any(variable is w for w in wrapper.weights),
    ],
    ids=["layer", "layers", "mixed", "pattern", "function"],
)
def test_ways_to_assign(assignment):
    model, wrapper = build()
    optimizer = grouped(assignment(wrapper))
    optimizer.build(model.trainable_variables)
    names = [optimizer.group_of(variable) for variable in model.trainable_variables]
    assert names == ["backbone"] * 4 + ["head"] * 4


def test_a_pattern_matches_whole_paths():
    model, _ = build()
    optimizer = grouped("output")
    optimizer.build(model.trainable_variables)
    assert {optimizer.group_of(variable) for variable in model.trainable_variables} == {"head"}


def test_a_variable_in_no_group_is_named():
    model, wrapper = build()
    optimizer = GroupOptimizer({"backbone": keras.optimizers.SGD()}, assign={"backbone": wrapper})
    with pytest.raises(ValueError, match="output/kernel is in none"):
        optimizer.build(model.trainable_variables)


def test_a_variable_in_two_groups_is_named():
    model, wrapper = build()
    groups = {name: keras.optimizers.SGD() for name in ("one", "two")}
    optimizer = GroupOptimizer(groups, assign={"one": wrapper, "two": ".*"})
    with pytest.raises(ValueError, match='kernel is in "one" and "two"'):
        optimizer.build(model.trainable_variables)


@pytest.mark.eager
def test_a_group_may_be_empty():
    model, wrapper = build()
    wrapper.freeze()
    optimizer = grouped(wrapper)
    model.compile(optimizer, "mse")
    before = as_bytes(wrapper.weights)
    fit(model)
    assert as_bytes(wrapper.weights) == before
    assert not optimizer.groups["backbone"].built


# The learning rate.


def rates_of(optimizer):
    return [float(one.learning_rate) for one in optimizer.groups.values()]


def test_setting_the_rate_scales_all_groups_alike():
    optimizer = grouped(".*backbone.*")
    assert float(optimizer.learning_rate) == np.float32(1e-2)
    optimizer.learning_rate = 1e-1
    np.testing.assert_allclose(rates_of(optimizer), [1e-2, 1e-1], rtol=1e-6)
    optimizer.groups["backbone"].learning_rate = 1e-1
    optimizer.learning_rate = 1.0
    np.testing.assert_allclose(rates_of(optimizer), [1.0, 1.0], rtol=1e-6)


def test_the_rates_come_back_from_zero():
    optimizer = grouped(".*backbone.*")
    optimizer.learning_rate = 0.0
    assert rates_of(optimizer) == [0.0, 0.0]
    optimizer.learning_rate = 1e-2
    np.testing.assert_allclose(rates_of(optimizer), [1e-3, 1e-2], rtol=1e-6)


def test_a_schedule_cannot_be_set():
    optimizer = GroupOptimizer(
        {"backbone": keras.optimizers.SGD(0.1), "head": keras.optimizers.SGD(schedule())},
        assign={"backbone": ".*"},
    )
    with pytest.raises(TypeError, match="LearningRateSchedule"):
        optimizer.learning_rate = 0.1
    assert rates_of(optimizer) == [np.float32(0.1)] * 2


@pytest.mark.eager
@pytest.mark.parametrize(
    "callback",
    [
        lambda: keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / 2 ** (epoch + 1)),
        lambda: keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: 0.05 if epoch == 0 else rate / 2
        ),
    ],
    ids=["absolute", "relative"],
)
def test_a_learning_rate_scheduler_keeps_the_ratio(callback):
    model, _ = build()
    history = fit(model, callback())
    np.testing.assert_allclose(history["learning_rate"], [0.05, 0.025], rtol=1e-6)
    np.testing.assert_allclose(rates_of(model.optimizer), [0.0025, 0.025], rtol=1e-6)


@pytest.mark.eager
def test_reduce_on_plateau_keeps_the_ratio():
    model, _ = build()
    reduce = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", min_delta=1e9, patience=1)
    fit(model, reduce, epochs=3, validation_data=DATA)
    np.testing.assert_allclose(rates_of(model.optimizer), [1e-5, 1e-4], rtol=1e-5)


def averaging(momenta):
    """A model whose groups keep averages with these momenta; None is for no average."""
    model, wrapper = build()
    groups = {
        name: keras.optimizers.SGD(0.01, use_ema=momentum is not None, ema_momentum=momentum or 0.9)
        for name, momentum in zip(("backbone", "head"), momenta, strict=True)
    }
    model.compile(GroupOptimizer(groups, assign={"backbone": wrapper}), "mse")
    return model


@pytest.mark.slow
@pytest.mark.eager
def test_swapping_averages():
    model = averaging((0.5, 0.5))
    fit(model, keras.callbacks.SwapEMAWeights(swap_on_epoch=True), validation_data=DATA)
    single, _ = build(keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.5))
    fit(single, keras.callbacks.SwapEMAWeights(swap_on_epoch=True), validation_data=DATA)
    assert values_of(model) == values_of(single)


@pytest.mark.eager
def test_swapping_averages_that_some_groups_lack_is_refused():
    with pytest.raises(ValueError, match="SwapEMAWeights must be used when `use_ema=True`"):
        fit(averaging((None, 0.5)), keras.callbacks.SwapEMAWeights(swap_on_epoch=True))


@pytest.mark.eager
def test_some_groups_may_average():
    model = averaging((None, 0.5))
    fit(model)
    single, _ = build(keras.optimizers.SGD(0.01))
    fit(single)
    backbone, head = slice(0, 8), slice(8, None)
    assert values_of(model)[backbone] == values_of(single)[backbone]
    assert values_of(model)[head] != values_of(single)[head]


# Saving.


@pytest.mark.eager
def test_a_saved_model_goes_on_as_if_it_had_not_been_saved(tmp_path):
    model, _ = build()
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    optimizer = loaded.optimizer
    assert list(optimizer.groups) == ["backbone", "head"]
    assert [optimizer.group_of(v) for v in loaded.trainable_variables] == [
        *["backbone"] * 4,
        *["head"] * 4,
    ]
    fit(model)
    fit(loaded)
    assert values_of(loaded) == values_of(model)


@pytest.mark.parametrize("built", [False, True])
def test_configuration_round_trip(built):
    model, wrapper = build()
    optimizer = grouped(wrapper, global_clipnorm=2.0)
    if built:
        optimizer.build(model.trainable_variables)
    new = GroupOptimizer.from_config(optimizer.get_config())
    new.build(model.trainable_variables)
    assert [new.group_of(v) for v in model.trainable_variables] == ["backbone"] * 4 + ["head"] * 4
    assert (new.name, new.global_clipnorm) == (optimizer.name, 2.0)
    assert rates_of(new) == rates_of(optimizer)


# Bad input.


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ({}, "must be a dictionary"),
        ([keras.optimizers.SGD()], "must be a dictionary"),
        ({"the head": keras.optimizers.SGD()}, "letters, digits and underscores"),
        ({"head": "sgd"}, "must be a Keras optimizer"),
        ({"head": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())}, "LossScale"),
    ],
)
def test_groups_must_be_named_optimizers(groups, match):
    with pytest.raises(ValueError, match=match):
        GroupOptimizer(groups)


def test_an_optimizer_cannot_serve_two_groups():
    sgd = keras.optimizers.SGD()
    with pytest.raises(ValueError, match="given twice"):
        GroupOptimizer({"one": sgd, "two": sgd}, assign={"one": ".*"})


def test_a_built_optimizer_is_refused():
    sgd = keras.optimizers.SGD()
    sgd.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="is built already"):
        GroupOptimizer({"one": sgd})


@pytest.mark.parametrize(
    ("assign", "match"),
    [
        ({}, r"leaves out the groups \['one', 'two'\]"),
        ({"three": ".*"}, "names unknown groups"),
        ({"one": "("}, "not a regular expression"),
        ({"one": 3}, "must be a layer"),
        ({"one": [".*", 3]}, "must be a layer"),
    ],
)
def test_assign_must_say_what_is_in_the_groups(assign, match):
    groups = {name: keras.optimizers.SGD() for name in ("one", "two")}
    with pytest.raises(ValueError, match=match):
        GroupOptimizer(groups, assign=assign)


def test_clipping_together_what_is_accumulated_is_refused():
    groups = {"one": keras.optimizers.SGD(gradient_accumulation_steps=2)}
    with pytest.raises(ValueError, match="cannot clip"):
        GroupOptimizer(groups, global_clipnorm=1.0)
    with pytest.raises(ValueError, match="above 0"):
        GroupOptimizer({"one": keras.optimizers.SGD()}, global_clipnorm=0.0)
