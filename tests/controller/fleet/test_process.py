"""Room, calls and deaths of processes, on a real Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from asyncdapo.config.config import Config
from asyncdapo.config.run import ControllerConfig
from asyncdapo.controller.fleet.placement import Bundle, Placement
from asyncdapo.controller.fleet.process import HUGE_PAGES, Process, ProcessDied, Watch
from asyncdapo.controller.fleet.rooms import reserve
from asyncdapo.controller.process import ray_session as sessions
from asyncdapo.controller.process.ray_session import ray_session
from asyncdapo.controller.process.roster import Entry
from asyncdapo.controller.roles.base import ProcessSpec
from asyncdapo.errors import ConfigError, RunError, StalenessError, UserError
from asyncdapo.model.config import ModelConfig
from asyncdapo.transport.keys import RunKeys

CONFIG = Config(model=ModelConfig(path="none"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("someone_listens", [False, True])
def test_a_cluster_that_does_not_answer_is_the_users_to_fix(
    someone_listens: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody at the port, and one who says nothing. Ray itself tries for minutes, and prints as long."""
    assert sessions.CLUSTER_ANSWERS_S < 30
    monkeypatch.setattr(sessions, "CLUSTER_ANSWERS_S", 2.0)
    with socket.socket() as port:
        port.bind(("", 0))
        if someone_listens:
            port.listen()
        address = f"127.0.0.1:{port.getsockname()[1]}"
        config = Config(model=ModelConfig(path="none"), controller=ControllerConfig(ray_address=address))
        with pytest.raises(UserError) as caught, ray_session(config):
            pass
    assert str(caught.value).startswith(f"controller.ray_address: no Ray cluster answers at {address} (`ray start --he")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


class Faulty:
    """An actor that fails in every way."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec, self.loaded = spec, asyncio.Event()

    async def load(self) -> None:
        self.loaded.set()

    async def entry(self) -> Entry:
        return self.spec.entry()

    async def call(self, pick: Callable[[Faulty], Callable[..., Awaitable[Any]]], *args: object) -> Any:
        return await pick(self)(*args)

    async def answer(self, value: int) -> tuple[str, int, str | None]:
        return self.spec.name, value, os.environ.get("OMP_NUM_THREADS")

    async def tunables(self) -> str | None:
        return os.environ.get("GLIBC_TUNABLES")

    async def has_loaded(self) -> bool:
        """Raises TimeoutError if nobody told it to: it may be told after it is asked."""
        return await asyncio.wait_for(self.loaded.wait(), 30)

    async def refuse(self) -> None:
        raise ConfigError("model.path", "has no weights", "there", "another")

    async def break_a_promise(self) -> None:
        raise StalenessError("too old")

    async def have_a_defect(self) -> None:
        {}["missing"]  # noqa: B018

    async def die(self) -> None:
        os._exit(3)


@pytest.fixture(scope="module")
def process() -> Iterator[Process[Any]]:
    with ray_session(CONFIG):
        placement = Placement((Bundle(("learner",)),), "alone")
        rooms = asyncio.run(reserve(placement, 30))
        spec = ProcessSpec(role="learner", config=CONFIG, keys=RunKeys.make())
        process = Process.placed(Faulty, spec, rooms=rooms, threads=2)
        process.spawn()
        yield process


def call(process: Process[Any], pick: Callable[[Faulty], Callable[..., Any]], *args: Any) -> Any:
    return asyncio.run(process.call(pick, *args))


def test_a_call_is_answered_by_a_process_with_its_own_thread_count(process: Process[Any]) -> None:
    assert call(process, lambda faulty: faulty.answer, 7) == ("learner", 7, "2")


def test_a_process_has_its_memory_in_huge_pages(process: Process[Any]) -> None:
    assert call(process, lambda faulty: faulty.tunables) == HUGE_PAGES


def test_a_users_error_stays_one_and_names_the_process(process: Process[Any]) -> None:
    with pytest.raises(UserError, match=r"^learner: model.path: has no weights, got 'there' \(another\)$"):
        call(process, lambda faulty: faulty.refuse)


def test_an_error_of_the_run_keeps_its_kind(process: Process[Any]) -> None:
    with pytest.raises(StalenessError, match="^learner: too old$"):
        call(process, lambda faulty: faulty.break_a_promise)


def test_a_defect_carries_the_traceback_of_its_process(process: Process[Any]) -> None:
    with pytest.raises(RunError, match="^learner: KeyError: 'missing'$") as caught:
        call(process, lambda faulty: faulty.have_a_defect)
    assert "in have_a_defect" in str(caught.value.__cause__)


def test_what_finds_no_room_says_what_was_asked_and_what_there_is(process: Process[Any]) -> None:
    with pytest.raises(RunError, match=r"3 processes ask for 0.3 CPU and 1000 GPU, there are \d+ CPU and \d+ GPU"):
        asyncio.run(reserve(Placement((Bundle(("replay",)), Bundle(("learner", "rollout-0"), 1000)), "rich"), 0.5))


def test_a_death_is_named_and_the_next_life_which_was_prepared_answers_again(process: Process[Any]) -> None:
    process.up.set()
    with pytest.raises(ProcessDied, match="^learner: the process died: "):
        call(process, lambda faulty: faulty.die)
    assert not process.up.is_set()
    process.prepare()
    process.spawn()
    assert process.life == 2
    assert call(process, lambda faulty: faulty.has_loaded), "it was prepared"
    assert call(process, lambda faulty: faulty.answer, 8) == ("learner", 8, "2")


def test_a_question_is_asked_again_in_the_next_life(process: Process[Any]) -> None:
    async def kill_and_start_again() -> object:
        process.up.set()
        entry = await process.identify()
        asked = asyncio.ensure_future(process.ask(lambda faulty: faulty.answer, 9))
        os.kill(entry.pid, signal.SIGSTOP)  # a stopped process answers nothing, and must be killed by hand
        asked_again = asyncio.ensure_future(process.ask(lambda faulty: faulty.answer, 10))
        await asyncio.sleep(0.2)
        process.spawn()
        process.up.set()
        return await asyncio.gather(asked, asked_again)

    process.spawn()
    answers = asyncio.run(kill_and_start_again())
    assert [answer[1] for answer in answers] == [9, 10]
    assert process.life == 4


def test_of_several_watched_that_ended_the_first_one_is_the_cause() -> None:
    """Rank 1 is killed; rank 0 is killed for that, before anybody has looked."""

    async def dies(name: str, after: asyncio.Event, then: asyncio.Event) -> None:
        await after.wait()
        then.set()
        raise ProcessDied(name, "killed")

    async def scene() -> None:
        watch, killed, noticed, over = Watch(), *(asyncio.Event() for _ in range(3))
        watch.add("learner", dies("learner", noticed, over))
        watch.add("learner-1", dies("learner-1", killed, noticed))
        killed.set()
        await watch.guard(dies("learner", over, over))

    with pytest.raises(ProcessDied, match="^learner-1: the process died: killed"):
        asyncio.run(scene())
