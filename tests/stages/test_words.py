"""What UnfreezeAtConvergence says of a stage's end and of what comes next."""

import pytest

from keras_tl.stages.words import (
    what_next,
    what_would_converge,
    why_ended,
    why_still_frozen,
)


@pytest.mark.parametrize(
    ("patience", "epochs", "last", "said"),
    [
        (None, None, True, "fine-tuning to the last epoch"),
        (2, None, False, "until loss stops improving for 2 epochs, then the next stage"),
        (0, None, True, "until loss stops improving for 1 epoch, then the end"),
        (None, 3, True, "fine-tuning for at most 3 epochs, then the end"),
        (2, 1, True, "for 2 epochs and for at most 1 epoch, then the end"),
    ],
)
def test_what_comes_next(patience, epochs, last, said):
    assert what_next("loss", patience, epochs, last=last).endswith(said)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("converged", "loss has not improved for 2 epochs"),
        ("early_stopping", "EarlyStopping has seen no improvement"),
        ("max_frozen_epochs", "it was frozen for 5 epochs"),
        ("epochs", "stage 1 has had its 5 epochs"),
    ],
)
def test_why_a_stage_ended(reason, said):
    assert why_ended(reason, "loss", 2, 1, 5) == said


@pytest.mark.parametrize(
    ("stopped", "decided", "said"),
    [
        (True, False, "another callback stopped it"),
        (False, True, "stage 0 ended with the last epoch"),
        (False, False, "loss had not converged by the last epoch (patience=4)"),
    ],
)
def test_why_a_run_ended_frozen(stopped, decided, said):
    message = why_still_frozen("loss", 4, stopped=stopped, decided=decided)
    assert said in message


def test_why_a_run_ended_frozen_that_never_saw_what_it_monitors():
    message = why_still_frozen("loss", 4, stopped=False, decided=False, seen=False)
    assert "loss was never in the logs" in message


def test_a_series_that_improves_by_a_hair_is_told_with_what_it_would_have_converged():
    hint = what_would_converge("loss", (1e-3, 30))
    message = why_still_frozen("loss", 4, stopped=False, decided=False, hint=hint)
    assert "(patience=4). loss still improves, but slowly: `min_delta=0.001` would" in message
    assert "unfrozen after epoch 31. Pass more" in message
    assert what_would_converge("loss", None) == ""
