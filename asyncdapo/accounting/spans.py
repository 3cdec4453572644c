"""Spans: what a process did when, in a file of bounded size for each process.

    SpanRing    the newest spans since they were taken
    SpanFile    RUN_DIR/spans/PROCESS.jsonl: a line for each `write`, at the end of a train step
    read        what all processes did in some time

A line holds several tracks. The spans of `STATES` follow each other without gaps, as the time account has them; those
of the others, such as waits, may overlap. In: seconds of `time.monotonic`. Out: seconds since 1970, by the offset that
the process had when it began, so that no span of it is moved against another. Memory: `MOST_SPANS` a ring. Disk: twice
`MOST_BYTES` a process. Does not own: what the states are, how spans are shown.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncdapo.disk import disk_errors

FOLDER = "spans"
STATES = "states"
NOT_KEPT = "not kept"
"""Stands for the oldest spans, when there were more than a ring holds."""
MOST_SPANS = 8192
MOST_BYTES = 8 << 20
"""Of a file; then it becomes `PROCESS.old`, and takes the place of the one before."""


class Span(NamedTuple):
    """One thing that was done, in seconds."""

    name: str
    began_s: float
    ended_s: float


class SpanRing:
    """The newest spans, by their ends. Not safe in several threads."""

    def __init__(self, most: int = MOST_SPANS) -> None:
        self._most = most
        self._spans: deque[Span] = deque()
        self._lost: Span | None = None

    def add(self, span: Span) -> None:
        """One more is over."""
        if len(self._spans) == self._most:
            oldest, lost = self._spans.popleft(), self._lost
            began_s = min(lost.began_s, oldest.began_s) if lost else oldest.began_s
            self._lost = Span(NOT_KEPT, began_s, oldest.ended_s)
        self._spans.append(span)

    def take(self) -> list[Span]:
        """All since the `take` before. Those that didn't fit are one in front of them."""
        taken = [*([self._lost] if self._lost else []), *self._spans]
        self._spans.clear()
        self._lost = None
        return taken


class _Line(msgspec.Struct):
    """Times are in microseconds: since 1970, and of the spans since then."""

    since_us: int
    until_us: int
    tracks: dict[str, list[tuple[str, int, int]]]

    def of_track(self, track: str) -> list[Span]:
        """Its spans, in seconds since 1970."""
        since_us, spans = self.since_us, self.tracks.get(track, ())
        return [
            Span(name, (since_us + began_us) / 1e6, (since_us + ended_us) / 1e6) for name, began_us, ended_us in spans
        ]


_encoder, _decoder = msgspec.json.Encoder(), msgspec.json.Decoder(_Line)


class SpanFile:
    """Writes what one process did."""

    def __init__(self, run_dir: Path, process: str, most_bytes: int = MOST_BYTES) -> None:
        """`process`: its name."""
        self._path, self._most_bytes = run_dir / FOLDER / f"{process}.jsonl", most_bytes
        self._epoch_s = time.time() - time.monotonic()

    def write(self, **tracks: Sequence[Span]) -> None:
        """Add a line with these tracks; none if they are all empty. Raises DiskError."""
        spans = [span for track in tracks.values() for span in track]
        if not spans:
            return
        since_us = self._us(min(span.began_s for span in spans))
        places = {
            track: [(span.name, self._us(span.began_s) - since_us, self._us(span.ended_s) - since_us) for span in own]
            for track, own in tracks.items()
            if own
        }
        line = _Line(since_us, self._us(max(span.ended_s for span in spans)), places)
        with disk_errors(self._path):
            self._append(b"\n" + _encoder.encode(line))  # what a killed process has begun ends with this

    def _us(self, monotonic_s: float) -> int:
        return round((self._epoch_s + monotonic_s) * 1e6)

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("ab") as file:
            file.write(line)
            is_full = file.tell() >= self._most_bytes
        if is_full:
            self._path.replace(self._path.with_suffix(".old"))


Tracks = dict[str, list[Span]]
"""Spans of a process by track, in order of their beginnings."""


def read(run_dir: Path, since_s: float, until_s: float) -> dict[str, Tracks]:
    """What each process did between two times, in seconds since 1970; spans are cut at both."""
    names = {path.stem for path in (run_dir / FOLDER).glob("*.*")}
    found = {name: read_process(run_dir, name, since_s, until_s) for name in sorted(names)}
    return {name: tracks for name, tracks in found.items() if tracks}


def read_process(run_dir: Path, process: str, since_s: float, until_s: float) -> Tracks:
    """The same of one process."""
    tracks: Tracks = {}
    for line in _lines(run_dir / FOLDER / f"{process}.jsonl"):
        if line.until_us < since_s * 1e6:
            break
        for track in line.tracks:
            cut = (
                Span(name, max(since_s, began_s), min(until_s, ended_s))
                for name, began_s, ended_s in line.of_track(track)
            )
            tracks.setdefault(track, []).extend(span for span in cut if span.began_s < span.ended_s)
    return {track: sorted(spans, key=lambda span: span.began_s) for track, spans in tracks.items() if spans}


def latest(run_dir: Path, process: str, track: str, most: int) -> list[Span]:
    """At most so many spans of a track, those that ended last, in order of their ends. Reads no more than it needs."""
    found: list[Span] = []
    for line in _lines(run_dir / FOLDER / f"{process}.jsonl"):
        found = line.of_track(track) + found
        if len(found) >= most:
            break
    return found[-most:]


def _lines(path: Path) -> Iterator[_Line]:
    """The newest first. What a killed process has written in part is left out."""
    for file in (path, path.with_suffix(".old")):
        for text in reversed(file.read_bytes().split(b"\n")) if file.exists() else ():
            try:
                yield _decoder.decode(text)
            except msgspec.DecodeError:
                continue
