"""Which run a backup is of: what must be the same for another `fit` to resume it."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.backbone import freezing
from keras_tl.backbone.model_backbones import Backbones
from keras_tl.backbone.selecting import flatten_layers, is_built
from keras_tl.backup.configurations import changed_settings, model_configuration, plain, shown
from keras_tl.backup.sketches import alike, sketch
from keras_tl.internals.batches import constants_in
from keras_tl.internals.callback_list import data_of_fit
from keras_tl.internals.layers import own_state, own_trainable_weights
from keras_tl.internals.models import compile_arguments, compile_call
from keras_tl.internals.optimizers import steps_of, without_loss_scale
from keras_tl.internals.processes import process_count
from keras_tl.internals.randomness import global_seed
from keras_tl.internals.values import on_host
from keras_tl.messages import some
from keras_tl.optimizers.groups import group_optimizer
from keras_tl.stages.stage import Stage
from keras_tl.version import __version__

_COMPILED = ("loss", "loss_weights", "metrics", "weighted_metrics")
# Which of a callback's arguments may change, and which `Stage` says.
_FREE = {"self", "backbone", "backup_dir", "delete_checkpoint", "verbose"}
_OF_STAGES = {"learning_rate", "layers", "train_batchnorm", "stages", "head_learning_rate"}
_SHOWN = 5

# What a run changes of what it started with, for a `fit` that resumes with the same model object.
_begun: weakref.WeakKeyDictionary[keras.Model, tuple[Any, dict[str, Any]]]
_begun = weakref.WeakKeyDictionary()


def identity_of(
    callback: keras.callbacks.Callback,
    stages: Sequence[Stage],
    backbones: Backbones,
    *,
    exactly: bool,
    stage: int,
    goes_on: bool,
) -> dict[str, Any]:
    """Returns what tells a run from others, as JSON can hold it.

    It is the same when the script is started again in another process, with other random numbers
    where it sets no seed: initial weights of a head are drawn at random and so do not count, but
    what a backbone has learnt does. Data is known by `sketches`, where it can be seen without
    reading from a pipeline: arrays, and the arrays or file names that a `tf.data.Dataset` is made
    of. Nothing here depends on `epochs`, on how steps are run, or on other callbacks.

    Args:
        callback: The callback that is in a running `fit`.
        stages: List of `Stage`.
        backbones: The model's `Backbones`.
        exactly: Bool. Whether a stage trains just its layers.
        stage: Int. The stage that the model is in.
        goes_on: Bool. Whether there are snapshots to resume from. The same model object may have
            been trained since its run started.
    """
    model = callback.model
    names = inspect.signature(type(callback).__init__).parameters.keys() - _FREE - _OF_STAGES
    return {
        "versions": [keras.__version__, __version__],
        "backend": keras.config.backend(),
        "processes": process_count(),
        "seed": global_seed(),
        "model": model_configuration(model),
        "compile": {key: plain(compile_arguments(model).get(key)) for key in _COMPILED},
        "callback": {
            name: plain(getattr(callback, name)) for name in names if hasattr(callback, name)
        },
        "stages": [_described(one) for one in stages],
        "data": _data(callback),
        "begin": _begin(
            model, goes_on, lambda: _state_at_begin(model, stages, backbones, exactly, stage)
        ),
    }


def why_another_run(was: Any, now: dict[str, Any]) -> str | None:
    """Says why a backup is of another run than this one, and what to do about it.

    Args:
        was: What `identity_of` returned for the run of the backup.
        now: What it returns for this one.

    Returns:
        A few sentences, or None if it is the same run.
    """
    found = list(_changes(was, now))
    if not found:
        return None
    more = len(found) - _SHOWN
    named = "; ".join(found[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    advice = "To resume that run, start it as it was. "
    if any(one.startswith("the data") for one in found):
        advice += (
            "Data that is drawn at random, as by a split, must be drawn with a seed, or it is "
            "another run. "
        )
    return f"it is of another run. Different: {named}. {advice}"


def doubt(was: Any, now: dict[str, Any]) -> str | None:
    """Says what may be another run, of two that `why_another_run` takes for one.

    Without a seed, other weights in a backbone may have been drawn, and not learnt.
    """
    if _seeded(was, now):
        return None
    found = list(_changes_in_backbone(was, now))
    if not found:
        return None
    return (
        f"different from those of the backup: {found[0]}. If it had learnt other things, delete "
        "the folder and start over. If its weights are drawn at random, set a seed with "
        "`keras.utils.set_random_seed` first."
    )


def _changes(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if was["backend"] != now["backend"]:
        yield (
            f"the Keras backend (was {was['backend']}, is {now['backend']}; random numbers and "
            "rounding would differ)"
        )
        return
    if was["processes"] != now["processes"]:
        yield f"the number of processes (was {was['processes']}, is {now['processes']})"
    if None not in (was["seed"], now["seed"]) and was["seed"] != now["seed"]:
        yield f"the seed of `keras.utils.set_random_seed` (was {was['seed']}, is {now['seed']})"
    # Another version may have other settings.
    complete = was["versions"] == now["versions"]
    for key, where in (
        ("callback", "UnfreezeAtConvergence"),
        ("stages", "stages"),
        ("compile", "compile"),
        ("model", "the model"),
    ):
        yield from changed_settings(was[key], now[key], complete=complete, where=where)
    yield from _changes_at_start(was["begin"], now["begin"], complete)
    if _seeded(was, now):
        yield from _changes_in_backbone(was, now)
    yield from _changes_in_data(was["data"], now["data"])


# What the run changes.


def _begin(
    model: keras.Model, goes_on: bool, describe: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Returns the state that the model's run has started with."""
    compiled = compile_call(model)
    known = _begun.get(model) if goes_on else None
    if known is None:
        state = describe()
    else:
        before, state = known
        if before() is not compiled:
            # Of an interrupted run in a notebook, compiled anew.
            state = {**state, **_optimizer(model)}
    _begun[model] = (weakref.ref(compiled), state)
    return state


def _state_at_begin(
    model: keras.Model,
    stages: Sequence[Stage],
    backbones: Backbones,
    exactly: bool,
    stage: int,
) -> dict[str, Any]:
    return {
        "stage": stage,
        **_optimizer(model),
        "trains": _trained_in_each(model, stages, backbones, exactly) if is_built(model) else None,
        "backbone": _learnt(backbones) if is_built(model) else None,
    }


def _optimizer(model: keras.Model) -> dict[str, Any]:
    trained = steps_of(model.optimizer) > 0
    optimizer = group_optimizer(model.optimizer)
    if optimizer is None:
        return {"optimizer": plain(without_loss_scale(model.optimizer)), "trained": trained}
    # Its configuration is another once it is built, and before it may have none.
    settings = ("groups", "global_clipnorm", "loss_scale_factor")
    described = {name: plain(getattr(optimizer, name)) for name in settings}
    if is_built(model):
        described["assigned"] = optimizer.resolve(model.trainable_variables)
    optimizer_class = type(optimizer).__qualname__
    return {"optimizer": {"class_name": optimizer_class, "config": described}, "trained": trained}


def _without_rates(config: Any) -> Any:
    """Returns an optimizer's configuration without learning rates that are numbers."""
    if isinstance(config, list):
        return [_without_rates(one) for one in config]
    if not isinstance(config, dict):
        return config
    return {
        name: _without_rates(one)
        for name, one in config.items()
        if not (name == "learning_rate" and isinstance(one, (int, float)))
    }


def _changes_at_start(was: dict[str, Any], now: dict[str, Any], complete: bool) -> Iterator[str]:
    if was["stage"] != now["stage"]:
        # A model that was loaded from a later stage: `fit` takes it back to that of the backup.
        return
    before, after = was["optimizer"], now["optimizer"]
    if was.get("trained") or now.get("trained"):
        # A rate that a callback may have changed since, in a file that is loaded.
        before, after = _without_rates(before), _without_rates(after)
    if None in (was["trains"], now["trains"]):
        complete = False  # Of a model that is not built, nothing is assigned yet.
    yield from changed_settings(before, after, complete=complete, where="compile.optimizer")
    if None not in (was["trains"], now["trains"]):
        for number, (one, other) in enumerate(zip(was["trains"], now["trains"], strict=False)):
            before, after = dict(one), dict(other)
            if before.keys() != after.keys():
                gone = [before[index] for index in before.keys() - after.keys()]
                new = [after[index] for index in after.keys() - before.keys()]
                yield (
                    f"the weights that train in stage {number} (not any more: "
                    f"{some(sorted(gone)) or 'none'}; new: {some(sorted(new)) or 'none'})"
                )


def _changes_in_backbone(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if was["begin"]["stage"] != now["begin"]["stage"]:
        return
    learnt = was["begin"]["backbone"], now["begin"]["backbone"]
    if None not in learnt and not alike(*learnt):
        yield "the weights with which the backbone began"


def _seeded(was: dict[str, Any], now: dict[str, Any]) -> bool:
    return None not in (was["seed"], now["seed"])


def _trained_in_each(
    model: keras.Model, stages: Sequence[Stage], backbones: Backbones, exactly: bool
) -> list[list[list[Any]]]:
    """Returns the weights that train in each stage, whatever selects them: positions and paths."""
    position = {id(variable): index for index, variable in enumerate(model.variables)}

    def trained() -> list[list[Any]]:
        return [[position[id(one)], one.path] for one in model.trainable_variables]

    found = [trained()]
    with freezing.trainable_flags_kept(model):
        for stage in stages:
            if exactly:
                backbones.freeze()
            backbones.unfreeze(stage.layers, stage.train_batchnorm)
            found.append(trained())
    return found


def _learnt(backbones: Backbones) -> dict[str, Any] | None:
    """Returns a sketch of what frozen backbones have learnt, None if they are untrained.

    Vectors (biases, the parameters and statistics of normalizations) start with one constant; those
    that do not have it any more were trained. Others may be drawn at random in each process, as
    LoRA's are, and vectors whose layer says so.
    """
    trained = {id(weight) for weight in backbones.trainable_weights}
    weights = [one for layer in [*backbones.wrapped, *backbones.plain] for one in layer.weights]
    drawn = _may_be_drawn([*backbones.wrapped, *backbones.plain])
    learnt = []
    for weight in weights:
        if len(weight.shape) == 1 and id(weight) not in trained | drawn:
            value = on_host(weight).astype("float32")
            if not (np.isin(value, (0.0, 1.0)).all() or (value == value[:1]).all()):
                learnt.append(value)
    return sketch(np.concatenate(learnt)[np.newaxis]) if learnt else None


def _may_be_drawn(layers: Sequence[keras.Layer]) -> set[int]:
    """Returns the ids of weights whose layer has an initializer for them that is no constant."""
    constant = (
        keras.initializers.Zeros,
        keras.initializers.Ones,
        keras.initializers.Constant,
    )
    return {
        id(weight)
        for layer in flatten_layers(layers)
        for weight in [*own_trainable_weights(layer), *own_state(layer)]
        if not isinstance(getattr(layer, f"{weight.name}_initializer", constant[0]()), constant)
    }


# Settings.


def _described(stage: Stage) -> dict[str, Any]:
    rates = ("learning_rate", "head_learning_rate")
    settings = ("patience", "epochs", "train_batchnorm")
    found = {name: plain(getattr(stage, name)) for name in settings}
    for name in rates:
        rate = getattr(stage, name)
        # By layers, whose names may count up.
        found[name] = list(rate.values()) if isinstance(rate, Mapping) else plain(rate)
    return found


# The data.


def _data(callback: keras.callbacks.Callback) -> dict[str, Any]:
    steps = (callback.params or {}).get("steps")
    data = data_of_fit(callback)
    known = {"steps": steps, "class_weight": plain(data.get("class_weight"))}
    named = ("x", "y", "sample_weight", "validation_data")
    return {**known, **{name: _sketches(data[name]) for name in named if name in data}}


def _sketches(data: Any) -> list[dict[str, Any]] | None:
    """Returns the sketches of arrays, or of those a pipeline is made of; None if none are seen."""
    arrays = constants_in(data)
    if arrays is None:
        arrays = [one for one in keras.tree.flatten(data) if hasattr(one, "__array__")]
    return [sketch(array) for array in arrays if hasattr(array, "shape")] or None


def _changes_in_data(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    where = "the data's class_weight"
    yield from changed_settings(was["class_weight"], now["class_weight"], where=where)
    for name in sorted((was.keys() & now.keys()) - {"class_weight"}):
        one, other = was[name], now[name]
        if one is None or other is None:
            continue
        if name == "steps":
            if one != other:
                yield f"the data's number of steps in an epoch (was {one}, is {other})"
        elif len(one) != len(other):
            yield f"the data's arrays in `{name}` (was {len(one)}, is {len(other)})"
        else:
            for before, after in zip(one, other, strict=True):
                if before["shape"] != after["shape"]:
                    what = f"was {shown(before['shape'])}, is {shown(after['shape'])}"
                    yield f"the data's shape in `{name}` ({what})"
                elif not alike(before, after):
                    yield f"the data's samples in `{name}`, of shape {shown(after['shape'])}"
