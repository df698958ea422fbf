"""Configurations of Keras objects as plain data that is the same in every process.

Names that Keras counts up, flags that change in training, and seeds that are drawn are left out,
and layers are known by their order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

_LEFT_OUT = {
    "name",
    "seed",
    # What changes in the course of a run.
    "trainable",
    "trainable_flags",
    "hand_frozen",
    # What a layer was built or compiled with, which the first call of a model says.
    "build_config",
    "build_input_shape",
    "compile_config",
    # Where a class comes from: a script is `__main__`, and a module when it is imported.
    "module",
    "registered_name",
    # The bytes of a function change with the lines around it.
    "code",
}
# Where layers are named.
_NAMING = {"keras_history", "input_layers", "output_layers"}
_LONG = 200
_SHOWN = 60


def model_configuration(model: keras.Model) -> Any:
    """Returns what a model is made of."""
    config = _config_of(model)
    if config is None:
        # A subclassed model without `get_config`. Only its own layers: those in them may be made
        # when these are built.
        config = {"layers": [plain(layer) for layer in model.layers]}
    names: dict[str, str] = {}
    _collect_names(config, names)
    return _plain(config, names)


def plain(value: Any) -> Any:
    """Returns a setting as JSON can hold it: objects as their classes and configurations."""
    return _plain(value, {})


def changed_settings(
    was: Any, now: Any, *, complete: bool = True, where: str = ""
) -> Iterator[str]:
    """Says which settings changed between two plain values: where, and what was and is there.

    Args:
        was: What `plain` returned.
        now: What it returns now.
        complete: Bool. Whether keys that only one of them has count. Defaults to `True`.
        where: String. What the values are called. Defaults to `""`.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        if was.get("class_name") != now.get("class_name"):
            yield _changed(where, was.get("class_name"), now.get("class_name"))
            return
        both = was.keys() & now.keys()
        for key in sorted(was.keys() | now.keys() if complete else both):
            there = _joined(where, "" if key == "config" else key)
            yield from changed_settings(was.get(key), now.get(key), complete=complete, where=there)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, (one, other) in enumerate(zip(was, now, strict=True)):
            kind = one.get("class_name") if isinstance(one, dict) else None
            there = f"{where}[{index}]" + (f" ({kind})" if kind else "")
            yield from changed_settings(one, other, complete=complete, where=there)
    elif not _equal(was, now):
        yield _changed(where, was, now)


def _equal(was: Any, now: Any) -> bool:
    numbers = isinstance(was, float) or isinstance(now, float)
    if numbers and isinstance(was, (int, float)) and isinstance(now, (int, float)):
        return math.isclose(was, now, rel_tol=1e-6)
    return was == now


def _joined(where: str, key: str) -> str:
    return f"{where}.{key}" if where and key else where or key


def _changed(where: str, was: Any, now: Any) -> str:
    return f"{where} (was {shown(was)}, is {shown(now)})"


def shown(value: Any) -> str:
    """Returns a plain value, short enough for a message."""
    if isinstance(value, dict) and "class_name" in value:
        return str(value["class_name"])
    if isinstance(value, list) and len(repr(value)) > _SHOWN:
        return f"{len(value)} entries"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _plain(value: Any, names: dict[str, str], *, naming: bool = False) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, (float, np.generic)):
        number = value.item() if isinstance(value, np.generic) else value
        finite = not isinstance(number, float) or math.isfinite(number)
        return number if finite and isinstance(number, (bool, int, float)) else str(number)
    if isinstance(value, (str, bytes)):
        return names.get(value, value) if naming and isinstance(value, str) else _text(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value, names)
    if isinstance(value, (set, frozenset)):
        # Their order is another in each process.
        return sorted((_plain(one, names, naming=naming) for one in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [_plain(one, names, naming=naming) for one in value]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return {"class_name": "array", "shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, type) or (callable(value) and not hasattr(value, "get_config")):
        return getattr(value, "__qualname__", type(value).__qualname__)
    config = _config_of(value)
    described = {"class_name": type(value).__qualname__}
    return described if config is None else {**described, "config": _plain(config, names)}


def _plain_mapping(value: Mapping, names: dict[str, str]) -> dict[str, Any]:
    # The name of a dtype policy says which it is.
    named = str(value.get("class_name")).endswith("Policy")
    found = {}
    for key, one in _without_inputs(value).items():
        if key in _NAMING or key == "output_names":
            found[str(key)] = _plain(one, names, naming=True)
        elif key == "batch_shape" and isinstance(one, (list, tuple)):
            # A Sequential model that builds itself takes the size of its first batch.
            found[str(key)] = [None, *_plain(list(one[1:]), names)]
        elif named and key == "config":
            found[str(key)] = {str(k): _plain(v, names) for k, v in dict(one).items()}
        elif key not in _LEFT_OUT:
            found[str(key)] = _plain(one, names)
    return found


def _without_inputs(config: Mapping) -> Mapping:
    """Returns a configuration; that of a Sequential model without an input.

    On TensorFlow the first batch adds one, if there is none.
    """
    layers = config.get("layers")
    if not isinstance(layers, (list, tuple)) or "input_layers" in config:
        return config

    def is_input(one: Any) -> bool:
        return isinstance(one, Mapping) and one.get("class_name") == "InputLayer"

    return {**config, "layers": [one for one in layers if not is_input(one)]}


def _text(value: str | bytes) -> str:
    """Returns a string, long ones as a digest; of a path only the name, as folders may move."""
    text = value if isinstance(value, str) else value.decode(errors="replace")
    if len(text) > _LONG:
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return text.rsplit("/", 1)[-1]


def _config_of(value: Any) -> Any:
    try:
        return value.get_config()
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # A user's class need not have one (NotImplementedError), or not one that works.
        return None


def _collect_names(config: Any, names: dict[str, str]) -> None:
    """Numbers the names of layers in the order in which they come."""
    if isinstance(config, Mapping):
        inner = config.get("config")
        if "class_name" in config and isinstance(inner, Mapping) and "name" in inner:
            names.setdefault(str(inner["name"]), f"#{len(names)}")
        for value in _without_inputs(config).values():
            _collect_names(value, names)
    elif isinstance(config, (list, tuple)):
        for value in config:
            _collect_names(value, names)
