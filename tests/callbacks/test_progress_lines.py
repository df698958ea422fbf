"""After an epoch without improvement, a line says what UnfreezeAtConvergence waits for."""

import re

import keras
import pytest

from keras_tl import FrozenBackbone, UnfreezeAtConvergence, fine_tune
from tests import models
from tests.shared import Scripted, regression_data

pytestmark = pytest.mark.eager

X, Y = regression_data()
SCORES = [5, 4, 6, 6, 3, 6, 6, 6, 2, 6, 6]
WAITS = {
    3: "score has not improved for 1 of 3 epochs",
    4: "score has not improved for 2 of 3 epochs",
    6: "score has not improved for 1 of 3 epochs",
    7: "score has not improved for 2 of 3 epochs",
    10: "score has not improved for 1 of 2 epochs",
}


def build():
    model = keras.Sequential([FrozenBackbone(models.functional(("dense",))), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


def printed(capsys, fit_verbose, **settings):
    callback = UnfreezeAtConvergence(
        **{"monitor": "score", "mode": "min", "fine_tune_patience": 2} | settings
    )
    model, script = build(), Scripted("score", SCORES)
    model.fit(X, Y, epochs=len(SCORES), callbacks=[script, callback], verbose=fit_verbose)
    return capsys.readouterr().out


def waits(out):
    found = re.findall(r"^Epoch (\d+): UnfreezeAtConvergence waits: (.*)\.$", out, re.MULTILINE)
    return {int(epoch): said for epoch, said in found}


@pytest.mark.parametrize("fit_verbose", [1, 2, "auto"])
def test_says_what_it_waits_for_where_fit_reports_epochs(fit_verbose, capsys):
    assert waits(printed(capsys, fit_verbose)) == WAITS


@pytest.mark.parametrize("fit_verbose", [0, 1, 2])
def test_says_nothing_of_it_where_it_is_silent(fit_verbose, capsys):
    assert "waits" not in printed(capsys, fit_verbose, verbose=0)


def test_a_silent_fit_reports_switches_alone(capsys):
    out = printed(capsys, 0)
    assert "waits" not in out
    assert "UnfreezeAtConvergence unfreezes" in out


def test_a_stage_without_a_patience_waits_for_nothing(capsys):
    assert set(waits(printed(capsys, 2, fine_tune_patience=None))) == {3, 4, 6, 7}


@pytest.mark.parametrize("fit_verbose", [1, 2])
def test_lines_stand_between_two_epochs_and_break_no_progress_bar(fit_verbose, capsys):
    lines = printed(capsys, fit_verbose).split("\n")
    positions = [i for i, line in enumerate(lines) if "waits" in line]
    assert len(positions) == len(WAITS)
    for position in positions:
        assert re.match(r"Epoch \d+: UnfreezeAtConvergence waits", lines[position])
        assert " - loss: " in lines[position - 1].split("\r")[-1]
        assert re.fullmatch(r"Epoch \d+/11", lines[position + 1])


def test_says_it_in_fine_tune_as_in_fit(capsys):
    settings = {"monitor": "score", "mode": "min", "verbose": 2}
    script = Scripted("score", SCORES)
    with pytest.warns(UserWarning, match="still frozen"):
        fine_tune(build(), X, Y, epochs=5, callbacks=[script], **settings)
    assert list(waits(capsys.readouterr().out)) == [3, 4]


HAIR = [5, 4, 3, *(3 - 0.001 * n for n in range(1, 22))]


@pytest.mark.parametrize("scores", [HAIR, [5 * 0.7**n for n in range(24)]])
def test_a_head_that_improves_by_a_hair_is_told_half_way_and_at_the_end(scores, capsys):
    callback = UnfreezeAtConvergence(monitor="score", mode="min")
    with pytest.warns(UserWarning, match="still frozen") as warned:
        build().fit(X, Y, epochs=24, callbacks=[Scripted("score", scores), callback], verbose=2)
    said = "score still improves, but slowly: `min_delta=0.005` would have unfrozen after epoch 6."
    half_way = f"Epoch 12: UnfreezeAtConvergence waits, at half of the epochs. {said}"
    assert any(said in str(one.message) for one in warned) is (scores is HAIR)
    assert (half_way in capsys.readouterr().out) is (scores is HAIR)
