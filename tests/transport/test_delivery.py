"""Delivery: a message is due until it is acknowledged."""

from __future__ import annotations

from asyncdapo.messages import Ask
from asyncdapo.transport.delivery import Outbox

FIRST, SECOND = Ask(asked=1), Ask(asked=2)


def test_a_new_message_is_due_at_once_and_then_after_each_interval() -> None:
    outbox = Outbox(resend_s=5.0)
    outbox.put("a", FIRST, [b"tokens"])
    assert outbox.due(now=100.0) == [(FIRST, [b"tokens"])]
    assert outbox.due(now=104.9) == []
    assert outbox.due(now=105.0) == [(FIRST, [b"tokens"])]
    assert outbox.due(now=109.9) == []
    assert outbox.num_resent == 1


def test_an_acknowledged_message_is_never_due_again() -> None:
    outbox = Outbox(resend_s=5.0)
    outbox.put("a", FIRST)
    outbox.put("b", SECOND)
    assert outbox.acknowledge("a")
    assert "a" not in outbox
    assert outbox.due(now=0.0) == [(SECOND, ())]
    assert len(outbox) == 1


def test_an_acknowledgement_of_something_unknown_or_of_the_same_twice_does_nothing() -> None:
    outbox = Outbox(resend_s=5.0)
    outbox.put("a", FIRST)
    assert not outbox.acknowledge("b")
    assert outbox.acknowledge("a")
    assert not outbox.acknowledge("a")
    assert outbox.due(now=0.0) == []


def test_messages_are_due_oldest_first() -> None:
    outbox = Outbox(resend_s=5.0)
    outbox.put("b", SECOND)
    outbox.put("a", FIRST)
    assert [message for message, _ in outbox.due(now=0.0)] == [SECOND, FIRST]


def test_after_clear_nothing_is_due() -> None:
    outbox = Outbox(resend_s=5.0)
    outbox.put("a", FIRST)
    outbox.clear()
    assert outbox.due(now=0.0) == []
    assert len(outbox) == 0
