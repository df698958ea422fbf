"""The pictures: what is in them is what happened, in every style."""

import itertools
import sys

import keras
import numpy as np
import pytest

from keras_tl import (
    FrozenBackbone,
    GroupOptimizer,
    Stage,
    UnfreezeAtConvergence,
    layerwise_learning_rates,
    plot_stages,
    plot_trainable,
)
from keras_tl.visualization.axes import COLORS
from tests import models
from tests.shared import Scripted, regression_data

pyplot = pytest.importorskip("matplotlib.pyplot")
X, Y = regression_data()


@pytest.fixture(scope="module")
def run():
    """A run of three stages, the best of which is the second epoch of the second."""
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense", "dense"])))
    model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
    callback = UnfreezeAtConvergence(
        monitor="score",
        mode="min",
        patience=1,
        stages=[Stage(1, 1e-3, head_learning_rate=5e-3), Stage("all", 1e-4, epochs=2)],
        verbose=0,
    )
    callbacks = [Scripted("score", [5, 5, 4, 3, 3.5, 6, 6]), callback]
    history = model.fit(X, Y, epochs=7, callbacks=callbacks, verbose=0)
    assert history.history["stage"] == [0, 0, 1, 1, 1, 2, 2]
    return callback, history


def texts(axes):
    return [one.get_text().strip() for one in axes.texts]


def lines(axes):
    return {one.get_label(): list(one.get_ydata()) for one in axes.lines}


def test_shows_metrics_stages_switches_and_the_best_epoch(run):
    callback, history = run
    axes, _ = plot_stages(callback).axes
    assert lines(axes)["score"] == history.history["score"]
    assert texts(axes) == ["frozen", "stage 1", "stage 2", "converged", "converged"]
    assert [round(x, 1) for x, _ in (one.get_position() for one in axes.texts)] == [
        *(1.5, 4.0, 6.5),
        *(2.5, 5.5),
    ]
    (star,) = [one for one in axes.lines if "best" in str(one.get_label())]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([4], [3])


def test_shows_the_learning_rate_of_each_group_on_a_logarithmic_axis(run):
    callback, history = run
    _, rates = plot_stages(callback).axes
    assert rates.get_yscale() == "log"
    shown = lines(rates)
    assert set(shown) == {
        "learning rate head",
        "learning rate backbone 1",
        "learning rate backbone 2",
    }
    expected = [rate or np.nan for rate in history.history["learning_rate_backbone_1"]]
    np.testing.assert_array_equal(shown["learning rate backbone 1"], expected)


@pytest.mark.parametrize("of", [lambda history: history, lambda history: history.history])
def test_a_history_is_enough(run, of):
    axes, _ = plot_stages(of(run[1]), metrics=["loss", "score"]).axes
    assert list(lines(axes)) == ["loss", "score"]
    assert texts(axes) == ["frozen", "stage 1", "stage 2"]


def test_a_run_without_stages():
    figure = plot_stages({"loss": [3.0, 2.0], "val_loss": [4.0, 3.0]})
    (axes,) = figure.axes
    assert lines(axes) == {"loss": [3.0, 2.0], "val_loss": [4.0, 3.0]}


# Validation in some epochs only.


def test_validation_in_some_epochs_only():
    logs = {"loss": [5.0, 4.0, 3.0, 2.0, 1.0], "val_loss": [4.0, 2.0], "val_mae": [3.0, 1.0]}
    with pytest.warns(UserWarning, match="at 2, 4, as with `validation_freq=2`") as warned:
        (axes,) = plot_stages(logs, metrics=["loss", "val_loss", "val_mae"]).axes
    assert len(warned) == 1
    assert [list(line.get_xdata()) for line in axes.lines[1:]] == [[2, 4], [2, 4]]


@pytest.fixture(scope="module")
def validated():
    """Returns a function that trains, and returns the callback, the history and what `fit` knew."""
    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    runs = {}

    class Validates(keras.callbacks.Callback):
        """Scripts what validation measures, and notes when it does."""

        def on_train_begin(self, logs=None):
            self.values = {}

        def on_epoch_end(self, epoch, logs=None):
            if "val_loss" in logs:
                logs["val_loss"] = self.values[epoch + 1] = [9, 8, 7, 6, 1, 4, 5][epoch]

    def train(validation_freq, initial_epoch=0):
        key = (str(validation_freq), initial_epoch)
        runs[key] = runs.get(key) or new_run(validation_freq, initial_epoch)
        return runs[key]

    def new_run(validation_freq, initial_epoch):
        switch = UnfreezeAtConvergence(1e-3, max_frozen_epochs=3, verbose=0)
        validates = Validates()
        model.layers[1].freeze()
        model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
        history = model.fit(
            X,
            Y,
            validation_data=(X, Y),
            validation_freq=validation_freq,
            initial_epoch=initial_epoch,
            epochs=7,
            callbacks=[validates, switch],
            verbose=0,
        )
        return switch, history, validates.values

    return train


WAITS = pytest.mark.filterwarnings("ignore:.*Waiting for an epoch with validation")
FREQUENCIES = [(2, 0), (5, 0), (2, 1), ([1, 5], 0), ([2, 3, 6], 1)]


@WAITS
@pytest.mark.parametrize(("validation_freq", "initial_epoch"), FREQUENCIES)
@pytest.mark.parametrize("told", ["by the callback", "by the argument"])
def test_values_are_drawn_at_the_epochs_in_which_they_were_measured(
    validated, validation_freq, initial_epoch, told
):
    callback, history, measured = validated(validation_freq, initial_epoch)
    if told == "by the callback":
        axes = plot_stages(callback).axes[0]
    else:
        axes = plot_stages(history, validation_freq=validation_freq).axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    (line, loss) = drawn["val_loss"], drawn["loss"]
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == measured
    assert list(loss.get_xdata()) == list(range(initial_epoch + 1, 8))
    if told == "by the callback":
        star = drawn["best, restored"]
        best = min(measured, key=measured.get)
        assert (list(star.get_xdata()), list(star.get_ydata())) == ([best], [measured[best]])
        (switch,) = [
            x for x, _ in (t.get_position() for t in axes.texts) if x == initial_epoch + 3.5
        ]
        assert switch == callback.transitions[0].epoch + 0.5


@WAITS
@pytest.mark.parametrize(("validation_freq", "initial_epoch"), [(2, 0), (2, 1)])
def test_a_history_alone_is_drawn_as_with_the_only_int_that_fits(
    validated, validation_freq, initial_epoch
):
    _, history, measured = validated(validation_freq, initial_epoch)
    with pytest.warns(UserWarning, match=f"as with `validation_freq={validation_freq}`"):
        line = plot_stages(history).axes[0].lines[1]
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == measured


@pytest.mark.parametrize(
    ("values", "words"),
    [(1, "`validation_freq` may be 3, 4, 5, or a list"), (3, "no int fits, or a list")],
)
def test_a_history_alone_is_not_drawn_where_other_ints_fit_or_none(values, words):
    logs = {"loss": [5.0, 4.0, 3.0, 2.0, 1.0], "val_loss": [1.0] * values}
    with pytest.raises(ValueError, match=f"{words}. Pass `validation_freq=` as to `fit`"):
        plot_stages(logs)


@pytest.mark.parametrize("freq", [1, 3, [1], [1, 2, 3]])
def test_another_validation_freq_than_that_of_the_run(freq):
    logs = {"loss": [5.0, 4.0, 3.0, 2.0, 1.0], "val_loss": [4.0, 2.0]}
    with pytest.raises(ValueError, match="`val_loss` has 2 values, but with"):
        plot_stages(logs, validation_freq=freq)


@pytest.mark.parametrize("freq", [0, -1, 1.5, True, "2", [0], [1.5]])
def test_a_validation_freq_that_is_none(freq):
    with pytest.raises(ValueError, match="`validation_freq` must be an int of at least 1"):
        plot_stages({"loss": [1.0, 2.0], "val_loss": [1.0]}, validation_freq=freq)


def test_what_is_logged_in_some_epochs_is_drawn_there_or_not_at_all(validated):
    class Now(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch in (0, 3):
                logs["score"] = epoch

    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
    switch = UnfreezeAtConvergence(1e-3, monitor="loss", max_frozen_epochs=2, verbose=0)
    history = model.fit(X, Y, epochs=5, callbacks=[Now(), switch], verbose=0)
    line = plot_stages(switch, metrics="score").axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 4]
    with pytest.raises(ValueError, match="`score` has 2 values in 5 epochs, and it is not known"):
        plot_stages(history, metrics="score")


# Which run it is.


@WAITS
def test_the_callback_draws_its_own_run_after_a_later_one(validated):
    callback, _, measured = validated(2)
    validated(1)
    line = plot_stages(callback).axes[0].lines[1]
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == measured


def test_a_history_of_several_fits_does_not_know_its_epochs():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    history = keras.callbacks.History()
    for _ in range(2):
        model.fit(X, Y, epochs=2, callbacks=[history], verbose=0)
    with pytest.raises(ValueError, match="among the `callbacks` of several fits"):
        plot_stages(history)
    assert list(plot_stages(history.history).axes[0].lines[0].get_xdata()) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("history", "metrics", "message"),
    [
        ({}, None, "draws the `History`"),
        (UnfreezeAtConvergence(), None, "with which no `fit` has run"),
        ({"loss": [1.0]}, ["acuracy"], "which are loss. Received: .*acuracy"),
        ({"stage": [0, 1]}, None, "`metrics` must name quantities"),
    ],
)
def test_nothing_to_draw(history, metrics, message):
    with pytest.raises(ValueError, match=message):
        plot_stages(history, metrics=metrics)


def grouped_model():
    base = models.functional(["dense", "batchnorm", "dense"])
    wrapper = FrozenBackbone(base)
    model = models.functional_outer(wrapper)
    wrapper.unfreeze()
    rates = layerwise_learning_rates(wrapper, 1e-3, 0.1)
    groups = {"backbone": keras.optimizers.SGD(), "head": keras.optimizers.SGD(1e-2)}
    model.compile(GroupOptimizer(groups, assign={"backbone": rates}), "mse")
    return model


@pytest.mark.parametrize("built", [False, True])
def test_a_strip_of_layers_as_wide_as_they_have_parameters(built):
    model = grouped_model()
    if built:
        model.optimizer.build(model.trainable_variables)
    axes, bar = plot_trainable(model).axes
    assert [patch.get_width() for patch in axes.patches] == [20, 16, 20, 5]
    assert axes.get_xlim() == (0, model.count_params())
    assert [bool(patch.get_hatch()) for patch in axes.patches] == [False, True, False, False]
    colors = [patch.get_facecolor() for patch in axes.patches]
    assert len(set(colors)) == 4
    assert bar.get_ylabel() == "learning rate"
    assert axes.get_title().endswith("45 of 61 parameters train")


def test_a_layer_of_which_a_part_trains_is_in_two_pieces():
    layer = keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((2,)), layer])
    layer.kernel.trainable = False
    (axes,) = plot_trainable(model).axes
    widths = {patch.get_width(): bool(patch.get_hatch()) for patch in axes.patches}
    assert widths == {6: True, 3: False}


def test_each_weight_counts_once_however_deep_or_shared():
    base = models.functional(["nested", "shared", "conv"])
    wrapper = FrozenBackbone(base)
    inputs = keras.Input((models.FEATURES,))
    model = keras.Model(inputs, keras.layers.Dense(1)(wrapper(wrapper(inputs))))
    (axes,) = plot_trainable(model).axes
    assert sum(patch.get_width() for patch in axes.patches) == model.count_params()


def test_a_model_that_is_not_built():
    with pytest.raises(ValueError, match="has no weights to draw; build it first"):
        plot_trainable(keras.Sequential([keras.layers.Dense(2)]))


DRAW = [
    lambda run, ax: plot_stages(run[0], ax=ax),
    lambda _, ax: plot_trainable(grouped_model(), ax=ax),
]


@pytest.mark.parametrize("draw", DRAW, ids=["stages", "trainable"])
@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_draws_a_png_in_the_style_in_force(run, draw, style, tmp_path):
    with pyplot.style.context(style):
        figure = draw(run, None)
        figure.savefig(tmp_path / "picture.png")
        text = pyplot.rcParams["text.color"]
        background = pyplot.rcParams["figure.facecolor"]
        pixels = pyplot.imread(tmp_path / "picture.png")
    assert figure.axes[0].title.get_color() == text
    np.testing.assert_array_equal(pixels[0, 0, :3], float(background == "white"))
    assert pixels[..., :3].std() > 0.05
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("draw", DRAW, ids=["stages", "trainable"])
def test_draws_on_given_axes(run, draw):
    figure, ax = pyplot.subplots()
    try:
        assert draw(run, ax) is figure
        assert figure.axes[0] is ax and ax.has_data()
    finally:
        pyplot.close(figure)


# What is seen without the cones for red, or for green (Machado, Oliveira and Fernandes, 2009).
SEEN = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab(color, seen):
    """The color as it is seen, in CIELAB, where a distance of 2.3 is just noticeable."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array(XYZ) @ np.clip(np.array(seen) @ linear, 0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def smallest_difference(colors, seen):
    pairs = itertools.combinations([lab(color, seen) for color in colors], 2)
    return min(np.linalg.norm(one - other) for one, other in pairs)


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_colors_differ_for_those_who_cannot_tell_red_from_green(seen):
    assert smallest_difference(COLORS, seen) > 15
    assert smallest_difference(["#00A000", "#C05000", "#A06000"], seen) < 15


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    for name in ("matplotlib", "matplotlib.pyplot", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"`keras_tl\[plot\]`"):
        plot_stages({"loss": [1.0]})
