"""Coming from fastai, Lightning or finetuning-scheduler: what their words are here.

Each function below does with keras_tl what a call there does, and asserts that it did. Four things
are different on purpose. BatchNormalization statistics never move, as with Lightning's
`train_bn=False` (fastai trains them in frozen groups too). Layers are counted, not groups:
`unfreeze(n)` takes the n nearest the output that have weights. The head trains until it has
converged, not for a number of epochs; `max_frozen_epochs` is that number, as an upper limit. And
no one-cycle schedule is the default: pass a `LearningRateSchedule` as `learning_rate`.

    python examples/guide/coming_from_elsewhere.py
"""

import argparse
import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import (
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
    find_learning_rate,
    fine_tune,
    layerwise_learning_rates,
)

X = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
Y = X[:, :1] * X[:, 1:2]


def make():
    """Returns a frozen backbone and a compiled model on it."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(8, activation="tanh", name=f"block{block}_dense") for block in (1, 2, 3)
    ]
    backbone = FrozenBackbone(keras.Sequential([keras.Input((8,)), *layers], name="base"))
    model = keras.Sequential([keras.Input((8,)), backbone, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return backbone, model


def fit(model, callback, epochs=4):
    """Returns what `fit` logs."""
    data = {"validation_split": 0.25, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, epochs=epochs, callbacks=[callback], **data).history


def unfreeze(*arguments, **settings):
    """Returns the callback, which says nothing here."""
    return UnfreezeAtConvergence(*arguments, verbose=0, **settings)


def fastai_fine_tune():
    """`learn.fine_tune(2, base_lr, freeze_epochs=2)`."""
    _, model = make()
    settings = {"validation_split": 0.25, "max_frozen_epochs": 2, "verbose": 0}
    history = fine_tune(model, X, Y, epochs=4, learning_rate=1e-3, **settings).history
    assert history["stage"] == [0, 0, 1, 1]


def fastai_freeze_to():
    """`learn.freeze()`, `learn.unfreeze()`, `learn.freeze_to(-2)`; compile after each."""
    backbone, _ = make()
    assert len(backbone.unfreeze()) == 3
    backbone.freeze()
    assert [layer.name for layer in backbone.unfreeze(2)] == ["block2_dense", "block3_dense"]


def fastai_slice():
    """`slice(1e-5, 1e-3)` as a learning rate: one for each block, in a geometric series."""
    backbone, _ = make()
    rates = layerwise_learning_rates(backbone, 1e-3, decay=0.1)
    np.testing.assert_allclose(list(rates.values()), [1e-5, 1e-4, 1e-3])


def fastai_lr_find():
    """`learn.lr_find()`."""
    _, model = make()
    found = find_learning_rate(model, X, Y, verbose=0)
    assert {"valley", "steepest", "minimum"} <= set(found.suggestions)


def lightning_backbone_finetuning():
    """`BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=1e-4)`."""
    _, model = make()
    history = fit(model, unfreeze(1e-4, head_learning_rate=1e-2, max_frozen_epochs=2))
    np.testing.assert_allclose(history["learning_rate_backbone"], [0, 0, 1e-4, 1e-4], rtol=1e-6)
    np.testing.assert_allclose(history["learning_rate_head"], [1e-2] * 4, rtol=1e-6)


def lightning_lambda_func():
    """`lambda_func`: a schedule, which starts at the switch."""
    _, model = make()
    rate = keras.optimizers.schedules.PolynomialDecay(1e-4, 4, 1e-3)
    rates = fit(model, unfreeze(rate, max_frozen_epochs=2))["learning_rate"]
    assert rates[2] < rates[3]


def finetuning_scheduler():
    """`FinetuningScheduler(ft_schedule=...)`, whose file is here a list of dictionaries."""
    _, model = make()
    stages = [Stage("block3_.*", 1e-3, epochs=1), Stage("block[23]_.*", 1e-4, epochs=1)]
    stages = [stage.to_dict() for stage in stages]  # As a YAML file has them.
    assert fit(model, unfreeze(stages=stages, max_frozen_epochs=1), 3)["stage"] == [0, 1, 2]


def finetuning_scheduler_implicit():
    """The implicit schedule, with `max_depth=2`."""
    backbone, model = make()
    stages = Stage.by_depth(backbone, 3, 1e-3, decay=0.5, epochs=1)[:2]
    fit(model, unfreeze(stages=stages, max_frozen_epochs=1), 3)
    assert not backbone.backbone.get_layer("block1_dense").trainable


def early_stopping_and_checkpoint():
    """`FTSEarlyStopping` and `FTSCheckpoint`: both are on by default; `backup_dir` resumes."""
    _, model = make()
    with tempfile.TemporaryDirectory() as folder:
        callback = unfreeze(1e-3, max_frozen_epochs=2, backup_dir=os.path.join(folder, "run"))
        history = fit(model, callback)
    assert callback.patience == callback.fine_tune_patience == 3
    assert history["val_loss"][callback.best_epoch] == min(history["val_loss"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()
    ways = [
        fastai_fine_tune,
        fastai_freeze_to,
        fastai_slice,
        fastai_lr_find,
        lightning_backbone_finetuning,
        lightning_lambda_func,
        finetuning_scheduler,
        finetuning_scheduler_implicit,
        early_stopping_and_checkpoint,
    ]
    for way in ways:
        way()
        print(f"{way.__name__}: {way.__doc__}")
    print(f"All {len(ways)} did here what they do there.")


if __name__ == "__main__":
    main()
