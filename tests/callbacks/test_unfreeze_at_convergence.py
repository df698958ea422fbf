import csv
import math
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FrozenBackbone, UnfreezeAtConvergence, memory_report
from keras_tl.stages import switching
from tests import models
from tests.shared import Recorder, Scripted, as_bytes, regression_data, values_of

pytestmark = [pytest.mark.covers("part: UnfreezeAtConvergence"), pytest.mark.eager]

X, Y = regression_data()


@pytest.fixture
def compiled(_eager):
    """Has a test trace its steps: whether a switch renews them is its point."""
    tf.config.run_functions_eagerly(False)


COMPILED = pytest.mark.usefixtures("compiled")


def build(outer=models.functional_outer, optimizer=None, kinds=("dense", "batchnorm", "dense")):
    wrapper = FrozenBackbone(models.functional(kinds))
    model = outer(wrapper, [keras.layers.Dropout(0.5)])
    model.compile(optimizer or keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return model, wrapper


def fit(model, *callbacks, epochs=6, **arguments):
    arguments.setdefault("validation_data", (X, Y))
    return model.fit(
        X, Y, batch_size=16, epochs=epochs, callbacks=list(callbacks), verbose=0, **arguments
    )


def scripted_fit(model, callback, values, *callbacks, **arguments):
    """Trains for as many epochs as there are values, which are what `callback` monitors."""
    script = Scripted(callback.monitor, values)
    arguments.setdefault("validation_data", None)
    return fit(model, script, *callbacks, callback, epochs=len(values), **arguments)


def unfreezer(learning_rate=1e-3, **arguments):
    return UnfreezeAtConvergence(
        learning_rate,
        **{"monitor": "score", "mode": "min", "patience": 1, "verbose": 0} | arguments,
    )


# The stages.


def test_switches_at_the_epoch_after_convergence():
    model, wrapper = build()
    callback = unfreezer(patience=2)

    history = scripted_fit(model, callback, [3, 2, 2, 2, 1, 1])

    assert history.history["stage"] == [0, 0, 0, 0, 1, 1]
    rates = history.history["learning_rate"]
    assert rates == [*[float(np.float32(0.01))] * 4, *[float(np.float32(1e-3))] * 2]
    assert wrapper.trainable
    assert callback.stage == 1


def test_other_callbacks_see_each_epochs_end_as_it_was_trained():
    model, wrapper = build()
    after = Recorder(lambda model: (wrapper.trainable, float(model.optimizer.learning_rate)))
    callback = unfreezer()
    fit(model, Scripted("score", [1, 1, 1]), callback, after, epochs=3)
    first, fine = float(np.float32(0.01)), float(np.float32(1e-3))
    assert after.records == [(False, first), (False, first), (True, fine)]


def test_transition_says_what_happened():
    model, _ = build()
    callback = unfreezer()
    frozen = 5
    scripted_fit(model, callback, [1, 2, 1])

    (transition,) = callback.transitions
    assert (transition.epoch, transition.stage, transition.reason) == (2, 1, "converged")
    assert transition.value == 1
    assert math.isclose(transition.learning_rate_before, 0.01, rel_tol=1e-6)
    assert math.isclose(transition.learning_rate_after, 1e-3, rel_tol=1e-6)
    assert (transition.trainable_before, transition.trainable_after) == (frozen, frozen + 40)
    assert len(transition.layers) == 2


@COMPILED
def test_only_the_head_moves_before_and_the_backbone_after():
    model, wrapper = build()
    recorder = Recorder(lambda model: as_bytes(wrapper.weights))
    before = as_bytes(wrapper.weights)
    scripted_fit(model, unfreezer(restore_best_weights=False), [1, 1, 1, 1], recorder)

    frozen, switched, *_, last = recorder.records
    assert frozen == switched == before
    moved = {a[0] for a, b in zip(before, last) if a != b}
    assert moved == {w.path for w in wrapper.weights if w.name in ("kernel", "bias")}


def test_unfreezes_only_what_is_selected():
    model, wrapper = build()
    scripted_fit(model, unfreezer(layers=1), [1, 1, 1])
    assert len(wrapper.trainable_weights) == 2


def test_trains_batchnorm_on_demand_with_constant_statistics():
    model, wrapper = build()
    statistics = as_bytes(models.statistics(wrapper))
    scripted_fit(model, unfreezer(train_batchnorm=True), [1, 1, 1])
    assert "gamma" in {w.name for w in wrapper.trainable_weights}
    assert as_bytes(models.statistics(wrapper)) == statistics


def test_stops_and_restores_when_fine_tuning_diverges():
    model, _ = build()
    recorder = Recorder(values_of)
    history = scripted_fit(model, unfreezer(), [2, 2, 1, math.nan, 0, 0], recorder)
    assert history.history["stage"] == [0, 0, 1, 1]
    assert values_of(model) == recorder.records[2]


def test_head_that_is_best_is_what_remains():
    model, _ = build()
    recorder = Recorder(values_of)
    scripted_fit(model, unfreezer(), [2, 1, 1, 5, 4], recorder)
    assert values_of(model) == recorder.records[1]


def test_best_of_the_frozen_stage_is_restored_before_fine_tuning():
    model, _ = build()
    recorder = Recorder(values_of)
    at_switch = []

    class AfterSwitch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            at_switch.append(values_of(self.model))

    callback = unfreezer(patience=2)
    script = Scripted("score", [1, 2, 2, 2])
    fit(model, script, recorder, callback, AfterSwitch(), epochs=4)
    assert at_switch[3] == recorder.records[0] != recorder.records[2]


def test_weights_are_left_alone_if_not_to_be_restored():
    model, _ = build()
    recorder = Recorder(values_of)
    scripted_fit(model, unfreezer(restore_best_weights=False), [1, 2, 3, 4], recorder)
    assert values_of(model) == recorder.records[-1]


def test_regularizers_of_the_backbone_do_not_hide_an_improvement():
    model, wrapper = build()
    for weight in wrapper.backbone.weights:
        if weight.name == "kernel":
            weight.regularizer = keras.regularizers.L2(10.0)
    callback = UnfreezeAtConvergence(1e-4, patience=1, max_frozen_epochs=2, verbose=0)
    history = fit(model, callback, epochs=8).history["val_loss"]

    assert min(history[2:]) > max(history[:2]), "the loss must jump for the test to mean anything"
    assert math.isclose(model.evaluate(X, Y, verbose=0), min(history[2:]), rel_tol=1e-6)


def test_mode_auto_asks_the_metric():
    model, _ = build()
    model.compile("sgd", "mse", metrics=[keras.metrics.R2Score(name="r2")])
    callback = UnfreezeAtConvergence(monitor="val_r2", patience=1, verbose=0)
    script = Scripted("val_r2", [0.1, 0.2, 0.3, 0.3, 0.3])
    history = fit(model, script, callback, epochs=5)
    assert history.history["stage"] == [0, 0, 0, 0, 1]


# Optimizers.


@COMPILED
def test_takes_a_schedule_after_a_schedule():
    decay = keras.optimizers.schedules.ExponentialDecay
    model, _ = build(optimizer=keras.optimizers.Adam(decay(0.01, 1, 0.5)))
    callback = unfreezer(decay(0.5, 1, 0.5, staircase=True))
    history = scripted_fit(model, callback, [1, 1, 1, 1])
    assert history.history["learning_rate"][2:] == [0.25, 0.125]


def test_takes_a_callable():
    model, _ = build()
    history = scripted_fit(model, unfreezer(lambda: 0.25), [1, 1, 1])
    assert history.history["learning_rate"][2:] == [0.25]


def test_takes_an_optimizer_and_uses_it_with_its_own_rate():
    model, _ = build()
    sgd = keras.optimizers.SGD(0.25, momentum=0.5)
    callback = UnfreezeAtConvergence(
        optimizer=sgd, monitor="score", mode="min", patience=1, verbose=0
    )
    history = scripted_fit(model, callback, [1, 1, 1])
    assert type(model.optimizer) is type(sgd)
    assert model.optimizer.momentum == 0.5
    # A copy: the next `fit` begins with what was given.
    assert not sgd.built
    assert history.history["learning_rate"][2:] == [0.25]


@COMPILED
def test_exclusions_from_weight_decay_survive_the_switch():
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model, _ = build(optimizer=optimizer)
    scripted_fit(model, unfreezer(), [1, 1, 1])
    use = {w.name: model.optimizer._use_weight_decay(w) for w in model.trainable_weights}
    assert use == {"kernel": True, "bias": False}


# Without a FrozenBackbone.


def plain(kinds=("dense", "batchnorm", "dense")):
    base = models.functional(kinds)
    inputs = keras.Input((models.FEATURES,))
    model = keras.Model(inputs, keras.layers.Dense(1)(base(inputs, training=False)))
    return model, base


@pytest.mark.parametrize("already_frozen", [False, True])
def test_plain_backbone_is_frozen_then_unfrozen_without_its_batchnorm(already_frozen):
    model, base = plain()
    base.trainable = not already_frozen
    model.compile("sgd", "mse")
    recorder = Recorder(lambda model: as_bytes(base.weights))
    before = as_bytes(base.weights)

    callback = unfreezer(0.1, backbone=base, restore_best_weights=False)
    scripted_fit(model, callback, [1, 1, 1], recorder)

    assert recorder.records[0] == recorder.records[1] == before
    moved = {a[0] for a, b in zip(before, as_bytes(base.weights)) if a != b}
    assert moved == {w.path for w in base.weights if w.name in ("kernel", "bias")}


def test_list_of_layers_is_a_backbone():
    dense = [keras.layers.Dense(4, name=name) for name in "abc"]
    model = keras.Sequential([keras.Input((4,)), *dense, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    callback = unfreezer(backbone=dense, layers="b|c")
    scripted_fit(model, callback, [1, 1, 1])
    assert [layer.trainable for layer in dense] == [False, True, True]
    assert callback.transitions[0].layers == ("b", "c")


def test_backbone_whose_layers_were_taken_over_one_by_one():
    base = models.functional(["dense", "dense"])
    model = keras.Model(base.input, keras.layers.Dense(1)(base.output))
    model.compile("sgd", "mse")
    scripted_fit(model, unfreezer(backbone=base, layers=1), [1, 1, 1])
    assert len(model.trainable_weights) == 4


def test_wrapped_model_may_be_named_instead_of_its_wrapper():
    model, wrapper = build()
    scripted_fit(model, unfreezer(backbone=wrapper.backbone, train_batchnorm=True), [1, 1, 1])
    assert "gamma" in {w.name for w in wrapper.trainable_weights}


def test_selection_need_not_match_in_every_backbone():
    left, right = (FrozenBackbone(models.functional(["dense"])) for _ in range(2))
    left.backbone.layers[1].name = "only_left"
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(1)(keras.layers.Add()([left(inputs), right(inputs)]))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    scripted_fit(model, unfreezer(layers="only_left"), [1, 1, 1])
    assert (left.trainable, right.trainable) == (True, False)


# Beside other callbacks.


def test_early_stopping_before_it_counts_as_convergence_and_starts_over():
    model, _ = build()
    stopping = keras.callbacks.EarlyStopping("score", mode="min", patience=2)
    callback = unfreezer(patience=100)
    history = scripted_fit(model, callback, [1, 1, 1, 3, 2, 2, 2, 2, 2], stopping)
    assert history.history["stage"] == [0, 0, 0, 1, 1, 1, 1]
    assert callback.transitions[0].reason == "early_stopping"


def test_early_stopping_that_restores_does_not_undo_the_best_of_the_run():
    model, _ = build()
    recorder = Recorder(values_of)
    stopping = keras.callbacks.EarlyStopping(
        "score", mode="min", patience=1, restore_best_weights=True
    )
    callback = unfreezer(patience=100)
    scripted_fit(model, callback, [1, 1, 5, 6], recorder, stopping)
    assert values_of(model) == recorder.records[0]


def test_stop_of_another_callback_ends_training_with_a_warning():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    model, _ = build()
    with pytest.warns(UserWarning, match="still frozen, because another callback stopped it"):
        history = scripted_fit(model, unfreezer(patience=9), [1] * 5, Stop())
    assert history.epoch == [0, 1]


def test_early_stopping_of_a_broken_run_ends_it():
    model, _ = build()
    stopping = keras.callbacks.EarlyStopping("score", mode="min", patience=1)
    callback = unfreezer(patience=9)
    broken = Scripted("loss", [math.nan] * 5)
    with pytest.warns(UserWarning, match="another callback stopped it"):
        history = scripted_fit(model, callback, [1] * 5, broken, stopping)
    assert history.epoch == [0, 1]


def test_training_that_ends_frozen_is_warned_of():
    model, _ = build()
    words = "still frozen, because stage 0 ended with the last epoch.*Pass more `epochs`"
    with pytest.warns(UserWarning, match=words):
        scripted_fit(model, unfreezer(), [1, 1])


def test_keys_are_logged_from_the_first_epoch(tmp_path):
    model, _ = build()
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    callback = unfreezer()
    fit(model, Scripted("score", [1, 1, 1]), callback, log, epochs=3)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["0", "0", "1"]
    assert len({row["learning_rate"] for row in rows}) == 2


# Later fits.


@COMPILED
def test_second_fit_with_the_same_callback_goes_on_fine_tuning():
    model, _ = build()
    callback = unfreezer()
    scripted_fit(model, callback, [1, 1, 1])
    optimizer = model.optimizer

    history = scripted_fit(model, callback, [1, 1, 1])

    assert history.history["stage"] == [1, 1, 1]
    assert callback.transitions == []
    assert model.optimizer is optimizer


def test_second_fit_goes_on_fine_tuning_a_plain_backbone():
    model, base = plain(["dense"])
    model.compile("sgd", "mse")
    callback = unfreezer(backbone=base)
    scripted_fit(model, callback, [1, 1, 1])
    history = scripted_fit(model, callback, [1, 1, 1])
    assert history.history["stage"] == [1, 1, 1]
    assert base.trainable


@pytest.mark.parametrize("head_learning_rate", [None, 1e-2])
def test_loaded_model_with_a_plain_backbone_goes_on_fine_tuning(head_learning_rate, tmp_path):
    model, base = plain(["dense"])
    model.compile("adam", "mse")
    arguments = {"head_learning_rate": head_learning_rate}
    scripted_fit(model, unfreezer(backbone=base, **arguments), [1, 1, 1])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    callback = unfreezer(backbone=loaded.layers[1], **arguments)
    history = scripted_fit(loaded, callback, [1, 1])

    assert history.history["stage"] == [1, 1]
    assert callback.transitions == []
    values = values_of(loaded)
    assert values_of(keras.saving.load_model(tmp_path / "model.keras")) != values


@pytest.mark.parametrize("trained_first", ["statistics too", "another head", "nothing"])
def test_trainable_plain_backbone_that_no_stage_left_so_is_frozen(trained_first):
    model, base = plain(["dense", "batchnorm"] if trained_first == "statistics too" else ["dense"])
    model.compile("sgd", "mse")
    if trained_first != "nothing":
        model.fit(X, Y, verbose=0)
    if trained_first == "another head":
        model = keras.Model(base.input, keras.layers.Dense(1)(base.output))
        model.compile("sgd", "mse")
    history = scripted_fit(model, unfreezer(backbone=base), [1, 1, 1])
    assert history.history["stage"] == [0, 0, 1]


def test_fine_tuned_plain_backbone_whose_flags_and_steps_are_lost_is_frozen_with_a_warning():
    model, base = plain(["dense"])
    model.compile(keras.optimizers.Adam(2e-3), "mse")
    with pytest.warns(UserWarning, match="the learning rate of a fine-tuning stage.*To continue"):
        history = scripted_fit(model, unfreezer(2e-3, backbone=base), [1, 1, 1])
    assert history.history["stage"] == [0, 0, 1]


def test_a_plain_backbone_compiled_with_the_usual_rate_is_not_taken_for_fine_tuned():
    model, base = plain(["dense"])
    model.compile("adam", "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = scripted_fit(model, unfreezer(1e-3, backbone=base), [1, 1, 1])
    assert history.history["stage"] == [0, 0, 1]


class CompilesItself(keras.Model):
    def compile(self, optimizer="sgd", loss="mse", **arguments):
        super().compile(optimizer, loss, **arguments)


def test_model_whose_file_cannot_tell_a_stage_says_so(capsys):
    base = models.functional(["dense"])
    model = CompilesItself(base.input, keras.layers.Dense(1)(base.output))
    model.compile()
    scripted_fit(model, unfreezer(backbone=base, verbose=1), [1, 1])
    assert "If this CompilesItself was saved in a fine-tuning stage" in capsys.readouterr().out


def test_second_fit_with_another_model_starts_over():
    callback = UnfreezeAtConvergence(
        optimizer=keras.optimizers.SGD(0.25), monitor="score", mode="min", patience=1, verbose=0
    )
    for _ in range(2):
        model, _ = build()
        history = scripted_fit(model, callback, [1, 1, 1])
        assert history.history["stage"] == [0, 0, 1]
        assert history.history["learning_rate"][-1] == 0.25


@COMPILED
def test_loaded_model_goes_on_fine_tuning(tmp_path):
    model, _ = build()
    scripted_fit(model, unfreezer(), [1, 1, 1])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    history = scripted_fit(loaded, unfreezer(), [1, 1])
    assert history.history["stage"] == [1, 1]
    assert math.isclose(history.history["learning_rate"][0], 1e-3, rel_tol=1e-6)


# Messages and errors.


def test_says_what_it_does_and_what_remains(capsys):
    model, wrapper = build()
    scripted_fit(model, unfreezer(verbose=1, fine_tune_patience=1), [2, 2, 1, 1, 1])
    printed = capsys.readouterr().out
    first, second = (layer.name for layer in wrapper.backbone.layers if "dense" in layer.name)
    block = f"""\
Epoch 3: UnfreezeAtConvergence unfreezes "{wrapper.backbone.name}"
  because        score has not improved for 1 epoch (best 2)
  joining        2 layers: {first}, {second}
  parameters     5 -> 45 trainable
  learning rate  0.01 -> 0.001
  memory         {memory_report(model, batch_size=16)}
  next           fine-tuning until score stops improving for 1 epoch, then the end
"""
    assert block in printed
    assert "Epoch 4: UnfreezeAtConvergence stopped: score has not improved" in printed
    assert "restored the best weights, of epoch 3: score 1." in printed


def test_says_that_it_goes_on_fine_tuning(capsys):
    model, wrapper = build()
    wrapper.unfreeze()
    model.compile(keras.optimizers.SGD(0.25), "mse")
    scripted_fit(model, unfreezer(verbose=1), [1])
    assert "trainable already, with learning rate 0.25." in capsys.readouterr().out


def test_says_nothing_if_not_verbose(capsys):
    model, _ = build()
    scripted_fit(model, unfreezer(), [1, 1, 1])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": 0}, "`learning_rate` must be a finite number above 0.*=0"),
        ({"learning_rate": -1e-3}, "`learning_rate` must be.*-0.001"),
        ({"learning_rate": math.nan}, "`learning_rate` must be.*nan"),
        ({"learning_rate": "low"}, "`learning_rate` must be.*'low'"),
        ({"patience": -1}, "`patience` must be an int of at least 0.*-1"),
        ({"fine_tune_patience": -1}, "`fine_tune_patience` must be an int of at least 0.*-1"),
        ({"start_from_epoch": 0.5}, "`start_from_epoch` must be an int"),
        ({"max_frozen_epochs": 0}, "`max_frozen_epochs` must be an int of at least 1.*0"),
        ({"min_delta": math.nan}, "`min_delta` must be a finite number"),
        ({"monitor": None}, "`monitor` must be a name in the logs.*None"),
        ({"mode": "lowest"}, '`mode` must be "auto", "min" or "max".*lowest'),
        ({"optimizer": "adam"}, "`optimizer` must be a `keras.optimizers.Optimizer`.*'adam'"),
    ],
)
def test_refuses_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        UnfreezeAtConvergence(**arguments)


def test_refuses_an_optimizer_that_is_built():
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build([keras.Variable(1.0)])
    with pytest.raises(ValueError, match="built already"):
        UnfreezeAtConvergence(optimizer=optimizer)


def test_refuses_two_learning_rates():
    with pytest.raises(ValueError, match="would be lost"):
        UnfreezeAtConvergence(1e-3, optimizer=keras.optimizers.SGD(0.1))


def no_backbone():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    return model, {}


def foreign_backbone():
    model, _ = plain()
    return model, {"backbone": models.functional(["dense"])}


def no_layers():
    return build()[0], {"backbone": []}


def empty_selection():
    return build()[0], {"layers": "block5_.*"}


def batchnorm_of_a_plain_backbone():
    model, base = plain()
    return model, {"backbone": base, "train_batchnorm": True}


def several_rates():
    model, _ = build()
    several = keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD(0.1))
    model.compile(several, "mse")
    return model, {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            no_backbone,
            "has no FrozenBackbone. Wrap the pretrained model in keras_tl.FrozenBackbone",
        ),
        (foreign_backbone, "is not part of the model"),
        (no_layers, "`backbone` must be a Keras layer, a model or a list of layers"),
        (empty_selection, '`layers="block5_.*"` matches no layer'),
        (batchnorm_of_a_plain_backbone, "`train_batchnorm=True` needs a FrozenBackbone"),
        (several_rates, "MultiOptimizer, which has no single learning rate"),
    ],
)
def test_refuses_before_the_first_step(make, words):
    model, arguments = make()
    if not model.compiled:
        model.compile("sgd", "mse")
    before = values_of(model)
    with pytest.raises(ValueError, match=re.escape(words)):
        fit(model, UnfreezeAtConvergence(**arguments))
    assert values_of(model) == before


def test_refuses_a_monitor_that_is_not_in_the_logs():
    model, _ = build()
    callback = UnfreezeAtConvergence(monitor="val_acuracy", verbose=0)
    with pytest.raises(ValueError, match="`monitor='val_acuracy'` is not in the logs.*val_loss"):
        fit(model, callback)


def test_refuses_a_fit_without_validation_before_its_second_epoch():
    model, _ = build()
    callback, epochs = UnfreezeAtConvergence(verbose=0), Recorder(lambda model: None)
    with pytest.raises(ValueError, match="'val_loss'.*is not in the logs.*validation data"):
        fit(model, epochs, callback, epochs=3, validation_data=None)
    assert len(epochs.records) == 1


def test_a_fit_that_never_logs_what_a_callback_may_add_ends_as_any_other():
    model, _ = build()
    callback, ended = unfreezer(monitor="val_map"), Recorder(lambda model: None)
    ended.on_train_end = lambda logs: ended.records.append("end")
    with (
        pytest.warns(UserWarning, match="'val_map'.*Waiting for an epoch with validation"),
        pytest.warns(UserWarning, match="val_map was never in the logs"),
    ):
        history = fit(model, callback, ended, epochs=2, validation_data=None)
    assert history.history["stage"] == [0, 0]
    assert ended.records[-1] == "end"


@pytest.mark.filterwarnings("error:`monitor")
def test_waits_for_epochs_with_validation_with_no_warning():
    model, _ = build()
    callback = UnfreezeAtConvergence(1e-3, patience=1, min_delta=100.0, verbose=0)
    history = fit(model, callback, epochs=5, validation_freq=2)
    assert history.history["stage"] == [0, 0, 0, 0, 1]


def test_a_run_of_which_no_epoch_was_judged_says_so():
    callback = unfreezer(monitor="val_loss", max_frozen_epochs=1)
    with pytest.warns(UserWarning, match="val_loss was never in the logs, so no epoch was judged"):
        fit(build()[0], callback, epochs=3, validation_freq=9)
    assert (callback.stage, callback.best_epoch) == (1, None)


def test_says_what_something_else_has_unfrozen(capsys):
    model, wrapper = build()
    model.compile("adam", "mse")
    callback = unfreezer(max_frozen_epochs=2, verbose=1)
    unfreeze = keras.callbacks.LambdaCallback(
        # Keras itself trains them only once the switch has renewed the optimizer.
        on_epoch_end=lambda epoch, logs: epoch == 1 and wrapper.unfreeze("dense.*")
    )
    scripted_fit(model, callback, [1.0, 1.0, 1.0], unfreeze)
    transition = callback.transitions[0]
    assert transition.layers == ()
    assert len(transition.unfrozen_early) == 2
    said = capsys.readouterr().out
    assert "joining        nothing" in said
    assert "trainable, as before" in said


@COMPILED
def test_a_switch_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model, wrapper = build()
    recorder = Recorder(values_of)
    callback = unfreezer(patience=2)

    renew_functions = switching.renew_functions

    def fail(*args, **kwargs):
        if recorder.records:  # Not when the switch is tried.
            raise MemoryError("no room for slots")
        renew_functions(*args, **kwargs)

    monkeypatch.setattr(switching, "renew_functions", fail)
    with pytest.raises(MemoryError):
        scripted_fit(model, callback, [1, 2, 3, 4], recorder)
    monkeypatch.undo()

    assert values_of(model) == recorder.records[-1]
    assert not wrapper.trainable
    fit(model, epochs=1)
