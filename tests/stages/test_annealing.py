"""How a learning rate finds itself, decided from logs alone: no model is made here."""

import math

import keras
import pytest

from keras_tl import Stage
from keras_tl.stages.annealing import first_rate, least_patience, with_rates
from keras_tl.stages.best_weights import BestWeights
from keras_tl.stages.deciding import Decisions
from keras_tl.stages.monitored_value import MonitoredValue
from keras_tl.stages.progress import Progress
from keras_tl.stages.transition import Transition

RATES = [1e-3, 3e-4, 1e-4, 3e-5, 1e-5]


def rates_tried(values, *before, mode="min", **arguments):
    """Returns the stage of each epoch, the reasons of switches, and why it stopped."""
    stages, first = with_rates([*before, Stage("all", "auto")], keras.optimizers.Adam())
    decisions = Decisions(
        stages,
        MonitoredValue("score", mode),
        **{"patience": 1, "fine_tune_patience": 1, "first_annealed": first} | arguments,
    )
    progress, tried = Progress(best=BestWeights(mode)), []
    for epoch, value in enumerate(values):
        if progress.switch_reason is not None:
            stage, reason = progress.stage + 1, progress.switch_reason
            progress.transitions.append(Transition(epoch, stage, reason, None, 1, 1, 1, 1, ()))
            progress.begin_stage(stage)
        decisions.decide(progress, epoch, {"score": value})
        progress.best.update(epoch, value, [], best_of_stage=progress.judge.best_epoch == epoch)
        tried.append(progress.stage)
        if progress.stop_reason is not None:
            break
    return tried, [one.reason for one in progress.transitions], progress.stop_reason


def test_rates_go_down_by_thirds_to_that_of_the_guide():
    stages, first = with_rates([Stage(3, "auto", patience=2)], keras.optimizers.Adam(0.1))
    assert [stage.learning_rate for stage in stages] == RATES
    assert {(stage.layers, stage.patience) for stage in stages} == {(3, 2)}
    assert first == 1


def test_the_first_rate_is_the_default_of_the_class_whatever_the_optimizer_has_now():
    class Own(keras.optimizers.SGD):
        def __init__(self, learning_rate, **kwargs):
            super().__init__(learning_rate, **kwargs)

    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0))
    optimizers = [keras.optimizers.AdamW(1e-6), keras.optimizers.SGD(1.0), scaled, Own(1.0)]
    assert [first_rate(one) for one in optimizers] == [1e-3, 1e-2, 1e-2, 1e-3]


def test_stages_without_auto_stay():
    stages = [Stage(1, 1e-4), Stage("all", 1e-5)]
    assert with_rates(stages, keras.optimizers.Adam()) == (stages, 3)


def test_a_rate_that_helps_is_followed_by_a_third_of_it():
    tried, reasons, stopped = rates_tried([9, 9, 8, 7, 7, 6, 6, 6, 6, 6, 6, 6])
    assert tried == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert reasons == ["converged"] * 4
    assert "two lower rates have not helped" in stopped


def test_after_one_rate_that_has_not_helped_the_next_may():
    tried, *_ = rates_tried([9, 9, 8, 8, 8, 8, 7, 7, 7, 7, 7, 7])
    assert tried == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_rates_that_only_hurt_are_followed_until_one_helps():
    tried, reasons, stopped = rates_tried([5, 5, 8, 8, 4, 4, 4, 4, 4, 4])
    assert tried == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert reasons == ["converged", "not_improved", "converged", "converged"]
    assert "two lower rates have not helped" in stopped


def test_ends_after_the_last_rate_if_none_helps():
    tried, reasons, stopped = rates_tried([5, 5] + [9, 9] * 6)
    assert tried == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert reasons == ["converged"] + ["not_improved"] * 4
    assert stopped.startswith("Epoch 12: UnfreezeAtConvergence stopped: score has not improved")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_rate_that_diverges_is_followed_by_a_third_of_it(bad):
    tried, reasons, _ = rates_tried([5, 5, bad, bad, 4, 4])
    assert tried == [0, 0, 1, 2, 3, 3]
    assert reasons == ["converged", "diverged", "diverged"]


def test_divergence_at_the_last_rate_ends_training():
    tried, _, stopped = rates_tried([5, 5] + [math.nan] * 9)
    assert tried == [0, 0, 1, 2, 3, 4, 5]
    assert "score is nan" in stopped


def test_rising_scores_are_judged_the_other_way():
    tried, reasons, _ = rates_tried([1, 1, 0, 0, 2, 2, 1, 1], mode="max")
    assert tried == [0, 0, 1, 1, 2, 2, 3, 3]
    assert reasons == ["converged", "not_improved", "converged"]


def test_stages_before_it_end_as_they_do():
    tried, reasons, _ = rates_tried([9, 9, 8, 8, 7, 7, 7, 7], Stage(1, 1e-4))
    assert tried == [0, 0, 1, 1, 2, 2, 3, 3]
    assert reasons == ["converged", "converged", "converged"]


def test_each_rate_has_the_patience_of_fine_tuning():
    tried, *_ = rates_tried([9, 9, 9, 8, 8, 8, 7, 7], patience=2)
    assert tried == [0, 0, 0, 1, 1, 2, 2, 2]


def test_the_first_two_rates_have_twice_the_warm_up_where_epochs_have_few_steps():
    stages, first = with_rates([Stage(1, 1e-4), Stage("all", "auto")], keras.optimizers.Adam())
    decisions = Decisions(
        stages, MonitoredValue("score", "min"), fine_tune_patience=3, first_annealed=first
    )
    decisions.least_patience = least_patience(warmup_steps=30, steps=7)
    assert [decisions.limits(stage)[0] for stage in range(7)] == [3, 3, 9, 9, 3, 3, 3]
    decisions.least_patience = least_patience(warmup_steps=30, steps=100)
    assert {decisions.limits(stage)[0] for stage in range(7)} == {3}
    progress = Progress(stage=2, best=BestWeights("min"))
    decisions.least_patience = 9
    for epoch in range(10):
        assert progress.switch_reason is None
        decisions.decide(progress, epoch, {"score": 1.0})
    assert progress.switch_reason == "not_improved"


def test_says_that_a_lower_rate_is_next():
    stages, first = with_rates([Stage("all", "auto")], keras.optimizers.Adam())
    decisions = Decisions(stages, MonitoredValue("score", "min"), first_annealed=first)
    assert decisions.what_next(1).endswith("then a third of the rate")
    assert decisions.what_next(5).endswith("then the end")
