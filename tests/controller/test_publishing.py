"""Publishing: what the controller does when weights arrive, and when they don't."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asyncdapo.controller import publishing
from asyncdapo.controller.publishing import Publishing
from asyncdapo.errors import RunError, WeightsError
from asyncdapo.weights.config import WeightsConfig


class FakeProcess:
    """A process that answers as told; `fails` decides by command and how often it was called."""

    def __init__(
        self, name: str, fails: Callable[[str, int], bool] = lambda command, nth: False, load_s: float = 0.0
    ) -> None:
        self.name, self.fails, self.load_s, self.calls = name, fails, load_s, []

    async def call(self, command: str, *args: Any) -> Any:
        self.calls.append((command, *args))
        if self.fails(command, sum(call[0] == command for call in self.calls)):
            raise WeightsError(f"{self.name} lost the connection")
        answers = {
            "device": "cpu",
            "host_weights": ("127.0.0.1:1", "manifest"),
            "send_weights": {"seconds": 0.5, "bytes": 100},
            "receive_weights": {"receive_s": 0.5, "load_s": self.load_s},
        }
        return answers.get(command)

    def commands(self) -> list[str]:
        return [call[0] for call in self.calls]


def connected(learner: FakeProcess, workers: list[FakeProcess], **config: Any) -> Publishing:
    made = Publishing(WeightsConfig(**config), learner, workers)
    asyncio.run(made.connect())
    return made


def test_every_worker_joins_with_a_rank_of_its_own() -> None:
    learner, workers = FakeProcess("learner"), [FakeProcess("rollout-0"), FakeProcess("rollout-1")]
    connected(learner, workers)
    assert learner.calls[1] == ("host_weights", 3, "gloo")
    joins = [worker.calls[-1] for worker in workers]
    assert joins == [("join_weights", "127.0.0.1:1", rank, 3, "gloo", "manifest") for rank in (1, 2)]


def test_a_publish_reports_bytes_and_the_slowest_load() -> None:
    made = connected(FakeProcess("learner"), [FakeProcess("rollout-0"), FakeProcess("rollout-1", load_s=3.0)])
    metrics = asyncio.run(made.publish(4))
    assert metrics == {"weights/publish_s": 0.5, "weights/bytes": 100, "weights/load_s": 3.0}


def test_a_failed_transfer_is_sent_again_through_a_new_group() -> None:
    learner = FakeProcess("learner")
    worker = FakeProcess("rollout-0", lambda command, nth: command == "receive_weights" and nth == 1)
    asyncio.run(connected(learner, [worker]).publish(4))
    assert worker.commands() == ["device", "join_weights", "receive_weights"] * 2
    assert [call for call in learner.calls if call[0] == "send_weights"] == [("send_weights", 4)] * 2


def test_a_version_that_never_arrives_ends_the_run_after_max_missed() -> None:
    learner = FakeProcess("learner")
    worker = FakeProcess("rollout-0", lambda command, nth: command == "receive_weights")
    with pytest.raises(RunError, match=r"version 4 did not arrive 2 times \(weights.max_missed\): rollout-0 lost"):
        asyncio.run(connected(learner, [worker], max_missed=2).publish(4))
    assert worker.commands().count("receive_weights") == 2


def test_an_end_that_never_answers_counts_as_a_failed_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "COMMAND_MARGIN_S", 0.05)

    class Silent(FakeProcess):
        async def call(self, command: str, *args: Any) -> Any:
            if command == "receive_weights":
                await asyncio.Event().wait()
            return await super().call(command, *args)

    made = connected(FakeProcess("learner"), [Silent("rollout-0")], max_missed=1, timeout_s=0.05)
    with pytest.raises(RunError, match="1 of 2 ends gave no answer in 0.1 s"):
        asyncio.run(made.publish(1))
