"""A learning rate that finds itself falls to nothing in the last epochs of `fit`."""

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence, fine_tune
from keras_tl.stages.annealing import FALLING_EPOCHS
from tests import models
from tests.shared import Scripted, forget_compiled, regression_data, values_of

pytestmark = pytest.mark.eager
X, Y = regression_data()
EPOCHS = 8
# In stage 0 two epochs, at 1e-3 four, of which the first helps, and the rest at a third of it.
SCORES = [5, 5, 4, 4, 4, 4, 3, 3]
STAGES = [0, 0, 1, 1, 1, 1, 2, 2]
# Six epochs are left when the first rate is tried.
RATES = [0.01, 0.01, *(1e-3 * left / 6 for left in range(6, 0, -1))]


def build(optimizer=None):
    forget_compiled()
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])), [])
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse")
    return model


def callback_of(learning_rate="auto", **arguments):
    settings = {"monitor": "score", "mode": "min", "patience": 1, "fine_tune_patience": 3}
    settings |= {"warmup_steps": 0, "verbose": 0} | arguments
    given = {} if "stages" in arguments else {"learning_rate": learning_rate}
    return UnfreezeAtConvergence(**given, **settings)


def fit(model, callback, *others, scores=SCORES, epochs=EPOCHS):
    callbacks = [Scripted("score", scores), callback, *others]
    settings = {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, callbacks=callbacks, **settings).history


def test_the_rate_is_at_most_what_leaves_time_to_fall():
    callback = callback_of()
    history = fit(build(), callback)
    assert history["stage"] == STAGES
    # A third of the first rate is lower only at first.
    expected = [
        min(rate, 3e-4) if stage == 2 else rate for rate, stage in zip(RATES, STAGES, strict=True)
    ]
    assert history["learning_rate"] == pytest.approx(expected)
    assert callback.transitions[0].learning_rate_after == pytest.approx(RATES[2])


def test_a_rate_that_goes_on_helping_falls_in_the_last_epochs():
    epochs = FALLING_EPOCHS + 6
    scores = list(range(2 * epochs, epochs, -1))
    history = fit(build(), callback_of(max_frozen_epochs=2), epochs=epochs, scores=scores)
    falling = [1e-3 * left / FALLING_EPOCHS for left in range(FALLING_EPOCHS, 0, -1)]
    assert history["learning_rate"] == pytest.approx([0.01] * 2 + [1e-3] * 4 + falling)


def test_a_run_with_time_enough_has_its_rates():
    history = fit(
        build(), callback_of(fine_tune_patience=1), epochs=FALLING_EPOCHS + 20, scores=[5] * 40
    )
    rates = sorted(set(np.float32(history["learning_rate"][2:]).tolist()), reverse=True)
    assert rates == pytest.approx([1e-3, 3e-4, 1e-4, 3e-5, 1e-5])


@pytest.mark.parametrize(
    "arguments", [{"learning_rate": 1e-3}, {"stages": [Stage("all", 1e-3)]}], ids=["rate", "stages"]
)
def test_a_rate_that_is_given_stays(arguments):
    history = fit(build(), callback_of(**arguments))
    assert history["learning_rate"][2:5] == pytest.approx([1e-3] * 3)


def test_only_stages_that_look_for_a_rate_fall():
    stages = [Stage(1, 2e-3, epochs=2), Stage("all", "auto")]
    history = fit(build(), callback_of(stages=stages))
    assert history["stage"][:5] == [0, 0, 1, 1, 2]
    falling = [1e-3 * left / 4 for left in range(4, 0, -1)]
    assert history["learning_rate"][2:] == pytest.approx([2e-3, 2e-3, *falling])


def test_what_another_callback_lowers_stays_lower():
    halves = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2 if epoch else rate)
    history = fit(build(), callback_of(), halves)
    rates = history["learning_rate"]
    expected = RATES[2] / 2
    for epoch in range(2, 6):
        assert rates[epoch] == pytest.approx(expected)
        expected = min(expected, RATES[epoch + 1]) / 2


def test_the_warm_up_goes_on_to_the_rate_of_each_epoch():
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            # On JAX, to read the model gives it the values that `fit` has.
            seen.append(float(self.model.optimizer.learning_rate))

    model, steps = build(), len(X) // 8
    fit(model, callback_of(warmup_steps=2 * steps), Looks())
    done = np.arange(2 * steps) / (2 * steps)
    expected = done * np.repeat(RATES[2:4], steps)
    assert seen[2 * steps : 4 * steps] == pytest.approx(expected, abs=1e-9)
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-3)  # As the stage has it.


@pytest.mark.parametrize("record", [True, False])
def test_fine_tune_does_as_fit_does(record):
    model, other = build(), build()
    history = fit(model, callback_of())
    settings = {"monitor": "score", "mode": "min", "patience": 1, "fine_tune_patience": 3}
    found = fine_tune(
        *(other, X, Y),
        batch_size=8,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        record=record,
        learning_rate="auto",
        warmup_steps=0,
        callbacks=Scripted("score", SCORES),
        **settings,
    ).history
    assert found["learning_rate"] == pytest.approx(history["learning_rate"])


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_has_the_same_rates(stop, tmp_path):
    """At the switch, in the warm-up that it begins, and after it."""
    warm_up = {"warmup_steps": None}
    whole = build()
    expected = fit(whole, callback_of(**warm_up))["learning_rate"]
    stops = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: epoch == stop and 1 / 0)
    callbacks = [callback_of(backup_dir=tmp_path, **warm_up) for _ in range(2)]
    with pytest.raises(ZeroDivisionError):
        fit(build(), stops, callbacks[0])
    resumed = build()
    history = fit(resumed, callbacks[1])
    assert history["learning_rate"] == expected[stop:]
    assert values_of(resumed) == values_of(whole)


def test_a_run_that_is_resumed_with_more_epochs_has_the_rates_of_these(tmp_path):
    fit(build(), callback_of(backup_dir=tmp_path, delete_checkpoint=False), epochs=5)
    history = fit(build(), callback_of(backup_dir=tmp_path))
    # Of those six, three are left.
    assert history["learning_rate"][0] == pytest.approx(RATES[5])


def test_a_later_fit_goes_on_at_the_rate_of_the_stage():
    model, callback = build(), callback_of()
    scores = list(range(40, 0, -1))
    fit(model, callback, epochs=6, scores=[50, 50, *scores])
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-3)
    history = fit(model, callback, epochs=2, scores=scores)
    assert history["stage"] == [1, 1]
    assert history["learning_rate"] == pytest.approx([1e-3, 5e-4])


def test_a_fit_that_was_interrupted_leaves_the_rate_of_the_stage():
    model = build()
    stops = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: epoch == 5 and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(model, callback_of(), stops)
    history = fit(model, callback_of(), scores=list(range(40, 0, -1)), epochs=2)
    assert history["stage"] == [1, 1]
    assert history["learning_rate"] == pytest.approx([1e-3, 5e-4])


@pytest.mark.parametrize("given", [None, 9])
def test_the_warm_up_takes_a_fifth_of_what_is_left_at_most(given):
    callback = callback_of(warmup_steps=given)
    warm_ups = []
    looks = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _: warm_ups.append(callback._running.state.warm_up)
    )
    fit(build(), callback, looks)
    assert warm_ups[:2] == [None, None]
    left = (EPOCHS - 2) * len(X) // 8
    assert warm_ups[2].steps == (given or left // 5)


def test_is_said(capsys):
    fit(build(), callback_of(verbose=1))
    said = capsys.readouterr().out
    assert f"learning rate  0.01 -> {RATES[2]:.4g}\n" in said
    assert "then a third of the rate; it falls to the end of fit, in 6 epochs\n" in said
