"""Recording what a frozen backbone returns, to train the head on it."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
import weakref
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tl.arguments import check_count, check_model
from keras_tl.backbone.model_backbones import BackboneOf
from keras_tl.features.disk_store import DiskStore
from keras_tl.features.identity import identity_of
from keras_tl.features.parts import Parts
from keras_tl.features.preparation import Data, check_prepares_alike, prepared
from keras_tl.features.reading import dataset_of, positions_of_batches, sizes_of_batches
from keras_tl.features.record_reader import RecordReader
from keras_tl.features.records import Field, Records
from keras_tl.features.settings import ExtractionSettings
from keras_tl.features.source import Samples, Source
from keras_tl.features.splitting import SplitModel
from keras_tl.features.store import MemoryStore, Store
from keras_tl.features.together import (
    alone_in_process,
    check_held,
    check_shared_equally,
    own_folder,
    same_in_all,
    seed_for_all,
    shards_of_all,
)
from keras_tl.features.unnamed import folder_for
from keras_tl.internals.processes import divides_data, is_chief, process_count

_DTYPES = (None, "float32", "float16", "bfloat16")
_ON_WINDOWS = os.name == "nt"
_RESERVED = re.compile(r".*\.|(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


class FeatureCache:
    """Runs the frozen backbone of a model once over data, to train the head on what it returned.

    While the backbone is frozen and nothing before it is random, what it returns for a sample is
    the same in every epoch. Training on a record of it is the same training without the backbone,
    bit for bit, if it is recorded in batches of the same size, in its own dtype. Batches of another
    size are summed in another order, and so are backbone and head where a compiler joins them (XLA;
    TensorFlow joins an Add with the Dense before it): that is a difference of rounding, some 1e-6
    of a feature's size in float32. On torch, Dropout without a `seed` draws other numbers than in
    `fit`: there it shares a generator with what reads arrays.

    Where some of the backbone trains, the record is of what comes before that: as deep as all
    layers are frozen, none is random and no BatchNormalization updates its statistics, also in the
    middle of a `FrozenBackbone` or a nested Functional model. `head` is then all that comes after.

    The head shares its layers with the model: training `head` trains `model`.

    Calling the cache on data records features, in memory or under `cache_dir`. On disk they outlive
    the process, and an interrupted extraction continues after the last whole shard. Features from a
    different backbone or, under the same name, of other data raise an error that says what has
    changed. Damaged or misplaced shards are found by their checksums and recorded again.

    Under `keras.distribution`, on JAX, each batch is spread over the devices. Of several processes
    each extracts its part of the batches, and then all read all of them, from memory or from a
    `cache_dir` that they share: Keras gives each its share of the features as of the data. With
    `auto_shard_dataset=False`, each records the data of its own, in a folder of its own. All must
    call the cache alike; the devices must be able to share each batch equally.

    Args:
        model: A Functional or built Sequential model with a frozen backbone, compiled or not.
        backbone: The layer, model or list of layers to record the outputs of, their names, or a
            function of the model that returns them. Defaults to every `FrozenBackbone` in the
            model, or else its attribute `backbone`.
        cache_dir: String or path. The folder to keep features in. Defaults to `None`: in memory.

    Attributes:
        head: The model from the backbone's outputs (or from where it is no longer frozen), and
            inputs that bypass it, to the outputs of `model`. It is compiled as `model` is, with the
            same optimizer.

    Raises:
        ValueError: If the model cannot be split, has no such backbone, or no weights come before
            those that train.

    Example:

    >>> import numpy as np
    >>> from keras_tl import FeatureCache, FrozenBackbone
    >>> pretrained = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model = keras.Sequential([FrozenBackbone(pretrained), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> cache = FeatureCache(model)
    >>> features = cache(np.ones((64, 8)), np.ones((64, 1)), verbose=0)
    >>> history = cache.head.fit(features, epochs=3, verbose=0)
    >>> features.element_spec[0].shape
    TensorShape([None, 4])

    References:

    - [Transfer learning and fine-tuning](https://keras.io/guides/transfer_learning/)
    """

    def __init__(
        self,
        model: keras.Model | SplitModel,
        *,
        backbone: BackboneOf | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        if not isinstance(model, SplitModel):  # As `fine_tune` passes it, which chose the place.
            check_model(model, "FeatureCache")
            model = SplitModel(model, backbone)
        self._split = model
        # Absolute, so that a later change of the working directory does not move it.
        self._folder = None if cache_dir is None else own_folder(pathlib.Path(cache_dir).absolute())
        self._known = _Known()
        self._readers: list[weakref.ref[RecordReader]] = []
        self.head = self._split.head

    def release(self) -> None:
        """Frees the memory of all features in memory, which can no longer be read."""
        for known in self._readers:
            reader = known()
            if reader is not None:
                reader.release()

    def __call__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        dtype: str | None = None,
        views: int | None = None,
        training: bool = True,
        shard: tuple[int, int] | None = None,
        name: str | None = None,
        refresh: bool = False,
        check_data: bool = True,
        verbose: int = 1,
    ) -> tf.data.Dataset:
        """Returns the features of data, recorded now or before.

        Args:
            x: Inputs, as `fit` takes them: arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset`
                or a generator; the last three with targets and sample weights.
            y: Targets, if `x` is arrays.
            sample_weight: Sample weights, if `x` is arrays.
            batch_size: Int. Samples in a batch: of arrays when they are extracted (32 if None), and
                of what is returned (that of the data if None).
            steps: Int. How many batches are recorded, of data without an end.
            shuffle: Bool. Whether each epoch is in a random order; otherwise in that of the data.
                Defaults to `True`.
            seed: Int. For the random orders.
            dtype: `"float16"` or `"bfloat16"`. The dtype to keep features in, at half the size;
                they are read in their own. Defaults to `None`: their own.
            views: Int k. Records k passes over data that is augmented at random, in layers or as it
                is read. Each epoch draws, for every position in the data, one of the k samples
                there: data that is read in another order each time gives some of them twice.
                Defaults to `None`: what is random is an error.
            training: Bool. Whether layers are called as in `fit`, or as in `evaluate`: pass `False`
                for validation data if there are random layers. Defaults to `True`.
            shard: Tuple `(index, count)`. Extracts every `count`-th batch from that index on.
                Parts can be extracted by separate processes; a call without `shard` joins them.
            name: String. The folder in `cache_dir` for these features: other data under the same
                name is an error. Defaults to `None`: the folder in which this data was recorded,
                whatever the order of calls; new data gets a new one, "0", "1" and so on. A
                generator can be read only once and is known by the order of calls: name it.
            refresh: Bool. Whether existing features are removed and recorded again.
            check_data: Bool. Whether the data is read (without the backbone) and compared with what
                was recorded before, and one recorded sample goes through the backbone again. Data
                other than arrays is also read again after recording, to see that it does not
                change. Otherwise only shapes, dtypes, weights and configuration are compared.
            verbose: 0, 1 or 2, as in `fit`: silence, a progress bar, or one line at the end.

        Returns:
            A `tf.data.Dataset` of batches of `(features, targets[, weights])`, as the data has
            them. Features are one tensor, or a dictionary from names as `head` takes it.

        Raises:
            StaleCacheError: If features were recorded with another backbone or other data.
            ValueError: For an argument out of range; if layers before the backbone's outputs are
                random or change; if the data changes on every read; if samples differ in shape;
                or if a part is missing.
            OSError: If a shard cannot be written. Those finished before are kept.
        """
        self._check(dtype, views, shard, name)
        for argument, value in (("batch_size", batch_size), ("steps", steps)):
            if value is not None:
                check_count(argument, value, at_least=1)
        self._split.check_constant()
        check_held(self._split)
        # Of several processes, one shows how far it is.
        settings = ExtractionSettings(dtype, views, training, verbose if is_chief() else 0)
        alone = functools.partial(alone_in_process, self._split.model)
        with contextlib.ExitStack() as stack:
            data = (x, y, sample_weight)
            source = alone(lambda: self._source(data, settings, batch_size, steps))
            stack.callback(source.close)
            identity: dict[str, Any] = {}
            if self._folder is not None:  # What is in memory is never looked for again.
                identity = alone(lambda: identity_of(self._split, source, settings))
            read = None
            if name is None and self._folder is not None:
                folder, read = alone(
                    lambda: self._folder_for(x, identity, source, shard, check_data, verbose)
                )
                name = same_in_all(folder)
            store = self._store(identity, name)
            recorded = shards_of_all(
                Parts(self._split, source, store, settings, read=read),
                store,
                alone,
                shard=shard,
                refresh=refresh,
                check_data=check_data,
            )
            alone(lambda: self._check_agrees(source))
        by_pass = [
            [shard for part in recorded for shard in part[view]] for view in range(settings.passes)
        ]
        reader = RecordReader(
            store.records or _records_of_nothing(self._split, source),
            [shard for shards in by_pass for shard in shards],
        )
        self._readers.append(weakref.ref(reader))
        batches = positions_of_batches([part[0] for part in recorded])
        sizes = sizes_of_batches(batches, batch_size=batch_size, shuffle=shuffle)
        check_shared_equally(sizes)
        return dataset_of(
            reader,
            lambda flat: self._packed(flat, source.spec),
            batches=batches,
            sizes=sizes,
            known_size=divides_data() and len(set(sizes)) == 1,
            views=settings.passes,
            shuffle=shuffle,
            seed=seed_for_all(seed),
        )

    def _source(
        self,
        data: Data,
        settings: ExtractionSettings,
        batch_size: int | None,
        steps: int | None,
    ) -> Source:
        how: dict[str, Any] = {"batch_size": batch_size, "training": settings.training}
        if not settings.random:
            check_prepares_alike(self._split.model, data, **how)
        source = Source(
            *prepared(self._split.model, *data, **how), batch_size=batch_size, steps=steps
        )
        if settings.passes > 1 and not source.repeatable:
            source.close()
            raise ValueError(
                f"`views={settings.views}` needs data that can be read more than once. Received a "
                "generator."
            )
        return source

    def _check_agrees(self, source: Source) -> None:
        """Raises an UncacheableError if the model does more with its data than call its layers.

        What was recorded before may be of a model that did not.
        """
        if source.first is not None and not source.agrees:
            self._split.check_agrees(source.first, None, arrays=source.fixed)

    def _check(self, dtype: Any, views: Any, shard: Any, name: Any) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be one of {_DTYPES}. Received: dtype={dtype!r}.")
        if views is not None:
            check_count("views", views, at_least=1)
        if name is not None and not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise ValueError(
                "`name` is that of a folder: letters, digits, '_', '-' and '.'. "
                f"Received: name={name!r}."
            )
        if name is not None and _ON_WINDOWS and _RESERVED.fullmatch(str(name)):
            raise ValueError(
                "Windows has no folder of that `name`: it must not end in '.', nor be that of a "
                f"device. Received: name={name!r}."
            )
        if shard is None:
            return
        if process_count() > 1:
            raise ValueError(
                "Processes that train together under `keras.distribution` divide the data among "
                f"themselves. Leave `shard` out. Received: shard={shard!r}."
            )
        valid = isinstance(shard, Sequence) and len(shard) == 2
        if not valid or not all(isinstance(one, int) for one in shard):
            raise ValueError(f"`shard` must be a tuple `(index, count)`. Received: {shard!r}.")
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(
                f"The index in `shard` must be from 0 to count - 1. Received: shard={shard!r}."
            )

    def _folder_for(
        self,
        x: Any,
        identity: dict[str, Any],
        source: Source,
        shard: tuple[int, int] | None,
        check_data: bool,
        verbose: int,
    ) -> tuple[str, Samples | None]:
        """Returns the folder of data without a name, and its samples if they were read for it."""
        known = self._known.of(x, identity["training"])
        if known is not None and not (check_data and source.repeatable):
            return known, None
        assert self._folder is not None
        name, samples = folder_for(
            self._folder,
            identity,
            source,
            shard,
            read=check_data,
            taken=self._known.folders,
            verbose=verbose,
        )
        self._known.add(x, identity["training"], name)
        return name, samples

    def _store(self, identity: dict[str, Any], name: str | None) -> Store:
        if self._folder is None or name is None:
            return MemoryStore()
        return DiskStore(self._folder / name, identity)

    def _packed(self, flat: Sequence[Any], spec: Any) -> Any:
        names = self._split.names
        features = flat[0] if len(names) == 1 else dict(zip(names, flat))
        rest = [part for part in keras.utils.unpack_x_y_sample_weight(spec)[1:] if part is not None]
        if not rest:
            return features
        return (features, *keras.tree.pack_sequence_as(rest, list(flat[len(names) :])))


class _Known:
    """The folders of the data that a cache was called on, so that it need not be read again."""

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref[Any], bool, str]] = []

    def of(self, x: Any, training: bool) -> str | None:
        """Returns the folder of the same object, if the cache was called on it in that way."""
        first = next(iter(keras.tree.flatten(x)), x)
        called = (folder for seen, how, folder in self._seen if seen() is first and how == training)
        return next(called, None)

    def add(self, x: Any, training: bool, folder: str) -> None:
        """Notes a folder."""
        first = next(iter(keras.tree.flatten(x)), x)
        with contextlib.suppress(TypeError):  # Of a list of strings, which is read again.
            self._seen.append((weakref.ref(first), training, folder))

    @property
    def folders(self) -> set[str]:
        """The folders that data has been given."""
        return {folder for *_, folder in self._seen}


def _records_of_nothing(split: SplitModel, source: Source) -> Records:
    """The records of data without any sample, of which no batch has told the layout."""
    _, y, weight = keras.utils.unpack_x_y_sample_weight(source.spec)
    rest = [one for one in keras.tree.flatten((y, weight)) if one is not None]
    specs = [(x.shape, x.dtype) for x in split.features.values()]
    specs += [(tuple(one.shape), one.dtype.name) for one in rest]
    return Records([Field(tuple(n or 0 for n in shape[1:]), d, d) for shape, d in specs])
