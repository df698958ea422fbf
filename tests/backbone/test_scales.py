"""The selection "scales": biases and scales, and no kernels (BitFit)."""

import keras
import pytest

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
    fine_tune,
    trainable_report,
    unwrap,
)
from keras_tl.backbone import freezing
from keras_tl.backbone.model_backbones import Backbones
from keras_tl.backbone.scales import scale_weights
from tests import models
from tests.shared import Recorder, as_bytes, regression_data

LAYERS = keras.layers
SCALES = ["a/bias", "norm/gamma", "norm/beta", "b/bias"]
BATCHNORM = ["bn/gamma", "bn/beta"]


def build(bias=True):
    return models.sequential_of(
        LAYERS.Dense(4, use_bias=bias, name="a"),
        LAYERS.BatchNormalization(momentum=0.5, name="bn"),
        *([LAYERS.LayerNormalization(name="norm")] if bias else []),
        LAYERS.Dense(4, use_bias=bias, name="b"),
    )


def training(layer):
    return ["/".join(weight.path.split("/")[-2:]) for weight in layer.trainable_weights]


def kernels(layer):
    return [weight for weight in layer.weights if weight.name == "kernel"]


def compiled(backbone, optimizer=None):
    model = models.functional_outer(backbone)
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse")
    return model


@pytest.mark.parametrize("train_batchnorm", [False, True])
def test_selects_biases_and_scales(train_batchnorm):
    wrapper = FrozenBackbone(build())
    wrapper.unfreeze("scales", train_batchnorm=train_batchnorm)
    assert sorted(training(wrapper)) == sorted(SCALES + BATCHNORM * train_batchnorm)


def test_attention_and_recurrent_layers_have_biases_of_more_dimensions():
    attention, recurrent = LAYERS.MultiHeadAttention(2, 3), LAYERS.GRU(2)
    x = keras.Input((5, 4))
    recurrent(attention(x, x))
    for layer in (attention, recurrent):
        found = [w for one in freezing.flatten_layers(layer) for w in scale_weights(one)]
        named = [w for w in layer.weights if w.name == "bias"]
        assert found == named != []


@pytest.mark.clients
def test_a_hub_backbone_trains_its_biases_and_keeps_its_embeddings():
    hub = pytest.importorskip("keras_hub")
    base = hub.models.BertBackbone(
        vocabulary_size=9,
        num_layers=1,
        num_heads=2,
        hidden_dim=4,
        intermediate_dim=6,
        max_sequence_length=5,
    )
    wrapper = FrozenBackbone(base)
    wrapper.unfreeze("scales")
    named = [w for w in base.weights if w.name in ("bias", "gamma", "beta")]
    assert wrapper.trainable_weights == named
    assert any("self_attention_layer/query/bias" in weight.path for weight in named)


def test_freezes_scales_alone():
    wrapper = FrozenBackbone(build())
    wrapper.unfreeze("all")
    wrapper.freeze("scales")
    assert training(wrapper) == ["a/kernel", "b/kernel"]


def test_biases_frozen_by_hand_stay_frozen():
    kernel_alone = LAYERS.Dense(4, use_bias=False)
    base = models.sequential_of(*build().layers, kernel_alone)
    base.get_layer("a").bias.trainable = False
    base.get_layer("norm").trainable = False
    wrapper = FrozenBackbone(base)
    wrapper.unfreeze("scales")
    assert training(wrapper) == ["b/bias"]


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (models.sequential_of(LAYERS.Dense(4, use_bias=False)), "has biases or scales"),
        (build(bias=False), "`train_batchnorm=True`"),
    ],
)
def test_a_selection_without_scales_is_an_error_before_any_step(base, match):
    model = compiled(FrozenBackbone(base))
    before = as_bytes(model.weights)
    with pytest.raises(ValueError, match=match):
        model.fit(*regression_data(), callbacks=[UnfreezeAtConvergence(layers="scales")], verbose=0)
    assert as_bytes(model.weights) == before


@pytest.mark.covers('part: layers="scales"')
@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "plain"])
@pytest.mark.eager
def test_head_first_then_scales_then_everything(wrap, tmp_path):
    base = build()
    model = compiled(FrozenBackbone(base) if wrap else base)
    x, y = regression_data()
    frozen = kernels(base) + models.statistics(base)
    record = Recorder(lambda model: (training(base), as_bytes(frozen), as_bytes(base.weights)))
    stages = [
        Stage("scales", 0.02, epochs=1, train_batchnorm=wrap),
        Stage("all", 0.02, epochs=1, train_batchnorm=wrap),
    ]
    callback = UnfreezeAtConvergence(
        stages=stages,
        backbone=None if wrap else base,
        max_frozen_epochs=1,
        restore_best_weights=False,
        verbose=0,
    )

    model.fit(
        x,
        y,
        validation_data=(x, y),
        epochs=3,
        callbacks=[callback, FreezeGuard(verbose=0), record],
        verbose=0,
    )

    (head, before, _), (scales, between, moved), (everything, after, _) = record.records
    named = SCALES + BATCHNORM * wrap
    assert head == []
    assert sorted(scales) == sorted(named)
    assert sorted(everything) == sorted([*named, "a/kernel", "b/kernel"])
    assert before == between
    statistics = len(models.statistics(base))
    assert before[-statistics:] == after[-statistics:]
    assert all(old != new for old, new in zip(before[:2], after[:2], strict=True))
    first = dict(record.records[0][2])
    assert {path for path, value in moved if first[path] != value} == {
        weight.path for weight in base.weights if "/".join(weight.path.split("/")[-2:]) in named
    }


@pytest.fixture
def in_stage():
    model = compiled(FrozenBackbone(build()))
    UnfreezeAtConvergence(layers="scales", train_batchnorm=True).enter_stage(model, 1)
    return model


def test_a_saved_model_trains_the_same_scales(in_stage, tmp_path):
    x, y = regression_data()
    in_stage.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert training(loaded) == training(in_stage)
    frozen = kernels(models.frozen_backbone_of(loaded))
    before = as_bytes(frozen)
    loaded.fit(x, y, verbose=0)
    assert as_bytes(frozen) == before


def test_a_loaded_model_goes_on_in_its_stage(in_stage, tmp_path):
    in_stage.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    callback = UnfreezeAtConvergence(
        stages=[Stage("scales", 1e-3, train_batchnorm=True), Stage("all", 1e-3)], verbose=0
    )
    x, y = regression_data()
    history = loaded.fit(x, y, validation_data=(x, y), callbacks=[callback], verbose=0)
    assert history.history["stage"] == [1]


def test_the_report_counts_scales(in_stage):
    report = trainable_report(in_stage, expand_nested=True)
    trainable = {layer.name.split("/")[-1]: layer.trainable for layer in report.layers}
    assert {name: trainable[name] for name in ("a", "bn", "norm", "b")} == {
        "a": 4,
        "bn": 8,
        "norm": 8,
        "b": 4,
    }


def test_an_unwrapped_model_trains_the_same_scales(in_stage):
    assert training(unwrap(in_stage)) == training(in_stage)


def test_a_plain_backbone_goes_on_in_its_stage_and_beyond():
    base = build()
    model = compiled(base)
    stages = [Stage("scales", 1e-3, epochs=1), Stage("all", 1e-3)]
    x, y = regression_data()
    given = {"stages": stages, "backbone": base, "restore_best_weights": False, "verbose": 0}
    UnfreezeAtConvergence(**given).enter_stage(model, 1)

    history = model.fit(
        x,
        y,
        validation_data=(x, y),
        epochs=2,
        callbacks=[UnfreezeAtConvergence(**given)],
        verbose=0,
    )

    assert history.history["stage"] == [1, 2]
    assert "a/kernel" in training(base)


def test_kernels_frozen_by_hand_beside_others_stay_frozen():
    base = build()
    base.get_layer("a").kernel.trainable = False
    backbones = Backbones(compiled(base), base, knows_scales=True)
    backbones.unfreeze("all", False)
    assert "a/kernel" not in training(base)


@pytest.mark.eager
def test_a_run_is_resumed_in_its_stage(tmp_path):
    x, y = regression_data()

    def run(epochs, folder):
        keras.utils.set_random_seed(0)
        model = compiled(FrozenBackbone(build()))
        callback = UnfreezeAtConvergence(
            stages=[Stage("scales", 0.01, epochs=2), Stage("all", 0.01)],
            max_frozen_epochs=1,
            backup_dir=folder,
            delete_checkpoint=False,
            verbose=0,
        )
        model.fit(
            x,
            y,
            validation_data=(x, y),
            shuffle=False,
            epochs=epochs,
            callbacks=[callback],
            verbose=0,
        )
        return [value for _, value in as_bytes(model.weights)], training(model)

    run(2, tmp_path / "killed")
    assert run(4, tmp_path / "killed") == run(4, tmp_path / "whole")


def test_fine_tune_takes_scales():
    x, y = regression_data()
    model = compiled(FrozenBackbone(build()))
    frozen = kernels(models.frozen_backbone_of(model))
    before = as_bytes(frozen)
    fine_tune(
        model,
        x,
        y,
        validation_data=(x, y),
        epochs=3,
        max_frozen_epochs=1,
        layers="scales",
        verbose=0,
    )
    assert "a/bias" in training(model)
    assert as_bytes(frozen) == before
