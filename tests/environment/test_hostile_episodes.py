"""Many episodes at once, ordinary and hostile ones, while hosts are killed: each has one end, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import suppress

import psutil
import pytest

from asyncdapo.child.process import MARK
from asyncdapo.environment.hosts import Hosts
from asyncdapo.errors import EpisodeError
from tests.environment.hosting import hosting, scripted

GOOD = ["end 1", "sleep 0.01", "reward 0.5", "print hello", "read", "surrogate", "threads", "long 1000"]
ENDS = {
    "hang": "time",
    "spin": "time",
    "long 10_000_000": "length",
    "raise on fire": "fails",
    "leave": "fails",
    "exit 3": "fails",
    "segfault": "fails",
    "close": "fails",
    "write": "fails",
    "sessions": "fails",
    "fork": "ends",
    "end nan": "fails",
    "return 7": "fails",
}
"""What becomes of an episode with such a response. `ends`: as if it were an ordinary one."""
AT_ONCE = 32


async def end_of(hosts: Hosts, responses: list[str]) -> str:
    try:
        said = await hosts.in_environment({}, scripted(*responses, "end 1"))
    except EpisodeError:
        return "fails"
    return said[-2] if said[-2] in ("time", "length") else "ends"


async def play_all(hosts: Hosts, num: int, hostile_share: float, draw: random.Random) -> Counter[tuple[str, str]]:
    """(expected, actual end) of each episode."""
    turn, ends = asyncio.Semaphore(AT_ONCE), Counter[tuple[str, str]]()

    async def one() -> None:
        responses, expected = draw.choices(GOOD[1:], k=draw.randrange(4)), "ends"
        if draw.random() < hostile_share:
            response, expected = draw.choice(list(ENDS.items()))
            responses.append(response)
        async with turn:
            ends[expected, await end_of(hosts, responses)] += 1

    await asyncio.gather(*(one() for _ in range(num)))
    return ends


async def kill_now_and_then(hosts: Hosts, every_s: float, draw: random.Random) -> None:
    while True:
        await asyncio.sleep(every_s)
        if pids := hosts.pids():
            with suppress(ProcessLookupError):
                os.kill(draw.choice(pids), signal.SIGKILL)


def num_left_behind() -> int:
    """Processes that something of a host has started."""
    found = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += process.environ().get(MARK) is not None and process.environ().get("HOSTILE") == str(os.getpid())
    return found


@pytest.mark.parametrize(
    ("num", "hostile_share", "kill_every_s"),
    [
        (120, 0.05, None),
        pytest.param(10_000, 0.05, None, marks=pytest.mark.soak),
        pytest.param(2_000, 0.01, 2.0, marks=pytest.mark.soak),
    ],
)
@pytest.mark.timeout(1800)
def test_every_episode_has_its_end_and_no_process_is_left(
    num: int, hostile_share: float, kill_every_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTILE", str(os.getpid()))
    draw = random.Random(num)

    async def soak() -> Counter[tuple[str, str]]:
        async with hosting(processes=2, step_timeout_s=1.0, retries=0) as hosts:
            killer = asyncio.create_task(kill_now_and_then(hosts, kill_every_s or 1e6, draw))
            ends = await play_all(hosts, num, hostile_share, draw)
            killer.cancel()
            return ends

    ends = asyncio.run(soak())
    assert ends.total() == num
    wrong = {pair: count for pair, count in ends.items() if pair[0] != pair[1]}
    if kill_every_s is None:
        assert wrong == {}
    else:  # a host that was killed twice under one episode is its failure, never a wrong answer
        assert all(actual == "fails" for _, actual in wrong), wrong
    assert num_left_behind() == 0
