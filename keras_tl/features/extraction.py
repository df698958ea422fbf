"""Running the backbone over the data, one shard after the other, where a shard is not there yet."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Self

import keras
import numpy as np

from keras_tl.errors import UncacheableError
from keras_tl.features.probe import Probe, same_features
from keras_tl.features.records import Records
from keras_tl.features.settings import ExtractionSettings
from keras_tl.features.source import Samples, Source
from keras_tl.features.splitting import SplitModel
from keras_tl.features.store import Shard, ShardName, Store
from keras_tl.internals.batches import predictions
from keras_tl.internals.layers import own_state, seed_states
from keras_tl.internals.values import on_host
from keras_tl.messages import say, some

# A shard is what an interruption loses at most, and what is held in memory while it is written.
SHARD_BYTES = 32 << 20
SHARD_BATCHES = 32


class Extraction:
    """Extracts one part of the data.

    Args:
        split: The `SplitModel`.
        source: The `Source`.
        store: The `Store`, opened.
        settings: The `ExtractionSettings`.
        part: Int. Which part.
        parts: Int. Of how many.
        watched: List that gets the `Samples` of each pass over all parts; None where only this part
            is read.
    """

    def __init__(
        self,
        split: SplitModel,
        source: Source,
        store: Store,
        settings: ExtractionSettings,
        *,
        part: int,
        parts: int,
        watched: list[Samples] | None = None,
    ):
        self._split, self._source, self._store = split, source, store
        self._settings = settings
        self._part, self._parts = part, parts
        self._watched = watched
        self._extractor = split.extractor(settings.training)
        self._check = None if settings.random else _Constant(split.layers)

    def run(self) -> list[list[Shard]]:
        """Records what is not there yet.

        Returns:
            For each pass, the list of its shards.

        Raises:
            StaleCacheError: If shards that are there are of other data.
            UncacheableError: If layers before the split change, or data has no fixed size.
            OSError: If a shard cannot be written.
        """
        with _Progress(self._target(), self._settings.verbose) as progress:
            passes = [self._pass(view, progress) for view in range(self._settings.passes)]
        self._store.finish(self._part, self._parts, passes)
        return passes

    def _target(self) -> int | None:
        batches = self._source.batches
        if batches is None:
            return None
        return self._settings.passes * len(range(self._part, batches, self._parts))

    def _pass(self, view: int, progress: _Progress) -> list[Shard]:
        shards: list[futures.Future[Shard]] = []
        batches = self._batches()
        with futures.ThreadPoolExecutor(1, "keras_tl_features") as writer:
            while (batch := next(batches, None)) is not None:
                group = itertools.chain([batch], batches)
                name = ShardName(self._part, self._parts, view, len(shards))
                there, damage = self._store.find(name)
                if damage is not None:
                    say(f"{damage}: extracting it again.")
                if there is None:
                    samples, packed = self._extract(group, progress)
                    # One shard is written while the next is computed, and no more are held.
                    if shards:
                        shards[-1].result()
                    shards.append(writer.submit(self._store.write, name, samples, packed))
                else:
                    self._skip(group, there.samples, progress)
                    shards.append(futures.Future())
                    shards[-1].set_result(there)
        left_over = ShardName(self._part, self._parts, view, len(shards))
        if self._store.has(left_over):
            raise self._store.stale("the number of samples (now fewer)")
        return [shard.result() for shard in shards]

    def _batches(self) -> Iterator[Any]:
        if self._watched is not None:
            return self._source.watched(self._part, self._parts, self._watched)
        return iter(self._source.part(self._part, self._parts))

    def _skip(self, group: Iterator[Any], recorded: Samples, progress: _Progress) -> None:
        """Reads the batches of a shard that is there, and checks that it was made of them."""
        found = Samples()
        for batch in itertools.islice(group, len(recorded.batches)):
            found.add(Samples.of(batch))
            progress.add(found.batches[-1])
        random = self._settings.random
        if not self._source.same(recorded, found, random=random):
            regrouped = found.batches != recorded.batches and "the batch size"
            order = "the order of the samples, on which a resumed extraction depends"
            changed = recorded.difference(found, inputs=not random)
            raise self._store.stale(changed or regrouped or order)

    def _extract(
        self, group: Iterator[Any], progress: _Progress
    ) -> tuple[Samples, list[np.ndarray]]:
        samples = Samples()
        packed: list[np.ndarray] = []
        for batch, features in predictions(self._extractor, group):
            if self._check is not None:
                self._check.raise_if_changed()
                self._check_repeats(batch, features)
                self._check = None  # One batch tells, and it costs as much as small batches do.
            arrays = self._arrays(batch, features)
            if not self._source.agrees:
                self._check_agrees(batch, features)
            if not packed:
                layout = self._layout(arrays)
                records = self._store.create(*layout, self._probe(batch, features))
            packed.append(records.pack(arrays))
            samples.add(Samples.of(batch))
            progress.add(samples.batches[-1])
            if len(packed) == self._store.batches_per_shard:
                break
        return samples, packed

    def _check_repeats(self, batch: Any, features: dict[str, Any]) -> None:
        """Raises an UncacheableError if the same batch gives other features now."""
        ((_, again),) = predictions(self._extractor, [batch])
        if not same_features(features, again):
            # Which may not show in their seeds: on torch, Keras draws Dropout from elsewhere.
            random = [layer.name for layer in self._split.layers if seed_states(layer)]
            if random:
                raise _random_layers_error(random)
            raise UncacheableError(
                "The layers up to the backbone's outputs return something else each time that they "
                "are called on the same batch: they draw random numbers, or are stateful. Recorded "
                "once, every epoch would see the same. Pass `views=k` to record k passes, of which "
                "each epoch draws; or train through the backbone."
            )

    def _check_agrees(self, batch: Any, features: dict[str, Any]) -> None:
        """Raises an UncacheableError if the model itself gives something else for a batch."""
        given = None if self._settings.random else features
        self._split.check_agrees(batch, given, arrays=self._source.fixed)
        self._source.agrees = True

    def _probe(self, batch: Any, features: dict[str, Any]) -> Probe | None:
        if self._settings.random:
            return None
        x = keras.utils.unpack_x_y_sample_weight(batch)[0]
        first, of_first = keras.tree.map_structure(lambda tensor: tensor[:1], (x, features))
        return Probe(first, of_first)

    def _arrays(self, batch: Any, features: dict[str, Any]) -> list[np.ndarray]:
        _, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        rest = [x.numpy() for x in keras.tree.flatten((y, weight)) if x is not None]
        arrays = [np.asarray(features[name]) for name in self._split.names]
        samples = len(next(iter(keras.tree.flatten(batch))))
        if any(array.ndim == 0 or len(array) != samples for array in arrays):
            raise UncacheableError(
                "The backbone must return one output for each sample, to be recorded with it. Of "
                f"{samples} samples it returned outputs of shape "
                f"{', '.join(str(array.shape) for array in arrays)}. Train through the backbone."
            )
        for array in arrays + rest:
            if array.dtype.kind in "OSU":
                raise UncacheableError(
                    "Strings cannot be recorded: only tensors of numbers have a fixed size. "
                    "Encode targets and inputs that bypass the backbone as numbers first."
                )
        return arrays + rest

    def _layout(self, arrays: Sequence[np.ndarray]) -> tuple[Records, int]:
        kept = [
            self._settings.dtype
            if _is_floating(array) and name not in self._split.bypassing
            else None
            for name, array in zip(self._split.names, arrays)
        ]
        records = Records.like(arrays, [*kept, *[None] * (len(arrays) - len(kept))])
        batch_bytes = max(1, len(arrays[0]) * records.dtype.itemsize)
        return records, max(1, min(SHARD_BATCHES, math.ceil(SHARD_BYTES / batch_bytes)))


class _Constant:
    """Raises an error if layers change their own state when they are called.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[keras.Layer]):
        self._random = _values(layers, seed_states)
        self._other = _values(layers, own_state)

    def raise_if_changed(self) -> None:
        """Raises an UncacheableError if a layer has changed, after putting it back."""
        random = _changed(self._random)
        if random:
            raise _random_layers_error(random)
        other = _changed(self._other)
        if other:
            raise UncacheableError(
                f"The layers {some(other)} come before the backbone's outputs and change "
                "their own state in training, so what is recorded would not stay right. Freeze "
                "them and compile the model again, or train through the backbone."
            )


def _random_layers_error(names: Sequence[str]) -> UncacheableError:
    """Returns the error that names layers that are random."""
    return UncacheableError(
        f"The layers {some(names)} come before the backbone's outputs and are "
        "random: recorded once, every epoch would see the same. Pass `views=k` to record k "
        "random passes, of which each epoch draws; or move them out of the model, or train "
        "through the backbone. Dropout in a backbone is off in a FrozenBackbone."
    )


def _values(
    layers: Sequence[keras.Layer], variables_of: Callable[[keras.Layer], list[keras.Variable]]
) -> list[tuple[str, keras.Variable, bytes]]:
    return [
        (layer.name, variable, on_host(variable).tobytes())
        for layer in layers
        for variable in variables_of(layer)
    ]


def _changed(before: Sequence[tuple[str, keras.Variable, bytes]]) -> list[str]:
    """Returns the names of layers that have changed, and gives them their values back."""
    names: dict[str, None] = {}
    for name, variable, value in before:
        now = on_host(variable)
        if now.tobytes() != value:
            variable.assign(np.frombuffer(value, now.dtype).reshape(now.shape))
            names[name] = None
    return list(names)


class _Progress:
    """A progress bar with batches, samples per second and the time left."""

    def __init__(self, target: int | None, verbose: int):
        self._bar = keras.utils.Progbar(target, verbose=verbose, unit_name="batch")
        self._batches = self._samples = 0
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def add(self, samples: int) -> None:
        """Counts a batch."""
        self._batches += 1
        self._samples += samples
        self._bar.update(self._batches, [("samples_per_second", self._rate())], finalize=False)

    def __exit__(self, *exception: object) -> None:
        if self._batches:
            rate = [("samples_per_second", self._rate())]
            self._bar.update(self._batches, rate, finalize=True)

    def _rate(self) -> float:
        return self._samples / max(time.monotonic() - self._begin, 1e-9)


def _is_floating(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"
