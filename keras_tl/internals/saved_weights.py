"""Files of weights: where in one a layer's weights are."""

from __future__ import annotations

import re
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.imported import to_snake_case


@checked(SINCE_3_15)
def read_without_wrapper(store: Any, layer: keras.Layer, attribute: str) -> bool:
    """Has a file that was saved without a wrapper read as if it had been saved with it.

    To be called in the wrapper's `load_own_variables`, whose `store` is the whole open file. Keras
    names what is in a list after its class, so without the wrapper the layer has another place
    there, and what is of its class and comes after it has a place one further on.

    Args:
        store: What `load_own_variables` was given.
        layer: The wrapped layer.
        attribute: String. The wrapper's attribute that holds it.

    Returns:
        Bool. Whether it is such a file.
    """
    # Other stores (of `.npz` files) have no such path: there Keras' own error names the layer.
    path = getattr(store, "_h5_entry_path", None)
    # Of a file in shards only one is open at a time.
    if path is None or hasattr(store, "sharding_config") or store.has_path(f"{path}/{attribute}"):
        return False
    places = getattr(store, "keras_tl_places", None) or _Places(store)
    if store.has_path(path):
        place: str | None = path
        places.skipped_in_layers(path, layer)
    else:
        place = places.find(path, layer)
    if place is None:
        return False
    places.moved[f"{path}/{attribute}"] = place
    store.keras_tl_places = places
    store.get, store.has_path = places.get, places.has_path
    return True


class _Places:
    """Where in a file saved without wrappers everything is."""

    def __init__(self, store: Any):
        self.moved: dict[str, str] = {}
        self._taken: dict[str, set[int]] = {}
        self._file = store.h5_file
        self._get, self._has_path = store.get, store.has_path

    def get(self, path: str) -> Any:
        return self._get(self._place_of(path))

    def has_path(self, path: str) -> bool:
        return self._has_path(self._place_of(path))

    def find(self, path: str, layer: keras.Layer) -> str | None:
        """The place of a layer that is not where a wrapper at `path` would have it.

        Known by its name, or by being the only one of its class.
        """
        parent = path.rpartition("/")[0]
        stem = f"{parent}/{to_snake_case(type(layer).__name__)}"
        taken = self._taken.setdefault(stem, set())
        free = [number for number in self._numbers(stem) if number not in taken]
        named = [one for one in free if self._name_at(_numbered(stem, one)) == layer.name]
        number = (named or free)[0] if len(named or free) == 1 else None
        if number is None:
            return None
        taken.add(number)
        return _numbered(stem, number)

    def skipped_in_layers(self, path: str, layer: keras.Layer) -> None:
        """Notes that a model's list of layers counts a layer that is saved as an attribute."""
        parent = path.rpartition("/")[0]
        stem = f"{parent}/layers/{to_snake_case(type(layer).__name__)}".lstrip("/")
        self._taken.setdefault(stem, set())

    def _numbers(self, stem: str) -> list[int]:
        parent, _, name = stem.rpartition("/")
        if parent not in self._file:
            return []
        matches = [
            re.fullmatch(rf"{re.escape(name)}(?:_(\d+))?", one) for one in self._file[parent]
        ]
        return sorted(int(match[1] or 0) for match in matches if match)

    def _name_at(self, place: str) -> str | None:
        group = self._file[place]
        return group["vars"].attrs.get("name") if "vars" in group else None

    def _place_of(self, path: str) -> str:
        for old, new in self.moved.items():
            if path == old or path.startswith(f"{old}/"):
                return new + path[len(old) :]
        for stem, taken in self._taken.items():
            match = re.fullmatch(rf"{re.escape(stem)}(?:_(\d+))?(/.*)?", path)
            if match:
                left = [one for one in self._numbers(stem) if one not in taken]
                number = int(match[1] or 0)
                if number < len(left):
                    return _numbered(stem, left[number]) + (match[2] or "")
        return path


def _numbered(stem: str, number: int) -> str:
    return f"{stem}_{number}" if number else stem
