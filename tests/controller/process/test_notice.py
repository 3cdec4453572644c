"""SIGTERM asks a process to leave; in any thread, it isn't ended."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from asyncdapo.controller.process.notice import LeaveNotice


@pytest.fixture
def made_elsewhere() -> Iterator[LeaveNotice]:
    """Made in another thread than the main one, as in a Ray actor."""
    made: list[LeaveNotice] = []
    thread = threading.Thread(target=lambda: made.append(LeaveNotice()))
    thread.start()
    thread.join()
    yield made[0]
    faulthandler.unregister(signal.SIGTERM)


def test_a_signal_is_known_from_then_on_and_more_of_them_do_no_harm(made_elsewhere: LeaveNotice) -> None:
    assert not made_elsewhere.has_come
    for _ in range(2000):
        os.kill(os.getpid(), signal.SIGTERM)
    assert made_elsewhere.has_come
    assert made_elsewhere.has_come
