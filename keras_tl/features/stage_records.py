"""What each stage of a run is trained on: records of what is frozen in it, or the data itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.backbone.model_backbones import BackboneOf, Backbones
from keras_tl.errors import StaleCacheError, UncacheableError
from keras_tl.features.feature_cache import FeatureCache
from keras_tl.features.preparation import Data, prepared
from keras_tl.features.room import room_in_memory, room_on_disk
from keras_tl.features.same_epochs import check_training_data, check_validation_data
from keras_tl.features.source import Source
from keras_tl.features.splitting import SplitModel, check_has_graph, recompile_head
from keras_tl.features.unrolled import Unrolled
from keras_tl.features.worth import Terms, bytes_of, judge
from keras_tl.internals.processes import agreed, of_all, processes_here, whole_data
from keras_tl.internals.randomness import random_state
from keras_tl.messages import bytes_in_words

_ITEM_BYTES = {None: None, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Training:
    """What a stage is trained on.

    Attributes:
        model: The head, or what trains and all after it.
        features: A `tf.data.Dataset` of the features of the training data.
        held_out: The same of the validation data, or None.
    """

    model: keras.Model
    features: Any
    held_out: Any

    @property
    def steps(self) -> int:
        """Int. How many batches an epoch has."""
        return int(self.features.cardinality())


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """How features are recorded for stages.

    Attributes:
        record: `"auto"`, True or False.
        max_bytes: Int or None. How many bytes may be kept; None: half of what is free.
        cache_dir: String or None. The folder to keep them in; None: in memory.
        batch_size: Int or None. For arrays.
        steps: Int or None. The `steps_per_epoch` of `fit`.
        validation_steps: Int or None. That of `fit`.
        shuffle: Bool. Whether each epoch is in a random order.
        views: Int or None. How many random passes are recorded.
        dtype: String or None. The dtype to keep features in.
        verbose: As `Progbar` takes it.
    """

    record: bool | str
    max_bytes: int | None
    cache_dir: str | None
    batch_size: int | None
    steps: int | None
    validation_steps: int | None
    shuffle: bool
    views: int | None
    dtype: str | None
    verbose: Any


class StageRecords:
    """Records for each stage of a run what comes out of what is frozen in it.

    A record lives as long as the same weights train: what no later stage can need is freed.

    Args:
        model: The compiled model.
        data: Tuple `(x, y, sample_weight)`, as `fit` takes it.
        validation_data: That of `fit`.
        settings: The `RecordSettings`.
        backbone: As `fine_tune` takes it.
        moving: List of weights that something else than training changes.
        say: Function that tells the user.
    """

    def __init__(
        self,
        model: keras.Model,
        data: Data,
        validation_data: Any,
        settings: RecordSettings,
        *,
        backbone: BackboneOf | None,
        moving: Sequence[keras.Variable] = (),
        say: Callable[[str], None],
    ):
        self._model, self._data, self._validation_data = model, data, validation_data
        self._settings = settings
        self._backbone, self._moving = backbone, moving
        self._say = say
        self._inputs: Any = None
        self._samples: int | None = None
        self._last: tuple[list[int], FeatureCache, Training] | None = None
        self._known = False  # What `SplitModel` takes.
        # Why no stage can be trained on records, once that is known.
        self.given_up = settings.record is False

    def of(self, stage: int, *, epochs: int) -> Training | None:
        """Returns what to train a stage on, None where that is the data itself, and says why.

        Args:
            stage: Int. The stage that the model is in.
            epochs: Int. How many epochs may be trained on it.
        """
        if self.given_up:
            return None
        trained = [id(weight) for weight in self._model.trainable_weights]
        if self._last is not None and self._last[0] == trained:
            return self._again()
        self.release()
        # What a recording that is given up has drawn must not change the training after it.
        put_back_random_state = random_state()
        try:
            split = self._split(stage, epochs)
            if split is None:
                return None
            cache = FeatureCache(split, cache_dir=self._settings.cache_dir)
            training = self._recorded(cache, stage)
        except UncacheableError as error:
            put_back_random_state()
            self.given_up = True
            what = "the head through the backbone" if stage == 0 else "the whole model"
            self._say(f"fine_tune trains {what}. {error}")
            return None
        self._last = (trained, cache, training)
        self._known = True
        return training

    def release(self) -> None:
        """Frees what is kept in memory."""
        if self._last is not None:
            self._last[1].release()
            self._last = None

    def _again(self) -> Training:
        """Returns the last record for another stage of the same layers."""
        assert self._last is not None
        training = self._last[2]
        if training.model.optimizer is not self._model.optimizer:
            recompile_head(training.model, self._model)
        return training

    def _split(self, stage: int, epochs: int) -> SplitModel | None:
        """Returns the model split where it is worth it, or None, and says why."""
        self._check_data()
        if not Backbones(self._model, self._backbone).trainable_weights:
            split = SplitModel(self._model, self._backbone, known=self._known)
            return split if self._fits(split, stage) else None
        check_has_graph(self._model)
        random = self._settings.views is not None
        unrolled = Unrolled(self._model, moving=self._moving)
        verdict = judge(unrolled, self._inputs, self._terms(epochs), random=random)
        if verdict.cut is None:
            self._say(f"fine_tune trains stage {stage} through the whole model: {verdict.why}.")
            return None
        split = SplitModel(self._model, self._backbone, cut=verdict.cut, known=self._known)
        self._say(f"fine_tune records {verdict.why}.")
        return split

    def _check_data(self) -> None:
        """Raises an UncacheableError if no record can stand for every epoch."""
        if self._inputs is None:
            self._inputs = _of_whole_data(self._inputs_of_data)

    def _inputs_of_data(self) -> Any:
        settings = self._settings
        data = self._prepared(self._data, training=True)
        check_training_data(
            *data,
            batch_size=settings.batch_size,
            steps=settings.steps,
            random=settings.views is not None,
        )
        check_validation_data(self._validation_data, steps=settings.validation_steps)
        source = Source(*data, batch_size=settings.batch_size, steps=settings.steps)
        source.close()
        return source.inputs

    def _fits(self, split: SplitModel, stage: int) -> bool:
        """Whether the outputs of the frozen backbone are not too many, and says so if they are."""
        shapes = {id(x): tuple(x.shape)[1:] for x in split.features.values()}
        if self._settings.max_bytes is None and self._count(read=False) is None:
            return True  # To read all data only to count it takes longer than it is worth.
        terms = self._terms(1)
        size = bytes_of(list(split.features.values()), shapes, terms.item_bytes)
        total = size * (terms.samples or 0) * terms.views
        if total <= terms.max_bytes:
            return True
        self._say(
            f"fine_tune trains stage {stage} through the whole model: the outputs of the backbone "
            f"take {bytes_in_words(total)}, and {bytes_in_words(terms.max_bytes)} may be kept "
            "(`max_bytes`)."
        )
        return False

    def _terms(self, epochs: int) -> Terms:
        settings = self._settings
        room = settings.max_bytes
        if room is None:
            folder = settings.cache_dir
            room = room_in_memory() if folder is None else room_on_disk(folder)
            # Processes on one machine fill it together, and all must decide alike.
            room = int(np.min(of_all(room // processes_here())))
        return Terms(
            always=settings.record is True,
            epochs=epochs,
            samples=self._count(),
            views=settings.views or 1,
            max_bytes=room,
            item_bytes=_ITEM_BYTES.get(settings.dtype),
        )

    def _count(self, *, read: bool = True) -> int | None:
        """Returns about how many samples there are, to train on and to validate on.

        Args:
            read: Bool. Whether data is read to count it, where nothing else tells: else it is None.
        """
        if self._samples is None:
            # Of processes with data of their own, the one with the most; none, if one cannot tell.
            counts = of_all(_of_whole_data(lambda: self._counted(read=read)))
            if np.min(counts) >= 0:
                self._samples = int(np.max(counts))
        return self._samples

    def _counted(self, *, read: bool) -> int:
        """Returns what `_count` does in this process, -1 for None."""
        settings = self._settings
        count = functools.partial(_count, batch_size=settings.batch_size, read=read)
        found = [count(self._prepared(self._data, training=True), steps=settings.steps)]
        if self._validation_data is not None:
            data = self._prepared(_in_tuple(self._validation_data), training=False)
            found.append(count(data, steps=settings.validation_steps))
        return -1 if None in found else sum(one for one in found if one is not None)

    def _prepared(self, data: Any, *, training: bool) -> Data:
        size = self._settings.batch_size
        return prepared(self._model, *data, batch_size=size, training=training)

    def _recorded(self, cache: FeatureCache, stage: int) -> Training:
        settings = self._settings
        # A stage after the first has weights before its cut that an earlier one may have trained:
        # what an earlier run has recorded is of no use then, and no error.
        record = functools.partial(
            cache if stage == 0 else functools.partial(_recorded_anew_if_stale, cache),
            batch_size=settings.batch_size,
            dtype=settings.dtype,
            verbose=settings.verbose,
        )
        suffix = "" if stage == 0 else f"-stage-{stage}"
        features = record(
            *self._data,
            steps=settings.steps,
            shuffle=settings.shuffle,
            views=settings.views,
            name=f"training{suffix}",
        )
        if self._validation_data is None:
            return Training(cache.head, features, None)
        # In the order of the data and without what is random, as `evaluate` reads it.
        validation = record(
            *_in_tuple(self._validation_data),
            steps=settings.validation_steps,
            shuffle=False,
            training=False,
            name=f"validation{suffix}",
        )
        return Training(cache.head, features, validation)


def _of_whole_data(function: Callable[[], Any]) -> Any:
    """Returns what a function finds in the data that is given, not in a process's share of it.

    Raises:
        Exception: In all processes, if the function raises in one.
    """

    def find() -> Any:
        with whole_data():
            return function()

    return agreed(find, UncacheableError, ValueError)


def _recorded_anew_if_stale(cache: FeatureCache, *data: Any, **settings: Any) -> Any:
    try:
        return cache(*data, **settings)
    except StaleCacheError:
        return cache(*data, **settings, refresh=True)


def _in_tuple(data: Any) -> Any:
    """Returns validation data as arguments."""
    return data if isinstance(data, (tuple, list)) else (data,)


def _count(data: Data, *, batch_size: int | None, steps: int | None, read: bool) -> int | None:
    """Returns how many samples are recorded of data, None if only reading it would tell."""
    source = Source(*data, batch_size=batch_size, steps=steps)
    with contextlib.closing(source):
        size = keras.tree.flatten(source.spec)[0].shape[0]
        if source.fixed:
            at_most = (batch_size or 32) * (source.batches or 0)
            return min(len(keras.tree.flatten(data[0])[0]), at_most)
        if size is not None and source.batches is not None:
            return size * source.batches
        return source.samples(0, 1).count if read else None
