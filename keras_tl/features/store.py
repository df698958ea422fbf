"""Where recorded features are kept: what every store is asked, and the store in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_tl.errors import StaleCacheError
from keras_tl.features.probe import Probe
from keras_tl.features.records import Records
from keras_tl.features.source import Samples

_SHARD = "part-{part:04d}-of-{parts:04d}.view-{view:03d}.shard-{index:06d}"


@dataclasses.dataclass(frozen=True)
class ShardName:
    """Which shard: of which part of the data, in which pass over it, and its number there."""

    part: int
    parts: int
    view: int
    index: int

    def __str__(self) -> str:
        return _SHARD.format(**dataclasses.asdict(self))

    def to_list(self) -> list[int]:
        """Returns what JSON can hold."""
        return [self.part, self.parts, self.view, self.index]


@dataclasses.dataclass(frozen=True)
class Shard:
    """What is known of a shard.

    Attributes:
        samples: `Samples` that it was made of.
        source: The path of its file, or the records.
        header: The bytes of the file before the records, by which it is known again.
    """

    samples: Samples
    source: Any
    header: bytes = b""

    @property
    def digest(self) -> str:
        """String. What tells its contents apart: the header has their checksum."""
        return hashlib.sha256(self.header).hexdigest()


class Store:
    """Shards, and what is known of those that were recorded before.

    As it is here, it keeps nothing from one call to the next: no shard is found, and no part is
    finished.

    Attributes:
        place: String. Where the features are, for messages.
        keeps: Bool. Whether other processes and later calls find what is written.
        shared: Bool. Whether other processes write parts of the same recording now.
        records: The layout of the `Records`; None until one is known.
        batches_per_shard: Int. How many batches a shard has, once the layout is known.
        probe: A `Probe` of what was recorded before, or None.
    """

    place = "memory"
    keeps = False
    shared = False
    records: Records | None = None
    batches_per_shard = 0
    probe: Probe | None = None

    def open(self) -> None:
        """Takes the layout of the records from what is there."""

    def delete(self) -> None:
        """Removes all that was recorded."""

    def tidy(self) -> None:
        """Removes what killed processes left, once none writes any more."""

    def create(self, records: Records, batches_per_shard: int, probe: Probe | None) -> Records:
        """Takes the layout of the records, unless there is one, and returns it."""
        if self.records is None:
            self.records, self.batches_per_shard = records, batches_per_shard
        return self.records

    def find(self, name: ShardName) -> tuple[Shard | None, str | None]:
        """Returns a shard if it is there and whole, and if not, what is wrong with it."""
        return None, None

    def has(self, name: ShardName) -> bool:
        """Whether there is anything in the place of a shard."""
        return False

    def write(self, name: ShardName, samples: Samples, packed: Sequence[np.ndarray]) -> Shard:
        """Keeps a shard."""
        raise NotImplementedError

    def finish(self, part: int, parts: int, passes: Sequence[Sequence[Shard]]) -> None:
        """Notes that all shards of a part are there, and which they are.

        Args:
            part: Int. Which part.
            parts: Int. Of how many.
            passes: For each pass, its shards.
        """

    def finished(self, part: int, parts: int) -> list[int] | None:
        """Returns how many shards each pass has, or None if the part is not finished."""
        return None

    def finished_parts(self) -> dict[int, set[int]]:
        """Returns the finished parts, by the number of parts that the data was divided in."""
        return {}

    def reopen_part(self, part: int, parts: int) -> None:
        """Removes the note that a part is finished, before shards of it are written again."""

    def delete_part(self, part: int, parts: int) -> None:
        """Removes what was recorded of a part."""

    def stale(self, changed: str) -> StaleCacheError:
        """Returns the error that says what has changed."""
        return StaleCacheError(
            f"The features in {self.place} were recorded with something else. Changed: {changed}. "
            "Pass `refresh=True` to record them again, or another `cache_dir` or `name`."
        )


class MemoryStore(Store):
    """Shards in memory."""

    def write(self, name: ShardName, samples: Samples, packed: Sequence[np.ndarray]) -> Shard:
        return Shard(samples, list(packed))
