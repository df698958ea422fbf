"""Transfer learning on text: an embedding and a transformer encoder, made of Keras layers.

Sentences come from a small grammar, so nothing is downloaded. The encoder is pretrained, with many
labels, to tell which of four topics a sentence is about and whether it has a kind or an unkind
word. It is then transferred to another question with few labels: whether the sentence praises or
complains, which a "not" turns around. The program prints the accuracy of a head on the frozen
encoder, and of the same with fine-tuning, as mean and standard deviation over seeds.

    python examples/text.py
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FrozenBackbone, UnfreezeAtConvergence

TOPICS, WORDS, LENGTH, WIDTH = 4, 12, 10, 32
# Words are numbers: 0 is padding, then those of each topic, unkind and kind words, "not", fillers.
UNKIND = 1 + TOPICS * WORDS
NOT = UNKIND + 2 * WORDS
VOCABULARY = NOT + 50


def sentences(count, seed):
    """Returns sentences, the topic and kind word of each as one label, and which of them praise."""
    random = np.random.default_rng(seed)
    topics, kind, negated = (random.integers(n, size=count) for n in (TOPICS, 2, 2))
    words = random.integers(NOT + 1, VOCABULARY, size=(count, LENGTH))
    rows, places = np.arange(count), np.argsort(random.random((count, 6)))
    words[rows, places[:, 0]] = 1 + topics * WORDS + random.integers(WORDS, size=count)
    words[rows, places[:, 1]] = UNKIND + kind * WORDS + random.integers(WORDS, size=count)
    words[rows[negated == 1], places[negated == 1, 2]] = NOT
    words[np.arange(LENGTH) >= random.integers(6, LENGTH + 1, size=(count, 1))] = 0
    return words, 2 * topics + kind, np.where(negated, 1 - kind, kind)


@keras.saving.register_keras_serializable(package="examples")
class WordsAndPositions(keras.layers.Layer):
    """Embeds words, and adds an embedding of where they are. Masks padding."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)
        self.positions = keras.layers.Embedding(LENGTH, WIDTH)

    def build(self, input_shape):
        self.words.build(input_shape)
        self.positions.build((LENGTH,))

    def call(self, x):
        return self.words(x) + self.positions(keras.ops.arange(LENGTH))

    def compute_mask(self, x, mask=None):
        return keras.ops.not_equal(x, 0)


def make_encoder(blocks=2):
    """Returns a transformer encoder that makes a vector of a sentence."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = WordsAndPositions(name="embedding")(inputs)
    for block in range(1, blocks + 1):
        attention = keras.layers.MultiHeadAttention(2, WIDTH // 2, name=f"block{block}_attention")
        x = keras.layers.LayerNormalization(name=f"block{block}_norm1")(x + attention(x, x))
        dense = keras.layers.Dense(2 * WIDTH, activation="gelu", name=f"block{block}_dense1")
        y = keras.layers.Dense(WIDTH, name=f"block{block}_dense2")(dense(x))
        x = keras.layers.LayerNormalization(name=f"block{block}_norm2")(x + y)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(x), name="encoder")


def classifier(encoder, classes):
    """Returns a compiled classifier of sentences."""
    model = keras.Sequential([keras.Input((LENGTH,), dtype="int32"), encoder])
    model.add(keras.layers.Dense(classes))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    return model


def transfer(weights, callback, seed, epochs):
    """Trains on few labels. Returns the accuracy on held-out sentences."""
    keras.utils.set_random_seed(seed)
    encoder = make_encoder()
    encoder.set_weights(weights)
    model = classifier(FrozenBackbone(encoder), 2)
    (x, _, y), (x_val, _, y_val), (x_test, _, y_test) = (
        sentences(count, 10 * seed + part) for part, count in enumerate((200, 200, 2000), start=1)
    )
    fit = {"validation_data": (x_val, y_val), "callbacks": [callback], "verbose": 0}
    model.fit(x, y, batch_size=20, epochs=epochs, **fit)
    return model.evaluate(x_test, y_test, batch_size=500, verbose=0)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="one seed and less data")
    small = parser.parse_args().small
    keras.utils.set_random_seed(0)
    x, labels, _ = sentences(1000 if small else 5000, 0)
    encoder = make_encoder()
    pretrained = classifier(encoder, 2 * TOPICS)
    pretrained.fit(x, labels, batch_size=50, epochs=2 if small else 5, verbose=0)
    accuracy = pretrained.evaluate(x, labels, verbose=0)[1]
    print(f"accuracy on what the encoder is pretrained on: {accuracy:.3f}")

    def head_only():
        return keras.callbacks.EarlyStopping(patience=4, restore_best_weights=True)

    def unfreeze():
        return UnfreezeAtConvergence(
            2e-3, patience=4, max_frozen_epochs=10, fine_tune_patience=6, verbose=0
        )

    print("| way       | accuracy | spread |\n|-----------|----------|--------|")
    for name, callback in {"head only": head_only, "keras_tl": unfreeze}.items():
        found = [
            transfer(encoder.get_weights(), callback(), seed, 20 if small else 100)
            for seed in range(1 if small else 3)
        ]
        print(f"| {name:9} | {np.mean(found):8.3f} | {np.std(found):6.3f} |")


if __name__ == "__main__":
    main()
