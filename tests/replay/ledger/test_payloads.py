"""Records of payload segments: what was written comes back, or is known not to be it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncdapo.messages import NO_CHECKSUM, Lease, SampledTurn
from asyncdapo.records.record import BadRecord, Place, read_record, segment_path
from asyncdapo.replay.ledger.payloads import Segments
from tests.replay.former import former_record
from tests.replay.small_run import make_group, prompt_at

NUM = 3


def arrived(lease_id: int):
    lease = Lease(lease_id=lease_id, branch=0, attempt=1, group_size=2, seed=1, prompt=prompt_at(lease_id))
    return make_group(lease, versions=((0, 3), (1, lease_id + 1)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Place]]:
    folder = tmp_path_factory.mktemp("records")
    segments = Segments(folder)
    places = [segments.append(*arrived(lease_id)) for lease_id in range(NUM)]
    segments.close()
    return folder, places


def same(read: tuple, lease_id: int) -> bool:
    group, payload = arrived(lease_id)
    return read[0] == group and read[1].frames() == payload.frames()


def read_harmed(folder: Path, places: list[Place], content: bytes | bytearray) -> list[bool]:
    """Which records come back as they were, out of a segment that holds this; the others are bad ones."""
    segment_path(folder, 1).write_bytes(content)
    whole = []
    for lease_id, place in enumerate(places):
        try:
            assert same(read_record(folder, lease_id, place), lease_id), "something else came back"
            whole.append(True)
        except BadRecord:
            whole.append(False)
    return whole


def test_a_group_comes_back_from_its_segment_as_it_was(tmp_path: Path) -> None:
    segments = Segments(tmp_path)
    places = [segments.append(*arrived(lease_id)) for lease_id in range(NUM)]
    assert all(same(read_record(tmp_path, lease_id, place), lease_id) for lease_id, place in enumerate(places))


def test_a_full_segment_is_followed_by_the_next(tmp_path: Path) -> None:
    segments = Segments(tmp_path, segment_bytes=600)
    places = [segments.append(*arrived(i)) for i in range(4)]
    assert [place.segment for place in places] == [1, 1, 2, 2]
    assert all(read_record(tmp_path, i, place)[0].lease_id == i for i, place in enumerate(places))


def test_a_new_writer_leaves_the_torn_end_of_an_old_segment_alone(tmp_path: Path) -> None:
    first = Segments(tmp_path)
    kept = first.append(*arrived(1))
    with (tmp_path / "000001.bin").open("ab") as file:
        file.write(b"half a rec")
    second = Segments(tmp_path)
    assert second.append(*arrived(2)).segment == 2
    assert read_record(tmp_path, 1, kept)[0].lease_id == 1


def test_a_record_that_ends_too_soon_is_an_error(tmp_path: Path) -> None:
    segments = Segments(tmp_path)
    place = segments.append(*arrived(1))
    with pytest.raises(BadRecord, match="the file ends before"):
        read_record(tmp_path, 1, Place(place.segment, place.offset, place.num_bytes + 1))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_record_whose_bytes_changed_is_bad_and_its_neighbours_are_not(
    written: tuple[Path, list[Place]], data: st.DataObject
) -> None:
    folder, places = written
    copy = Path(shutil.copytree(folder, folder.with_name("harmed"), dirs_exist_ok=True))
    content = bytearray(segment_path(folder, 1).read_bytes())
    before = bytes(content)
    first = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.one_of(st.binary(min_size=1, max_size=40), st.integers(1, 900).map(bytes)))
    content[first : first + len(new)] = new[: len(content) - first]
    harmed = [content[place.offset : place.end] != before[place.offset : place.end] for place in places]
    assert read_harmed(copy, places, content) == [not harm for harm in harmed]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_record_that_is_cut_off_anywhere_is_bad(written: tuple[Path, list[Place]], data: st.DataObject) -> None:
    folder, places = written
    copy = Path(shutil.copytree(folder, folder.with_name("cut"), dirs_exist_ok=True))
    content = segment_path(folder, 1).read_bytes()
    end = data.draw(st.integers(0, len(content)))
    assert read_harmed(copy, places, content[:end]) == [place.end <= end for place in places]


def test_a_sound_record_of_another_group_is_bad(written: tuple[Path, list[Place]]) -> None:
    folder, (first, second, _) = written
    assert same(read_record(folder, 1, second), 1)
    with pytest.raises(BadRecord, match=rf"^{folder.name}/000001\.bin, record at 0: it is of group 0, not of group 1"):
        read_record(folder, 1, first)


def test_a_place_that_no_record_has_is_bad_however_large(written: tuple[Path, list[Place]]) -> None:
    folder, (first, *_) = written
    for place in (
        Place(1, first.offset + 1, first.num_bytes),
        Place(1, first.offset, first.num_bytes - 1),
        Place(1, first.offset, 1 << 60),
        Place(1, -5, 10),
        Place(1, 0, 2),
        Place(9, 0, 10),
    ):
        with pytest.raises(BadRecord, match=rf"^{folder.name}/00000[19]\.bin[:,] "):
            read_record(folder, 0, place)


@pytest.mark.parametrize("marked", [False, True])
def test_a_record_of_before_contexts_is_read_as_one_of_a_single_turn(tmp_path: Path, marked: bool) -> None:
    """Those of before marks have no checksum."""
    group, payload = arrived(1)
    record = former_record(group, payload, marked=marked)
    segment_path(tmp_path, 1).write_bytes(record)
    read, its_payload = read_record(tmp_path, 1, Place(1, 0, len(record)))
    turns = [
        replace(
            completion,
            contexts=[replace(context, turns=[SampledTurn(0, 5, NO_CHECKSUM)]) for context in completion.contexts],
        )
        for completion in group.completions
    ]
    assert read == replace(group, completions=turns)
    assert its_payload.frames() == payload.frames()
    segment_path(tmp_path, 1).write_bytes(bytes(len(record)))
    with pytest.raises(BadRecord):
        read_record(tmp_path, 1, Place(1, 0, len(record)))
