"""Records of groups in segment files, `RUN_DIR/payloads/000001.bin` and so on: their format, and how they are read.

In: a group's header and buffers; a `group_id` and the place of its record. Out: the record's bytes; from its place the
same group, or `BadRecord`. Invariant: no other group is taken for it, however sound its record is. One record:

    "RC3\\xff" | uint32 header bytes, uint32 crc of the buffers, uint32 crc of these two and the header
    msgpack `Group` | prompt_ids int32 | token_ids int32 | logprobs float32                          (little-endian)
    and, where sampling was narrowed, | counts int32 | token_ids int32 of its `Support`

Both checksums are CRC-32: they guard against accidents. The header has one of its own because it is also read alone.
Records of earlier formats are read, too (`former`). Those with the mark "RC2\\xff" have another header. Those before
them also have no checksum: they begin with the header's length, which is always smaller than a mark, and only wrong
sizes and broken msgpack are noticed.

A segment is opened anew for each read, and nothing is kept between two of them: over NFS a process that opens a file
sees what others had synced before, and one that has it open may not. So whoever is told a place after the sync finds
its record, on whichever node.
Does not own: who writes segments and when they are synced (`replay/ledger/payloads`), which groups are still needed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from itertools import accumulate, groupby, pairwise
from pathlib import Path

import msgspec
from isal.isal_zlib import crc32
from msgspec import Struct

from asyncdapo.messages import Group
from asyncdapo.records.former import former_group
from asyncdapo.transport.payload import Payload

PAYLOAD_FOLDER = "payloads"
"""Of a run directory."""
MARK, FORMER_MARK = b"RC3\xff", b"RC2\xff"

_HEADER_SIZE = struct.Struct("<I")
_SIZE_AND_CRC = struct.Struct("<II")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Group)


class BadRecord(Exception):  # noqa: N818 - a finding about a file, which the run outlives
    """A record is missing, short, damaged, unreadable or of another group. The message names its file."""


class Place(Struct, frozen=True, order=True, array_like=True, forbid_unknown_fields=True):
    """Where a record is: segment number, offset and length in bytes."""

    segment: int
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """Offset after its last byte."""
        return self.offset + self.num_bytes


def segment_path(folder: Path, segment: int) -> Path:
    """The file of a segment."""
    return folder / f"{segment:06d}.bin"


def record_of(group: Group, payload: Payload) -> list[bytes | memoryview]:
    """The record's bytes in a segment: what stands before its buffers, and these."""
    header, buffers, crc = _encoder.encode(group), payload.frames(), 0
    for buffer in buffers:
        crc = crc32(buffer, crc)
    sizes = _SIZE_AND_CRC.pack(len(header), crc)
    return [b"".join((MARK, sizes, _HEADER_SIZE.pack(crc32(header, crc32(sizes))), header)), *buffers]


def read_records(folder: Path, places: Mapping[int, Place]) -> dict[int, tuple[Group, Payload]]:
    """Header and buffers (views on the bytes read) of groups, by `group_id`. Each segment is opened once, and read
    forwards. Raises BadRecord if one of them isn't as it was written, as far as checksums show."""
    found: dict[int, tuple[Group, Payload]] = {}
    forwards = sorted(places.items(), key=lambda item: item[1])
    for segment, own in groupby(forwards, key=lambda item: item[1].segment):
        with _opened(folder, segment) as file:
            for group_id, place in own:
                with _at(file, place):
                    found[group_id] = _read_record(file, group_id, place)
    return found


def read_record(folder: Path, group_id: int, place: Place) -> tuple[Group, Payload]:
    """One group. See `read_records`."""
    return read_records(folder, {group_id: place})[group_id]


def read_header(folder: Path, group_id: int, place: Place) -> Group:
    """The group without its payload. Raises BadRecord."""
    with _opened(folder, place.segment) as file, _at(file, place):
        return _read_header(file, group_id, place)[0]


def read_bytes(folder: Path, place: Place) -> bytes:
    """A record as it is. Raises BadRecord if the file lacks some of it."""
    with _opened(folder, place.segment) as file, _at(file, place):
        return file.read(place.num_bytes)


@contextmanager
def _opened(folder: Path, segment: int) -> Iterator[BufferedReader]:
    """The segment. Errors of the file system become BadRecord."""
    path = segment_path(folder, segment)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise BadRecord(f"{folder.name}/{path.name}: {error.strerror}") from error


@contextmanager
def _at(file: BufferedReader, place: Place) -> Iterator[None]:
    """The file stands at the beginning of the record, and holds the whole of it. What is wrong with the record becomes
    BadRecord."""
    try:
        if place.end > os.fstat(file.fileno()).st_size:
            raise ValueError(f"the file ends before its {place.num_bytes:,} bytes do")
        file.seek(place.offset)
        yield
    except (ValueError, msgspec.DecodeError) as error:
        path = Path(file.name)
        problem = f"its header can't be read: {error}" if isinstance(error, msgspec.DecodeError) else error
        raise BadRecord(f"{path.parent.name}/{path.name}, record at {place.offset:,}: {problem}") from error


def _read_record(file: BufferedReader, group_id: int, place: Place) -> tuple[Group, Payload]:
    """Of the record that begins here."""
    group, crc = _read_header(file, group_id, place)
    buffers = memoryview(file.read(place.end - file.tell()))
    if crc not in (None, crc32(buffers)):
        raise ValueError("its tokens are damaged: another checksum than was written")
    num_sampled = group.num_sampled_tokens
    sizes = [group.num_prompt_tokens, group.num_tokens, num_sampled, num_sampled]
    ends = [4 * end for end in accumulate(sizes, initial=0)]
    frames = [buffers[begin:end] for begin, end in pairwise(ends)]
    frames = [*frames, buffers[ends[-1] :]] if len(buffers) > ends[-2] else frames[:3]
    return group, Payload.from_frames(frames, [group])


def _read_header(file: BufferedReader, group_id: int, place: Place) -> tuple[Group, int | None]:
    """The header of the record that begins here, and the checksum of its buffers; None in the earliest format."""
    group, crc = _read_any_header(file, place)
    if group.lease_id != group_id:
        raise ValueError(f"it is of group {group.lease_id}, not of group {group_id}")
    return group, crc


def _read_any_header(file: BufferedReader, place: Place) -> tuple[Group, int | None]:
    start = _take(file, place, _HEADER_SIZE.size)
    if start not in (MARK, FORMER_MARK):
        return former_group(_take(file, place, *_HEADER_SIZE.unpack(start))), None
    sizes = _take(file, place, _SIZE_AND_CRC.size)
    num_bytes, crc = _SIZE_AND_CRC.unpack(sizes)
    (expected,) = _HEADER_SIZE.unpack(_take(file, place, _HEADER_SIZE.size))
    header = _take(file, place, num_bytes)
    if crc32(header, crc32(sizes)) != expected:
        raise ValueError("its header is damaged: another checksum than was written")
    return (_decoder.decode(header) if start == MARK else former_group(header)), crc


def _take(file: BufferedReader, place: Place, num_bytes: int) -> bytes:
    """The next bytes of a record. Raises ValueError if it has fewer: then a length is damaged."""
    if not 0 <= num_bytes <= place.end - file.tell():
        raise ValueError(f"its lengths are damaged: {place.num_bytes:,} bytes can't hold them")
    return file.read(num_bytes)
