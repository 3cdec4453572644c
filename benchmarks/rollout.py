"""Tokens per second of rollout worker, scorer and replay server against vLLM's AsyncLLM alone, alternating.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py [--rounds 5] [--seconds 15] [--model DIR] [key=value …]

Two engines with the same arguments exist at once, and one of them works at a time. `alone` is AsyncLLM, asked for
groups of the same prompts by the same rule (another group as soon as a slot is free); the results are dropped. `whole`
is what a run has: the rollout worker with its engine, the verifier's process, and a process with prompt stream, replay
server and ledger. Instead of the learner a sink takes every batch as soon as it is cut, so that credit never ends.
Tokens are counted over a window that begins and ends under full load. Prints each round, the medians, and the median
ratio of a round. key=value changes the quickstart's config.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from asyncdapo.config.config import Config, load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.roles.engines import make_engine
from asyncdapo.learner.batches.feed import BatchFeed
from asyncdapo.messages import Prompt
from asyncdapo.model.tokenizer import load_tokenizer
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.server.server import ReplayServer
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.scorer import Scale, Scorer
from asyncdapo.rollout.engine import Engine
from asyncdapo.rollout.episodes import SingleTurn
from asyncdapo.rollout.worker import RolloutWorker
from asyncdapo.shares import NoBatch

OVERRIDES = (
    "rollout.engine=vllm",
    "filter.enabled=false",
    "replay.run_ahead=8",
    "replay.max_staleness=1000000",
)
"""Nothing is published: every group is of version 0, and none is too old."""
WARM_UP_S = 3.0
CHECKPOINT_EVERY = 12
"""Batches after which the sink says that it needs no payload any more, as the quickstart's learner does."""


# -------------------------------------------------------------------------------- the process with the replay server


def make_stream(config: Config) -> PromptStream:
    task = open_task(config.prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
    encode = load_tokenizer(config.model.tokenizer_files).prompt_encoder(
        config.prompts.chat_template, config.prompts.system_prompt
    )
    return PromptStream(config.prompts, task, encode, config.run.seed)


def replay_process(config: Config, run_dir: str, controller: Connection) -> None:
    asyncio.run(serve(config, Path(run_dir), controller))


async def serve(config: Config, run_dir: Path, controller: Connection) -> None:
    """Server and sink, until the controller closes its end. Commands: `begin` and `pause`."""
    stream = make_stream(config)
    server = ReplayServer(
        ServerSettings(
            replay=config.replay,
            group_size=config.rollout.group_size,
            seed=config.run.seed,
        ),
        lambda recovered: ReplayState(
            config.replay, config.filter, max_attempts=3, num_prompts=stream.num_prompts, recovered=recovered
        ),
        Journal(run_dir),
        stream.prompt_at,
    )
    controller.send(server.rollout_address)
    orders: asyncio.Queue[str] = asyncio.Queue()
    asyncio.get_running_loop().add_reader(controller.fileno(), lambda: orders.put_nowait(controller.recv()))
    async with asyncio.TaskGroup() as tasks:
        for work in (server.run(), sink(server, run_dir), obey(server, orders)):
            tasks.create_task(work)


async def obey(server: ReplayServer, orders: asyncio.Queue[str]) -> None:
    known = {"begin": server.begin, "pause": server.pause}
    while True:
        await known[await orders.get()]()


async def sink(server: ReplayServer, run_dir: Path) -> None:
    """Takes every batch and reports it trained at once."""
    feed, step = BatchFeed(server.learner_address, run_dir), 0
    while True:
        step += 1
        taken = await feed.take(step)
        assert not isinstance(taken, NoBatch), "the data has no end"
        await feed.read(step, taken[1])
        await server.trained(step, {})
        await server.published(step)
        if step % CHECKPOINT_EVERY == 0:
            await server.covered(step)


# ------------------------------------------------------------------------------------------------- the two contenders


class Alone:
    """The AsyncLLM of a separate engine, asked for groups of the stream's prompts."""

    def __init__(self, config: Config, engine: Engine, prompt_at: Callable[[int], Prompt | None]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        adapter = engine._vllm  # what is measured is what the engine adds to this
        self._llm, self._slots, self._group_size = adapter._llm, config.rollout.slots, config.rollout.group_size
        self._prompt_at = prompt_at
        self._num_prompts = self._num_requests = self._num_outstanding = 0
        self._room = asyncio.Event()
        self._going = False
        self._params = SamplingParams(
            max_tokens=config.rollout.max_response_length,
            temperature=config.rollout.temperature,
            stop_token_ids=adapter._stop_token_ids,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.num_tokens = 0

    async def begin(self) -> None:
        self._going = True
        self._driving = asyncio.create_task(self._drive())

    async def end(self) -> None:
        self._going = False
        await self._driving

    async def _drive(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while self._going:
                self._room.clear()
                while self._num_outstanding < self._slots:
                    prompt = self._prompt_at(self._num_prompts)
                    self._num_prompts += 1
                    for _ in range(self._group_size):
                        self._num_outstanding += 1
                        tasks.create_task(self._sample(prompt.token_ids))
                await self._room.wait()

    async def _sample(self, prompt_ids: list[int]) -> None:
        self._num_requests += 1
        prompt = {"type": "token", "prompt_token_ids": prompt_ids, "cache_salt": "0"}
        async for output in self._llm.generate(prompt, self._params, str(self._num_requests)):
            self.num_tokens += len(output.outputs[0].token_ids)
        self._num_outstanding -= 1
        self._room.set()


class Whole:
    """A rollout worker as the controller makes it, joined to the replay process."""

    def __init__(self, config: Config, engine: Engine, address: str, controller: Connection) -> None:
        reward = config.reward
        pool = ScorerPool(
            reward.verifier, reward.processes, reward.timeout_s, concurrency=reward.concurrency, retries=reward.retries
        )
        decode = load_tokenizer(config.model.tokenizer_files).decode
        self.scorer = Scorer(reward.verifier, pool, decode, Scale(reward, config.rollout.max_response_length))
        self.worker = RolloutWorker(
            0, config.rollout, config.replay.heartbeat_s, engine, SingleTurn(engine, self.scorer), decode, address
        )
        self._engine, self._controller = engine, controller

    @property
    def num_tokens(self) -> int:
        return int(self._engine.gauges()["tokens"])

    async def begin(self) -> None:
        self._controller.send("begin")

    async def end(self) -> None:
        self._controller.send("pause")
        while self._engine.num_outstanding or self.worker.num_running:
            await asyncio.sleep(0.05)


async def tokens_per_s(contender: Alone | Whole, seconds: float) -> float:
    await contender.begin()
    await asyncio.sleep(WARM_UP_S)
    began, before = time.perf_counter(), contender.num_tokens
    await asyncio.sleep(seconds)
    rate = (contender.num_tokens - before) / (time.perf_counter() - began)
    await contender.end()
    return rate


async def main(options: argparse.Namespace) -> None:
    config = load_config(find_config("quickstart"), [*OVERRIDES, f"model.path={options.model}", *options.overrides])
    ours, theirs = (make_engine(config, 0.45).engine for _ in range(2))
    controller, replay = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as run_dir:
        process = multiprocessing.get_context("spawn").Process(target=replay_process, args=(config, run_dir, replay))
        process.start()
        try:
            for engine in (ours, theirs):
                await engine.start()
            whole = Whole(config, ours, controller.recv(), controller)
            alone = Alone(config, theirs, make_stream(config).prompt_at)
            await whole.scorer.start()
            working = asyncio.create_task(whole.worker.run())
            await compare(alone, whole, options)
            working.cancel()
            await asyncio.wait([working])
            await whole.scorer.stop()
        finally:
            process.kill()
            process.join()
            for engine in (ours, theirs):
                await engine.stop()


async def compare(alone: Alone, whole: Whole, options: argparse.Namespace) -> None:
    rounds = []
    for number in range(options.rounds + 1):
        order = [("alone", alone), ("whole", whole)][:: 1 if number % 2 else -1]
        rates = {name: await tokens_per_s(contender, options.seconds) for name, contender in order}
        what = f"round {number}" if number else "first, not counted"
        print(f"{what}: alone {rates['alone']:.0f}, whole {rates['whole']:.0f} tok/s", flush=True)
        if number:
            rounds.append(rates)
    gauges = whole.worker.gauges()
    print(f"{gauges['scored_groups']:.0f} groups were judged, {gauges['failed_groups']:.0f} verdicts failed")
    for name in ("alone", "whole"):
        print(f"{name}: median {statistics.median(rates[name] for rates in rounds):.0f} tok/s of {len(rounds)}")
    print(f"ratio: median {statistics.median(rates['whole'] / rates['alone'] for rates in rounds):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="of each contender in a round")
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "configs" / "models" / "chain_start")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asyncio.run(main(parser.parse_intermixed_args()))
