"""Writes the token buffers of groups to append-only segment files, `RUN_DIR/payloads/000001.bin` and so on.

In: a group's header and buffers. Out: the place of their record, which any process can read (`records/record`).

Records are never changed. A segment is written by one process: the next one that opens the folder starts a new file, so
nothing follows half a record of a killed writer. Only the ledger knows the place of a record. Bytes to which no row of
`groups` points don't count.
Does not own: the format of a record (`records/record`), which groups are still needed, so when a segment is deleted;
when records have to be on disk (`journal`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

from asyncdapo.disk import sync
from asyncdapo.messages import Group
from asyncdapo.records.record import BadRecord, Place, read_header, read_record, record_of, segment_path
from asyncdapo.transport.payload import Payload

SEGMENT_BYTES = 64 << 20


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
        self._file.writelines(record_of(group, payload))
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

    def read_header(self, group_id: int, place: Place) -> Group:
        """The group that `append` placed there, without its payload. Raises BadRecord."""
        return read_header(self._folder, group_id, place)

    def problem_with(self, group_id: int, place: Place) -> str:
        """Why the group's record there can't be used; empty if it is as it was written."""
        try:
            read_record(self._folder, group_id, place)
        except BadRecord as bad:
            return str(bad)
        return ""

    def let_go(self, segment: int) -> None:
        """Nobody is going to read a full segment soon: the system may use the memory in which it keeps a copy of it. A
        segment that is deleted has none."""
        if hasattr(os, "posix_fadvise"):
            with suppress(FileNotFoundError), segment_path(self._folder, segment).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def delete(self, segment: int) -> None:
        """Free a segment that is no longer written to."""
        segment_path(self._folder, segment).unlink(missing_ok=True)

    def close(self) -> None:
        for file in (*self._full, self._file):
            file.close()
