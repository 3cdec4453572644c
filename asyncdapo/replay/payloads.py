"""Token buffers of groups in append-only segment files, `RUN_DIR/payloads/000001.bin` and so on.

In: a group's header and buffers. Out: the place where they stand, and the same group again. One record is

    uint32 header bytes | msgpack `Group` | prompt_ids int32 | token_ids int32 | logprobs float32      (little-endian)

Records are never changed. A segment is written by one process: another one that opens the folder starts a new file, so
that half a record at the end of an old one (its writer was killed) is followed by nothing. The place of a record is in
the ledger or nowhere: bytes that no row of `groups` points to don't count.
Does not own: which groups are still needed, and so when a segment may go (`journal`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec

from asyncdapo.messages import Group
from asyncdapo.payload import Payload

SEGMENT_BYTES = 64 << 20

_HEADER_SIZE = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Group)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands: segment number, offset and length in bytes."""

    segment: int
    offset: int
    num_bytes: int


class Segments:
    """Writes records to the end of the newest segment; a full one is followed by the next."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._segment_bytes = folder, segment_bytes
        self._newest = max(self.numbers(), default=0) + 1
        self._file = segment_path(folder, self._newest).open("ab")

    @property
    def newest(self) -> int:
        """Number of the segment that is written to."""
        return self._newest

    def append(self, group: Group, payload: Payload) -> Place:
        """Write one record. On return the operating system has its bytes, so that killing this process loses none."""
        header = _encoder.encode(group)
        record = b"".join((_HEADER_SIZE.pack(len(header)), header, *payload.frames()))
        if self._file.tell() >= self._segment_bytes:
            self._file.close()
            self._newest += 1
            self._file = segment_path(self._folder, self._newest).open("ab")
        offset = self._file.tell()
        self._file.write(record)
        self._file.flush()
        return Place(self._newest, offset, len(record))

    def holds(self, place: Place) -> bool:
        """Whether all bytes of the record are there; a power cut may have taken the last ones of a file."""
        path = segment_path(self._folder, place.segment)
        return path.is_file() and path.stat().st_size >= place.offset + place.num_bytes

    def numbers(self) -> list[int]:
        """The segments that are there, oldest first."""
        return sorted(int(path.stem) for path in self._folder.glob("*.bin"))

    def read(self, place: Place) -> tuple[Group, Payload]:
        """The group that `append` placed there."""
        return read_record(self._folder, place)

    def read_header(self, place: Place) -> Group:
        """Its header alone. Raises OSError or ValueError when it isn't there."""
        with segment_path(self._folder, place.segment).open("rb") as file:
            file.seek(place.offset)
            size = file.read(_HEADER_SIZE.size)
            if len(size) < _HEADER_SIZE.size:
                raise ValueError(f"segment {place.segment} ends before offset {place.offset}")
            return _decoder.decode(file.read(*_HEADER_SIZE.unpack(size)))

    def delete(self, segment: int) -> None:
        """Free a segment that is no longer written to."""
        segment_path(self._folder, segment).unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


def segment_path(folder: Path, segment: int) -> Path:
    """The file of a segment."""
    return folder / f"{segment:06d}.bin"


def read_record(folder: Path, place: Place) -> tuple[Group, Payload]:
    """Header and buffers (views on the bytes read) of a group. Raises OSError or ValueError when they aren't there."""
    with segment_path(folder, place.segment).open("rb") as file:
        file.seek(place.offset)
        record = memoryview(file.read(place.num_bytes))
    if len(record) != place.num_bytes or len(record) < _HEADER_SIZE.size:
        raise ValueError(f"segment {place.segment} ends before offset {place.offset} + {place.num_bytes} bytes")
    (header_bytes,) = _HEADER_SIZE.unpack_from(record)
    header_end = _HEADER_SIZE.size + header_bytes
    group = _decoder.decode(record[_HEADER_SIZE.size : header_end])
    prompt_end = header_end + 4 * group.num_prompt_tokens
    tokens_end = prompt_end + 4 * group.num_tokens
    frames = (record[header_end:prompt_end], record[prompt_end:tokens_end], record[tokens_end:])
    return group, Payload.from_frames(frames, [group])
