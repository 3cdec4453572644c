"""Inside a step: how far the batch is, and failures that are said while they happen."""

from __future__ import annotations

import pytest

from asyncdapo.controller.loop.inside_step import InsideStep
from asyncdapo.controller.process.health import Filling


class Listener:
    """A reporter of which progress and notes are read."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.notes: list[str] = []

    def progress(self, text: str) -> None:
        self.shown.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def listener() -> Listener:
    return Listener()


def look(step: int = 1, num_ready: int = 0, num_failed: int = 0, words: str = "") -> Filling:
    return Filling(step=step, num_ready=num_ready, num_failed=num_failed, last_failure=words)


def test_the_groups_of_the_next_batch_are_shown(listener: Listener):
    inside = InsideStep(listener, 16, 36)
    for step, num_ready in ((12, 15), (13, 3), (36, 0), (37, 2)):
        inside.show(look(step, num_ready))
    assert listener.shown == ["batch 12: 15/16 groups", "batch 13: 3/16 groups", "batch 36: 0/16 groups", ""]
    assert listener.notes == []


def test_failures_are_said_at_once_and_then_whenever_they_have_doubled(listener: Listener):
    inside = InsideStep(listener, 16, 36)
    for num_failed in range(1001):
        inside.show(look(num_failed=num_failed, words=f"LookupError: no answer {num_failed}"))
    assert len(listener.notes) == 10
    raised = "reward warning: the reward function raised on"
    assert listener.notes[0] == f"{raised} 1 groups so far, the last: LookupError: no answer 1"
    assert listener.notes[-1] == f"{raised} 512 groups so far, the last: LookupError: no answer 512"


def test_a_replay_server_that_was_started_again_counts_anew(listener: Listener):
    inside = InsideStep(listener, 16, 36)
    for num_failed in (0, 40, 40, 0, 1):
        inside.show(look(num_failed=num_failed, words="no such answer"))
    assert [note.partition(", ")[0] for note in listener.notes] == [
        "reward warning: the reward function raised on 40 groups so far",
        "reward warning: the reward function raised on 1 groups so far",
    ]
