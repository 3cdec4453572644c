"""Hosts: whatever an environment does, its episode has an end, and no other episode pays for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import psutil
import pytest

from asyncdapo.environment.config import EnvironmentConfig
from asyncdapo.environment.hosts import Hosts
from asyncdapo.errors import EpisodeError, RunError
from tests.asynchronous import asynchronous, until
from tests.environment.hosting import FILE, hosting, scripted
from tests.reward.processes import gone_within

SHORT_S = 1.0


@asynchronous
async def test_an_episode_is_reset_stepped_and_measured() -> None:
    async with hosting() as hosts:
        said = await hosts.in_environment({"reset": "begin"}, scripted("one", "reward 0.5", "end 1"))
        assert said == ["heard begin", "heard one", "more", None, 1.5, {"num_steps": 3}]
        assert await hosts.in_environment({}, scripted("end")) == [None, None, 0.0, {"num_steps": 1}]
        assert hosts.num_calls == 8


@asynchronous
async def test_async_environments_wait_side_by_side() -> None:
    async with hosting("Async", concurrency=4) as hosts:
        said = await asyncio.gather(
            *(hosts.in_environment({}, scripted(f"await 0.{number}", "end 1")) for number in range(1, 5))
        )
        assert said == [[None, "slept", None, 1.0, {}]] * 4
        [host] = hosts.pids()
        assert psutil.Process(host).num_threads() < 10


@asynchronous
async def test_episodes_are_spread_over_the_hosts() -> None:
    async with hosting("Async", processes=3) as hosts:
        pids: set[int] = set()
        await asyncio.gather(
            *(
                hosts.in_environment({}, scripted("return str(os.getpid())", note=lambda _: pids.update(hosts.pids())))
                for _ in "abc"
            )
        )
        assert len(pids) == 3


FAILURES = [
    ("raise on fire", "step: ValueError: on fire (in obey, "),
    ("stop_iteration", "StopIteration"),
    ("leave", "step: SystemExit: 3"),
    ("interrupt", "step: KeyboardInterrupt"),
    ("end nan", "step: a reward is a finite number, got nan"),
    ("end inf", "step: a reward is a finite number, got inf"),
    ("return ('', 'much')", "a reward is a finite number, got 'much'"),
    ("return (1, 2, 3)", "a tuple of 3"),
    ("return 7", "with role and content, or None; a step may return (observation, reward): got 7"),
    ("return [{'role': 'tool'}]", "list of messages with role and content"),
    ("exit 3", "step: ended its process, the second time alone in a host"),
    ("segfault", "step: ended its process"),
    ("close", "step: ended its process"),
]
OF_ASYNC_ALSO_BY_DEFAULT = ("raise on fire", "exit 3", "close")


@pytest.mark.parametrize(
    ("name", "response", "why"),
    [("Plain", *failure) for failure in FAILURES]
    + [
        pytest.param("Async", *failure, marks=[] if failure[0] in OF_ASYNC_ALSO_BY_DEFAULT else pytest.mark.soak)
        for failure in FAILURES
    ],
)
@asynchronous
async def test_a_failure_is_told_and_the_next_episode_finds_a_host(name: str, response: str, why: str) -> None:
    async with hosting(name, retries=0) as hosts:
        with pytest.raises(EpisodeError) as caught:
            await hosts.in_environment({}, scripted("one", response))
        assert why in str(caught.value)
        assert (await hosts.in_environment({}, scripted("end 1")))[2] == 1.0


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("print hello", "heard print hello"),
        ("read", "read ''"),
        ("fork", "heard fork"),
        ("threads", "heard threads"),
        ("surrogate", "?"),
        ("return [{'role': 'tool', 'content': '7'}]", [{"role": "tool", "content": "7"}]),
    ],
)
@asynchronous
async def test_what_an_environment_does_besides_disturbs_nothing(response: str, said: object) -> None:
    async with hosting() as hosts:
        assert (await hosts.in_environment({}, scripted(response, "end 1")))[1:4] == [said, None, 1.0]


@asynchronous
async def test_an_observation_that_fits_no_context_ends_the_episode_and_its_reward_counts() -> None:
    async with hosting() as hosts:
        assert await hosts.in_environment({}, scripted("long 10_000_000")) == [None, "length", 0.0]
        assert await hosts.in_environment({}, scripted("reward 1", "return ('x' * 10**7, 0.5)")) == [
            None,
            "more",
            "length",
            1.5,
        ]
        with pytest.raises(EpisodeError, match=r"reset: 10,000,000 characters don't fit environment.max_context"):
            await hosts.in_environment({"reset": "long 10_000_000"}, scripted("end"))


@pytest.mark.parametrize("response", ["hang", "spin"])
@asynchronous
async def test_a_step_that_takes_too_long_twice_counts_as_wrong(response: str) -> None:
    async with hosting(step_timeout_s=SHORT_S) as hosts:
        assert await hosts.in_environment({}, scripted("reward 1", response)) == [None, "more", "time", 1.0]
        assert (await hosts.in_environment({}, scripted("end 1")))[2] == 1.0
        assert hosts.gauges() == {"environment_timeouts": 1, "environment_repeats": 1, "host_restarts": 2}


@asynchronous
async def test_a_step_that_takes_too_long_once_costs_an_attempt(tmp_path) -> None:
    async with hosting(step_timeout_s=SHORT_S) as hosts:
        said = await hosts.in_environment({}, scripted(f"hang_once {tmp_path / 'seen'}", "end 1"))
        assert said[2:] == [None, 1.0, {"num_steps": 2}]
        assert hosts.gauges()["environment_timeouts"] == 0


@asynchronous
async def test_a_reset_that_takes_too_long_is_the_environments_failure() -> None:
    async with hosting(step_timeout_s=SHORT_S) as hosts:
        with pytest.raises(EpisodeError, match="reset: took too long"):
            await hosts.in_environment({"reset": "hang"}, scripted("end"))


@asynchronous
async def test_an_episodes_time_in_its_environment_is_limited_over_all_its_steps() -> None:
    async with hosting(step_timeout_s=0.6, max_seconds=0.6) as hosts:
        said = await hosts.in_environment({}, scripted(*["sleep 0.25"] * 4, "end 1"))
        assert said[-2:] == ["time", 0.0]
        assert len(said) < 6


@pytest.mark.parametrize("response", ["hang", "exit 1", "sessions"])
@asynchronous
async def test_the_others_of_a_host_begin_again_and_none_is_blamed(response: str, tmp_path) -> None:
    async with hosting(step_timeout_s=2.0, retries=0) as hosts:
        bad = asyncio.create_task(hosts.in_environment({}, scripted("one", response)))
        others = [
            asyncio.create_task(hosts.in_environment({}, scripted("one", "sleep 0.5", "two", "end 1")))
            for _ in range(4)
        ]
        assert [(await other)[-2:] for other in others] == [[1.0, {"num_steps": 4}]] * 4
        if response == "hang":
            assert (await bad)[-2:] == ["time", 0.0]
        else:
            with pytest.raises(EpisodeError, match="ended its process"):
                await bad


@asynchronous
async def test_an_environment_that_raises_is_tried_again_as_often_as_configured(tmp_path) -> None:
    async with hosting(retries=1) as hosts:
        responses: list[str] = []
        said = await hosts.in_environment(
            {}, scripted("one", f"raise_once {tmp_path / 'seen'}", "end 1", note=responses.append)
        )
        assert said[-2:] == [1.0, {"num_steps": 3}]
        assert len(responses) == 5
        assert hosts.gauges()["host_restarts"] == 0


@asynchronous
async def test_calls_that_wait_for_a_thread_are_not_late() -> None:
    async with hosting(concurrency=1, step_timeout_s=1.2) as hosts:
        said = await asyncio.gather(*(hosts.in_environment({}, scripted("sleep 0.3", "end 1")) for _ in range(6)))
        assert [result[2:4] for result in said] == [[None, 1.0]] * 6
        assert hosts.gauges()["environment_repeats"] == 0


@asynchronous
async def test_a_cancelled_episode_leaves_its_host_to_the_others_and_its_environment_is_dropped() -> None:
    async with hosting(step_timeout_s=1.0) as hosts:
        responses: list[str] = []
        cancelled = asyncio.create_task(hosts.in_environment({}, scripted("sleep 0.3", note=responses.append)))
        await until(lambda: responses)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert (await hosts.in_environment({}, scripted("end 1")))[2] == 1.0
        [pid] = hosts.pids()
        hung = asyncio.create_task(hosts.in_environment({}, scripted("hang", note=responses.append)))
        await until(lambda: len(responses) == 2)
        hung.cancel()
        await until(lambda: pid not in hosts.pids())
        assert (await hosts.in_environment({}, scripted("end 1")))[2] == 1.0
        assert hosts.gauges()["host_restarts"] == 1


@asynchronous
async def test_a_host_that_is_killed_costs_its_episodes_an_attempt() -> None:
    async with hosting() as hosts:
        [pid] = hosts.pids()
        responses: list[str] = []
        running = [
            asyncio.create_task(hosts.in_environment({}, scripted("sleep 0.3", "end 1", note=responses.append)))
            for _ in "ab"
        ]
        await until(lambda: len(responses) == 2)
        os.kill(pid, signal.SIGKILL)
        assert [(await one)[2:4] for one in running] == [[None, 1.0]] * 2


@asynchronous
async def test_metrics_that_are_no_finite_numbers_break_the_contract() -> None:
    async with hosting("BadMetrics") as hosts:
        with pytest.raises(EpisodeError, match="end: metric 'nan' is a finite number, got nan"):
            await hosts.in_environment({}, scripted("end 1"))


@asynchronous
async def test_an_environment_that_cannot_be_loaded_ends_the_start_with_the_cause(tmp_path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nowhere_to_be_found\n")
    with pytest.raises(RunError, match=r"can't be loaded: ModuleNotFoundError: .*nowhere.*broken.py:1\)") as caught:
        await Hosts(EnvironmentConfig(path=f"{path}:Mine"), 100).start()
    assert not isinstance(caught.value, EpisodeError)


@asynchronous
async def test_another_interpreter_needs_nothing_of_ours(tmp_path) -> None:
    """Without site packages there is neither msgspec nor this package's own dependencies."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    async with hosting(python=str(bare)) as hosts:
        said = await hosts.in_environment(
            {}, scripted("return __import__('importlib.util').util.find_spec('msgspec') and 'there'")
        )
        assert said[1] is None


WORKER = """
import asyncio, sys
from tests.environment.hosting import hosting, scripted

async def main():
    async with hosting(processes=2) as hosts:
        asyncio.create_task(hosts.in_environment({}, scripted(sys.argv[1])))
        await asyncio.sleep(0.3)
        print(*hosts.pids(), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_workers_death_leaves_no_host_behind() -> None:
    command = [sys.executable, "-c", WORKER, "spin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=FILE.parents[2]) as worker:
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        assert len(pids) == 2
        worker.kill()
    assert gone_within(pids, 20.0)
