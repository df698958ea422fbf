"""The parts of recorded data: what is there already is used, the rest is extracted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import keras

from keras_tl.errors import UncacheableError
from keras_tl.features.extraction import Extraction
from keras_tl.features.settings import ExtractionSettings
from keras_tl.features.source import Samples, Source
from keras_tl.features.splitting import SplitModel
from keras_tl.features.store import Shard, ShardName, Store
from keras_tl.internals.layers import seed_states

# How many missing parts a message names: a file may claim that there are millions.
_PARTS_SHOWN = 8


class Parts:
    """Gets the shards of parts of the data.

    Args:
        split: The `SplitModel`.
        source: The `Source`.
        store: The `Store`, opened.
        settings: The `ExtractionSettings`.
        read: The samples of the data if they have just been read, so that they need not be again.
    """

    def __init__(
        self,
        split: SplitModel,
        source: Source,
        store: Store,
        settings: ExtractionSettings,
        *,
        read: Samples | None = None,
    ):
        self._split, self._source, self._store = split, source, store
        self._settings = settings
        self._read = read

    def get(self, shard: tuple[int, int] | None, *, check_data: bool) -> list[list[list[Shard]]]:
        """Returns for each part, for each pass, its shards.

        Args:
            shard: The index of a part and the number of parts; None for all.
            check_data: Bool. Whether the data is compared with what was recorded of it.

        Raises:
            StaleCacheError: If what is there was recorded of other data.
            UncacheableError: If the data is not the same each time.
            ValueError: If a part is missing.
        """
        if check_data:
            self._check_same_backbone()  # Before an interrupted extraction continues.
        count = self._count_to_join() if shard is None else shard[1]
        wanted = [*range(count)] if shard is None else [shard[0]]
        there = {part: self._recorded(part, count) for part in wanted}
        parts = [there[part] or self._extract(part, count) for part in wanted]
        now = (0, 1) if shard is None else shard
        if check_data and any(there.values()):
            self._check_unchanged(parts, now)
        elif (
            check_data
            and self._source.repeatable
            and not (self._settings.random or self._source.fixed)
        ):
            self._check_repeats(parts, now)
        return parts

    def complete(self) -> int:
        """Returns in how many parts all of the data is there, and whole; 0 if it is not."""
        counts = [n for n, parts in self._store.finished_parts().items() if len(parts) == n]
        return next((n for n in sorted(counts) if None not in self._all(n)), 0)

    def joined(self, count: int) -> list[list[list[Shard]]]:
        """Returns for each part, for each pass, its shards, all recorded before.

        Raises:
            ValueError: If a part is missing.
        """
        there = self._all(count)
        missing = [part for part, passes in enumerate(there) if passes is None]
        if missing:
            raise ValueError(
                f"Processes have just recorded features in {self._store.place}, but this one does "
                f"not find {'that' if len(missing) == 1 else 'those'} of process "
                f"{', '.join(map(str, missing))} there. `cache_dir` must be one folder on a disk "
                "that all processes share; or leave it out, to keep features in memory."
            )
        return [passes for passes in there if passes is not None]

    def unchanged(self, count: int) -> list[list[list[Shard]]]:
        """Returns what `joined` does, after comparing it with the data.

        Raises:
            StaleCacheError: If it was recorded of other data, or another backbone.
        """
        self._check_same_backbone()
        parts = self.joined(count)
        self._check_unchanged(parts, (0, 1))
        return parts

    def extracted(
        self, part: int, parts: int, *, check_data: bool
    ) -> tuple[list[list[Shard]], list[Samples]]:
        """Extracts a part while all of the data is read.

        Args:
            part: Int. Which part.
            parts: Int. Of how many.
            check_data: Bool. Whether the backbone is compared with that of what is there.

        Returns:
            For each pass its shards, and what tells apart all samples of each pass.
        """
        if check_data:
            self._check_same_backbone()
        if self._settings.random:
            _draw_other_numbers(self._split.layers, part)
        watched: list[Samples] = []
        return self._extract(part, parts, watched), watched

    def alike_in_all(self, watched: Sequence[Samples]) -> list[Any]:
        """Returns what processes that read the same data find alike, as JSON can hold it."""
        if not self._settings.random:
            return [dataclasses.asdict(one) for one in watched]
        # What is random as it is read may be other in each.
        has_targets = bool(self._source.describe()["targets"])
        return [[one.batches, one.targets if has_targets else 0] for one in watched]

    def check_repeats(self, part: int, parts: int, watched: Samples) -> None:
        """Raises an UncacheableError if all of the data is not the same when it is read again."""
        if self._source.fixed or self._settings.random or not self._source.repeatable:
            return
        changed = watched.difference(self._source.samples(0, 1))
        if changed is not None:
            self._store.delete_part(part, parts)
            raise _changing_error(changed, "")

    def _all(self, count: int) -> list[list[list[Shard]] | None]:
        return [self._recorded(part, count) for part in range(count)]

    def _count_to_join(self) -> int:
        finished = self._store.finished_parts()
        if not finished or 1 in finished:
            return 1
        count = max(finished)
        missing = count - len(finished[count])
        if missing:
            listed = (part for part in range(count) if part not in finished[count])
            first, *rest = itertools.islice(listed, _PARTS_SHOWN)
            shown = ", ".join(map(str, [first, *rest]))
            more = f" and {missing - _PARTS_SHOWN} more" if missing > _PARTS_SHOWN else ""
            raise ValueError(
                f"The features in {self._store.place} are in {count} parts, of which "
                f"{shown}{more} {'is' if missing == 1 else 'are'} missing or not finished. Call "
                f"the cache with `shard=({first}, {count})` first, or pass `refresh=True`."
            )
        return count

    def _recorded(self, part: int, parts: int) -> list[list[Shard]] | None:
        """The shards of a part, if it is finished and none is damaged."""
        counts = self._store.finished(part, parts)
        if counts is None or len(counts) != self._settings.passes:
            return None
        passes = []
        for view, count in enumerate(counts):
            found = [self._store.find(ShardName(part, parts, view, i))[0] for i in range(count)]
            if any(shard is None for shard in found):
                return None
            passes.append([shard for shard in found if shard is not None])
        return passes

    def _extract(
        self, part: int, parts: int, watched: list[Samples] | None = None
    ) -> list[list[Shard]]:
        self._store.reopen_part(part, parts)
        return Extraction(
            self._split,
            self._source,
            self._store,
            self._settings,
            part=part,
            parts=parts,
            watched=watched,
        ).run()

    def _check_unchanged(self, parts: list[list[list[Shard]]], now: tuple[int, int]) -> None:
        """Raises a StaleCacheError if the data is not what was recorded."""
        passes = [_samples(parts, view) for view in range(self._settings.passes)]
        changed = difference(passes, self._read or self._source.samples(*now))
        if changed is not None:
            raise self._store.stale(changed)

    def _check_same_backbone(self) -> None:
        """Raises a StaleCacheError if the backbone makes something else of a recorded sample."""
        if self._store.probe is None:
            return
        extractor = self._split.extractor(self._settings.training)
        if self._store.probe.differs(extractor, self._source.inputs):
            raise self._store.stale("what the layers up to the backbone's outputs compute")

    def _check_repeats(self, parts: list[list[list[Shard]]], now: tuple[int, int]) -> None:
        """Raises an UncacheableError if the data is not the same when it is read again."""
        index, count = now
        if count == 1 and parts[0][0]:
            # Data that changes shows it at once: the first shard, read in order, is enough.
            first = parts[0][0][0].samples
            if self._source.samples(*now, batches=len(first.batches)) == first:
                return
        changed = _samples(parts, 0).difference(self._source.samples(*now))
        if changed is None:
            return
        self._store.delete_part(index, count)
        raise _changing_error(changed, "in another order or " if count > 1 else "")


def _draw_other_numbers(layers: Sequence[keras.Layer], part: int) -> None:
    """Has random layers draw other numbers for each part, of which each process extracts one."""
    seeds = {id(seed): seed for layer in layers for seed in seed_states(layer)}
    for seed in seeds.values():
        seed.assign(keras.ops.add(seed, keras.ops.cast(part, seed.dtype)))


def _changing_error(changed: str, order: str) -> UncacheableError:
    return UncacheableError(
        f"The data is read {order}with other values each time, as after random augmentation: "
        f"{changed} differ. Recorded once, every epoch would see the same. Pass `views=k` to "
        "record k passes, of which each epoch draws; `check_data=False` if that is meant; or "
        "train through the backbone."
    )


def difference(passes: Sequence[Samples], now: Samples) -> str | None:
    """Says what differs between data as it was recorded in some passes, and now."""
    first, *others = passes
    # What changed from pass to pass cannot be compared with what is read now.
    return first.difference(
        now,
        inputs=all(one.inputs == first.inputs for one in others),
        targets=all(one.targets == first.targets for one in others),
    )


def _samples(parts: list[list[list[Shard]]], view: int) -> Samples:
    """What tells the samples of a pass apart."""
    samples = Samples()
    for shard in (shard for part in parts for shard in part[view]):
        samples.add(shard.samples)
    return samples
