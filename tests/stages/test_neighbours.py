"""Every callback that Keras ships, next to UnfreezeAtConvergence, in both orders.

The table in examples/README.md has a row for each; the tests are named after them.
"""

import contextlib
import csv
import functools
import json
import warnings
from unittest import mock

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from tests import models
from tests.shared import Scripted, regression_data, values_of

# What a neighbour does is seen without traced steps too.
pytestmark = pytest.mark.eager

X, Y = regression_data()
VALUES = [5, 4, 4, 3, 3]
STAGES = [0, 0, 0, 1, 1]


def build(optimizer=None):
    keras.utils.set_random_seed(0)
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
    model = models.functional_outer(wrapper, [keras.layers.Dropout(0.3)])
    model.compile(optimizer or keras.optimizers.SGD(0.02), "mse")
    return model


def ours(**arguments):
    settings = {"monitor": "score", "mode": "min", "patience": 1, "verbose": 0}
    return UnfreezeAtConvergence(1e-3, **settings | arguments)


def fit(model, *callbacks, values=VALUES, verbose=0):
    validated = any(getattr(one, "monitor", "").startswith("val_") for one in callbacks)
    return model.fit(
        X,
        Y,
        batch_size=16,
        epochs=len(values),
        shuffle=False,
        validation_data=(X, Y) if validated else None,
        callbacks=[Scripted("score", values), *callbacks],
        verbose=verbose,
    )


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*run_functions_eagerly")
        yield


@pytest.fixture
def alone():
    return run_alone()


# Not a fixture of the module: that would be set up before the mark has steps run untraced, and
# traced ones round otherwise on some processors.
@functools.cache
def run_alone():
    model = build()
    history = fit(model, ours()).history
    assert history["stage"] == STAGES
    return values_of(model), history


@pytest.fixture(params=["before", "after"])
def both_orders(request):
    return lambda one, own: [one, own] if request.param == "before" else [own, one]


# Some that only look on are first in the ordinary run; csv_logger, model_checkpoint and those that
# act are in both places.
SECOND_ORDER_IS_SLOW = pytest.mark.parametrize(
    "both_orders", ["before", pytest.param("after", marks=pytest.mark.slow)], indirect=True
)


def check_is_as_alone(alone, make, both_orders):
    """The other callback changes nothing of ours. Returns it, and the History."""
    model, one = build(), make()
    history = fit(model, *both_orders(one, ours())).history
    assert values_of(model) == alone[0]
    assert {key: history[key] for key in alone[1]} == alone[1]
    return one


# Those that look on.


def test_csv_logger(alone, both_orders, tmp_path):
    path = tmp_path / "log.csv"
    check_is_as_alone(alone, lambda: keras.callbacks.CSVLogger(path), both_orders)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == len(VALUES)
    # Placed before ours it reads the logs before stage and learning rate are in them.
    after = "stage" in rows[0]
    assert after == (both_orders(1, 2) == [2, 1])
    if after:
        assert [int(row["stage"]) for row in rows] == STAGES


@SECOND_ORDER_IS_SLOW
def test_lambda_callback(alone, both_orders):
    seen = []
    check_is_as_alone(
        alone,
        lambda: keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch)),
        both_orders,
    )
    assert seen == list(range(len(VALUES)))


def test_model_checkpoint(alone, both_orders, tmp_path):
    path = str(tmp_path / "{epoch}.keras")
    check_is_as_alone(alone, lambda: keras.callbacks.ModelCheckpoint(path), both_orders)
    for epoch, stage in enumerate(STAGES, start=1):
        loaded = keras.saving.load_model(tmp_path / f"{epoch}.keras")
        trained = models.frozen_backbone_of(loaded).trainable_weights
        # The switch is made when the epoch after it begins.
        assert len(trained) == (4 if stage else 0)


@SECOND_ORDER_IS_SLOW
def test_progbar_logger(alone, both_orders, capsys):
    model = build()
    fit(model, *both_orders(keras.callbacks.ProgbarLogger(), ours()), verbose=2)
    assert values_of(model) == alone[0]
    assert f"Epoch {len(VALUES)}/{len(VALUES)}" in capsys.readouterr().out


@SECOND_ORDER_IS_SLOW
def test_remote_monitor(alone, both_orders, monkeypatch):
    posts = []

    class Requests:
        class exceptions:
            RequestException = OSError

        @staticmethod
        def post(path, json=None, **_):
            posts.append(json)

    monkeypatch.setattr("keras.src.callbacks.remote_monitor.requests", Requests)
    check_is_as_alone(alone, lambda: keras.callbacks.RemoteMonitor(send_as_json=True), both_orders)
    assert [post["epoch"] for post in posts] == list(range(len(VALUES)))
    json.dumps(posts)


@SECOND_ORDER_IS_SLOW
def test_tensorboard(alone, both_orders, tmp_path):
    pytest.importorskip("tensorboard")
    check_is_as_alone(
        alone, lambda: keras.callbacks.TensorBoard(tmp_path, write_graph=False), both_orders
    )
    assert list(tmp_path.rglob("*tfevents*"))


@SECOND_ORDER_IS_SLOW
def test_terminate_on_nan(alone, both_orders):
    check_is_as_alone(alone, keras.callbacks.TerminateOnNaN, both_orders)


def test_terminate_on_nan_when_fine_tuning_diverges(both_orders):
    model = build()
    own = UnfreezeAtConvergence(1e20, monitor="val_loss", max_frozen_epochs=2, verbose=0)
    history = fit(model, *both_orders(keras.callbacks.TerminateOnNaN(), own)).history
    assert history["stage"] == [0, 0, 1]
    final = model.evaluate(X, Y, batch_size=16, verbose=0)
    assert final == min(history["val_loss"][:2])


def test_orbax_checkpoint(alone, both_orders, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    check_is_as_alone(
        alone,
        lambda: keras.callbacks.OrbaxCheckpoint(str(tmp_path), save_freq="epoch"),
        both_orders,
    )
    assert list(tmp_path.iterdir())


# Those that act.


def test_early_stopping_before(recwarn):
    model = build()
    stopping = keras.callbacks.EarlyStopping("score", mode="min", patience=1)
    own = ours(patience=9)
    assert fit(model, stopping, own).history["stage"] == [0, 0, 0, 1, 1]
    assert [one.reason for one in own.transitions] == ["early_stopping"]
    assert not [one for one in recwarn if "EarlyStopping" in str(one.message)]


def test_early_stopping_after():
    model = build()
    stopping = keras.callbacks.EarlyStopping("score", mode="min", patience=1)
    with pytest.warns(UserWarning, match="Place it before UnfreezeAtConvergence, and its stop"):
        history = fit(model, ours(), stopping).history
    assert history["stage"] == [0, 0, 0]


@pytest.mark.parametrize("monitor", ["score", "loss"])
def test_early_stopping_after_that_restores_other_weights(monitor):
    stopping = keras.callbacks.EarlyStopping(
        monitor, mode="min", patience=9, restore_best_weights=True
    )
    with pytest.warns(UserWarning, match="puts its own best weights in place of those"):
        fit(build(), ours(restore_best_weights=True), stopping)
    with no_warnings():
        fit(build(), stopping, ours(restore_best_weights=True))


class StartsOver(keras.callbacks.EarlyStopping):
    """Takes what Keras passes."""

    def on_train_begin(self, logs):
        self.given = [*getattr(self, "given", []), dict(logs)]
        super().on_train_begin(logs)


def test_what_starts_over_is_given_what_keras_gives_it():
    stopping = StartsOver("score", mode="min", patience=9)
    assert fit(build(), stopping, ours()).history["stage"] == STAGES
    assert stopping.given == [{}, {}]


class LooksEqual(keras.callbacks.Callback):
    """A callback that equals each other one, as an array that has no truth."""

    __hash__ = None

    def __eq__(self, other):
        return np.ones(2) == 1.0


@pytest.mark.parametrize(
    "other", [LooksEqual, lambda: mock.MagicMock(spec=keras.callbacks.Callback)]
)
def test_a_callback_is_known_by_identity_and_by_what_it_has(other, both_orders):
    assert fit(build(), *both_orders(other(), ours())).history["stage"] == STAGES


@pytest.mark.parametrize(
    "stopping",
    [
        lambda: keras.callbacks.EarlyStopping("score", mode="min", patience=4),
        lambda: keras.callbacks.EarlyStopping("stage", mode="max", patience=1, start_from_epoch=9),
        lambda: keras.callbacks.ReduceLROnPlateau("score", mode="min", patience=1, factor=0.5),
        pytest.param(
            lambda: keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_lr=9.0),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_callbacks_that_do_not_fight_are_not_warned_of(stopping):
    model, stopping = build(), stopping()
    with no_warnings():
        assert fit(model, ours(), stopping).history["stage"] == STAGES


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(lambda epoch: 0.02, marks=pytest.mark.slow), lambda epoch, rate: 0.02],
)
def test_learning_rate_scheduler_that_undoes_the_switch(both_orders, schedule):
    model = build()
    scheduler = keras.callbacks.LearningRateScheduler(schedule)
    with pytest.warns(UserWarning, match="Have its schedule change the rate") as caught:
        fit(model, *both_orders(scheduler, ours()))
    assert len([one for one in caught if "LearningRateScheduler" in str(one.message)]) == 1


def test_learning_rate_scheduler_that_changes_the_rate(both_orders):
    model = build()
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.9 * rate)
    with no_warnings():
        rates = fit(model, *both_orders(scheduler, ours())).history["learning_rate"]
    np.testing.assert_allclose(rates[:3], 0.02 * 0.9 ** np.arange(1, 4), rtol=1e-5)
    first = 3 if both_orders(1, 2) == [1, 2] else 2
    np.testing.assert_allclose(rates[4] / rates[3], 0.9, rtol=1e-5)
    np.testing.assert_allclose(rates[3], 1e-3 * 0.9 ** (3 - first), rtol=1e-5)


def test_reduce_lr_on_plateau_with_less_patience(both_orders):
    model = build()
    plateau = keras.callbacks.ReduceLROnPlateau("score", mode="min", patience=1, factor=0.5)
    with pytest.warns(UserWarning, match="Give it a patience of 2 or more"):
        fit(model, *both_orders(plateau, ours(patience=2)), values=[5, 4, 4, 4, 3, 3])


def test_reduce_lr_on_plateau_starts_over_in_each_stage(both_orders):
    model = build()
    plateau = keras.callbacks.ReduceLROnPlateau("score", mode="min", patience=2, factor=0.5)
    values = [5, 4, 4, 9, 9, 9, 9]
    with no_warnings():
        rates = fit(model, *both_orders(plateau, ours()), values=values).history["learning_rate"]
    # Judged against the head's 4, it would lower the rate after the first epoch of stage 1. A rate
    # that it lowers at an epoch's end is logged there if it is before ours.
    early = both_orders(1, 2) == [1, 2]
    halved = [1, 1, 0.5, 0.5] if early else [1, 1, 1, 0.5]
    np.testing.assert_allclose(rates[3:], 1e-3 * np.array(halved), rtol=1e-5)


def test_backup_and_restore_without_a_backup_of_ours(both_orders, tmp_path):
    model = build()
    other = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.warns(UserWarning, match="would continue frozen"):
        fit(model, *both_orders(other, ours()))


def test_backup_and_restore_with_a_backup_of_ours(both_orders, tmp_path):
    model = build()
    before = values_of(model)
    callbacks = both_orders(
        keras.callbacks.BackupAndRestore(tmp_path / "its"), ours(backup_dir=tmp_path / "ours")
    )
    with pytest.raises(ValueError, match="Drop BackupAndRestore: `backup_dir` alone"):
        fit(model, *callbacks)
    assert values_of(model) == before


def averaging():
    return keras.optimizers.SGD(0.02, use_ema=True, ema_momentum=0.5)


@pytest.mark.parametrize(
    ("order", "settings", "fine"),
    [
        ("before", {"swap_on_epoch": True}, True),
        ("after", {"swap_on_epoch": True}, False),
        ("before", {}, False),
        ("after", {}, False),
    ],
)
def test_swap_ema_weights(order, settings, fine):
    model = build(averaging())
    swap, own = keras.callbacks.SwapEMAWeights(**settings), ours(monitor="val_loss")
    callbacks = [swap, own] if order == "before" else [own, swap]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(model, *callbacks).history
    warned = [one for one in caught if "SwapEMAWeights has the model" in str(one.message)]
    assert len(warned) == (0 if fine else 1)
    if fine:
        final = model.evaluate(X, Y, batch_size=16, verbose=0)
        assert final == pytest.approx(min(history["val_loss"]), rel=1e-5)


def test_swap_ema_weights_with_a_backup(tmp_path):
    model = build(averaging())
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    with pytest.raises(ValueError, match="Place it after UnfreezeAtConvergence, with"):
        fit(model, swap, ours(backup_dir=tmp_path))
    fit(model, ours(backup_dir=tmp_path, restore_best_weights=False), swap)


def test_every_callback_of_keras_has_a_row():
    tested = "".join(name for name in globals() if name.startswith("test_")).replace("_", "")
    shipped = [
        name
        for name, one in vars(keras.callbacks).items()
        if isinstance(one, type) and issubclass(one, keras.callbacks.Callback)
    ]
    others = {"Callback", "CallbackList", "History"}
    missing = [n for n in shipped if n not in others and n.lower() not in tested]
    assert missing == []
