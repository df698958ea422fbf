"""The whole of transfer learning in one call."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import keras

from keras_tl.arguments import check_count
from keras_tl.backbone.backbones import BackboneOf
from keras_tl.callbacks import FreezeGuard, UnfreezeAtConvergence
from keras_tl.errors import UncacheableError
from keras_tl.features import FeatureCache
from keras_tl.features.same_epochs import check_training_data, check_validation_data, never_ends
from keras_tl.internals.batches import split_off_validation
from keras_tl.internals.randomness import random_state
from keras_tl.messages import say
from keras_tl.stages.joint_fits import JointFits


def fine_tune(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    validation_data: Any = None,
    validation_split: float = 0.0,
    epochs: int = 100,
    learning_rate: Any = None,
    backbone: BackboneOf | None = None,
    monitor: str | None = None,
    patience: int = 3,
    fine_tune_patience: int | None = 3,
    cache_dir: str | os.PathLike[str] | None = None,
    views: int | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    shuffle: bool = True,
    class_weight: dict[int, float] | None = None,
    callbacks: Any = None,
    verbose: Any = "auto",
    **unfreezing: Any,
) -> keras.callbacks.History:
    """Trains the head to convergence on recorded features, then fine-tunes the whole model.

    The frozen backbone runs once over the data (`FeatureCache`), and the head trains on what it
    returned until it has converged. Then the best weights of the head are restored, the backbone is
    unfrozen and fine-tuning goes on from the data itself with the low learning rate until it stops
    helping (`UnfreezeAtConvergence`), with proof that what is frozen stays so (`FreezeGuard`). The
    best weights of both stages are what remains. Without recorded features it is what
    `model.fit(..., callbacks=[UnfreezeAtConvergence(...), FreezeGuard()])` does.

    Where features cannot be recorded, the head trains through the backbone, and it is said why: if
    there are random layers before the backbone's outputs; if an epoch may read other data than the
    one before, as after augmentation, from a generator, or if `steps_per_epoch` is not one pass
    over the data; if the model is subclassed, or gives something else for a batch than its layers
    do, as one that prepares data in a `fit` of its own. A model whose backbone is
    trainable already, such as one saved while it was fine-tuned, goes on fine-tuning.

    Args:
        model: A compiled model with a frozen backbone.
        x: Inputs, as `fit` takes them: arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a
            generator; the last three with targets and sample weights.
        y: Targets, if `x` is arrays.
        sample_weight: Sample weights, if `x` is arrays.
        validation_data: What convergence is judged by, as `fit` takes it. Defaults to `None`: it is
            judged by the training loss.
        validation_split: Float between 0 and 1. The fraction of arrays to hold out as validation
            data: the last part, taken before shuffling, as in `fit`. Without effect where there is
            `validation_data`. Defaults to `0.0`.
        epochs: Int. How many epochs there are at the most, of both stages. Defaults to `100`.
        learning_rate: The learning rate of fine-tuning: a float, `LearningRateSchedule` or
            callable; or a dictionary from names of layers to floats, such as
            `layerwise_learning_rates` returns. Defaults to `None`: that of `optimizer`, those of
            the model's own `GroupOptimizer`, or else `1e-5`.
        backbone: The layer, model or list of layers to unfreeze, their names, or a function of the
            model that returns them. Defaults to every `FrozenBackbone` in the model.
        monitor: String. The quantity in the logs to judge convergence by. Defaults to `None`:
            `"val_loss"`, or `"loss"` without `validation_data`.
        patience: Int. Epochs without improvement after which the head has converged. Defaults to
            `3`.
        fine_tune_patience: Int or None. Epochs without improvement after which fine-tuning stops.
            None trains to the last epoch. Defaults to `3`.
        cache_dir: String or path. The folder to keep features in, for this and later runs. Defaults
            to `None`: in memory.
        views: Int k. Records k random passes if there are random layers; see `FeatureCache`.
            Defaults to `None`: the head then trains through the backbone.
        dtype: `"float16"` or `"bfloat16"`. The dtype to keep features in. Defaults to `None`: their
            own.
        batch_size: Int. Samples in a batch of arrays. Defaults to `None`: 32.
        steps_per_epoch: Int. Batches in an epoch, after which the next one goes on in the data.
        validation_steps: Int. Batches that are validated on, always from the start of the data.
        shuffle: Bool. Whether each epoch is in a random order. The orders of a `tf.data.Dataset`
            or a generator are its own in fine-tuning. Defaults to `True`.
        class_weight: Dictionary from class indices to floats, as in `fit`.
        callbacks: A callback or a list of them. To them it is one `fit` of `model`. A `FreezeGuard`
            among them takes the place of the one that is added otherwise, behind all others.
        verbose: `"auto"`, 0, 1, or 2, as in `fit`.
        **unfreezing: Further arguments of `UnfreezeAtConvergence`, such as `layers`, `stages`,
            `max_frozen_epochs`, `head_learning_rate` or `warmup_steps`.

    Returns:
        One `History` of all epochs, with `stage` and `learning_rate`.

    Raises:
        ValueError: If the model is not compiled, and as `UnfreezeAtConvergence` raises it.
        StaleCacheError: If the features in `cache_dir` are of another backbone or other data.

    Example:

    >>> import numpy as np
    >>> from keras_tl import FrozenBackbone, fine_tune
    >>> pretrained = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model = keras.Sequential([FrozenBackbone(pretrained), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((32, 8)), np.ones((32, 1))
    >>> history = fine_tune(model, x, y, epochs=4, max_frozen_epochs=2, verbose=0)
    >>> history.history["stage"]
    [0, 0, 1, 1]

    References:

    - Howard and Gugger, 2020, "fastai: A Layered API for Deep Learning" (`Learner.fine_tune`)
    - Kumar et al., 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
      Out-of-Distribution"
    """
    if not model.compiled:
        raise ValueError(
            f'The model "{model.name}" is not compiled. Call `compile` before `fine_tune`.'
        )
    check_count("epochs", epochs, at_least=1)
    # A callback may change the working directory.
    cache_dir = None if cache_dir is None else os.path.abspath(cache_dir)
    for argument, value in (
        ("batch_size", batch_size),
        ("steps_per_epoch", steps_per_epoch),
        ("validation_steps", validation_steps),
    ):
        if value is not None:
            check_count(argument, value, at_least=1)
    if steps_per_epoch is None and never_ends(x):
        what = "A generator" if inspect.isgenerator(x) else f"A {type(x).__name__} without an end"
        raise ValueError(
            f"{what} needs `steps_per_epoch`: it is read in several epochs, and must not end. "
            "Or pass a `keras.utils.PyDataset` or a `tf.data.Dataset` that has a length."
        )
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = split_off_validation(
            x, y, sample_weight, validation_split
        )
    says = 1 if verbose == "auto" else verbose
    switch = UnfreezeAtConvergence(
        learning_rate,
        backbone=backbone,
        monitor=monitor or ("loss" if validation_data is None else "val_loss"),
        patience=patience,
        fine_tune_patience=fine_tune_patience,
        verbose=says,
        **unfreezing,
    )
    given = keras.tree.flatten(callbacks) if callbacks else []
    others = [one for one in given if not isinstance(one, FreezeGuard)]
    guards = [one for one in given if isinstance(one, FreezeGuard)] or [FreezeGuard(verbose=says)]
    fits = JointFits(
        [*others, switch, *guards],  # A guard follows a switch from the place behind it.
        model,
        epochs=epochs,
        verbose=verbose,
    )
    fits.begin(x, y, sample_weight, validation_data=validation_data, class_weight=class_weight)
    steps = None
    if switch.stage == 0 and not switch.decided:
        put_back_random_state = random_state()
        try:
            check_training_data(
                x,
                y,
                sample_weight,
                batch_size=batch_size,
                steps=steps_per_epoch,
                random=views is not None,
            )
            check_validation_data(validation_data, steps=validation_steps)
            cache = FeatureCache(model, backbone=backbone, cache_dir=cache_dir)
            record = functools.partial(cache, batch_size=batch_size, dtype=dtype, verbose=says)
            features = record(
                x,
                y,
                sample_weight,
                steps=steps_per_epoch,
                shuffle=shuffle,
                views=views,
                name="training",
            )
            validation = validation_data
            if validation is not None:
                held_out = validation if isinstance(validation, (tuple, list)) else (validation,)
                validation = record(
                    *held_out,
                    steps=validation_steps,
                    shuffle=False,
                    training=False,
                    name="validation",
                )
        except UncacheableError as error:
            put_back_random_state()
            if says:
                say(f"fine_tune trains the head through the backbone. {error}")
        else:
            steps = int(features.cardinality())
            fits.fit(
                cache.head,
                features,
                steps=steps,
                shuffle=False,  # The features are.
                until=lambda: switch.decided,
                validation_data=validation,
                class_weight=class_weight,
            )
    fits.fit(
        model,
        x,
        y,
        steps=steps,
        sample_weight=sample_weight,
        validation_data=validation_data,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        validation_steps=validation_steps,
        shuffle=shuffle,
        class_weight=class_weight,
    )
    fits.end()
    return fits.history
