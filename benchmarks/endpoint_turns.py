"""What a call to the endpoint costs beside the engine: 64 programs at once, each in a thread of one host, against an
engine that answers at once.

    python benchmarks/endpoint_turns.py

Out: wall and CPU time a call, of the worker and of its host, for token ids. The clients are urllib's, with a connection
a call.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
import urllib.request
from pathlib import Path

import numpy as np

from asyncdapo.environment.config import EnvironmentConfig
from asyncdapo.environment.hosts import Hosts
from asyncdapo.eval_messages import Sampling
from asyncdapo.messages import Lease, Prompt
from asyncdapo.rollout.endpoint.endpoint import Endpoint
from asyncdapo.rollout.engine import Priority, Request, Sample
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.several_turns.agents import Agents
from asyncdapo.rollout.several_turns.attempt import TurnLimits
from asyncdapo.rollout.several_turns.several_turns import SeveralTurns

NUM_EPISODES, NUM_CALLS, NUM_TOKENS = 64, 20, 16
MAX_CONTEXT = 1000
PROMPT = list(range(100))


class Immediate:
    """An engine that has the tokens already."""

    num_slots, loaded_version = NUM_EPISODES, 0

    async def generate(self, request: Request) -> list[Sample]:
        token_ids, logprobs = np.arange(NUM_TOKENS, dtype=np.int32), np.zeros(NUM_TOKENS, np.float32)
        return [Sample(token_ids=token_ids, logprobs=logprobs, versions=[(0, NUM_TOKENS)], finish_reason="stop")]


def run(row, base_url, api_key):
    """The program."""
    context = list(PROMPT)
    for _ in range(NUM_CALLS):
        url, body = base_url.removesuffix("/v1") + "/inference/v1/generate", json.dumps({"token_ids": context})
        request = urllib.request.Request(url, body.encode(), {"authorization": f"Bearer {api_key}"})
        with urllib.request.urlopen(request) as answer:
            context += [*json.load(answer)["choices"][0]["token_ids"], 7]
    return 0.0


async def main() -> None:
    path = f"agent:{Path(__file__).absolute()}:run"
    hosts, engine = Hosts(EnvironmentConfig(path=path, concurrency=NUM_EPISODES), MAX_CONTEXT), Immediate()
    endpoint = Endpoint(MAX_CONTEXT, lambda: None)
    await endpoint.start()
    await hosts.start()
    limits = TurnLimits(max_turns=NUM_CALLS, max_context=MAX_CONTEXT)
    rollouts = SeveralTurns(engine, hosts, Agents(endpoint), lambda *_: [], limits, 1.0)
    prompt = Prompt(prompt_id=0, epoch=0, source="none", row=0, token_ids=PROMPT, answer="")
    lease = Lease(lease_id=0, branch=0, attempt=0, group_size=NUM_EPISODES, seed=0, prompt=prompt)
    sampling = Sampling(max_tokens=NUM_CALLS * NUM_TOKENS)
    job = Job(lease, NUM_EPISODES, lambda: None)
    began, began_cpu = time.monotonic(), time.process_time()
    await rollouts.sample(job, prompt, list(range(NUM_EPISODES)), sampling, Priority.FRESH)
    wall_ms, cpu_ms = 1e3 * (time.monotonic() - began), 1e3 * (time.process_time() - began_cpu)
    await hosts.stop()
    await endpoint.stop()
    used, num = resource.getrusage(resource.RUSAGE_CHILDREN), NUM_EPISODES * NUM_CALLS
    host_ms = 1e3 * (used.ru_utime + used.ru_stime)
    print(f"a call of {NUM_EPISODES} programs at once: {wall_ms / num:.3f} ms of wall time")
    print(f"CPU a call: worker {cpu_ms / num:.3f} ms, host {host_ms / num:.3f} ms with its start")


if __name__ == "__main__":
    asyncio.run(main())
