"""Transfer learning on text: an embedding and a transformer encoder, made of Keras layers.

Sentences come from a small grammar, so nothing is downloaded. The encoder is pretrained, with many
labels, to tell which of four topics a sentence is about and whether it has a kind or an unkind
word. It is then transferred to another question with few labels: whether the sentence praises or
complains, which a "not" turns around. The program prints the accuracy of a head on the frozen
encoder, and of the same with fine-tuning, as mean and standard deviation over seeds.

    python examples/text.py

Words become numbers outside of the model, so it runs on any backend of Keras.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FrozenBackbone, UnfreezeAtConvergence

VOCABULARY, LENGTH, WIDTH = 200, 12, 32
TOPICS = (
    ["soup", "bread", "cake", "pizza", "salad", "coffee", "dessert", "waiter"],
    ["train", "hotel", "flight", "beach", "island", "map", "guide", "ferry"],
    ["match", "team", "goal", "coach", "race", "player", "stadium", "referee"],
    ["plot", "actor", "scene", "film", "script", "ending", "camera", "song"],
)
UNKIND = ["bad", "awful", "boring", "poor", "dull", "weak", "horrible", "sad"]
KIND = ["good", "great", "lovely", "superb", "fine", "brilliant", "charming", "perfect"]
BEGINS = "", "honestly", "i must say", "for me", "as we all know", "last week"
VERBS = ["is", "was", "seemed", "looked", "felt", "became"]
ENDS = "", "today", "in the end", "if you ask me", "after all", "once more"


def sentences(count, seed):
    """Returns sentences, the topic and kind word of each as one label, and which of them praise."""
    random = np.random.default_rng(seed)
    topics, kind, negated = (random.integers(n, size=count) for n in (len(TOPICS), 2, 2))
    texts = [
        f"{random.choice(BEGINS)} the {random.choice(TOPICS[topic])} {random.choice(VERBS)} "
        f"{'not' if no else ''} {random.choice((UNKIND, KIND)[good])} {random.choice(ENDS)}"
        for topic, good, no in zip(topics, kind, negated)
    ]
    return texts, 2 * topics + kind, np.where(negated, 1 - kind, kind)


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
        return self.words.compute_mask(x)


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


def transfer(weights, numbers, callback, seed, epochs):
    """Trains on few labels. Returns the accuracy on held-out sentences."""
    keras.utils.set_random_seed(seed)
    encoder = make_encoder()
    encoder.set_weights(weights)
    model = classifier(FrozenBackbone(encoder), 2)
    parts = [sentences(count, 10 * seed + part) for part, count in enumerate((150, 150, 2000), 1)]
    train, validation, test = ((numbers(texts), praise) for texts, _, praise in parts)
    fit = {"validation_data": validation, "callbacks": [callback], "verbose": 0}
    model.fit(*train, batch_size=15, epochs=epochs, **fit)
    return model.evaluate(*test, batch_size=500, verbose=0, return_dict=True)["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="one seed and less data")
    small = parser.parse_args().small
    keras.utils.set_random_seed(0)
    texts, labels, _ = sentences(1000 if small else 5000, 0)
    vectorize = keras.layers.TextVectorization(VOCABULARY, output_sequence_length=LENGTH)
    vectorize.adapt(texts)

    def numbers(texts):
        return np.asarray(keras.ops.convert_to_numpy(vectorize(texts)), "int32")

    x = numbers(texts)
    encoder = make_encoder()
    pretrained = classifier(encoder, 2 * len(TOPICS))
    pretrained.fit(x, labels, batch_size=50, epochs=3 if small else 5, verbose=0)
    accuracy = pretrained.evaluate(x, labels, verbose=0, return_dict=True)["accuracy"]
    print(f"for example: {texts[0].strip()!r}")
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
            transfer(encoder.get_weights(), numbers, callback(), seed, 20 if small else 100)
            for seed in range(1 if small else 3)
        ]
        print(f"| {name:9} | {np.mean(found):8.3f} | {np.std(found):6.3f} |")


if __name__ == "__main__":
    main()
