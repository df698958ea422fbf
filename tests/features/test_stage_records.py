"""Each stage trains on records of what is frozen in it, bit for bit as through the whole model."""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FeatureCache, FreezeGuard, FrozenBackbone, Stage, fine_tune
from keras_tl.callbacks import UnfreezeAtConvergence
from keras_tl.features import splitting
from keras_tl.features.unrolled import Unrolled
from keras_tl.features.worth import Terms, deepest, judge
from keras_tl.stages.joint_fits import JointFits
from tests import models
from tests.shared import examples, regression_data, seeded_dropout, values_of

X, Y = regression_data(16, seed=1)
VALIDATION = regression_data(8, seed=2)
RUN = {"batch_size": 8, "shuffle": False, "validation_data": VALIDATION}
EVER = {"epochs": 10, "samples": 8, "views": 1, "max_bytes": 1 << 40, "item_bytes": None}


def residual(blocks=3, dropout=0.0):
    inputs = keras.Input((models.FEATURES,))
    x = inputs
    for number in range(blocks):
        y = keras.layers.Dense(models.FEATURES, "tanh", name=f"block{number}_dense")(x)
        y = keras.layers.BatchNormalization(name=f"block{number}_norm")(y)
        y = keras.layers.Dropout(dropout, name=f"block{number}_drop")(y)
        x = keras.layers.Add(name=f"block{number}_add")([x, y])
    return keras.Model(inputs, x, name="residual")


def build(optimizer="adam", backbone=residual, **wrapping):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((models.FEATURES,))
    x = FrozenBackbone(backbone(), name="wrapper", **wrapping)(inputs)
    x = keras.layers.BatchNormalization(momentum=0.5)(x)
    x = seeded_dropout(0.3)(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x), name="functional")
    optimizer = keras.optimizers.get(optimizer)
    optimizer.learning_rate = 0.02
    # Not as a graph, in which TensorFlow fuses an Add with the matrix product before it.
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


STAGES = [
    {"layers": "block2.*", "learning_rate": 1e-2, "epochs": 1},
    {"layers": "block[12].*", "learning_rate": 1e-3, "epochs": 2},
    {"layers": "all", "learning_rate": 1e-4},
]


class Epochs(keras.callbacks.Callback):
    """Notes what a callback sees, and how far into the model the data goes in each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(("begins", epoch))

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(("ends", epoch, dict(logs), values_of(self.model)))


def check_same(build=build, *, epochs=6, others=lambda: (), **unfreezing):
    mine, theirs = Epochs(), Epochs()
    unfreezing = {"max_frozen_epochs": 1, "fine_tune_patience": 3, **unfreezing}
    switch = UnfreezeAtConvergence(verbose=0, **unfreezing)
    model = build()
    fit = model.fit(
        X, Y, epochs=epochs, callbacks=[*others(), theirs, switch, FreezeGuard(verbose=0)],
        verbose=0, **RUN,
    )  # fmt: skip
    other = build()
    ours = fine_tune(
        other, X, Y, epochs=epochs, record=True, callbacks=[*others(), mine], verbose=0, **RUN,
        **unfreezing,
    )  # fmt: skip
    assert ours.history == fit.history
    assert values_of(other) == values_of(model)
    assert mine.seen == theirs.seen
    assert other.history is ours
    return ours.history


@pytest.fixture
def trained(monkeypatch):
    """A list of the models that are trained in a run, by the number of their weights."""
    models_trained, original = [], JointFits.fit

    def fit(self, trainer, *data, **settings):
        models_trained.append(len(trainer.weights))
        return original(self, trainer, *data, **settings)

    monkeypatch.setattr(JointFits, "fit", fit)
    return models_trained


@pytest.mark.eager
def test_gradual_unfreezing_as_in_one_fit(trained):
    history = check_same(stages=STAGES)
    assert history["stage"] == [0, 1, 2, 2, 3, 3]
    whole = len(build().weights)
    # The head, with one block more in each stage, and in the last one all.
    assert trained == [whole - 18, whole - 12, whole - 6, whole]


@pytest.mark.slow
def test_gradual_unfreezing_as_in_one_fit_where_steps_are_compiled():
    check_same(stages=STAGES)


@pytest.mark.eager
@settings(max_examples=examples(6))
@given(
    layers=st.sampled_from(["block2.*", "block1.*", "block[12]_dense", "block2_dense"]),
    head_rate=st.sampled_from([None, 1e-3]),
    optimizer=st.sampled_from(["adam", "sgd", "rmsprop"]),
    mode=st.sampled_from(["always", "batchnorm"]),
    batchnorm=st.booleans(),
    restore=st.booleans(),
)
def test_any_stage_as_in_one_fit(layers, head_rate, optimizer, mode, batchnorm, restore):
    check_same(
        functools.partial(build, optimizer, inference_mode=mode),
        epochs=3,
        layers=layers,
        learning_rate=1e-2,
        head_learning_rate=head_rate,
        train_batchnorm=batchnorm,
        restore_best_weights=restore,
    )


@pytest.mark.eager
def test_rates_that_are_tried_are_one_record(batches_extracted):
    # None of them helps by so much.
    rates = {"learning_rate": "auto", "fine_tune_patience": 0, "warmup_steps": 1, "min_delta": 10.0}
    history = check_same(epochs=6, layers="block2.*", **rates)
    assert history["stage"] == [0, 1, 1, 2, 2, 3]
    # Of the head and of one stage, whatever number of rates it tried.
    assert len(batches_extracted) == 2 * 3


@pytest.mark.eager
def test_a_later_stage_is_checked_on_one_batch_of_the_training_data(monkeypatch):
    checked, original = [], splitting.difference

    def difference(*arguments, outputs_only, **settings):
        checked.append(outputs_only)
        return original(*arguments, outputs_only=outputs_only, **settings)

    monkeypatch.setattr(splitting, "difference", difference)
    run = {**RUN, "epochs": 4, "max_frozen_epochs": 1, "record": True, "verbose": 0}
    fine_tune(build(), X, Y, stages=STAGES, **run)
    # The first one on both data sets, and by the loss too.
    assert checked == [False, False, True, True]


@pytest.mark.eager
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="Its steps take and return states.")
def test_a_later_stage_in_which_the_model_gives_something_else_is_not_recorded(trained, capsys):
    class Distorts(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            predict_step = self.model.predict_step
            self.model.predict_step = lambda data: 1 + predict_step(data)

    run = {**RUN, "epochs": 2, "max_frozen_epochs": 1, "layers": "block2.*", "verbose": 2}
    model = build()
    fine_tune(model, X, Y, learning_rate=1e-2, record=True, callbacks=Distorts(), **run)
    assert trained[-1] == len(model.weights)
    assert "gives something else for the first batch" in capsys.readouterr().out


@pytest.mark.eager
def test_moving_averages_come_at_the_end_of_training_only():
    def averaged():
        return build(keras.optimizers.SGD(0.02, use_ema=True, ema_momentum=0.5))

    check_same(averaged, epochs=3, stages=STAGES[:2], restore_best_weights=False)


@pytest.mark.eager
def test_a_plain_nested_backbone():
    def plain():
        keras.utils.set_random_seed(0)
        base = residual()
        base.trainable = False
        model = keras.Sequential(
            [keras.Input((4,)), base, keras.layers.Dense(1)], name="functional"
        )
        model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
        return model

    check_same(plain, backbone="residual", layers="block2.*", learning_rate=1e-2, epochs=2)


@pytest.mark.eager
def test_a_model_on_the_inputs_of_its_backbone(trained):
    def on_its_inputs():
        keras.utils.set_random_seed(0)
        backbone = FrozenBackbone(residual())
        x = seeded_dropout(0.3)(backbone(backbone.backbone.input))
        model = keras.Model(backbone.backbone.input, keras.layers.Dense(1)(x))
        model.compile(keras.optimizers.Adam(0.02), "mse")
        return model

    check_same(on_its_inputs, stages=STAGES[:1], epochs=2)
    whole = len(on_its_inputs().weights)
    assert trained == [whole - 18, whole - 12]


@pytest.mark.eager
@pytest.mark.parametrize(
    "interrupted_at, stages, epochs",
    [(2, STAGES[:2], 4), pytest.param(4, STAGES, 6, marks=pytest.mark.slow)],
)
def test_a_run_goes_on_from_its_backup_in_a_recorded_stage(
    interrupted_at, stages, epochs, tmp_path, trained
):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == interrupted_at:
                raise KeyboardInterrupt

    run = {**RUN, "epochs": epochs, "max_frozen_epochs": 1, "record": True, "verbose": 0}
    run["stages"] = stages
    undisturbed = build()
    history = fine_tune(undisturbed, X, Y, **run).history
    run["backup_dir"] = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(build(), X, Y, callbacks=Interrupt(), **run)
    trained.clear()
    model = build()
    rest = fine_tune(model, X, Y, **run).history
    assert rest["loss"] == history["loss"][interrupted_at:]
    assert values_of(model) == values_of(undisturbed)
    assert trained[0] < len(model.weights) or interrupted_at == 4


@pytest.mark.eager
def test_features_of_another_run_are_never_used(tmp_path, batches_extracted):
    run = {**RUN, "epochs": 2, "max_frozen_epochs": 1, "record": True, "verbose": 0}
    run |= {"cache_dir": tmp_path, "layers": "block2.*", "learning_rate": 1e-2}
    first = fine_tune(build(), X, Y, **run).history
    batches_extracted.clear()
    assert fine_tune(build(), X, Y, **run).history == first
    assert batches_extracted == []
    run["layers"] = "block[12].*"  # Of which less is frozen.
    assert fine_tune(build(), X, Y, **run).history != first
    assert len(batches_extracted) == 3


@pytest.mark.eager
def test_dropout_that_is_on_ends_what_is_recorded():
    model = dropping()
    models.frozen_backbone_of(model).unfreeze("block2.*")
    cut = deepest(Unrolled(model))
    assert cut.name == '"block0_norm"'


def augmented():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((models.FEATURES,))
    x = keras.layers.GaussianNoise(0.5, name="augmentation")(inputs)
    x = FrozenBackbone(residual(), name="wrapper")(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    return model


def dropping():
    return build(backbone=lambda: residual(dropout=0.5), inference_mode="batchnorm")


@pytest.mark.eager
@pytest.mark.parametrize("make", [augmented, dropping])
def test_views_let_random_layers_be_before_the_record_of_a_later_stage(
    make, trained, batches_extracted, monkeypatch
):
    seen, fit = {}, JointFits.fit

    def looked_at(self, trainer, features, *data, **settings):
        fit(self, trainer, features, *data, **settings)
        rows = seen.setdefault(len(trainer.weights), {})
        for _ in range(8):
            for x, y in features:
                for one, target in zip(x.numpy(), y.numpy(), strict=True):
                    rows.setdefault(target.tobytes(), set()).add(one.tobytes())

    monkeypatch.setattr(JointFits, "fit", looked_at)
    model = make()
    fine_tune(
        model, X, Y, stages=STAGES[:1], epochs=2, max_frozen_epochs=1, views=2, record=True,
        verbose=0, **RUN,
    )  # fmt: skip
    whole = len(model.weights)
    assert trained == [whole - 18, whole - 12]
    # Two passes to train on and one to validate on, for each of two stages.
    assert len(batches_extracted) == 2 * (2 * 2 + 1)
    assert {len(rows) for rows in seen[whole - 12].values()} == {2}


@pytest.mark.eager
def test_batch_normalization_that_trains_ends_what_is_recorded():
    base = residual()
    base.trainable = False
    base.get_layer("block1_norm").trainable = True
    base.get_layer("block1_norm").center = False
    model = keras.Sequential([keras.Input((4,)), base, keras.layers.Dense(1)])
    cut = deepest(Unrolled(model))
    assert all("block1_norm" != step.call.operation.name for step in cut.before)
    assert all(not step.call.operation.name.startswith("block2") for step in cut.before)


@pytest.mark.eager
def test_what_a_guard_leaves_out_is_not_taken_for_constant():
    model = build()
    wrapper = models.frozen_backbone_of(model)
    wrapper.unfreeze("block2.*")
    moving = wrapper.backbone.get_layer("block1_dense").weights
    assert deepest(Unrolled(model)).name == '"block1_add"'
    assert deepest(Unrolled(model, moving=moving)).name == '"block0_add"'


@pytest.mark.eager
@pytest.mark.parametrize("layers, trains", [("block2.*", 4), ("block[12].*", 6)])
def test_a_cache_is_cut_before_all_that_trains(layers, trains):
    model = build()
    models.frozen_backbone_of(model).unfreeze(layers)
    model.compile("adam", "mse")
    cache = FeatureCache(model)
    assert [id(one) for one in cache.head.trainable_variables] == [
        id(one) for one in model.trainable_variables
    ]
    assert len(cache.head.trainable_variables) == 2 + trains
    features = cache(X, Y, batch_size=8, shuffle=False, verbose=0)
    expected = model.predict(X, batch_size=8, verbose=0)
    assert cache.head.predict(features, verbose=0).tobytes() == expected.tobytes()


def test_a_cache_of_a_model_of_which_nothing_before_the_rest_is_frozen():
    model = build()
    models.frozen_backbone_of(model).unfreeze()
    with pytest.raises(ValueError, match="is not frozen"):
        FeatureCache(model)


@functools.cache
def whole_mobile_net():
    """Made once: it takes longer than all that is judged of it."""
    base = keras.applications.MobileNetV2((64, 64, 3), include_top=False, weights=None)
    wrapper = FrozenBackbone(base)
    inputs = keras.Input((64, 64, 3))
    x = keras.layers.GlobalAveragePooling2D()(wrapper(inputs))
    return keras.Model(inputs, keras.layers.Dense(1)(x))


def mobile_net(layers):
    model = whole_mobile_net()
    wrapper = models.frozen_backbone_of(model)
    wrapper.freeze()
    wrapper.unfreeze(layers)
    return model


@pytest.mark.parametrize("always", [False, True])
def test_maps_larger_than_the_images_are_not_recorded(always):
    terms = Terms(always=always, **EVER)
    late = judge(Unrolled(mobile_net("block_16.*")), (), terms, random=False)
    assert late.cut.name == '"block_15_add"'
    early = judge(Unrolled(mobile_net("block_.*")), (), terms, random=False)
    assert (early.cut is not None) == always
    assert always or "larger than the input" in early.why


@pytest.mark.parametrize(
    "changed, why",
    [({"epochs": 1}, "too few"), ({"max_bytes": 100}, "100 bytes may be kept")],
)
def test_what_is_not_worth_it_is_said(changed, why):
    terms = Terms(always=False, **{**EVER, **changed})
    verdict = judge(Unrolled(mobile_net("block_16.*")), (), terms, random=False)
    assert verdict.cut is None
    assert why in verdict.why


@pytest.mark.eager
@pytest.mark.parametrize("record, stages", [(True, 2), (False, 0)])
def test_record_says_whether(record, stages, trained, batches_extracted, capsys):
    run = {**RUN, "epochs": 2, "max_frozen_epochs": 1, "layers": "block2.*", "record": record}
    model = build()
    fine_tune(model, X, Y, learning_rate=1e-2, verbose=2, **run)
    assert len(batches_extracted) == 3 * stages
    assert min(trained) < len(model.weights) if record else set(trained) == {len(model.weights)}
    assert ('fine_tune records what comes after "block1_add"' in capsys.readouterr().out) == record


@pytest.mark.eager
def test_bytes_that_may_not_be_kept_are_not(batches_extracted, capsys):
    run = {**RUN, "epochs": 2, "max_frozen_epochs": 1, "layers": "block2.*", "record": True}
    fine_tune(build(), X, Y, learning_rate=1e-2, max_bytes=383, verbose=2, **run)
    printed = capsys.readouterr().out
    assert batches_extracted == []
    assert printed.count("384 bytes, and 383 bytes may be kept (`max_bytes`)") == 2
    fine_tune(build(), X, Y, learning_rate=1e-2, max_bytes=384, **{**run, "verbose": 0})
    assert len(batches_extracted) == 6


@pytest.mark.parametrize(
    "argument", [{"record": "always"}, {"record": None}, {"max_bytes": 0}, {"max_bytes": 1.5}]
)
def test_bad_settings(argument):
    with pytest.raises(ValueError, match=f"`{next(iter(argument))}` must be"):
        fine_tune(build(), X, Y, verbose=0, **argument)


@pytest.mark.eager
def test_half_precision_features_train_nearly_as_well():
    run = {**RUN, "epochs": 2, "max_frozen_epochs": 1, "record": True, "verbose": 0}
    run |= {"layers": "block2.*", "learning_rate": 1e-2}
    whole, half = (fine_tune(build(), X, Y, dtype=d, **run).history for d in (None, "bfloat16"))
    assert whole["val_loss"] != half["val_loss"]
    np.testing.assert_allclose(half["val_loss"], whole["val_loss"], rtol=0.1)


@pytest.mark.eager
def test_what_no_later_stage_needs_is_freed():
    kept = []

    class Kept(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept.append([one for one in readers if one.samples_in_memory])

    from keras_tl.features import feature_cache

    readers, original = [], feature_cache.RecordReader

    class Reader(original):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            readers.append(self)

        @property
        def samples_in_memory(self):
            return len(self._in_memory[0])

    feature_cache.RecordReader = Reader
    try:
        run = {**RUN, "epochs": 4, "max_frozen_epochs": 1, "record": True, "verbose": 0}
        stages = [Stage(**one) for one in STAGES[1:]]
        fine_tune(build(), X, Y, stages=stages, callbacks=Kept(), **run)
    finally:
        feature_cache.RecordReader = original
    # Features to train and to validate on, of one stage at a time, and none in the last one.
    assert [len(one) for one in kept] == [2, 2, 2, 0]
    assert not any(one.samples_in_memory for one in readers)


def test_dimensions_that_are_open_are_those_of_the_data():
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    shapes = Unrolled(model).shapes([keras.KerasTensor((None, 7, 4))])
    assert shapes[id(inputs)] == (7, 4)
    assert shapes[id(model.output)] == (7, 3)
