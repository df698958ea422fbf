"""Which folder of `cache_dir` is that of data without a name: the one that it was recorded in.

Folders are numbered in the order in which they are made. Which of them is of some data is told by
what was recorded in it, so that neither the order of calls nor that of processes matters.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

from keras_tl.features.disk_store import DiskStore
from keras_tl.features.identity import differences
from keras_tl.features.manifest import Manifest
from keras_tl.features.parts import difference
from keras_tl.features.sealed import BROKEN
from keras_tl.features.source import Samples, Source
from keras_tl.messages import say

_Part = tuple[int, int]


def folder_for(
    root: pathlib.Path,
    identity: dict[str, Any],
    source: Source,
    shard: _Part | None,
    *,
    read: bool,
    taken: set[str],
    verbose: int,
) -> tuple[str, Samples | None]:
    """Finds the folder.

    Args:
        root: The path of `cache_dir`.
        identity: All that the records depend on but the samples.
        source: The `Source`.
        shard: The index of a part and the number of parts; None for all.
        read: Bool. Whether the data is read even if only one folder could be its own.
        taken: Set of the names of folders that are of other data, where that cannot be read.
        verbose: Int. 0 for silence.

    Returns:
        The name, and what tells the samples of this data apart if it was read for it.
    """
    stores = _stores(root, identity)
    same = [name for name, (store, is_same) in stores.items() if is_same and store.first_samples()]
    if not source.repeatable:
        # Reading would use it up: it is known by what it was recorded with, or the order of calls.
        free = [name for name in same if name not in taken]
        numbers = (str(n) for n in itertools.count() if str(n) not in taken)
        return (free[0] if len(free) == 1 else next(numbers)), None
    if not read and len(same) == 1:
        return same[0], None
    now: dict[_Part, Samples] = {}
    wanted = shard or (0, 1)
    # Recorded with another backbone, it is this data's folder all the same, and stale. Recorded for
    # `evaluate` and not for `fit`, it is another one: both are wanted of one data set.
    others = [name for name, (store, _) in stores.items() if store.training == identity["training"]]
    for name in dict.fromkeys([*same, *others]):
        if _holds(stores[name][0], source, shard, now):
            return name, now.get(wanted)
    unfinished = [name for name in same if _recorded(stores[name][0], shard) is None]
    goes_on = _interrupted({name: stores[name][0] for name in unfinished}, identity, source)
    if goes_on is not None:
        return goes_on, now.get(wanted)
    occupied = {name for name, (_, is_same) in stores.items() if not is_same} | {*same}
    new = next(str(n) for n in itertools.count() if str(n) not in occupied)
    if occupied and verbose:
        say(f"{str(root)!r} has no features of this data yet. They are recorded in {new!r}.")
    return new, None


def _stores(root: pathlib.Path, identity: dict[str, Any]) -> dict[str, tuple[DiskStore, bool]]:
    """The numbered folders, and whether they are of this backbone and these settings."""
    names = [path.name for path in root.glob("*") if path.name.isdecimal()]
    stores = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        try:
            recorded = Manifest.of(root / name).identity
        except BROKEN:
            recorded = identity  # Its shards tell.
        stores[name] = DiskStore(root / name, recorded), not differences(recorded, identity)
    return stores


def _holds(
    store: DiskStore, source: Source, shard: _Part | None, now: dict[_Part, Samples]
) -> bool:
    """Whether the features in a folder are of this data, as far as they are there."""
    wanted = shard or (0, 1)
    recorded = _recorded(store, shard)
    if recorded is None:
        return _begins_as(store, source, random=False)
    passes = [Samples() for _ in recorded[0]]
    for of_part in recorded:
        for samples, more in zip(passes, of_part):
            samples.add(more)
    if wanted not in now:
        now[wanted] = source.samples(*wanted)
    return difference(passes, now[wanted]) is None


def _recorded(store: DiskStore, shard: _Part | None) -> list[list[Samples]] | None:
    """What tells apart the samples of each pass of the parts, None if they are not finished."""
    finished = store.finished_parts()
    if shard is None:
        count = 1 if 1 in finished else max(finished, default=1)
        needed = [*range(count)] if len(finished.get(count, ())) == count else []
    else:
        needed, count = [shard[0]], shard[1]
    recorded = [of_part for part in needed if (of_part := store.samples(part, count))]
    return recorded if recorded and len(recorded) == len(needed) else None


def _interrupted(
    stores: dict[str, DiskStore], identity: dict[str, Any], source: Source
) -> str | None:
    """Returns the folder of an interrupted recording of data that changes on every read.

    Its inputs cannot identify it. Data in a new order cannot continue there, and raises: a new
    folder each time would never be finished.
    """
    if identity["views"] is not None:
        return next((n for n, store in stores.items() if _begins_as(store, source, True)), None)
    if len(stores) != 1:
        return None
    ((name, store),) = stores.items()
    found = store.first_samples()
    if found is None:
        return None
    part, parts, first = found
    once, again = (source.samples(part, parts, batches=len(first.batches)) for _ in range(2))
    return None if once == again else name


def _begins_as(store: DiskStore, source: Source, random: bool) -> bool:
    """Whether the first shard that there is was made of the first batches of this data."""
    found = store.first_samples()
    if found is None:
        return False
    part, parts, first = found
    now = source.samples(part, parts, batches=len(first.batches))
    return source.same(first, now, random=random)
