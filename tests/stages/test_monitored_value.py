"""The monitored quantity, read from logs that no `fit` has made."""

import types
import warnings

import keras
import numpy as np
import pytest

from keras_tl.stages.monitored_value import MonitoredValue


def read(logs, monitor="val_score", validates=None):
    return MonitoredValue(monitor, "min").read(logs, validates=validates)


@pytest.mark.parametrize(
    "value", [2, 2.0, np.array([2.0]), np.float16(2), [2.0], keras.ops.convert_to_tensor([[2.0]])]
)
def test_a_number_in_any_form(value):
    assert read({"val_score": value}) == 2.0


@pytest.mark.parametrize("value", [np.zeros(3), np.zeros((0,)), "high", None])
def test_refuses_what_is_not_one_number(value):
    with pytest.raises(ValueError, match="`monitor='val_score'` is not one number in the logs"):
        read({"val_score": value})


@pytest.mark.parametrize(
    ("monitor", "logs", "validates"),
    [
        # Validated, and it is not there.
        ("val_acuracy", {"loss": 1.0, "val_accuracy": 1.0}, True),
        ("acuracy", {"loss": 1.0}, None),  # Of training, so there is nothing to wait for.
        ("val_loss", {"loss": 1.0}, False),  # `fit` has nothing to validate on.
    ],
)
def test_what_never_comes_is_an_error_in_the_first_epoch_alone(monitor, logs, validates):
    monitored = MonitoredValue(monitor, "min")
    with pytest.raises(ValueError, match=f"{monitor}.* is not in the logs. Available: loss") as it:
        monitored.read(logs, validates=validates)
    meant = 'Did you mean "val_accuracy"? Pass one of these; a callback' in str(it.value)
    assert meant == (monitor == "val_acuracy")
    assert ("validation data" in str(it.value)) != meant
    # Later an error would lose what was trained.
    monitored = MonitoredValue(monitor, "min")
    assert monitored.read({monitor: 1.0}, validates=validates) == 1.0
    assert monitored.read(logs, validates=validates) is None


def test_a_name_that_no_validation_logs_is_warned_of_once_after_the_first_epoch():
    monitored = MonitoredValue("val_acuracy", "min")
    logs = {"loss": 1.0, "val_loss": 1.0}
    assert monitored.read({"loss": 1.0}, validates=True) is None
    with pytest.warns(UserWarning, match="'val_acuracy'` is not in the logs. Available.*val_loss"):
        monitored.read(logs, validates=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitored.read(logs, validates=True) is None


def test_what_a_callback_may_still_add_is_waited_for_with_a_warning():
    monitored = MonitoredValue("val_map", "max")
    with pytest.warns(UserWarning, match="'val_map'.*Waiting for an epoch with validation"):
        assert monitored.read({"loss": 1.0}, validates=False) is None
    assert not monitored.seen
    assert monitored.read({"loss": 1.0, "val_map": 0.5}, validates=False) == 0.5
    assert monitored.seen


def test_epochs_without_validation_are_waited_for_with_no_warning():
    monitored = MonitoredValue("val_loss", "min")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitored.read({"loss": 1.0}, validates=True) is None
        assert monitored.read({"loss": 1.0, "val_loss": 2.0}, validates=True) == 2.0
        assert monitored.read({"loss": 1.0}, validates=True) is None


def test_a_loss_improves_by_falling():
    model = types.SimpleNamespace(metrics=())
    assert MonitoredValue("val_loss", "auto", model).mode == "min"


def test_refuses_a_quantity_of_unknown_direction():
    model = types.SimpleNamespace(metrics=())
    with pytest.raises(ValueError, match="Cannot tell whether 'score' improves by rising"):
        _ = MonitoredValue("score", "auto", model).mode
