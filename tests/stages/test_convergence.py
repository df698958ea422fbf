import math

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_tl import ConvergenceMonitor
from keras_tl.stages.convergence import min_delta_to_converge
from tests.shared import examples

values = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, 1.0, math.nan, math.inf, -math.inf]),
    st.integers(0, 5).map(lambda n: n / 10),
    # TensorFlow, and so EarlyStopping, raises for finite numbers beyond float32.
    st.floats(-3e38, 3e38),
)


class _Model:
    """As much of a model as EarlyStopping looks at."""

    metrics = ()
    stop_training = False


def early_stopping_epoch(series, **arguments):
    """The epoch at which EarlyStopping stops, or None."""
    callback = keras.callbacks.EarlyStopping("value", **arguments)
    callback.set_model(_Model())
    callback.on_train_begin()
    for epoch, value in enumerate(series):
        callback.on_epoch_end(epoch, {"value": value})
        if callback.model.stop_training:
            return epoch
    return None


def monitor_epoch(series, **arguments):
    monitor = ConvergenceMonitor(**arguments)
    converged = [monitor.update(epoch, value) for epoch, value in enumerate(series)]
    return converged.index(True) if any(converged) else None


@given(
    series=st.lists(values, max_size=12),
    mode=st.sampled_from(["min", "max"]),
    min_delta=st.sampled_from([0, 0.0, 0.1, -0.1, 1e-9, 2]),
    patience=st.integers(0, 4),
    start_from_epoch=st.integers(0, 3),
)
@example([0.1, 0.1 - 1e-12, 0.1 - 2e-12], "min", 0.0, 1, 0)
@settings(max_examples=examples(400))
def test_converges_when_early_stopping_stops(series, mode, min_delta, patience, start_from_epoch):
    arguments = {
        "mode": mode,
        "min_delta": min_delta,
        "patience": patience,
        "start_from_epoch": start_from_epoch,
    }
    assert monitor_epoch(series, **arguments) == early_stopping_epoch(series, **arguments)


def test_compares_in_the_precision_of_the_backend():
    series = [0.1, 0.1 - 1e-12]

    assert monitor_epoch(series, patience=1) == 1
    assert monitor_epoch(series, patience=1, dtype="float64") is None


def test_numbers_beyond_the_precision_are_infinite():
    assert monitor_epoch([1e300, 2e300], mode="max", patience=1) == 1


def test_remembers_the_best_value_and_its_epoch():
    monitor = ConvergenceMonitor(mode="max", patience=5)
    for epoch, value in enumerate([0.1, 0.7, 0.3]):
        monitor.update(epoch, value)

    assert (monitor.best, monitor.best_epoch, monitor.wait) == (0.7, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "auto"}, '`mode` must be "min" or "max".*\'auto\''),
        ({"patience": -1}, "`patience` must be an int of at least 0.*-1"),
        ({"patience": 1.5}, "`patience` must be an int.*1.5"),
        ({"patience": True}, "`patience` must be an int.*True"),
        ({"start_from_epoch": -2}, "`start_from_epoch` must be an int.*-2"),
        ({"min_delta": math.nan}, "`min_delta` must be a finite number.*nan"),
        ({"min_delta": "0"}, "`min_delta` must be a finite number.*'0'"),
    ],
)
def test_refuses_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        ConvergenceMonitor(**arguments)


def test_takes_numpy_numbers():
    assert monitor_epoch([1.0, 2.0], patience=np.int64(1), min_delta=np.float32(0.1)) == 1


@given(
    series=st.lists(st.floats(-3e38, 3e38) | st.integers(0, 50).map(float), max_size=12),
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(1, 3),
)
@settings(max_examples=examples(200))
def test_a_min_delta_that_is_advised_converges_in_the_first_half(series, mode, patience):
    arguments = {"mode": mode, "patience": patience}
    found = min_delta_to_converge(series, **arguments)
    if found is not None:
        min_delta, epoch = found
        assert epoch < len(series) // 2
        assert monitor_epoch(series, min_delta=min_delta, **arguments) == epoch
        assert min_delta <= abs(series[0]) / 100


@pytest.mark.parametrize(
    ("series", "found"),
    [
        ([10 - 1e-4 * n for n in range(40)], (2e-4, 2)),
        ([10 - 0.03 * n for n in range(20)], (0.1, 2)),
        ([10 - 0.3 * n for n in range(20)], None),
        ([0.9**n for n in range(20)], None),
        ([math.nan] * 9, None),
        ([1.0, math.inf] * 9, None),
        ([0.0] * 9, None),
        ([], None),
    ],
)
def test_the_min_delta_that_would_have_ended_a_slow_series(series, found):
    assert min_delta_to_converge(series, patience=2) == found
