"""Programs that call the model by themselves: real processes and sockets, a small engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncdapo.environment.hosts import Hosts
from asyncdapo.errors import EpisodeError
from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.endpoint.endpoint import Endpoint
from asyncdapo.rollout.engine import Priority
from asyncdapo.rollout.episodes import Episode
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.several_turns.agents import Agents
from asyncdapo.rollout.several_turns.attempt import TurnLimits
from asyncdapo.rollout.several_turns.several_turns import SeveralTurns
from asyncdapo.seeds import sample_seed
from tests.asynchronous import asynchronous, until
from tests.environment import agents
from tests.environment.hosting import hosting
from tests.rollout.fakes import FakeEngine, make_lease, make_prompt, tokens_of

SEED = 5
FILE = Path(agents.__file__)


@dataclass
class Playing:
    """Where episodes are sampled."""

    engine: FakeEngine
    hosts: Hosts
    rollouts: SeveralTurns
    jobs: list[Job] = field(default_factory=list)

    async def episode(self, order: str) -> Episode:
        prompt = msgspec.structs.replace(make_prompt(3), text=order)
        self.jobs.append(Job(make_lease(7), 1, lambda: None))
        sampling = Sampling(max_tokens=100)
        [episode] = await self.rollouts.sample(self.jobs[-1], prompt, [SEED], sampling)
        return episode


@asynccontextmanager
async def playing(
    *, num_tokens: Callable[[int], int] = lambda _: 3, function: str = "run", **keys: Any
) -> AsyncIterator[Playing]:
    engine, endpoint = FakeEngine(num_tokens=num_tokens), Endpoint(100, lambda: None)
    await endpoint.start()
    async with hosting(f"agent:{FILE}:{function}", **keys) as hosts:
        limits = TurnLimits(max_turns=6, max_context=100)
        yield Playing(engine, hosts, SeveralTurns(engine, hosts, Agents(endpoint), lambda *_: [], limits, 1.0))
    await endpoint.stop()


def turn(number: int) -> list[int]:
    return tokens_of(sample_seed(SEED, number), 3).tolist()


@pytest.mark.parametrize("function", ["run", "run_async"])
@asynchronous
async def test_a_programs_calls_are_the_episode_and_what_it_returns_is_its_reward(function: str) -> None:
    async with playing(function=function) as it:
        episode = await it.episode("twice")
    [context] = episode.contexts
    assert context.token_ids.tolist() == [*turn(0), 50, *turn(1)]
    assert (context.rooted, episode.finish_reason, episode.reward) == (True, "stop", 1.0)
    assert episode.metrics == {"calls": 2.0}
    assert [request.priority for request in it.engine.requests] == [Priority.FRESH, Priority.CONTINUATION]


@asynchronous
async def test_a_history_that_leaves_something_out_is_a_context_of_its_own() -> None:
    async with playing() as it:
        episode = await it.episode("forget")
    assert [context.token_ids.tolist() for context in episode.contexts] == [turn(0), [50, *turn(1)]]


@asynchronous
async def test_calls_at_the_same_time_part_and_what_they_share_is_sampled_once() -> None:
    async with playing() as it:
        episode = await it.episode("parallel")
    shared, parted = episode.contexts
    assert [len(context.turns) for context in episode.contexts] == [2, 1]
    assert parted.turns[0].observed[:4] == [*turn(0), 50] == shared.token_ids.tolist()[:4]
    assert {shared.turns[1].observed[1], parted.turns[0].observed[4]} == {0, 1}
    assert [one.number for one in episode.turns] == [0, 1, 2]


@asynchronous
async def test_a_program_that_runs_into_a_limit_has_reached_its_end() -> None:
    async with playing(num_tokens=lambda _: 20) as it:
        for order, reward, metrics in (("endless", 0.0, {}), ("until_refused", 0.5, {"status": 400.0})):
            episode = await it.episode(order)
            assert (episode.finish_reason, episode.reward, dict(episode.metrics)) == ("length", reward, metrics)
            assert episode.num_sampled_tokens <= 100
        assert it.hosts.gauges()["environment_repeats"] == 0
    async with playing(num_tokens=lambda _: 2) as it:
        assert (await it.episode("endless")).finish_reason == "turns"


@asynchronous
async def test_only_the_programs_own_time_counts() -> None:
    async with playing(step_timeout_s=0.6) as it:
        it.engine.gate.clear()
        episode = asyncio.create_task(it.episode("twice"))
        await until(lambda: it.engine.num_outstanding == 1)
        [job] = it.jobs
        assert job.num_in_environment == 0
        await asyncio.sleep(1)  # longer than a program may take
        it.engine.gate.set()
        assert (await episode).finish_reason == "stop"
        assert it.hosts.gauges()["environment_repeats"] == 0


@asynchronous
async def test_a_program_that_takes_too_long_twice_is_wrong() -> None:
    async with playing(step_timeout_s=0.3) as it:
        episode = await it.episode("hang")
        assert (episode.finish_reason, episode.timed_out, len(episode.turns)) == ("time", True, 1)
        assert it.hosts.gauges()["environment_timeouts"] == 1
        with pytest.raises(EpisodeError, match="run: took too long, twice, without any answer of the model"):
            await it.episode("sleep")


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("raise no such tool", "run: ValueError: no such tool"),
        ("stop", "run: HTTPError: HTTP Error 400: stop isn't supported: a call is one sample of the model"),
        ("exit", "run: ended its process, the second time alone"),
        ("silent", "run: ended without any answer of the model"),
        ("return None", "run: a reward is a finite number, got None"),
        ("return float('nan')", "run: a reward is a finite number, got nan"),
        ("return 1.0, {'acc': 'x'}", "run: metric 'acc' is a finite number, got 'x'"),
        ("return 1.0, 2.0, 3.0", "run: returned a tuple of 3"),
    ],
)
@asynchronous
async def test_a_program_that_fails_is_never_a_reward(order: str, words: str) -> None:
    async with playing() as it:
        with pytest.raises(EpisodeError, match=words):
            await it.episode(order)
        assert it.engine.num_outstanding == 0


@asynchronous
async def test_a_program_that_raises_once_begins_again_and_leaves_no_trace(tmp_path: Path) -> None:
    async with playing() as it:
        episode = await it.episode(f"raise_once {tmp_path / 'raised'}")
        assert [turn.number for turn in episode.turns] == [0]
        assert it.hosts.gauges()["environment_repeats"] == 1


@asynchronous
async def test_calls_that_outlive_their_program_are_withdrawn() -> None:
    async with playing() as it:
        real = it.engine.generate

        async def first_only(request):
            if len(it.engine.requests) == 1:
                it.engine.gate.clear()
            return await real(request)

        it.engine.generate = first_only
        episode = await it.episode("leave_calling")
        assert len(episode.turns) == 1
        assert it.engine.num_outstanding == 0


@asynchronous
async def test_an_episode_that_is_given_up_ends_its_calls_and_frees_its_host() -> None:
    async with playing(concurrency=1) as it:
        it.engine.gate.clear()
        episode = asyncio.create_task(it.episode("endless"))
        await until(lambda: it.engine.num_outstanding == 1)
        episode.cancel()
        await until(lambda: it.engine.num_outstanding == 0)
        it.engine.gate.set()
        assert (await it.episode("twice")).reward == 1.0
