"""Schedules: one given for a stage begins at its switch, one that was compiled in goes on."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import (
    FrozenBackbone,
    GroupOptimizer,
    Stage,
    UnfreezeAtConvergence,
)
from keras_tl.optimizers.shifted_schedule import ShiftedSchedule
from keras_tl.stages import switching
from tests import models
from tests.shared import SEVERAL_STEPS, as_bytes, examples, regression_data, values_of

X, Y = regression_data(16)
schedules = keras.optimizers.schedules


class OwnSchedule(schedules.LearningRateSchedule):
    """As in many notebooks: without `get_config`, and not registered."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def __call__(self, step):
        return self.scale * keras.ops.rsqrt(keras.ops.cast(step, "float32") + 1.0)


SCHEDULES = st.one_of(
    st.builds(schedules.CosineDecay, st.floats(1e-3, 0.1), st.integers(1, 30)),
    st.builds(
        schedules.CosineDecay,
        st.just(1e-3),
        st.integers(1, 30),
        warmup_target=st.just(0.05),
        warmup_steps=st.integers(1, 12),
    ),
    st.builds(
        schedules.ExponentialDecay, st.floats(1e-3, 0.1), st.integers(1, 5), st.floats(0.5, 0.9)
    ),
    st.builds(schedules.PiecewiseConstantDecay, st.just([3, 9]), st.just([0.03, 0.02, 0.01])),
    st.builds(OwnSchedule, st.floats(1e-3, 0.1)),
)


def build(optimizer=None, **compile_arguments):
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense", "dense"])))
    model.compile(optimizer or keras.optimizers.SGD(0.01, momentum=0.9), "mse", **compile_arguments)
    return model


def fit(model, *callbacks, epochs=5, batch_size=8):
    return model.fit(
        X,
        Y,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        callbacks=list(callbacks),
        verbose=0,
    ).history


def callback(learning_rate=1e-3, **arguments):
    settings = {"monitor": "loss", "patience": 99, "restore_best_weights": False, "verbose": 0}
    if "stages" not in arguments:
        settings |= {"learning_rate": learning_rate, "max_frozen_epochs": 2}
    return UnfreezeAtConvergence(**settings | arguments)


def values(schedule, steps):
    return [float(schedule(step)) for step in steps]


@pytest.mark.eager
@given(
    head=SCHEDULES,
    backbone=SCHEDULES,
    frozen=st.integers(1, 3),
    batch_size=st.sampled_from([4, 8]),
)
@settings(max_examples=examples(3))
def test_schedules_given_for_a_stage_begin_at_its_switch(head, backbone, frozen, batch_size):
    model = build(run_eagerly=True)
    ours = callback(backbone, head_learning_rate=head, max_frozen_epochs=frozen)
    history = fit(model, ours, batch_size=batch_size)

    per_epoch = len(X) // batch_size
    since = [per_epoch * (epoch + 1) for epoch in range(5 - frozen)]
    found = history["learning_rate_head"][frozen:]
    np.testing.assert_allclose(found, values(head, since), rtol=1e-6)
    found = history["learning_rate_backbone"][frozen:]
    np.testing.assert_allclose(found, values(backbone, since), rtol=1e-6)
    # The head's own count goes on, as its optimizer's state does.
    assert int(model.optimizer.groups["head"].iterations) == 5 * per_epoch


@pytest.mark.eager
@given(first=SCHEDULES, second=SCHEDULES, compiled=SCHEDULES)
@settings(max_examples=examples(2))
def test_each_stage_begins_its_own_schedule(first, second, compiled):
    model = build(keras.optimizers.SGD(compiled), run_eagerly=True)
    stages = [
        Stage(1, first, head_learning_rate=1e-3, epochs=1),
        Stage(2, second, head_learning_rate=first, epochs=2),
        Stage("all", 1e-3, head_learning_rate=second),
    ]
    history = fit(model, callback(stages=stages, max_frozen_epochs=1), epochs=6)

    assert history["stage"] == [0, 1, 2, 2, 3, 3]
    expected = [values(compiled, [2])[0], 1e-3, *values(first, [2, 4]), *values(second, [2, 4])]
    np.testing.assert_allclose(history["learning_rate_head"], expected, rtol=1e-6)
    expected = [0.0, *values(first, [2, 4, 6, 8, 10])]
    np.testing.assert_allclose(history["learning_rate_backbone_1"], expected, rtol=1e-6)
    expected = [0.0, 0.0, *values(second, [2, 4, 6, 8])]
    np.testing.assert_allclose(history["learning_rate_backbone_2"], expected, rtol=1e-6)


@pytest.mark.eager
def test_the_rate_is_what_the_weights_are_trained_with():
    # SGD on a constant gradient: the bias of the output moves by the sum of the rates.
    class Sum(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return y_pred[:, 0]

    schedule = schedules.PiecewiseConstantDecay([2], [0.5, 0.25])
    model = build(keras.optimizers.SGD(1.0))
    model.compile(keras.optimizers.SGD(1.0), Sum())
    bias = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: bias.append(float(np.array(model.layers[-1].bias)[0]))
    )
    fit(model, callback(head_learning_rate=schedule, max_frozen_epochs=1), note, epochs=3)
    np.testing.assert_allclose(np.diff([0.0, *bias]), [-2.0, -1.0, -0.75], rtol=1e-6)


@pytest.mark.eager
def test_a_compiled_schedule_goes_on_where_weights_join_its_group():
    schedule = schedules.ExponentialDecay(0.1, 1, 0.9)
    groups = {"bias": keras.optimizers.SGD(0.1), "rest": keras.optimizers.Adam(schedule)}
    model = build(GroupOptimizer(groups, assign={"bias": "output/bias"}))
    history = fit(model, UnfreezeAtConvergence(monitor="loss", max_frozen_epochs=2, verbose=0))

    rest = model.optimizer.groups["rest"]
    assert int(rest.iterations) == 6  # Anew, with the weights that joined.
    expected = values(schedule, [2, 4, 6, 8, 10])
    np.testing.assert_allclose(history["learning_rate_rest"], expected, rtol=1e-6)


@pytest.mark.eager
def test_a_group_without_weights_begins_its_schedule_when_some_join():
    schedule = schedules.ExponentialDecay(0.1, 1, 0.9)
    groups = {"output": keras.optimizers.SGD(0.1), "rest": keras.optimizers.Adam(schedule)}
    model = build(GroupOptimizer(groups, assign={"output": "output/.*"}))
    history = fit(model, UnfreezeAtConvergence(monitor="loss", max_frozen_epochs=2, verbose=0))
    expected = [0.0, 0.0, *values(schedule, [2, 4, 6])]
    np.testing.assert_allclose(history["learning_rate_rest"], expected, rtol=1e-6)


@pytest.mark.eager
def test_a_compiled_schedule_goes_on_when_training_is_renewed():
    schedule = schedules.ExponentialDecay(0.1, 1, 0.9)
    model = build(keras.optimizers.Adam(schedule), run_eagerly=True)
    fit(model, epochs=2)
    switching.renew_training(model)
    fit(model, epochs=2)
    rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    np.testing.assert_allclose(rate, values(schedule, [8])[0], rtol=1e-6)


@pytest.mark.parametrize(
    "compile_arguments",
    [{"jit_compile": False}, pytest.param({"steps_per_execution": 2}, marks=SEVERAL_STEPS)],
    ids=str,
)
def test_in_compiled_steps(compile_arguments):
    schedule = schedules.CosineDecay(0.01, 20)
    model = build(**compile_arguments)
    history = fit(model, callback(schedule, head_learning_rate=schedule))
    expected = [0.01, 0.01, *values(schedule, [2, 4, 6])]
    np.testing.assert_allclose(history["learning_rate_head"], expected, rtol=1e-6)


@pytest.mark.eager
def test_in_mixed_precision_with_a_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        schedule = schedules.CosineDecay(0.01, 20)
        model = build()
        history = fit(model, callback(schedule, head_learning_rate=schedule))
        expected = [0.01, 0.01, *values(schedule, [2, 4, 6])]
        np.testing.assert_allclose(history["learning_rate_head"], expected, rtol=1e-6)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.eager
def test_with_accumulated_gradients_a_schedule_counts_steps_as_keras_does():
    schedule = schedules.CosineDecay(0.01, 20)
    model = build(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2))
    history = fit(model, callback(schedule, head_learning_rate=schedule))
    expected = [0.01, 0.01, *values(schedule, [2, 4, 6])]
    np.testing.assert_allclose(history["learning_rate_head"], expected, rtol=1e-6)


SCHEDULED = {
    "head": (lambda: None, {"head_learning_rate": schedules.CosineDecay(0.01, 20)}),
    "compiled": (
        lambda: keras.optimizers.Adam(schedules.CosineDecay(0.01, 20)),
        {"head_learning_rate": schedules.ExponentialDecay(0.1, 2, 0.8)},
    ),
    "stages": (
        lambda: None,
        {
            "stages": [
                Stage(1, 1e-3, head_learning_rate=schedules.CosineDecay(0.02, 9), epochs=1),
                Stage("all", 1e-3, head_learning_rate=schedules.CosineDecay(0.01, 9)),
            ]
        },
    ),
    "groups": (
        lambda: GroupOptimizer(
            {
                "bias": keras.optimizers.SGD(0.1),
                "rest": keras.optimizers.Adam(schedules.ExponentialDecay(0.1, 1, 0.9)),
            },
            assign={"bias": "output/bias"},
        ),
        {"learning_rate": None},
    ),
}


class Killed(RuntimeError):
    """Stands for the end of the process."""


@pytest.mark.eager
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("head", marks=pytest.mark.slow),
        "compiled",
        pytest.param("stages", marks=pytest.mark.slow),
        "groups",
    ],
)
def test_a_resumed_run_goes_on_at_the_same_step(tmp_path, name):
    make, arguments = SCHEDULED[name]
    arguments = {"max_frozen_epochs": 1, **arguments}
    model = build(make(), run_eagerly=True)
    whole = fit(model, callback(**arguments), epochs=4)

    def kill(epoch, logs):
        if epoch == 2:
            raise Killed

    ours = callback(backup_dir=tmp_path, **arguments)
    with pytest.raises(Killed):
        kills = keras.callbacks.LambdaCallback(on_epoch_end=kill)
        fit(build(make(), run_eagerly=True), ours, kills, epochs=4)
    resumed = build(make(), run_eagerly=True)
    ours = callback(backup_dir=tmp_path, **arguments)
    rest = fit(resumed, ours, epochs=4)

    assert len(rest["loss"]) == 1
    for key, found in rest.items():
        assert found == whole[key][3:], key
    assert values_of(resumed) == values_of(model)


@pytest.mark.eager
def test_a_saved_model_goes_on_in_its_schedule(tmp_path):
    schedule = schedules.CosineDecay(0.01, 20)
    model = build()
    fit(model, callback(schedule, head_learning_rate=schedule), epochs=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    ours = callback(schedule, head_learning_rate=schedule)
    history = fit(loaded, ours, epochs=2)
    assert ours.stage == 1
    np.testing.assert_allclose(history["learning_rate_head"], values(schedule, [4, 6]), rtol=1e-6)
    fit(model, epochs=2)
    assert [b for _, b in as_bytes(loaded.weights)] == [b for _, b in as_bytes(model.weights)]


@pytest.mark.eager
@given(schedule=SCHEDULES, first_step=st.integers(-5, 20), step=st.integers(0, 60))
@settings(max_examples=examples(20))
def test_a_shifted_schedule_is_the_schedule_later(schedule, first_step, step):
    shifted = ShiftedSchedule(schedule, first_step)
    assert float(shifted(step)) == float(schedule(max(0, step - first_step)))
    if not isinstance(schedule, OwnSchedule):
        again = schedules.deserialize(schedules.serialize(shifted))
        assert again.get_config() == shifted.get_config()
        assert float(again(step)) == float(shifted(step))


def test_the_step_that_was_traced_is_renewed_with_the_start():
    model = build(keras.optimizers.Adam(schedules.CosineDecay(0.01, 20)))
    fit(model, epochs=1)
    step = model.train_function
    switching.set_schedule_starts(model, {"head": 0})
    assert model.train_function is step
    switching.set_schedule_starts(model, {"head": 2})
    assert model.train_function is not step
    assert switching.schedule_starts(model) == {"head": 2}
