"""What the benchmark of quality counts and prints; how good models are is not tested."""

import json
import types

import keras
import numpy as np
import pytest

from tests.benchmarks.quality import __main__ as quality
from tests.benchmarks.quality import options
from tests.benchmarks.quality.pairs import Pair
from tests.benchmarks.quality.ways import OneCycle


def result(way, rate, seed, val_loss, score, cpu=1.0):
    key = {"pair": "digits", "way": way, "rate": rate, "seed": seed}
    return {**key, "val_loss": val_loss, "cpu": cpu, "calibration": 0.1, "scores": {"all": score}}


def by_key(*results):
    return {(one["pair"], one["way"], one["rate"], one["seed"]): one for one in results}


def test_a_rate_is_chosen_by_validation_loss_and_all_rates_cost():
    tried = [
        result("everything, plain", 1e-3, 0, 0.5, 0.9, cpu=2.0),
        result("everything, plain", 1e-4, 0, 0.4, 0.8, cpu=3.0),
    ]
    (one,) = quality.chosen(by_key(*tried), "digits")["everything, plain"]
    assert (one["scores"]["all"], one["cpu"]) == (0.8, 5.0)


def test_the_table_has_mean_and_standard_deviation_of_the_seeds():
    tried = [result("keras_tl", None, seed, 0.5, score) for seed, score in enumerate((0.8, 0.9))]
    row = quality.table(by_key(*tried), "digits").splitlines()[-1]
    assert row == "| keras_tl | 2 | 0.850 ± 0.071 | 0.100 | 1 |"


@pytest.mark.parametrize(
    ("confidence", "accuracy", "error"), [(0.75, 0.75, 0.0), (1.0, 0.75, 0.25), (0.75, 1.0, 0.25)]
)
def test_the_calibration_error_is_between_confidence_and_accuracy(confidence, accuracy, error):
    predicted = np.tile([confidence, 1 - confidence], (100, 1))
    labels = (np.arange(100) >= 100 * accuracy).astype(int)
    assert quality.calibration_error(predicted, labels) == pytest.approx(error)


def test_accuracy_is_balanced_over_classes():
    predicted = np.array([[1.0, 0.0]] * 4)
    assert quality.balanced_accuracy(predicted, np.array([0, 0, 0, 1])) == 0.5


def test_runs_that_are_there_are_not_done_again(tmp_path, monkeypatch):
    done = []

    def run(pair, way, rate, seed):
        done.append((way, rate, seed))
        return {"val_loss": 1.0, "cpu": 1.0, "calibration": 0.0, "scores": {"all": 1.0}}

    monkeypatch.setattr(quality, "run", run)
    pair = Pair(None, None, None, 2, 16, (1e-3, 1e-4), without=("head only",))
    monkeypatch.setitem(quality.PAIRS, "digits", lambda cache: pair)
    path = tmp_path / "quality.jsonl"
    path.write_text(json.dumps(result("everything, plain", 1e-4, 0, 0.4, 0.8)) + "\n")
    for _ in range(2):
        quality.run_all(["digits"], ["head only", "everything, plain"], 1, path)
    assert done == [("everything, plain", 1e-3, 0)]


def test_a_cycle_rises_and_falls_in_each_group_by_its_own_rate():
    groups = {name: types.SimpleNamespace() for name in ("backbone", "head")}
    cycle = OneCycle({"backbone": 0.1, "head": 1.0}, steps=10, warm_up=0.3)
    cycle.set_model(types.SimpleNamespace(optimizer=types.SimpleNamespace(groups=groups)))
    rates = []
    for step in range(10):
        cycle.on_train_batch_begin(step)
        rates.append([one.learning_rate for one in groups.values()])
    backbone, head = np.transpose(rates)
    assert head[0] == pytest.approx(0.2) and head[3] == pytest.approx(1.0)
    assert np.argmax(head) == 3 and np.all(np.diff(head[3:]) < 0)
    np.testing.assert_allclose(head, 10 * backbone)


def test_l2_sp_pulls_what_has_moved_back_to_where_it_was_at_first():
    options._starts.clear()
    weight = keras.Variable(np.ones(2), name="kernel")
    for moved in (1.0, 3.0):  # Each rate has an optimizer of its own.
        optimizer = options.TowardsStart(0.01, pull=10.0)
        optimizer.build([weight])
        weight.assign(np.full(2, moved))
        optimizer.apply([np.zeros(2, "float32")])
        assert np.allclose(weight, moved - 0.1 * (moved - 1.0))


def test_parts_of_a_network_are_its_blocks_and_what_is_around_them():
    layers = ["stem_conv", "block3_expand_conv", "block12_project_conv", "head_conv"]
    assert [options._part_of(layer) for layer in layers] == ["stem", "block3", "block12", "head"]
