"""Many episodes at once, ordinary and hostile ones, while hosts are killed: each has one end, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from contextlib import suppress
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from asyncdapo.child.process import MARK
from asyncdapo.environment.hosts import Hosts
from asyncdapo.errors import EpisodeError
from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.several_turns.attempt import TurnLimits
from asyncdapo.rollout.several_turns.several_turns import SeveralTurns
from asyncdapo.rollout.several_turns.steps import Steps
from tests.environment.hosting import MAX_CONTEXT, hosting
from tests.rollout.fakes import FakeEngine, make_lease, make_prompt, say_tokens
from tests.rollout.test_several_turns import Encoder

GOOD = ["sleep 0.01", "reward 0.5", "print hello", "read", "surrogate", "threads", "long 1000"]
IN_STEP = {
    "hang": "time",
    "spin": "time",
    "bomb 5": "time",
    "forever": "turns",
    "long 10_000_000": "length",
    "raise on fire": "fails",
    "leave": "fails",
    "exit 3": "fails",
    "segfault": "fails",
    "close": "fails",
    "write": "fails",
    "sessions": "fails",
    "fork": "stop",
    "end nan": "fails",
    "end inf": "fails",
    "return 7": "fails",
}
"""What becomes of an episode whose environment does such a thing in a step: its finish reason, or it fails."""
IN_RESET = ["hang", "raise on fire", "exit 3", "bomb 5", "close", "long 10_000_000", "return 7"]
"""All of them fail: the model has said nothing yet."""
IN_METRICS = ["hang", "raise on fire", "exit 3", "return {'nan': float('nan')}", "return {'calls': 'many'}"]
"""These fail, too."""
HOSTILE = [
    *(("step", order, end) for order, end in IN_STEP.items()),
    *(("reset", order, "fails") for order in IN_RESET),
    *(("metrics", order, "fails") for order in IN_METRICS),
]
AT_ONCE = 32


def drawn(draw: random.Random, hostile_share: float) -> tuple[dict[str, Any], str]:
    """A script, and the end that it should have."""
    script, end = {"reset": "", "step": draw.choices(GOOD, k=draw.randrange(4)), "metrics": ""}, "stop"
    if draw.random() < hostile_share:
        where, order, end = draw.choice(HOSTILE)
        script[where] = [*script[where], order] if where == "step" else order
    return script, end


async def play_all(hosts: Hosts, num: int, hostile_share: float, draw: random.Random) -> Counter[tuple[str, str]]:
    """(expected, actual end) of each episode."""
    limits = TurnLimits(max_turns=8, max_context=MAX_CONTEXT)
    rollouts = SeveralTurns(FakeEngine(AT_ONCE), hosts, Steps(Encoder(), say_tokens), lambda *_: [], limits, 1.0)
    turn, ends = asyncio.Semaphore(AT_ONCE), Counter[tuple[str, str]]()

    async def one(number: int) -> None:
        script, expected = drawn(draw, hostile_share)
        prompt = replace(make_prompt(number), text=json.dumps(script))
        async with turn:
            job = Job(make_lease(number, 1), 1, lambda: None)
            [ended] = await rollouts.sample_each(job, prompt, [number], Sampling(max_tokens=100))
        ends[expected, "fails" if isinstance(ended, EpisodeError) else ended.finish_reason] += 1

    await asyncio.gather(*map(one, range(num)))
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
        (60, 0.05, None),
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
        async with hosting("Script", processes=2, step_timeout_s=1.0, retries=0) as hosts:
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
