"""Unfreezing in stages: a list of `Stage`, by depth or by hand, in one `fit`.

In each stage just the selected layers of the backbone train, besides the head. So a schedule can
unfreeze block after block from the output on, or train one block in the middle and nothing else;
what an earlier stage trained and the next one does not select is frozen again. A stage ends when
the monitored value has not improved for its `patience`, or after its `epochs`. Its best weights are
restored before the next one, and those of the whole run at the end. Schedules are data: they go
into JSON and back. `Stage.by_depth` reads blocks from layers' names (`block3_conv1`,
`conv4_block2_1_conv`), or else from where everything in a Functional model goes through one layer:
in a network whose cells skip over their neighbours there are few such places, and in a subclassed
backbone without such names each layer counts as a block.

    python examples/guide/unfreezing_in_stages.py
"""

import argparse
import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence


def make_backbone():
    """Returns a frozen network of three blocks."""
    layers = [keras.Input((8,))]
    for block in (1, 2, 3):
        layers.append(keras.layers.Dense(8, activation="tanh", name=f"block{block}_dense"))
    return FrozenBackbone(keras.Sequential(layers, name="base"))


def train(stages_of, epochs=8):
    """Trains with the stages that a function makes for a backbone. Returns callback and model."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    backbone = make_backbone()
    model = keras.Sequential([keras.Input((8,)), backbone, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    callback = UnfreezeAtConvergence(stages=stages_of(backbone), max_frozen_epochs=2, verbose=0)
    model.fit(x, x[:, :1], validation_split=0.25, epochs=epochs, callbacks=[callback], verbose=0)
    return callback, model


def show(title, callback):
    """Prints the stages of a run."""
    print(f"{title}: stages of the epochs {callback.history.history['stage']}")
    for one in callback.transitions:
        joins, leaves = ", ".join(one.layers) or "none", ", ".join(one.frozen) or "none"
        print(
            f"  stage {one.stage} from epoch {one.epoch + 1} ({one.reason}): joins {joins}; "
            f"frozen again {leaves}; learning rate {one.learning_rate_after:.3g}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()

    callback, _ = train(lambda backbone: Stage.by_depth(backbone, 3, 1e-3, decay=0.5, epochs=2))
    show("from the output on", callback)
    assert [one.layers for one in callback.transitions] == [
        ("block3_dense",),
        ("block2_dense",),
        ("block1_dense",),
    ]

    by_hand = [
        Stage("block2_.*", 1e-3, epochs=2),  # One block in the middle: surgical fine-tuning.
        Stage(1, 1e-3, epochs=2),  # The last layer alone: block2 is frozen again.
        Stage("all", 1e-4, patience=5),
    ]
    callback, model = train(lambda backbone: by_hand)
    show("by hand", callback)
    assert callback.transitions[1].frozen == ("block2_dense",)
    assert len(model.trainable_weights) == 8

    written = json.dumps([stage.to_dict() for stage in by_hand])
    assert [Stage.from_dict(one) for one in json.loads(written)] == by_hand
    callback, _ = train(lambda backbone: json.loads(written))  # `stages` takes dictionaries too.
    assert callback.history.history["stage"] == [0, 0, 1, 1, 2, 2, 3, 3]

    keeps = [Stage("block3_.*", 1e-3, head_learning_rate=5e-3, epochs=2)]
    keeps.append(Stage("all", 1e-4, head_learning_rate=5e-3))
    callback, model = train(lambda backbone: keeps, epochs=6)
    groups = {
        name: rates[0] for name, rates in callback.transitions[-1].group_learning_rates.items()
    }
    print("with head_learning_rate what trains keeps its state and its rate:")
    print("  " + ", ".join(f"{name} {rate:.3g}" for name, rate in groups.items()))
    assert len(groups) == 3
    print("One `fit` each, with one History; schedules went to JSON and back.")


if __name__ == "__main__":
    main()
