"""KerasHub's tasks, plain and on a FrozenBackbone, made from small configurations."""

import warnings

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence, unwrap
from keras_tl.backbone.freezing import count_params
from tests.backbone.test_hub_blocks import IMAGE, TABLE
from tests.shared import as_bytes, slow_on

hub = pytest.importorskip("keras_hub").models
pytestmark = pytest.mark.clients

IMAGES = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype("float32")
CLASSES = np.arange(8) % 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "was", "good"]
TOKENS = {
    "token_ids": np.random.default_rng(0).integers(0, len(WORDS), (8, 8)),
    "segment_ids": np.zeros((8, 8), int),
    "padding_mask": np.ones((8, 8), int),
}
# What JAX compiles of a task takes a minute.
WRAPPED = pytest.mark.parametrize(
    "wrap",
    [pytest.param(True, marks=slow_on("jax")), pytest.param(False, marks=pytest.mark.slow)],
)


def image_task(wrap):
    base = hub.DenseNetBackbone([1, 1], growth_rate=4, image_shape=(16, 16, 3))
    backbone = FrozenBackbone(base) if wrap else base
    task = hub.ImageClassifier(backbone=backbone, num_classes=2, preprocessor=None)
    return compiled(task), base


def text_task(wrap, preprocessor=None):
    base = hub.BertBackbone(len(WORDS), 2, 2, 4, 8, max_sequence_length=8)
    backbone = FrozenBackbone(base) if wrap else base
    task = hub.BertTextClassifier(backbone, preprocessor=preprocessor, num_classes=2)
    return compiled(task), base


def test_a_plain_task_that_has_prepared_strings_is_unwrapped():
    # Its preprocessor makes layers when it is first called, which a copy does not have.
    tokenizer = hub.BertTokenizer(vocabulary=WORDS)
    preprocessor = hub.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    base = hub.BertBackbone(len(WORDS), 2, 2, 4, 8, max_sequence_length=8)
    task = hub.BertTextClassifier(base, preprocessor=preprocessor, num_classes=2)
    prepared = preprocessor(["the film", "was good"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = unwrap(compiled(task))
    assert np.array_equal(plain(prepared), task(prepared))
    assert plain.compiled
    assert type(plain.optimizer) is type(task.optimizer)


def compiled(task):
    task.compile(
        keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return task


def fit(task, x, callback, epochs=2):
    settings = {"validation_data": (x, CLASSES), "epochs": epochs, "verbose": 0}
    return task.fit(x, CLASSES, callbacks=[callback], **settings).history["stage"]


def outputs(model, x):
    return keras.tree.map_structure(keras.ops.convert_to_numpy, model(x))


def unfreezer(**settings):
    return UnfreezeAtConvergence(max_frozen_epochs=1, verbose=0, **settings)


@pytest.mark.eager
@pytest.mark.covers("beside: KerasHub")
@WRAPPED
def test_an_image_task_keeps_its_statistics_and_loads_as_it_was(wrap, tmp_path):
    task, base = image_task(wrap)
    statistics = as_bytes([w for w in base.weights if "moving" in w.path])
    kernel = as_bytes([base.weights[0]])

    assert fit(task, IMAGES, unfreezer(restore_best_weights=False)) == [0, 1]

    assert as_bytes([w for w in base.weights if "moving" in w.path]) == statistics
    assert as_bytes([base.weights[0]]) != kernel
    task.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    assert np.array_equal(outputs(loaded, IMAGES), outputs(task, IMAGES))
    if not wrap:  # Its file does not tell.
        assert len(loaded.trainable_weights) > len(task.trainable_weights)
        callback = unfreezer()
        callback.enter_stage(loaded)
        assert fit(loaded, IMAGES, callback) == [1, 1]
    assert len(loaded.trainable_weights) == len(task.trainable_weights)


@pytest.mark.slow
@pytest.mark.eager
@pytest.mark.parametrize("name", ["ResNet", "EfficientNet", "ViT"])
def test_image_tasks_train_in_stages_and_are_deployed(name):
    base = TABLE[name][0]()
    kind = hub.ViTImageClassifier if name == "ViT" else hub.ImageClassifier
    task = kind(backbone=FrozenBackbone(base), num_classes=2, preprocessor=None)
    images = np.random.default_rng(0).normal(size=(8, *IMAGE)).astype("float32")
    statistics = as_bytes([w for w in base.weights if "moving" in w.path])
    assert bool(statistics) == (name != "ViT")

    assert fit(compiled(task), images, unfreezer(restore_best_weights=False)) == [0, 1]

    assert as_bytes([w for w in base.weights if "moving" in w.path]) == statistics
    assert np.array_equal(outputs(unwrap(task), images), outputs(task, images))


@pytest.mark.eager
@pytest.mark.covers("beside: KerasHub")
@WRAPPED
def test_a_text_task_trains_its_head_then_lora_then_everything(wrap, tmp_path):
    task, base = text_task(wrap)
    task.backbone.enable_lora(2)
    stages = [Stage("lora", 0.05, epochs=1), Stage("all", 0.01, epochs=1)]
    callback = unfreezer(stages=stages, restore_best_weights=False)

    assert fit(task, TOKENS, callback, epochs=3) == [0, 1, 2]

    lora, everything = callback.transitions
    adapted = [w for w in base.weights if "lora" in w.path]
    assert lora.trainable_after - lora.trainable_before == count_params(adapted)
    assert everything.frozen == ()
    frozen = [weight.name for weight in task.weights if not weight.trainable]
    assert frozen == ["kernel"] * 4  # Those whose updates LoRA trains.
    task.backbone.save_lora_weights(tmp_path / "weights.lora.h5")
    before = as_bytes(adapted)
    for weight in adapted:
        weight.assign(weight * 0)
    task.backbone.load_lora_weights(tmp_path / "weights.lora.h5")
    assert as_bytes(adapted) == before


@pytest.mark.slow
def test_a_preset_of_a_wrapped_task_is_one(tmp_path):
    tokenizer = hub.BertTokenizer(vocabulary=WORDS)
    preprocessor = hub.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    task, base = text_task(True, preprocessor)
    task.backbone.unfreeze(1)
    task.save_to_preset(tmp_path / "preset")

    loaded = hub.TextClassifier.from_preset(str(tmp_path / "preset"))
    plain = hub.Backbone.from_preset(str(tmp_path / "preset"))

    assert isinstance(loaded.backbone, FrozenBackbone)
    assert np.array_equal(outputs(loaded, TOKENS), outputs(task, TOKENS))
    assert len(loaded.trainable_weights) == len(task.trainable_weights)
    assert type(plain) is hub.BertBackbone
    found, expected = [outputs(one, TOKENS)["pooled_output"] for one in (plain, base)]
    assert np.array_equal(found, expected)


@pytest.mark.eager
@WRAPPED
def test_a_language_model_begins_with_a_stage(wrap):
    base = hub.GPT2Backbone(14, 1, 2, 4, 8, max_sequence_length=8)
    task = hub.GPT2CausalLM(FrozenBackbone(base) if wrap else base, preprocessor=None)
    task.compile(
        keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    task.backbone.enable_lora(2)
    tokens = {"token_ids": np.ones((8, 6), int), "padding_mask": np.ones((8, 6), int)}
    data = (tokens, np.ones((8, 6), int))
    callback = unfreezer(stages=[Stage("lora", 0.05)])
    flags = [weight.trainable for weight in task.weights]

    with pytest.raises(ValueError, match="Stage 0 would train nothing"):
        task.fit(*data, validation_data=data, callbacks=[callback], verbose=0)

    assert [weight.trainable for weight in task.weights] == flags
    callback.enter_stage(task)
    assert {w.name for w in task.trainable_weights} == {"lora_kernel_a", "lora_kernel_b"}
    history = task.fit(*data, validation_data=data, callbacks=[callback], verbose=0)
    assert history.history["stage"] == [1]
