"""What a notebook shows of callbacks, reports and ranges."""

import xml.etree.ElementTree as ET

import keras
import pytest

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    LearningRateRange,
    UnfreezeAtConvergence,
    trainable_report,
)
from tests.shared import regression_data

X, Y = regression_data()


def table_of(shown):
    """The rows of the table in what a notebook shows, after the titles."""
    return [[cell.text or "" for cell in row] for row in ET.fromstring(shown).iter("tr")]


@pytest.fixture(scope="module")
def model():
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="<body>")], name="base")
    model = keras.Sequential([keras.Input((4,)), FrozenBackbone(base), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def test_a_report_shows_as_the_table_that_it_prints(model):
    report = trainable_report(model, expand_nested=True)
    titles, *rows = table_of(report._repr_html_())
    assert repr(report) == str(report)
    for line, row in zip(str(report).splitlines(), [titles, *rows], strict=True):
        assert line.split() == " ".join(row).split()
    assert rows[0][0].endswith("<body>")


@pytest.mark.eager
def test_a_callback_shows_its_switches(model):
    switch = UnfreezeAtConvergence(1e-5, max_frozen_epochs=1, verbose=0)
    assert repr(switch) == "<UnfreezeAtConvergence monitor='val_loss' stage=0 of 1>"
    assert "<table>" not in switch._repr_html_()
    model.fit(X, Y, epochs=2, validation_data=(X, Y), verbose=0, callbacks=[switch])
    assert repr(switch) == "<UnfreezeAtConvergence monitor='val_loss' stage=1 of 1>"
    (transition,) = switch.transitions
    titles, row = table_of(f"<p>{switch._repr_html_()}</p>")
    shown = dict(zip(titles, row, strict=True))
    assert shown["epoch"] == "2"
    assert shown["reason"] == transition.reason == "max_frozen_epochs"
    assert shown["learning rate"] == "0.01 -> 1e-05"
    assert shown["parameters"] == "4 -> 19 trainable"


def test_a_guard_shows_what_it_does():
    assert repr(FreezeGuard(action="restore")) == "<FreezeGuard action='restore' restored=0>"


def test_a_range_shows_its_suggestions():
    rates = tuple(10.0**exponent for exponent in range(-9, 1))
    losses = (1.0, 1.0, 1.0, 0.9, 0.5, 0.1, 0.1, 0.2, 2.0, 9.0)
    found = LearningRateRange(rates, losses, losses)
    assert repr(found) == str(found)
    assert repr(found).startswith("10 learning rates tried; suggestions: valley ")
    _, *rows = table_of(found._repr_html_())
    assert [name for name, _ in rows] == ["valley", "steepest", "minimum"]
    assert ["minimum", "1e-06"] in rows
