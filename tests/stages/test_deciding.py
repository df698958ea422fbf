"""Each epoch's decision, from its logs alone: no model is made here."""

import math

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import Stage
from keras_tl.stages.deciding import Decisions
from keras_tl.stages.monitored_value import MonitoredValue
from keras_tl.stages.progress import Progress


def decisions(*stages, mode="min", **arguments):
    stages = stages or (Stage("all", 1e-3),)
    return Decisions(stages, MonitoredValue("score", mode), **{"patience": 1} | arguments)


def run(decisions, values, stopped_early=()):
    """Returns the stage of each epoch, as a run has them, and how far the run is then."""
    progress, stages, reasons = Progress(), [], []
    for epoch, value in enumerate(values):
        if progress.switch_reason is not None:
            reasons.append(progress.switch_reason)
            progress.begin_stage(progress.stage + 1)
        logs = {} if value is None else {"score": value}
        early = epoch in stopped_early
        decisions.decide(progress, epoch, logs, stopped_early=early, validates=True)
        stages.append(progress.stage)
        if progress.stop_reason is not None:
            break
    return stages, reasons, progress


# Stage 0.


def test_the_stage_after_convergence_starts_in_the_next_epoch():
    stages, reasons, progress = run(decisions(patience=2), [3, 2, 2, 2, 1, 1])
    assert stages == [0, 0, 0, 0, 1, 1]
    assert reasons == ["converged"]
    assert (progress.judge.best, progress.stop_reason) == (1, None)


@pytest.mark.parametrize("of_min_delta", [False, True])
def test_smaller_improvements_than_min_delta_count_as_none(of_min_delta):
    stages, *_ = run(decisions(min_delta=0.5 if of_min_delta else 0.0), [3.0, 2.9, 2.8])
    assert stages == ([0, 0, 1] if of_min_delta else [0, 0, 0])


def test_epochs_before_the_start_are_not_judged():
    assert run(decisions(start_from_epoch=2), [1, 1, 1, 1, 1])[0] == [0, 0, 0, 0, 1]


def test_max_frozen_epochs_end_the_frozen_stage():
    stages, reasons, _ = run(decisions(max_frozen_epochs=2), [4, 3, 2, 1])
    assert stages == [0, 0, 1, 1]
    assert reasons == ["max_frozen_epochs"]


def test_convergence_comes_before_max_frozen_epochs():
    assert run(decisions(max_frozen_epochs=2), [4, 4, 4])[1] == ["converged"]


def test_epochs_without_the_value_are_no_epochs_without_improvement():
    stages, *_ = run(decisions(), [4, None, None, 4, 4])
    assert stages == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_no_improvement_and_no_end(bad):
    stages, _, progress = run(decisions(patience=2), [3, bad, 2, bad, 1])
    assert stages == [0, 0, 0, 0, 0]
    assert progress.stop_reason is None


def test_early_stopping_ends_any_stage_but_the_last():
    stages = Stage(1, 1e-3), Stage("all", 1e-4)
    found, reasons, progress = run(decisions(*stages, patience=9), [5, 4, 3, 2, 1], (0, 2, 3))
    assert found == [0, 1, 1, 2, 2]
    assert reasons == ["early_stopping", "early_stopping"]
    assert progress.switch_reason is None


def test_convergence_comes_before_early_stopping():
    assert run(decisions(), [1, 1, 1], stopped_early=[1])[1] == ["converged"]


@given(
    series=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan, math.inf]), max_size=10),
    mode=st.sampled_from(["min", "max"]),
    min_delta=st.sampled_from([0.0, 0.1, 0.15]),
    patience=st.integers(0, 3),
    start_from_epoch=st.integers(0, 2),
)
@settings(max_examples=60)
def test_decides_when_early_stopping_stops(series, mode, **arguments):
    class Model:
        metrics, stop_training = (), False

    stopping = keras.callbacks.EarlyStopping("score", mode=mode, **arguments)
    stopping.set_model(Model())
    stopping.on_train_begin()
    stops = None
    for epoch, value in enumerate(series):
        stopping.on_epoch_end(epoch, {"score": value})
        if stopping.model.stop_training:
            stops = epoch
            break

    tested, progress = decisions(mode=mode, **arguments), Progress()
    decided = None
    for epoch, value in enumerate(series):
        tested.decide(progress, epoch, {"score": value})
        if progress.switch_reason is not None:
            decided = epoch
            break
    assert decided == stops


# Fine-tuning.


def test_fine_tuning_stops_by_default_once_it_has_converged():
    stages, _, progress = run(decisions(), [1, 1, 3, 2, 2, 2, 2, 2])
    assert stages == [0, 0, 1, 1, 1, 1, 1]
    assert progress.stop_reason == (
        "Epoch 7: UnfreezeAtConvergence stopped: score has not improved for 3 epochs."
    )
    assert progress.switch_reason is None


def test_fine_tuning_lasts_to_the_last_epoch_without_a_patience():
    stages, _, progress = run(decisions(fine_tune_patience=None), [1, 1, *[2] * 9])
    assert stages == [0, 0, *[1] * 9]
    # Seen all the same: the best weights of the stage are those of its first epoch.
    assert (progress.judge.best_epoch, progress.stop_reason) == (2, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_fine_tuning_that_diverges_stops_in_any_stage(bad):
    stages = Stage(1, 1e-3), Stage("all", 1e-4)
    found, _, progress = run(decisions(*stages, patience=5, max_frozen_epochs=1), [2, 1, bad, 0])
    assert found == [0, 1, 1]
    assert progress.stop_reason == f"Epoch 3: UnfreezeAtConvergence stopped: score is {bad}."


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        # The callback's patience, and in the last stage its `fine_tune_patience`.
        ({}, {}, [0, 0, 1, 1, 2, 2, 2]),
        ({"patience": 2}, {"patience": 1}, [0, 0, 1, 1, 1, 2, 2]),
        # A stage that has `epochs` alone does not end sooner.
        ({"epochs": 3}, {"epochs": 1}, [0, 0, 1, 1, 1, 2]),
        ({"epochs": 3, "patience": 1}, {"epochs": 1}, [0, 0, 1, 1, 2]),
    ],
)
def test_a_stage_of_its_own_limits(first, last, expected):
    stages = Stage(1, 1e-3, **first), Stage("all", 1e-4, **last)
    found, reasons, progress = run(decisions(*stages, fine_tune_patience=2), [1] * 9)
    assert found == expected
    by_epochs = first == {"epochs": 3}
    assert reasons == ["converged", "epochs" if by_epochs else "converged"]
    assert progress.stop_reason is not None


def test_says_what_comes_next():
    stages = Stage(1, 1e-3), Stage("all", 1e-4)
    said = decisions(*stages, patience=2, fine_tune_patience=None)
    assert said.what_next(1) == (
        "fine-tuning until score stops improving for 2 epochs, then the next stage"
    )
    assert said.what_next(2) == "fine-tuning to the last epoch"
