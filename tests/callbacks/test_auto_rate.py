"""A learning rate that finds itself, in a `fit`: what each rate starts from, and what remains."""

import dataclasses

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence, fine_tune
from keras_tl.internals.values import on_host
from keras_tl.stages import annealing, switching
from keras_tl.stages.annealing import warmup_steps
from tests import models
from tests.shared import Recorder, Scripted, forget_compiled, regression_data, values_of

X, Y = regression_data()
RATES = [1e-3, 3e-4, 1e-4, 3e-5, 1e-5]
# The head, 1e-3, which hurts, 3e-4 and 1e-4, which help, and 3e-5 and 1e-5, which do not.
SCORES = [5, 5, 7, 6, 6, 4, 4, 3, 3, 3, 3, 3, 3]
STAGES = [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.fixture(autouse=True)
def rates_that_do_not_fall(monkeypatch):
    """These runs end soon, and are of the rates that are tried before that."""
    monkeypatch.setattr(annealing, "FALLING_EPOCHS", 1)


def build(optimizer=None):
    forget_compiled()
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense", "batchnorm"])), [])
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse")
    return model


def auto(*stages, **arguments):
    settings = {"monitor": "score", "mode": "min", "patience": 1, "fine_tune_patience": 1}
    given = {"stages": stages} if stages else {"learning_rate": "auto"}
    return UnfreezeAtConvergence(**settings | {"warmup_steps": 0, "verbose": 0} | given | arguments)


def fit(model, callback, *others, scores=SCORES, epochs=None):
    script = Scripted("score", scores)
    return model.fit(
        X,
        Y,
        batch_size=8,
        epochs=epochs or len(scores),
        shuffle=False,
        callbacks=[script, callback, *others],
        verbose=0,
    ).history


def changed(one, other):
    return any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.covers('part: learning_rate="auto"')
@pytest.mark.eager
def test_each_rate_starts_from_the_best_weights_so_far():
    model, callback = build(), auto()
    starts, ends = [], Recorder(values_of)
    starting = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: starts.append(values_of(model))
    )
    history = fit(model, callback, starting, ends)
    assert history["stage"] == STAGES
    assert [t.reason for t in callback.transitions][:3] == [
        "converged",
        "not_improved",
        "converged",
    ]
    assert history["learning_rate"][2:] == pytest.approx(
        [1e-3, 1e-3, 1e-3, 3e-4, 3e-4, 1e-4, 1e-4, 3e-5, 3e-5, 1e-5, 1e-5]
    )
    for stage, best in {1: 0, 2: 0, 3: 5, 4: 7}.items():
        assert not changed(starts[STAGES.index(stage)], ends.records[best]), stage
    assert changed(ends.records[4], ends.records[0])
    assert callback.best_epoch == 7
    assert not changed(values_of(model), ends.records[7])


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "averages": lambda: keras.optimizers.AdamW(0.01, use_ema=True),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


@pytest.mark.parametrize(
    "name",
    [one if one == "adam" else pytest.param(one, marks=pytest.mark.slow) for one in OPTIMIZERS],
)
def test_rates_that_help_are_as_the_stages_that_a_user_writes(name):
    results = []
    for given in ([], [Stage("all", rate, patience=1) for rate in RATES[:3]]):
        model = build(OPTIMIZERS[name]())
        fit(model, auto(*given, warmup_steps=1), scores=[9, 9, 8, 8, 7, 7, 6])
        results.append([*values_of(model), *(on_host(one) for one in model.optimizer.variables)])
    assert not changed(*results)


@pytest.mark.covers('part: learning_rate="auto"')
def test_a_lower_rate_keeps_the_train_step():
    model, steps = build(), []
    seen = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: steps.append((model.train_function, model.optimizer))
    )
    fit(model, auto(), seen)
    assert len({id(step) for step, _ in steps[2:]}) == 1
    assert len({id(optimizer) for _, optimizer in steps[2:]}) == 1
    assert steps[2][0] is not steps[1][0]


@pytest.mark.eager
def test_a_switch_that_fails_leaves_the_optimizer_as_it_was(monkeypatch):
    model, callback = build(), auto()
    before = []
    keeps = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, _: before.append(
            [np.array(one) for one in model.optimizer.variables]
        )
    )

    def copy_some(source, target):
        target.assign(source)
        raise KeyboardInterrupt

    def break_copies(epoch, _):
        if epoch == 4:
            monkeypatch.setattr(switching, "copy_value", copy_some)

    fails = keras.callbacks.LambdaCallback(on_epoch_end=break_copies)
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, keeps, fails)
    after = [np.array(one) for one in model.optimizer.variables]
    assert len(before) == 5
    assert not changed(before[-1], after)


@pytest.mark.parametrize("at", [5, *[pytest.param(one, marks=pytest.mark.slow) for one in (3, 8)]])
def test_a_run_that_is_resumed_ends_with_the_same_weights(at, tmp_path):
    model = build()
    whole = auto(warmup_steps=3)
    history = fit(model, whole)
    interrupted = auto(warmup_steps=3, backup_dir=tmp_path)

    def interrupt(epoch, _):
        if epoch == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(build(), interrupted, keras.callbacks.LambdaCallback(on_epoch_begin=interrupt))
    resumed, again = build(), auto(warmup_steps=3, backup_dir=tmp_path)
    rest = fit(resumed, again, epochs=len(SCORES))
    assert rest["stage"] == history["stage"][at:]
    for one, other in zip(again.transitions, whole.transitions, strict=True):
        assert dataclasses.replace(one, layers=other.layers) == other  # Names count up.
    assert again.best_epoch == whole.best_epoch
    assert not changed(values_of(model), values_of(resumed))


@pytest.mark.eager
def test_a_rate_that_diverges_costs_its_epochs_and_nothing_else():
    model, callback, ends = build(), auto(), Recorder(values_of)
    fit(model, callback, ends, scores=[5, 5, np.nan, np.inf, 6, 6])
    assert [t.reason for t in callback.transitions] == ["converged", "diverged", "diverged"]
    assert callback.best_epoch == 0
    assert not changed(values_of(model), ends.records[0])


@pytest.mark.eager
def test_a_loaded_model_goes_on_with_the_rates_below_its_own(tmp_path):
    model = build()
    fit(model, auto(), scores=[9, 9, 8, 8, 7, 7, 6])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    callback = auto()
    state = [np.array(one) for one in loaded.optimizer.variables]
    first = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _: (
            epoch or seen.extend(np.array(one) for one in loaded.optimizer.variables)
        )
    )
    seen = []
    history = fit(loaded, callback, first, scores=[5, 5, 4, 4])
    assert history["stage"] == [3, 3, 4, 4]
    assert history["learning_rate"] == pytest.approx([1e-4, 1e-4, 3e-5, 3e-5])
    assert not changed(state, seen)  # The switches that are tried first have not touched it.


@pytest.mark.eager
def test_is_for_the_last_stage_of_a_schedule():
    callback = auto(Stage(1, 1e-2), Stage("all", "auto"))
    history = fit(build(), callback, scores=[9, 9, 8, 8, 7, 7, 7, 7])
    assert history["stage"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert history["learning_rate"][4:] == pytest.approx([1e-3, 1e-3, 3e-4, 3e-4])


@pytest.mark.eager
def test_the_given_optimizer_says_the_class():
    callback = auto(optimizer=keras.optimizers.SGD(0.5, momentum=0.9))
    model = build()
    history = fit(model, callback, scores=[9, 9, 8, 8, 7, 7])
    assert history["learning_rate"][2:] == pytest.approx([1e-2, 1e-2, 3e-3, 3e-3])
    assert model.optimizer.momentum == 0.9


@pytest.mark.eager
def test_says_what_it_does(capsys):
    fit(build(), auto(verbose=1))
    said = capsys.readouterr().out
    assert "because        this learning rate has not improved score in 3 epochs" in said
    assert "goes back to the best weights, and to a third of the learning rate" in said
    assert "0.001 -> 0.0003" in said
    assert "(best 5)" in said
    assert "(best of the stage 4)" in said
    assert "training ended in stage" not in said
    assert said.count("  memory  ") == 1, "the same layers train at each rate"


@pytest.mark.eager
def test_fine_tune_takes_it():
    model, rates = build(), []

    def note(batch, logs=None):
        rates.append(float(model.optimizer.learning_rate))

    history = fine_tune(
        model,
        X,
        Y,
        validation_data=(X, Y),
        epochs=4,
        max_frozen_epochs=1,
        learning_rate="auto",
        warmup_steps=30,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=note)],
    ).history
    assert history["stage"] == [0, 1, 1, 1]
    # 30 steps of warm-up, of which each epoch has one.
    np.testing.assert_allclose(rates[1:], [0, 1e-3 / 30, 2e-3 / 30], rtol=1e-6)
    np.testing.assert_allclose(history["learning_rate"][1:], 1e-3, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": "Auto"}, 'must be a finite number above 0, .* or "auto"'),
        ({"restore_best_weights": False}, "needs `restore_best_weights`"),
        ({"fine_tune_patience": None}, "needs `fine_tune_patience`"),
        ({"head_learning_rate": 1e-3}, "Leave out `head_learning_rate`"),
        (
            {"learning_rate": None, "stages": [Stage(1, "auto"), Stage("all", 1e-4)]},
            "Only the last",
        ),
    ],
)
def test_what_it_cannot_be_combined_with_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        auto(**arguments)


def test_there_is_warm_up_only_where_a_rate_is_to_be_found():
    assert [warmup_steps(None, found) for found in (True, False)] == [30, 0]
    assert [warmup_steps(0, found) for found in (True, False)] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ({}, "auto"),
        ({"monitor": "val_accuracy"}, "auto"),
        ({"monitor": "loss"}, 1e-5),
        ({"head_learning_rate": 1e-3}, 1e-5),
        ({"stages": [Stage("all", None)]}, 1e-5),
        ({"fine_tune_patience": None}, 1e-5),
        ({"restore_best_weights": False}, 1e-5),
    ],
)
def test_it_is_the_default_where_nothing_says_otherwise(arguments, rate):
    assert UnfreezeAtConvergence(**arguments).default_rate == rate


# Of hundreds of steps: to compile them takes less long.
@pytest.mark.parametrize("found", [True, False])
def test_without_any_argument_it_is_found_by_validation_data(found):
    model = build()
    # Each epoch is worse than the head's first.
    script = Scripted("val_loss", [1, 2, 2, 2] + [3] * 40)
    callback = UnfreezeAtConvergence(verbose=0, **({} if found else {"learning_rate": 1e-5}))
    settings = {"batch_size": 1, "epochs": 29, "verbose": 0}
    history = model.fit(X, Y, callbacks=[script, callback], **settings).history
    assert [one.stage for one in callback.transitions] == ([1, 2, 3, 4, 5] if found else [1])
    assert history["learning_rate"][7] == pytest.approx(1e-3 if found else 1e-5)


@pytest.mark.eager
def test_an_optimizer_or_groups_keep_their_own_rates():
    model = build()
    callback = UnfreezeAtConvergence(
        optimizer=keras.optimizers.SGD(0.5), monitor="val_score", mode="min", patience=1, verbose=0
    )
    script = Scripted("val_score", [9, 9, 8, 8])
    history = model.fit(X, Y, epochs=4, callbacks=[script, callback], verbose=0).history
    assert history["learning_rate"][2:] == [0.5, 0.5]


def test_it_is_plain_data_in_a_stage():
    stage = Stage("all", "auto", patience=2)
    assert Stage.from_dict(stage.to_dict()) == stage
    assert str(stage) == 'all layers, learning rate "auto", patience 2'
