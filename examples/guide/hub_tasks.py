"""KerasHub tasks: text on raw strings, stages with LoRA, and a task that is loaded again.

A task works as it is: `UnfreezeAtConvergence()` finds `task.backbone`, and `fit`, `fine_tune`,
`FeatureCache` and `find_learning_rate` apply the task's own preprocessing, as with every model that
has `preprocess_samples`. Made on a `FrozenBackbone`, statistics of BatchNormalization stay constant
too, and the file keeps what trains. The file of a task on a plain backbone keeps neither what
trained nor at which rate: after `compile`, `enter_stage` says so. A language model without a head
has nothing to train in stage 0, which is an error: begin with `enter_stage`. LoRA has a stage of
its own; an "all" beside it trains what `enable_lora` froze too, except the kernels that LoRA
adapts. Random preprocessing needs `views=`, and KerasHub trains in the order of the data: to
compare with `fit`, pass `shuffle=False`. Images: `examples/keras_hub_task.py`.

    python -m pip install keras-hub
    python examples/guide/hub_tasks.py
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence, fine_tune, unwrap

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "great", "bad", "weak", "film"]
TEXTS = np.array(["a good film", "a bad film", "a great film", "a weak film"] * 8)
LABELS = np.array([1, 0, 1, 0] * 8)


def make_task(wrap=False):
    """Returns a small text classifier with random weights, compiled."""
    keras.utils.set_random_seed(0)
    models = keras_hub.models
    tokenizer = models.BertTokenizer(vocabulary=WORDS)
    backbone = models.BertBackbone(len(WORDS), 1, 2, 16, 32, max_sequence_length=6, dropout=0)
    task = models.BertTextClassifier(
        FrozenBackbone(backbone) if wrap else backbone,
        preprocessor=models.BertTextClassifierPreprocessor(tokenizer, sequence_length=6),
        num_classes=2,
        dropout=0,
    )
    compile_with(task, 1e-2)
    return task


def compile_with(task, learning_rate):
    """Compiles a task. So small a one runs sooner than it is traced."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    task.compile(keras.optimizers.Adam(learning_rate), loss, run_eagerly=True)


def train(task, callback, epochs=6):
    """Trains on raw strings. Returns the stages of the epochs."""
    data = {"validation_data": (TEXTS, LABELS), "epochs": epochs, "verbose": 0}
    return task.fit(TEXTS, LABELS, callbacks=[callback], **data).history["stage"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()

    # The task as it is.
    task = make_task()
    stages = train(task, UnfreezeAtConvergence(1e-3, max_frozen_epochs=2), epochs=4)
    assert stages == [0, 0, 1, 1]

    # LoRA in a stage of its own.
    task = make_task()
    task.backbone.enable_lora(2)
    by_stage = [Stage("lora", 1e-3, epochs=2), Stage("all", 1e-4)]
    callback = UnfreezeAtConvergence(stages=by_stage, max_frozen_epochs=2, verbose=0)
    assert train(task, callback) == [0, 0, 1, 1, 2, 2]
    print("LoRA in stages:", [one.trainable_after for one in callback.transitions], "parameters")

    # On a FrozenBackbone, saved in stage 1 and loaded: it continues there.
    task = make_task(wrap=True)
    train(task, UnfreezeAtConvergence(1e-3, max_frozen_epochs=2, verbose=0), epochs=3)
    expected = task.predict(TEXTS, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.keras"
        task.save(path)
        loaded = keras.models.load_model(path)
        compile_with(loaded, 1e-3)  # KerasHub's files do not tell.
    np.testing.assert_array_equal(loaded.predict(TEXTS, verbose=0), expected)
    callback = UnfreezeAtConvergence(1e-3)
    assert train(loaded, callback, epochs=1) == [1]

    # Without keras_tl, for programs that lack it: takes what the preprocessor returns.
    plain = unwrap(task)
    prepared = task.preprocessor(TEXTS)
    np.testing.assert_array_equal(plain.predict(prepared, verbose=0), expected)

    # Recorded features, of strings.
    run = {"validation_data": (TEXTS, LABELS), "epochs": 4, "max_frozen_epochs": 2, "verbose": 0}
    history = fine_tune(make_task(wrap=True), TEXTS, LABELS, learning_rate=1e-3, **run).history
    print(f"fine_tune on recorded features of strings: stages {history['stage']}")

    # A plain task from a file, of which nothing tells the stage.
    task = make_task()
    callback = UnfreezeAtConvergence(1e-3, verbose=0)
    callback.enter_stage(task)
    assert train(task, callback, epochs=1) == [1]
    print("Tasks train in stages as they are, with LoRA, loaded, recorded and unwrapped.")


if __name__ == "__main__":
    main()
