"""At-least-once delivery: messages are kept until the other end has acknowledged them, and sent again when due.

In: messages under a key, acknowledgements of keys, the time. Out: what is to be sent now. The invariant: a message is
due until its key is acknowledged, whatever is lost on the way; its receiver must expect it more than once.
Does not own: sockets, a clock, tasks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from asyncdapo.messages import Message
from asyncdapo.transport.codec import Buffer


@dataclass
class _Entry:
    message: Message
    frames: Sequence[Buffer]
    due_at: float = float("-inf")


class Outbox:
    """Messages that wait for an acknowledgement, with their payload frames, oldest first."""

    def __init__(self, resend_s: float) -> None:
        """`resend_s`: seconds without an acknowledgement after which a message is due again."""
        self._resend_s = resend_s
        self._entries: dict[Hashable, _Entry] = {}
        self.num_resent = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._entries)

    def put(self, key: Hashable, message: Message, frames: Sequence[Buffer] = ()) -> None:
        """Keep a message; it is due at once. A message already kept under the key is replaced."""
        self._entries[key] = _Entry(message, frames)

    def acknowledge(self, key: Hashable) -> bool:
        """Forget a message. False when there is none under the key: acknowledged before, or never kept."""
        return self._entries.pop(key, None) is not None

    def clear(self) -> None:
        """Forget every message."""
        self._entries.clear()

    def due(self, now: float) -> list[tuple[Message, Sequence[Buffer]]]:
        """Messages to send now, each of which is due again `resend_s` later."""
        entries = [entry for entry in self._entries.values() if entry.due_at <= now]
        self.num_resent += sum(entry.due_at != float("-inf") for entry in entries)
        for entry in entries:
            entry.due_at = now + self._resend_s
        return [(entry.message, entry.frames) for entry in entries]
