"""At-least-once delivery: messages are kept until the other end acknowledges them, and sent again when due.

In: messages under a key, acknowledgements of keys, the time. Out: the messages to send now. Invariant: a message is
sent again until its key is acknowledged, so its receiver must expect it more than once. Does not own: sockets, a clock,
tasks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from asyncdapo.messages import Message
from asyncdapo.transport.codec import Buffer

Key = TypeVar("Key", bound=Hashable)


@dataclass
class _Entry:
    message: Message
    frames: Sequence[Buffer]
    due_at: float = float("-inf")


class Outbox(Generic[Key]):
    """Messages that wait for an acknowledgement, with their payload frames, oldest first."""

    def __init__(self, resend_s: float) -> None:
        """`resend_s`: seconds without an acknowledgement after which a message is due again."""
        self._resend_s = resend_s
        self._entries: dict[Key, _Entry] = {}
        self.num_resent = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def put(self, key: Key, message: Message, frames: Sequence[Buffer] = ()) -> None:
        """Keep a message. It is due at once. It replaces an earlier message under the same key."""
        self._entries[key] = _Entry(message, frames)

    def acknowledge(self, key: Key) -> bool:
        """Forget a message. False if there is none under the key: it was acknowledged before, or never kept."""
        return self._entries.pop(key, None) is not None

    def clear(self) -> None:
        """Forget every message."""
        self._entries.clear()

    def due(self, now: float) -> list[tuple[Message, Sequence[Buffer]]]:
        """Messages to send now. Each is due again after `resend_s`."""
        entries = [entry for entry in self._entries.values() if entry.due_at <= now]
        self.num_resent += sum(entry.due_at != float("-inf") for entry in entries)
        for entry in entries:
            entry.due_at = now + self._resend_s
        return [(entry.message, entry.frames) for entry in entries]
