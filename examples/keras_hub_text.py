"""Fine-tunes a KerasHub text task, first its head, then its LoRA weights, then everything.

Sentences are raw strings: the task's own tokenizer prepares them, in `fit` as in `fine_tune`, which
records what the frozen encoder makes of them and so trains the head without it.

    python -m pip install keras-hub
    python examples/keras_hub_text.py            # BERT tiny (a download)
    python examples/keras_hub_text.py --small    # a small one with random weights, in seconds
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np

from keras_tl import Stage, UnfreezeAtConvergence, fine_tune

NOUNS = ["film", "play", "song", "book"]
GOOD, BAD = ["good", "great", "lovely", "superb"], ["bad", "awful", "boring", "weak"]


def sentences(count, seed):
    """Returns sentences, and whether each praises."""
    random = np.random.default_rng(seed)
    labels, negated = random.integers(2, size=count), random.integers(2, size=count)
    texts = [
        f"the {random.choice(NOUNS)} was {'not ' if no else ''}"
        f"{random.choice((BAD, GOOD)[praises ^ no])}"
        for praises, no in zip(labels, negated)
    ]
    return np.array(texts), labels


def make_task(small):
    """Returns the text classifier, compiled."""
    models = keras_hub.models
    if small:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "was", "not"]
        tokenizer = models.BertTokenizer(vocabulary=[*words, *NOUNS, *GOOD, *BAD])
        size = tokenizer.vocabulary_size()
        task = models.BertTextClassifier(
            models.BertBackbone(size, 2, 2, 16, 32, max_sequence_length=12),
            preprocessor=models.BertTextClassifierPreprocessor(tokenizer, sequence_length=12),
            num_classes=2,
        )
    else:
        task = models.TextClassifier.from_preset("bert_tiny_en_uncased", num_classes=2)
    task.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return task


def main():
    """Trains in two ways."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    train, held_out = sentences(64 if small else 512, 0), sentences(64 if small else 512, 1)
    run = {"validation_data": held_out, "epochs": 6 if small else 30, "batch_size": 32}

    keras.utils.set_random_seed(0)
    print("The head on what the frozen encoder made of the sentences, then everything:")
    task = make_task(small)
    history = fine_tune(task, *train, learning_rate=1e-4, max_frozen_epochs=2, verbose=0, **run)
    print(
        f"stages {history.history['stage']}, best val_accuracy "
        f"{max(history.history['val_accuracy']):.3f}\n"
    )

    keras.utils.set_random_seed(0)
    print("The head, then the LoRA weights, then everything, in one `fit`:")
    task = make_task(small)
    task.backbone.enable_lora(4)
    stages = [Stage("lora", 1e-3, epochs=2), Stage("all", 1e-4)]
    switch = UnfreezeAtConvergence(stages=stages, max_frozen_epochs=2)
    history = task.fit(*train, callbacks=[switch], verbose=0, **run)
    print(
        f"stages {history.history['stage']}, best val_accuracy "
        f"{max(history.history['val_accuracy']):.3f}"
    )


if __name__ == "__main__":
    main()
