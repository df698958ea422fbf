"""The whole of transfer learning in one call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import keras

from keras_tl.arguments import check_count, check_model
from keras_tl.backbone.model_backbones import BackboneOf
from keras_tl.backbone.selecting import choose_layers, is_built
from keras_tl.callbacks import FreezeGuard, UnfreezeAtConvergence
from keras_tl.features.same_epochs import never_ends
from keras_tl.features.stage_records import RecordSettings, StageRecords
from keras_tl.internals.batches import batch_count, samples_in_batch, split_off_validation
from keras_tl.internals.processes import divides_data
from keras_tl.messages import did_you_mean, how_to_call, say
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
    record: bool | str = "auto",
    max_bytes: int | None = None,
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

    The frozen backbone runs once over the data (`FeatureCache`), and the head trains on the
    recorded outputs until it has converged. Then the best weights of the head are restored, the
    backbone is unfrozen, and the whole model trains on the data itself at the low learning rate
    until that stops helping (`UnfreezeAtConvergence`). `FreezeGuard` proves that what is frozen
    stays so. The model ends with the best weights of both stages. Without recorded features this is
    `model.fit(..., callbacks=[UnfreezeAtConvergence(...), FreezeGuard()])`.

    A stage in which some of the backbone trains is recorded too, where that is worth it
    (`record`): the layers before all that trains run once over the data, and the stage trains what
    comes after them. A line after the switch says where and why, or why not. The weights are those
    of the model itself, callbacks see the whole model, and the results are those of `fit`, bit for
    bit, but for the rounding that `FeatureCache` tells of. Stages that train the same layers, as
    `learning_rate="auto"` makes them, share one record; a record that no later stage needs is freed
    from memory. Under `cache_dir` it stays, in a folder for each stage, and is made anew where it
    was of other weights or data. In such a stage, too, `views` lets random layers be before the
    place to record at; without it, layers from the first random one on are trained through.

    Where features cannot be recorded, the head trains through the backbone, and a message says why:
    random layers come before the backbone's outputs; an epoch may read other data than the one
    before (augmented data, a generator, or `steps_per_epoch` that is not one pass over the data);
    the model is subclassed; none of several processes holds all of the frozen weights, or they run
    on torch; or the model does more with a batch than call its layers and, as a KerasHub task does,
    prepare it in `preprocess_samples`. A model whose backbone is trainable already, such as one
    saved while it was fine-tuned, continues fine-tuning.

    Several processes under `keras.distribution`, on JAX, record and train together; `FeatureCache`
    says how. They decide alike where to record: by the one with the least room.

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
        epochs: Int. The maximum number of epochs, of both stages. Defaults to `100`.
        learning_rate: The learning rate of fine-tuning: a float, `LearningRateSchedule` or
            callable; or a dictionary from names of layers to floats, such as
            `layerwise_learning_rates` returns. Or `"auto"`, which finds it: fine-tuning starts at
            the default rate of the optimizer's class, and goes down by thirds, each time from the
            best weights so far; see `UnfreezeAtConvergence`. Defaults to `None`: that of
            `optimizer`, those of the model's own `GroupOptimizer`, `"auto"` with validation data,
            or else `1e-5`.
        backbone: The layer, model or list of layers to unfreeze, their names, or a function of the
            model that returns them. Defaults to every `FrozenBackbone` in the model, or else its
            attribute `backbone`.
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
        record: `"auto"`, True or False. Whether stages train on records of what is frozen in them.
            `"auto"`: where that spares more time than it takes; True: wherever it can be done;
            False: never. Defaults to `"auto"`.
        max_bytes: Int. How many bytes of features a stage may keep, in memory or in `cache_dir`.
            Defaults to `None`: half of what is free there.
        batch_size: Int. Samples in a batch of arrays. Defaults to `None`: 32.
        steps_per_epoch: Int. Batches in an epoch; the next epoch continues in the data.
        validation_steps: Int. Batches that are validated on, always from the start of the data.
        shuffle: Bool. Whether each epoch is in a random order. The orders of a `tf.data.Dataset`
            or a generator are its own in fine-tuning. Defaults to `True`.
        class_weight: Dictionary from class indices to floats, as in `fit`.
        callbacks: A callback or a list of callbacks, which see one `fit` of `model`. A
            `FreezeGuard` among them replaces the one that is added otherwise, after all others.
        verbose: `"auto"`, 0, 1, or 2, as in `fit`.
        **unfreezing: Further arguments of `UnfreezeAtConvergence`, such as `layers`, `stages`,
            `max_frozen_epochs`, `head_learning_rate`, `warmup_steps` or `interpolate`.

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
    _check_arguments(
        model,
        x,
        epochs=epochs,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        validation_steps=validation_steps,
        max_bytes=max_bytes,
    )
    _check_names(unfreezing)
    if record not in ("auto", True, False):
        raise ValueError(f'`record` must be "auto", True or False. Received: record={record!r}.')
    if divides_data():
        _check_divisible(x, y, sample_weight, validation_data)
    # A callback may change the working directory.
    cache_dir = None if cache_dir is None else os.path.abspath(cache_dir)
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
    in_order = _in_order(callbacks, switch, says)
    fits = JointFits(
        in_order,
        model,
        epochs=epochs,
        verbose=verbose,
        batch_size=samples_in_batch(x, batch_size),
    )
    fits.begin(x, y, sample_weight, validation_data=validation_data, class_weight=class_weight)
    records = StageRecords(
        model,
        (x, y, sample_weight),
        validation_data,
        RecordSettings(
            record=record,
            max_bytes=max_bytes,
            cache_dir=cache_dir,
            batch_size=batch_size,
            steps=steps_per_epoch,
            validation_steps=validation_steps,
            shuffle=shuffle,
            views=views,
            dtype=dtype,
            verbose=says,
        ),
        backbone=backbone,
        moving=_moved_by_callbacks(model, in_order),
        say=say if says else _nothing,
    )
    steps = None
    validation = {
        "validation_data": validation_data,
        "batch_size": batch_size,
        "validation_steps": validation_steps,
    }
    while fits.epochs_left:
        if switch.decided:
            # The switch, as records are of what is frozen after it.
            fits.begin_epoch(steps=steps, **validation)
        training = records.of(switch.stage, epochs=_epochs_of_stage(switch, fits.epochs_left))
        if training is not None:
            steps = training.steps
            fits.fit(
                training.model,
                training.features,
                steps=steps,
                shuffle=False,  # The features are.
                until=lambda: switch.decided,
                validation_data=training.held_out,
                class_weight=class_weight,
            )
            continue
        fits.fit(
            model,
            x,
            y,
            steps=steps,
            # All that is left, where no stage can be recorded.
            until=lambda: switch.decided and not records.given_up,
            sample_weight=sample_weight,
            steps_per_epoch=steps_per_epoch,
            shuffle=shuffle,
            class_weight=class_weight,
            **validation,
        )
        if records.given_up:
            break  # Also where `fit` ended early, as of data that ran out.
    records.release()
    fits.end(**validation)
    return fits.history


def _check_arguments(model: keras.Model, x: Any, *, epochs: int, **counts: int | None) -> None:
    """Raises a ValueError for what would fail only after some training."""
    check_model(model, "fine_tune")
    if not model.compiled:
        raise ValueError(
            f'The model "{model.name}" is not compiled. Call `compile` before `fine_tune`.'
        )
    check_count("epochs", epochs, at_least=1)
    for argument, value in counts.items():
        if value is not None:
            check_count(argument, value, at_least=1)
    if counts["steps_per_epoch"] is None and never_ends(x):
        what = "A generator" if inspect.isgenerator(x) else f"A {type(x).__name__} without an end"
        raise ValueError(
            f"{what} needs `steps_per_epoch`: it is read in several epochs, and must not end. "
            "Or pass a `keras.utils.PyDataset` or a `tf.data.Dataset` that has a length."
        )


def _check_names(unfreezing: dict[str, Any]) -> None:
    """Raises the TypeError that names this function, not one that the user did not call."""
    ours = inspect.signature(fine_tune).parameters
    known = [*ours, *inspect.signature(UnfreezeAtConvergence).parameters]
    for name in unfreezing:
        if name not in known:
            raise TypeError(
                f"`fine_tune` has no argument `{name}`, nor has `UnfreezeAtConvergence`, whose "
                f"arguments it takes too.{did_you_mean(name, known)}"
            )


def _check_divisible(x: Any, y: Any, sample_weight: Any, validation_data: Any) -> None:
    """Raises Keras' ValueError for data of which it cannot give each process its share.

    The stages that train on features would not need it, and the later ones fail.
    """
    batch_count(x, y, sample_weight, None)
    if validation_data is not None:
        held_out = keras.utils.unpack_x_y_sample_weight(validation_data)
        batch_count(held_out[0], held_out[1], held_out[2], None)


def _in_order(
    callbacks: Any, switch: UnfreezeAtConvergence, verbose: Any
) -> list[keras.callbacks.Callback]:
    """Returns the user's callbacks, then the switch, then a guard: it follows from behind it."""
    given = keras.tree.flatten(callbacks) if callbacks else []
    for one in given:
        _check_callback(one)
    others = [one for one in given if not isinstance(one, FreezeGuard)]
    guards = [one for one in given if isinstance(one, FreezeGuard)]
    return [*others, switch, *(guards or [FreezeGuard(verbose=verbose)])]


def _check_callback(callback: Any) -> None:
    # As `fit` does, it takes what only has the hooks of a callback.
    if isinstance(callback, type) or not hasattr(callback, "set_model"):
        raise ValueError(
            "`callbacks` must be a `keras.callbacks.Callback` or a list of these. Received: "
            f"{callback!r} (of type {type(callback).__name__}).{how_to_call(callback)}"
        )
    if isinstance(callback, UnfreezeAtConvergence):
        raise ValueError(
            "`fine_tune` makes its own UnfreezeAtConvergence. Give its arguments to `fine_tune` in "
            f"place of the callback. Received among `callbacks`: {callback!r}."
        )


def _moved_by_callbacks(
    model: keras.Model, callbacks: Sequence[keras.callbacks.Callback]
) -> list[keras.Variable]:
    """Returns the weights that guards leave out, for something else changes them."""
    guards = [one for one in callbacks if isinstance(one, FreezeGuard)]
    left_out = [one.exclude for one in guards if one.exclude is not None]
    if not is_built(model):
        return []
    layers = [layer for one in left_out for layer in choose_layers(model, one, "exclude")]
    return [weight for layer in layers for weight in layer.weights]


def _epochs_of_stage(switch: UnfreezeAtConvergence, left: int) -> int:
    """Returns how many epochs the stage may have, with those after it that train the same."""
    if switch.stage not in range(1, len(switch.stages)):
        return left  # The last one may be several, at falling rates.
    return min(left, switch.stages[switch.stage - 1].epochs or left)


def _nothing(message: str) -> None:
    """Says nothing."""
