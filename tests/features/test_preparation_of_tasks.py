"""Tasks of KerasHub: recorded training on raw images and strings is that of `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FeatureCache, StaleCacheError, UnfreezeAtConvergence, fine_tune

keras_hub = pytest.importorskip("keras_hub")
hub = keras_hub.models
pytestmark = pytest.mark.clients

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "good",
    "bad",
    "film",
    "was",
]
TEXTS = np.array(["the film was good", "the film was bad", "the cat sat", "the dog ran"] * 2)
IMAGES = np.random.default_rng(0).uniform(0, 255, (8, 20, 20, 3)).astype("float32")
LABELS = np.array([1, 0, 1, 0] * 2)


def image_task(backbone, kind=hub.ImageClassifier):
    converter = keras_hub.layers.ImageConverter(image_size=(16, 16), scale=1 / 255)
    preprocessor = hub.ImageClassifierPreprocessor(image_converter=converter)
    return kind(backbone=backbone, preprocessor=preprocessor, num_classes=2)


def res_net():
    return image_task(
        hub.ResNetBackbone(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[3],
            stackwise_num_filters=[64],
            stackwise_num_blocks=[1],
            stackwise_num_strides=[1],
            block_type="basic_block",
            image_shape=(16, 16, 3),
        )
    )


def vit():
    backbone = hub.ViTBackbone(
        image_shape=(16, 16, 3),
        patch_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=4,
        mlp_dim=4,
        dropout_rate=0.0,
    )
    return image_task(backbone, hub.ViTImageClassifier)


def bert_backbone():
    return hub.BertBackbone(len(WORDS), 1, 2, 4, 8, dropout=0.0, max_sequence_length=96)


def bert(words=WORDS):
    tokenizer = hub.BertTokenizer(vocabulary=words)
    preprocessor = hub.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    return hub.BertTextClassifier(
        bert_backbone(), preprocessor=preprocessor, num_classes=2, dropout=0
    )


def made(make, *arguments):
    keras.utils.set_random_seed(0)
    task = make(*arguments)
    task.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(True))
    return task


def raw(kind, x):
    if kind == "dataset":
        data = tf.data.Dataset.from_tensor_slices((x, LABELS)).batch(4)
        return [data], {"validation_data": data}
    return [x, LABELS], {"validation_data": (x, LABELS), "batch_size": 4}


@pytest.mark.parametrize(
    "make, x, kind",
    [
        (res_net, IMAGES, "arrays"),
        pytest.param(vit, IMAGES, "dataset", marks=pytest.mark.slow),
        (bert, TEXTS, "dataset"),
        pytest.param(bert, TEXTS, "arrays", marks=pytest.mark.slow),
    ],
)
def test_recorded_training_is_that_of_fit(make, x, kind, capsys):
    data, settings = raw(kind, x)
    task = made(make)
    switch = UnfreezeAtConvergence(1e-3, backbone=task.backbone, max_frozen_epochs=1, verbose=0)
    expected = task.fit(*data, epochs=2, callbacks=[switch], verbose=0, **settings).history

    task = made(make)
    found = fine_tune(
        task,
        *data,
        backbone=task.backbone,
        epochs=2,
        learning_rate=1e-3,
        max_frozen_epochs=1,
        shuffle=False,
        verbose=2,
        **settings,
    ).history

    assert "through the backbone" not in capsys.readouterr().out
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


def test_another_vocabulary_makes_a_record_stale(tmp_path):
    def record(task):
        task.backbone.trainable = False
        cache = FeatureCache(task, backbone=task.backbone, cache_dir=tmp_path)
        return cache(TEXTS, LABELS, name="texts", check_data=False, verbose=0)

    record(made(bert))
    record(made(bert))
    with pytest.raises(StaleCacheError, match="how the model prepares data"):
        record(made(bert, [*WORDS[:-2], WORDS[-1], WORDS[-2]]))


def test_random_preprocessing_is_recorded_in_views_alone():
    keras.utils.set_random_seed(0)
    backbone = hub.VGGBackbone([1], [2], image_shape=(20, 20, 3))
    random = keras.layers.RandomContrast(0.9)
    task = hub.ImageClassifier(backbone=backbone, preprocessor=random, num_classes=2)
    backbone.trainable = False
    cache = FeatureCache(task, backbone=backbone)
    with pytest.raises(ValueError, match="at random"):
        cache(IMAGES, LABELS, verbose=0)
    features = cache(IMAGES, LABELS, views=2, shuffle=False, verbose=0)
    assert len({next(iter(features))[0].numpy().tobytes() for _ in range(8)}) > 1
