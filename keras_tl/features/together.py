"""Recording in several processes that train one model, under `keras.distribution` on JAX.

Where Keras gives each process its share of one data set, each computes the features of its share of
the batches, and then all have all of them: from the folder that they share, or from each other's
memory. What is returned is the same data set everywhere, of which Keras again takes shares. Where
each process has data of its own (`auto_shard_dataset=False`), it records that for itself.

While one computes or reads, none waits for another. In between all agree on what they go on with:
what one decides by its files or its errors, all do.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_tl.errors import StaleCacheError, UncacheableError
from keras_tl.features.parts import Parts
from keras_tl.features.records import Field, Records
from keras_tl.features.source import Samples
from keras_tl.features.splitting import SplitModel
from keras_tl.features.store import Shard, Store
from keras_tl.internals.apart import apart, spread_weights
from keras_tl.internals.models import in_data_parallel
from keras_tl.internals.processes import (
    agreed,
    divides_data,
    gathered,
    is_chief,
    of_chief,
    process_count,
    process_index,
    replica_count,
    whole_data,
)
from keras_tl.messages import some

_HEADER = struct.Struct("<I")
_RAISED_IN_ALL = (StaleCacheError, UncacheableError, ValueError, OSError)

# For each part, for each pass, its shards.
_Parts = list[list[list[Shard]]]
_Alone = Callable[[Callable[[], Any]], Any]


def alone_in_process(model: keras.Model, function: Callable[[], Any]) -> Any:
    """Returns what a function returns that this process runs without the others.

    Args:
        model: The model, which the function may call.
        function: Function without arguments.

    Raises:
        Exception: In all processes, if the function raises in one.
    """

    def run() -> Any:
        with apart(model):
            return function()

    return agreed(run, *_RAISED_IN_ALL)


def _in_each(function: Callable[[], Any]) -> Any:
    """Returns what `alone_in_process` does of a function that calls no model, and copies none."""

    def run() -> Any:
        with whole_data():
            return function()

    return agreed(run, *_RAISED_IN_ALL)


def check_held(split: SplitModel) -> None:
    """Raises an UncacheableError if a process cannot compute all up to the split by itself."""
    if in_data_parallel(split.model):
        raise UncacheableError(
            "Features are not recorded by several processes on torch, where Keras has them run all "
            "models together. Record them with the JAX backend, or train through the backbone."
        )
    spread = spread_weights(split.graph.variables)
    if spread:
        raise UncacheableError(
            f"The weights {some(spread)} come before the backbone's outputs and are spread over "
            "several processes, so that none can compute features by itself. Have a "
            "`keras.distribution.LayoutMap` spread them over the devices of one process only, use "
            "`keras.distribution.DataParallel`, or train through the backbone."
        )


def own_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder for features in a folder: another one for data of a process's own."""
    if process_count() == 1 or divides_data():
        return folder
    return folder / f"process-{process_index()}-of-{process_count()}"


def same_in_all(folder: str | None) -> str | None:
    """Returns the chief's folder, in all processes that record one data set."""
    if folder is None or not divides_data():
        return folder
    return gathered(folder.encode())[0].decode()


def seed_for_all(seed: int | None) -> int | None:
    """Returns a seed by which all processes draw the same orders of one data set."""
    if seed is not None or not divides_data():
        return seed
    return int(of_chief(np.random.randint(2**31)))


def check_shared_equally(sizes: Sequence[int]) -> None:
    """Raises a ValueError for batches of which the devices cannot have equal pieces.

    Args:
        sizes: The number of samples in each batch, as this process is given them.
    """
    replicas, processes = replica_count(), process_count()
    if replicas == 1:
        return
    own = processes > 1 and not divides_data()
    pieces = max(1, replicas // processes) if own else replicas
    uneven = any(size % pieces for size in sizes) or (processes > 1 and len(set(sizes)) > 1)
    of_each = [json.loads(one) for one in gathered(json.dumps(_counts(sizes)).encode())]
    if not uneven and all(one == of_each[0] for one in of_each):
        return
    same = ", all of the same size" if processes > 1 else ""
    whose = "this process's data is" if own else "the data is"
    others = " In each process, there must be as many batches." if own else ""
    raise ValueError(
        f"`keras.distribution` divides each batch equally among {pieces} devices{same}, and "
        f"{whose} in batches of {_in_words(sizes)}.{others} Choose a batch size that is a multiple "
        f"of {pieces}, and leave out the samples that fill no batch, as with `drop_remainder=True`."
    )


def _counts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return [(size, sizes.count(size)) for size in sorted(set(sizes), reverse=True)]


def _in_words(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size} ({count} of them)" for size, count in _counts(sizes))


def shards_of_all(
    parts: Parts,
    store: Store,
    alone: _Alone,
    *,
    shard: tuple[int, int] | None,
    refresh: bool,
    check_data: bool,
) -> _Parts:
    """Returns for each part of the data, for each pass, its shards, recorded where they are not.

    Args:
        parts: The `Parts`.
        store: Their `Store`, not opened.
        alone: Function that runs another one without the other processes.
        shard: The part to extract, None for all: as a user passes it.
        refresh: Bool. Whether what is there is removed.
        check_data: Bool. Whether the data is compared with what is there.
    """
    divided = divides_data()
    if refresh:
        _in_each(lambda: store.delete() if is_chief() or not divided else None)
    _in_each(store.open)
    if not divided:
        return alone(lambda: parts.get(shard, check_data=check_data))
    complete = int(of_chief(_in_each(parts.complete)))
    if complete:
        return alone(
            lambda: parts.unchanged(complete) if check_data else parts.joined(complete),
        )
    return _recorded_by_all(parts, store, alone, check_data=check_data)


def _recorded_by_all(parts: Parts, store: Store, alone: _Alone, *, check_data: bool) -> _Parts:
    index, count = process_index(), process_count()
    store.shared = True
    passes, watched = alone(lambda: parts.extracted(index, count, check_data=check_data))
    read = _of_all_json(parts.alike_in_all(watched))
    if any(one != read[0] for one in read):
        _in_each(lambda: store.delete_part(index, count))
        raise ValueError(
            "Processes that train together read one data set, of which Keras gives each its share, "
            "and these read other samples or in another order. Make the data the same in all, such "
            "as by `shuffle(..., seed=0)`; or pass `auto_shard_dataset=False` to the distribution "
            "if each process has data of its own."
        )
    if check_data:
        _in_each(lambda: parts.check_repeats(index, count, watched[0]))
    if store.keeps:
        _in_each(lambda: store.tidy() if is_chief() else None)
        _in_each(store.open)
        return _in_each(lambda: parts.joined(count))
    return _exchanged(store, passes)


def _exchanged(store: Store, passes: Sequence[Sequence[Shard]]) -> _Parts:
    """Returns the shards of all processes, of which each has its own in memory."""
    store.records = records = _records_of_all(store.records)
    found: _Parts = [[[] for _ in passes] for _ in range(process_count())]
    if records is None:
        return found
    longest = [max(one) for one in zip(*_of_all_json([len(shards) for shards in passes]))]
    for view, shards in enumerate(passes):
        for number in range(longest[view]):
            own = _packed(shards[number]) if number < len(shards) else b""
            for process, content in enumerate(gathered(own)):
                if content:
                    found[process][view].append(_unpacked(content, records))
    return found


def _of_all_json(value: Any) -> list[Any]:
    return [json.loads(one) for one in gathered(json.dumps(value).encode())]


def _records_of_all(records: Records | None) -> Records | None:
    """Returns the layout that all processes have that have any.

    Raises:
        UncacheableError: If there are several.
    """
    own = None if records is None else [field.to_list() for field in records.fields]
    layouts = [one for one in _of_all_json(own) if one is not None]
    if not layouts:
        return None
    if any(one != layouts[0] for one in layouts):
        raise UncacheableError(
            "All samples must have tensors of the same shape and dtype, and those that processes "
            f"have recorded differ: {layouts}. Pad or resize the data, or pool in the backbone."
        )
    return Records([Field.from_list(one) for one in layouts[0]])


def _packed(shard: Shard) -> bytes:
    header = json.dumps(dataclasses.asdict(shard.samples)).encode()
    return b"".join([_HEADER.pack(len(header)), header, *[one.tobytes() for one in shard.source]])


def _unpacked(content: bytes, records: Records) -> Shard:
    (size,) = _HEADER.unpack_from(content)
    start = _HEADER.size + size
    samples = Samples(**json.loads(content[_HEADER.size : start]))
    packed = np.frombuffer(content, records.dtype, offset=start)
    ends = np.cumsum(samples.batches)[:-1]
    return Shard(samples, np.split(packed, ends))
