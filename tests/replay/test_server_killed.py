"""The replay server's process is killed again and again under real workers and a real batch feed."""

import asyncio
import random

import pytest

from asyncdapo.learner.batches.feed import BatchFeed
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.episodes import SingleTurn
from asyncdapo.rollout.worker import RolloutWorker
from tests.replay.server_process import HEARTBEAT_S, ServerProcess
from tests.replay.serving import rows
from tests.replay.small_run import GROUP_SIZE, write_files
from tests.rollout.fakes import FakeEngine, say_tokens, score_first_token

NUM_STEPS, NUM_KILLS, NUM_WORKERS = 14, 4, 2


class SlowEngine(FakeEngine):
    """A token takes a few milliseconds, so that there is always something under way."""

    async def _step(self):
        await asyncio.sleep(0.004)


class Run:
    """Workers, a learner and a controller that outlive their server."""

    def __init__(self, run_dir, seed):
        self.server, self.random = ServerProcess(run_dir), random.Random(seed)
        self.run_dir, self.lines, self.branch = run_dir, {}, 0

    async def drive(self):
        await self.server.start()
        await self.server.call("begin")
        config = RolloutConfig(slots=4 * GROUP_SIZE, group_size=GROUP_SIZE)
        engines = [
            SlowEngine(num_slots=4 * GROUP_SIZE, num_tokens=lambda sample: 2 + sample) for _ in range(NUM_WORKERS)
        ]
        self.workers = [
            RolloutWorker(
                index,
                config,
                HEARTBEAT_S,
                engine,
                SingleTurn(engine, score_first_token),
                say_tokens,
                self.server.rollout_address,
            )
            for index, engine in enumerate(engines)
        ]
        tasks = [asyncio.create_task(worker.run()) for worker in self.workers]
        tasks.append(asyncio.create_task(self.kill_again_and_again()))
        tasks.append(asyncio.create_task(self.train(1, NUM_STEPS // 2)))
        try:
            await self._first_end(tasks, tasks[-1])
            await self.roll_back(NUM_STEPS // 2 - 2)
            tasks[-1] = asyncio.create_task(self.train(NUM_STEPS // 2 - 1, NUM_STEPS))
            await self._first_end(tasks, tasks[-1])
            await tasks[-2]
            await self.server.call("finish")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.server.kill()

    async def _first_end(self, tasks, awaited):
        """A worker that ends is a failure."""
        while not awaited.done():
            done, _ = await asyncio.wait(tasks, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await asyncio.sleep(0)

    async def kill_again_and_again(self):
        for _ in range(NUM_KILLS):
            await asyncio.sleep(self.random.uniform(0.1, 0.6))
            await self.server.kill()
            await self.server.start()
            await self.server.call("begin")

    async def train(self, first, last):
        feed = BatchFeed(self.server.learner_address, self.run_dir, ask_again_s=0.2)
        try:
            for step in range(first, last + 1):
                batch, _ = await feed.take(step)
                assert (batch.step, batch.branch, len(batch.groups)) == (step, self.branch, 2)
                self.lines[step] = {"step": step, **await self.server.call("trained", step, {})}
                await self.load(step)
                await self.server.call("published", step)
        finally:
            feed.close()

    async def load(self, version):
        for worker in self.workers:
            await worker.load_weights(version, {}, self.branch)

    async def roll_back(self, step):
        self.branch = await self.server.call("roll_back", step, "test")
        await self.load(step)


@pytest.mark.parametrize("seed", range(2))
def test_whenever_the_server_is_killed_every_prompt_ends_exactly_once(tmp_path, seed):
    run = Run(tmp_path, seed)
    asyncio.run(asyncio.wait_for(run.drive(), 90))
    write_files(tmp_path, [run.lines[step] for step in range(1, NUM_STEPS + 1)])
    assert audit(tmp_path) == []
    assert rows(tmp_path, "SELECT step FROM batches ORDER BY step") == [(step,) for step in range(1, NUM_STEPS + 1)]
    assert rows(tmp_path, "SELECT COUNT(*) FROM prompts WHERE state IN ('waiting', 'leased', 'queued', 'cut')") == [
        (0,)
    ]
