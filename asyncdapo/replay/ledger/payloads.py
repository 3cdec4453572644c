"""Token buffers of groups in append-only segment files, `RUN_DIR/payloads/000001.bin` and so on.

In: a group's header and buffers. Out: their place, and from the place the same group, or `BadRecord`. One record:

    "RC3\\xff" | uint32 header bytes, uint32 crc of the buffers, uint32 crc of these two and the header
    msgpack `Group` | prompt_ids int32 | token_ids int32 | logprobs float32                          (little-endian)
    and, where sampling was narrowed, | counts int32 | token_ids int32 of its `Support`

Both checksums are CRC-32: they guard against accidents. The header has one of its own because it is also read alone.
Records of earlier formats are read, too (`former`). Those with the mark "RC2\\xff" have another header. Those before
them also have no checksum: they begin with the header's length, which is always smaller than a mark, and only wrong
sizes and broken msgpack are noticed.

Records are never changed. A segment is written by one process: the next one that opens the folder starts a new file, so
nothing follows half a record of a killed writer. Only the ledger knows the place of a record. Bytes to which no row of
`groups` points don't count.
Does not own: which groups are still needed, so when a segment is deleted; when records have to be on disk (`journal`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec
from isal.isal_zlib import crc32

from asyncdapo.disk import sync
from asyncdapo.messages import Group
from asyncdapo.replay.ledger.former import former_group
from asyncdapo.transport.payload import Payload

SEGMENT_BYTES = 64 << 20
MARK, FORMER_MARK = b"RC3\xff", b"RC2\xff"

_HEADER_SIZE = struct.Struct("<I")
_SIZE_AND_CRC = struct.Struct("<II")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Group)


class BadRecord(Exception):  # noqa: N818 - a finding about a file, which the run outlives
    """A record is missing, short, damaged or unreadable. The message names its file."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is: segment number, offset and length in bytes."""

    segment: int
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """Offset after its last byte."""
        return self.offset + self.num_bytes


class Segments:
    """Writes records to the end of the newest segment, and begins the next one when it is full."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
        self._folder, self._segment_bytes = folder, segment_bytes
        self.newest = max(self.numbers(), default=0) + 1
        """Number of the segment that is written to."""
        self._file, self._full = self._open_newest(), list[BufferedWriter]()
        self._named: BufferedWriter | None = None
        """The newest segment whose name is on disk."""
        self._num_appended = self._num_synced = 0

    def _open_newest(self) -> BufferedWriter:
        return segment_path(self._folder, self.newest).open("ab")

    def append(self, group: Group, payload: Payload) -> Place:
        """Write one record. On return the operating system has its bytes, so a kill of this process loses none."""
        if self._file.tell() >= self._segment_bytes:
            self.begin_next()
        offset = self._file.tell()
        self._file.writelines(_record(group, payload))
        self._file.flush()
        self._num_appended += 1
        return Place(self.newest, offset, self._file.tell() - offset)

    def begin_next(self) -> None:
        """Write to a new segment from now on."""
        self._full.append(self._file)
        self.newest += 1
        self._file = self._open_newest()

    def sync(self) -> None:
        """On return every record that was appended before the call is on disk, so a power cut loses none. Any thread
        may call it while others are appended, one call at a time."""
        num_appended = self._num_appended
        if num_appended == self._num_synced:
            return
        newest = self._file  # taken first: if it is full by now, it is among the full ones, too
        full = list(self._full)
        for file in dict.fromkeys((*full, newest)):
            os.fdatasync(file.fileno())
        if newest is not self._named:
            sync(self._folder)
            self._named = newest
        for file in full:
            self._full.remove(file)
            file.close()
        self._num_synced = num_appended

    def numbers(self) -> list[int]:
        """The segments that exist, oldest first."""
        return sorted(int(path.stem) for path in self._folder.glob("*.bin") if path.stem.isdecimal())

    def read(self, place: Place) -> tuple[Group, Payload]:
        """The group that `append` placed there. Raises BadRecord."""
        return read_record(self._folder, place)

    def read_header(self, place: Place) -> Group:
        """The group without its payload. Raises BadRecord."""
        with _opened(self._folder, place) as file:
            return _read_header(file, place)[0]

    def problem_with(self, place: Place) -> str:
        """Why the record there can't be used; empty if it is as it was written."""
        try:
            self.read(place)
        except BadRecord as bad:
            return str(bad)
        return ""

    def delete(self, segment: int) -> None:
        """Free a segment that is no longer written to."""
        segment_path(self._folder, segment).unlink(missing_ok=True)

    def close(self) -> None:
        for file in (*self._full, self._file):
            file.close()


def segment_path(folder: Path, segment: int) -> Path:
    """The file of a segment."""
    return folder / f"{segment:06d}.bin"


def _record(group: Group, payload: Payload) -> list[bytes | memoryview]:
    """The record's bytes in a segment: what stands before its buffers, and these."""
    header, buffers, crc = _encoder.encode(group), payload.frames(), 0
    for buffer in buffers:
        crc = crc32(buffer, crc)
    sizes = _SIZE_AND_CRC.pack(len(header), crc)
    return [b"".join((MARK, sizes, _HEADER_SIZE.pack(crc32(header, crc32(sizes))), header)), *buffers]


def read_bytes(folder: Path, place: Place) -> bytes:
    """A record as it is. Raises BadRecord if the file lacks some of it."""
    with _opened(folder, place) as file:
        return file.read(place.num_bytes)


def read_record(folder: Path, place: Place) -> tuple[Group, Payload]:
    """Header and buffers (views on the bytes read) of a group. Raises BadRecord if they aren't as they were written, as
    far as checksums show."""
    with _opened(folder, place) as file:
        group, crc = _read_header(file, place)
        buffers = memoryview(file.read(place.end - file.tell()))
        if crc not in (None, crc32(buffers)):
            raise ValueError("its tokens are damaged: another checksum than was written")
        num_sampled = group.num_sampled_tokens
        sizes = [group.num_prompt_tokens, group.num_tokens, num_sampled, num_sampled]
        ends = [4 * end for end in accumulate(sizes, initial=0)]
        frames = [buffers[begin:end] for begin, end in pairwise(ends)]
        frames = [*frames, buffers[ends[-1] :]] if len(buffers) > ends[-2] else frames[:3]
        return group, Payload.from_frames(frames, [group])


@contextmanager
def _opened(folder: Path, place: Place) -> Iterator[BufferedReader]:
    """The segment, open at the beginning of the record. The file holds the whole record. Errors become BadRecord."""
    path = segment_path(folder, place.segment)
    try:
        with path.open("rb") as file:
            if place.end > os.fstat(file.fileno()).st_size:
                raise ValueError(f"the file ends before its {place.num_bytes:,} bytes do")
            file.seek(place.offset)
            yield file
    except OSError as error:
        raise BadRecord(f"{folder.name}/{path.name}: {error.strerror}") from error
    except (ValueError, msgspec.DecodeError) as error:
        problem = f"its header can't be read: {error}" if isinstance(error, msgspec.DecodeError) else error
        raise BadRecord(f"{folder.name}/{path.name}, record at {place.offset:,}: {problem}") from error


def _read_header(file: BufferedReader, place: Place) -> tuple[Group, int | None]:
    """The header of the record that begins here, and the checksum of its buffers; None in the earliest format."""
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
