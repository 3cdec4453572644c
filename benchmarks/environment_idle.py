"""How long the torch engine has nothing to do, and how full its slots are, while environments take their time.

    python benchmarks/environment_idle.py [--slots 256] [--step-s 2] [--seconds 40] [--oversubscribe 1 1.5 2]

Groups of 16 episodes of four turns with random lengths; after each turn the environment sleeps for `--step-s`. As a
worker does, a group is begun whenever a seat is free. n times as many seats as slots keep the slots full if n × t is at
least t + s, where t is the time of a turn in its slot and s that of a step.

Out, a line for each oversubscribe: idle share of the time (no sequence at all), mean share of the slots in use, t.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch_engine import GROUP_SIZE, random_model, random_prompts

from asyncdapo.environment.config import EnvironmentConfig
from asyncdapo.environment.hosts import Hosts
from asyncdapo.eval_messages import Sampling
from asyncdapo.messages import Lease, Prompt
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Priority
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.several_turns.attempt import TurnLimits
from asyncdapo.rollout.several_turns.several_turns import SeveralTurns
from asyncdapo.rollout.several_turns.steps import Steps
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine

MAX_TOKENS, MAX_CONTEXT = 2000, 3000
WARM_UP_S = 10.0
SLOW = """
import asyncio

class Slow:
    def reset(self, row):
        self.num_left = 4

    async def step(self, response):
        await asyncio.sleep({step_s})
        self.num_left -= 1
        return "more" if self.num_left else None
"""


class EightTokens:
    """An observation as tokens."""

    def begin(self, text: object) -> list[int]:
        raise NotImplementedError("episodes begin behind their prompts")

    def observe(self, text: object) -> list[int]:
        return [7] * 8


class Worker:
    """Begins a group whenever a seat is free."""

    def __init__(self, rollouts: SeveralTurns) -> None:
        self._rollouts = rollouts
        self._room = asyncio.Event()

    async def run(self) -> None:
        sampling, jobs = Sampling(max_tokens=MAX_TOKENS), list[Job]()
        async with asyncio.TaskGroup() as tasks:
            for number, token_ids in enumerate(endless_prompts()):
                while self._rollouts.num_free(jobs) < 1:
                    self._room.clear()
                    await self._room.wait()
                    jobs = [job for job in jobs if job.num_unfinished]
                prompt = Prompt(prompt_id=number, epoch=0, source="", row=number, token_ids=token_ids, answer="")
                lease = Lease(lease_id=number, branch=0, attempt=1, group_size=GROUP_SIZE, seed=number, prompt=prompt)
                jobs.append(Job(lease, GROUP_SIZE, self._room.set))
                seeds = [number << 8 | sample for sample in range(GROUP_SIZE)]
                tasks.create_task(self._rollouts.sample(jobs[-1], prompt, seeds, sampling, Priority.FRESH))


def endless_prompts() -> Iterator[list[int]]:
    for seed in itertools.count():
        yield from random_prompts(64, seed)


async def measure(engine: TorchEngine, path: Path, oversubscribe: float, seconds: float) -> str:
    seats = int(oversubscribe * engine.num_slots) + GROUP_SIZE
    hosts = Hosts(EnvironmentConfig(path=f"{path}:Slow", concurrency=seats), MAX_CONTEXT)
    await hosts.start()
    limits = TurnLimits(max_turns=8, max_context=MAX_CONTEXT)
    rollouts = SeveralTurns(engine, hosts, Steps(EightTokens(), lambda _: ""), lambda *_: [], limits, oversubscribe)
    running = asyncio.create_task(Worker(rollouts).run())
    await asyncio.sleep(WARM_UP_S)
    before = engine.gauges() | rollouts.gauges()
    await asyncio.sleep(seconds)
    after = engine.gauges() | rollouts.gauges()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await hosts.stop()
    grown = {name: after[name] - before[name] for name in before}
    idle = max(0.0, grown["idle_s"] / (grown["idle_s"] + grown["busy_s"]))  # the step under way isn't counted yet
    in_use = grown["slot_steps"] / grown["steps"]
    turn_s, num_tokens = in_use * grown["busy_s"] / grown["turns"], grown["tokens"] / grown["turns"]
    return (
        f"oversubscribe {oversubscribe:g}: idle {idle:.3f}, slots in use {in_use / engine.num_slots:.2f}, "
        f"a turn of {num_tokens:.0f} tokens took {turn_s:.2f} s, {grown['tokens'] / seconds:.0f} tokens/s"
    )


async def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    config = RolloutConfig(slots=options.slots, group_size=GROUP_SIZE, max_response_length=MAX_TOKENS, device="cpu")
    with tempfile.TemporaryDirectory() as directory:
        random_model(max_position_embeddings=MAX_CONTEXT).save_pretrained(directory)
        engine = TorchEngine(
            directory, config, max_prompt_length=MAX_CONTEXT - 1, max_context=MAX_CONTEXT, stop_token_ids=[1]
        )
        await engine.start()
        path = Path(directory) / "slow.py"
        path.write_text(SLOW.format(step_s=options.step_s))
        for oversubscribe in options.oversubscribe:
            print(await measure(engine, path, oversubscribe, options.seconds), flush=True)
        await engine.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--step-s", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--oversubscribe", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    asyncio.run(main(parser.parse_args()))
