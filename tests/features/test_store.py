"""Files of recorded features: in the wrong place, broken or hostile, open."""

import gc
import itertools
import json
import os
import shutil
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FeatureCache, StaleCacheError
from keras_tl.features import extraction, feature_cache, record_reader, whole_files
from keras_tl.features.disk_store import _header_of
from keras_tl.features.manifest import Manifest
from keras_tl.features.sealed import sealed, unsealed
from tests.features.conftest import contents
from tests.shared import examples, regression_data

pytestmark = [pytest.mark.eager, pytest.mark.usefixtures("small_shards")]

X, Y = regression_data(12)
SHARDS = 3
NOTE = "part-0000-of-0001.json"


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder that nothing may change, and the features in it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "SHARD_BATCHES", 2)
        return folder, contents(record(model, folder))


@pytest.fixture
def recorded(whole, tmp_path):
    """A copy of it, and the features."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "data", whole[1]


def record(model, folder, x=X, y=Y, **settings):
    settings = {"batch_size": 2, "shuffle": False, "verbose": 0, "name": "data", **settings}
    return FeatureCache(model, cache_dir=folder)(x, y, **settings)


def shards_in(folder):
    return sorted(folder.glob("*.shard-*"))


# Places.


@pytest.mark.parametrize(
    "swapped, check_data",
    [
        (True, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
def test_a_shard_in_the_place_of_another_is_extracted_again(
    swapped, check_data, model, recorded, batches_extracted, capsys
):
    folder, features = recorded
    first, second, _ = shards_in(folder)
    before = first.read_bytes(), second.read_bytes()
    second.write_bytes(before[0])
    if swapped:
        first.write_bytes(before[1])
    again = record(model, folder.parent, check_data=check_data)
    assert contents(again) == features
    assert len(batches_extracted) == (4 if swapped else 2)
    assert f"{second.name} is damaged (it belongs in the place of {first.name})" in (
        capsys.readouterr().out
    )


def test_a_shard_of_other_data_is_extracted_again(model, recorded, batches_extracted, capsys):
    folder, features = recorded
    record(model, folder.parent, X + 1, name="other")
    batches_extracted.clear()
    shutil.copy(shards_in(folder.parent / "other")[1], folder)
    assert contents(record(model, folder.parent, check_data=False)) == features
    assert len(batches_extracted) == 2
    assert "it is another one than was recorded here" in capsys.readouterr().out


def test_the_note_of_another_part_does_not_count(model, tmp_path):
    few = X[:4], Y[:4]  # Two batches, so that the last of three parts has none.
    for part in range(3):
        record(model, tmp_path, *few, shard=(part, 3))
    folder = tmp_path / "data"
    note = (folder / "part-0002-of-0003.json").read_bytes()
    (folder / "part-0001-of-0003.json").write_bytes(note)
    with pytest.raises(ValueError, match="in 3 parts, of which 1 is missing"):
        record(model, tmp_path, *few, check_data=False)


def as_by_version_0_1_0(folder):
    """Takes out of the files what 0.1.0 did not write."""
    for path in shards_in(folder):
        (size,) = struct.unpack("<I", path.read_bytes()[:4])
        header, rest = path.read_bytes()[8 : 8 + size], path.read_bytes()[8 + size :]
        header = {key: one for key, one in json.loads(header).items() if key != "place"}
        header = json.dumps(header).encode()
        path.write_bytes(struct.pack("<II", len(header), zlib.crc32(header)) + header + rest)
    note = json.loads((folder / NOTE).read_text())["content"]
    note = {key: note[key] for key in ("digest", "shards")}
    (folder / NOTE).write_bytes(sealed(note))


def test_features_of_version_0_1_0_are_compared_with_the_data_and_used(
    model, recorded, batches_extracted
):
    folder, features = recorded
    as_by_version_0_1_0(folder)
    first, second, _ = shards_in(folder)
    assert contents(record(model, folder.parent, check_data=False)) == features
    assert batches_extracted == []
    first.write_bytes(second.read_bytes())
    assert contents(record(model, folder.parent, check_data=False)) == features
    assert len(batches_extracted) == 2


def test_swapped_shards_of_version_0_1_0_are_not_used(model, recorded):
    folder, _ = recorded
    as_by_version_0_1_0(folder)
    first, second, _ = shards_in(folder)
    before = first.read_bytes(), second.read_bytes()
    first.write_bytes(before[1])
    second.write_bytes(before[0])
    with pytest.raises(StaleCacheError, match="the inputs"):
        record(model, folder.parent, check_data=False)


# Broken and hostile files.


def nested(path):
    path.write_text("[" * 200_000)


def claims_4_gigabytes(path):
    path.write_bytes(b"\xff" * 8)


def no_text(path):
    path.write_bytes(b"\xff\xfe\x00" * 9)


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("manifest.json", nested),
        (NOTE, no_text),
        ("shard", claims_4_gigabytes),
        *(
            pytest.param(name, spoil, marks=pytest.mark.slow)
            for name, spoil in itertools.product(
                ("manifest.json", NOTE, "shard"), (nested, claims_4_gigabytes, no_text)
            )
        ),
    ],
)
def test_a_bomb_is_a_damaged_file(name, spoil, model, recorded, capsys):
    folder, features = recorded
    path = shards_in(folder)[1] if name == "shard" else folder / name
    spoil(path)
    assert contents(record(model, folder.parent)) == features
    assert (f"{path.name} is damaged" in capsys.readouterr().out) == (name != NOTE)


def test_a_record_that_changed_is_seen_without_the_note(model, recorded, capsys):
    folder, features = recorded
    path = shards_in(folder)[1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (folder / NOTE).unlink()
    assert contents(record(model, folder.parent)) == features
    assert f"{path.name} is damaged (its checksum is wrong" in capsys.readouterr().out


@pytest.mark.parametrize("batches", [0, 1025, True, 2.0])
def test_a_manifest_does_not_decide_how_large_shards_get(batches, recorded):
    written = Manifest.of(recorded[0]).to_dict()
    with pytest.raises(ValueError, match=f"its shards have {batches} batches"):
        Manifest.from_dict(written | {"batches_per_shard": batches})


@pytest.mark.parametrize("name", ["manifest.json", NOTE])
def test_a_small_file_that_changed_is_not_whole(name, recorded):
    path = recorded[0] / name
    written = json.loads(path.read_text())
    written["content"]["more"] = 1
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="its checksum is wrong"):
        unsealed(path)


def test_a_header_that_claims_more_than_there_is_takes_no_memory(recorded):
    import tracemalloc

    path = recorded[0] / "claims"
    path.write_bytes(struct.pack("<II", 2**32 - 1, 0))
    tracemalloc.start()
    with path.open("rb") as file, pytest.raises(ValueError, match="shorter than its header"):
        _header_of(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("content", [b"{}", b"", None], ids=["json", "empty", "a whole note"])
def test_the_number_of_parts_in_a_name_is_not_counted_up(content, model, recorded):
    folder, features = recorded
    note = json.loads((folder / NOTE).read_text())["content"]
    for path in folder.glob("part-*"):
        path.unlink()
    place = 7, 99_999_999
    name = "part-{:04d}-of-{}.json".format(*place)
    (folder / name).write_bytes(sealed({**note, "place": place}) if content is None else content)
    if content is None:
        with pytest.raises(
            ValueError, match="0, 1, 2, 3, 4, 5, 6, 8 and 99999990 more are missing"
        ):
            record(model, folder.parent)
    else:
        assert contents(record(model, folder.parent)) == features


def paths_in(value, at=()):
    """The places of all values in nested JSON."""
    yield at
    children = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield from paths_in(child, (*at, key))


NUMBERS = [True, -1, 0, 10**9, 2**70, 0.5]
ODD = [None, *NUMBERS, "", "f4,i4", "object", "x" * 99, [], {}, [[]], [-1], [10**9]]


def mutated(content, draw):
    """JSON with a value of it replaced, removed, or doubled."""
    content = json.loads(json.dumps(content))
    *to, last = draw(st.sampled_from([one for one in paths_in(content) if one]))
    parent = content
    for key in to:
        parent = parent[key]
    how = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
    if how == "replace":
        parent[last] = draw(st.sampled_from(ODD))
    elif how == "remove":
        del parent[last]
    elif isinstance(parent, list):
        parent.append(parent[last])
    else:
        parent["more"] = parent[last]
    return content


def write_mutated(path, draw):
    """Changes a file, whose checksums are right again."""
    if path.suffix == ".json":
        path.write_bytes(sealed(mutated(json.loads(path.read_text())["content"], draw)))
        return
    raw = path.read_bytes()
    (size,) = struct.unpack("<I", raw[:4])
    header = json.dumps(mutated(json.loads(raw[8 : 8 + size]), draw)).encode()
    raw = struct.pack("<II", len(header), zlib.crc32(header)) + header + raw[8 + size :]
    path.write_bytes(raw)


@settings(max_examples=examples(30))
@given(data=st.data())
def test_whatever_a_file_says_features_are_right_or_the_error_is_named(
    data, model, whole, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("mutated")
    shutil.copytree(whole[0], folder, dirs_exist_ok=True)
    write_mutated(data.draw(st.sampled_from(sorted((folder / "data").iterdir()))), data.draw)
    check_data = data.draw(st.booleans())
    try:
        assert contents(record(model, folder, check_data=check_data)) == whole[1]
    except StaleCacheError as error:
        assert "refresh=True" in str(error)
        assert contents(record(model, folder, refresh=True)) == whole[1]
    else:
        # And it is mended.
        assert contents(record(model, folder, check_data=check_data)) == whole[1]


# Windows, where a file that is open is not replaced or removed.


@pytest.fixture
def in_use(monkeypatch):
    """Lets some calls that change a file fail, as on Windows while it is open."""
    left = {}

    def guarded(name, original):
        def change(*arguments, **settings):
            if left.get(name, 0) > 0:
                left[name] -= 1
                raise PermissionError(13, "Access is denied")
            return original(*arguments, **settings)

        return change

    monkeypatch.setattr(whole_files, "_ON_WINDOWS", True)
    monkeypatch.setattr(whole_files, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(os, "replace", guarded("replace", os.replace))
    monkeypatch.setattr(os, "unlink", guarded("unlink", os.unlink))
    return left


def test_a_file_that_is_open_for_a_moment_is_waited_for(model, recorded, in_use):
    folder, features = recorded
    in_use.update(replace=2, unlink=2)
    assert contents(record(model, folder.parent, refresh=True)) == features
    assert not list(folder.glob(".*"))


def test_a_file_that_stays_open_is_an_error_that_says_so(model, recorded, in_use):
    folder, features = recorded
    in_use.update(unlink=10)
    with pytest.raises(OSError, match="could not be removed.*that read these features"):
        record(model, folder.parent, refresh=True)
    in_use.clear()
    assert contents(record(model, folder.parent)) == features


def test_a_file_that_another_process_has_written_and_reads_is_left(model, recorded, in_use):
    folder, features = recorded
    (folder / NOTE).rename(folder / "note")
    in_use.update(replace=10)
    with pytest.raises(OSError, match="could not be written"):
        record(model, folder.parent)
    shutil.copy(folder / "note", folder / NOTE)
    in_use.update(replace=10)
    whole_files.put(folder, NOTE, [(folder / NOTE).read_bytes()])
    assert contents(record(model, folder.parent)) == features


@pytest.mark.parametrize("name", ["nul", "COM1", "lpt9.train", "train."])
def test_names_that_windows_has_no_folder_for(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_ON_WINDOWS", True)
    with pytest.raises(ValueError, match="Windows has no folder of that `name`"):
        record(model, tmp_path, name=name)


# Open files.


def shards_open(folder):
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [path for path in map(os.path.realpath, links) if path.startswith(str(folder))]


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Counts in /proc.")


@needs_proc
def test_files_are_closed_at_the_end_of_an_epoch(model, recorded):
    dataset = record(model, recorded[0].parent, shuffle=True)
    for _ in range(2):
        iterator = iter(dataset)
        next(iterator)
        assert shards_open(recorded[0])
        list(iterator)
        assert not shards_open(recorded[0])


@needs_proc
@pytest.mark.parametrize("how", ["break", "take", "fit"])
def test_files_are_closed_when_an_iterator_is_given_up(how, model, recorded):
    dataset = record(model, recorded[0].parent)
    if how == "break":
        for _ in dataset:
            break
    elif how == "take":
        list(dataset.take(1))
    else:
        cache = FeatureCache(model)
        cache.head.compile("sgd", "mse")
        cache.head.fit(dataset, epochs=3, steps_per_epoch=2, verbose=0)
        del cache
    gc.collect()
    assert not shards_open(recorded[0])


@needs_proc
def test_no_more_files_are_open_than_allowed_however_many_data_sets_are_read(
    model, recorded, monkeypatch
):
    monkeypatch.setattr(record_reader, "_OPEN_FILES", 4)
    datasets = [record(model, recorded[0].parent, shuffle=True) for _ in range(3)]
    iterators = [iter(dataset) for dataset in datasets]
    for _ in range(6):
        for iterator in iterators:
            next(iterator)
        assert len(shards_open(recorded[0])) <= 4
    del iterators
