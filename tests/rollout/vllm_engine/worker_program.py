"""A process with an engine whose running requests compute their keys and values again after an update.

    python -m tests.rollout.vllm_engine.worker_program CHECKPOINT

Generates through updates to every version, writes one line of JSON (the engine's process ids and the samples), and
then generates on and on, until it is killed.
"""

from __future__ import annotations

import asyncio
import json
import sys

from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.engine import Request

from .models import MAX_RESPONSE_LENGTH, NUM_VERSIONS, vllm_engine

PROMPT_IDS = [7, 1, 40, 22, 9]


async def main(path: str) -> None:
    engine = vllm_engine(path, on_update="recompute")
    await engine.start()
    request = new_request()
    samples = asyncio.create_task(engine.generate(request))
    for version in range(1, NUM_VERSIONS):
        while request.num_sampled < len(request.seeds) * version * MAX_RESPONSE_LENGTH / (NUM_VERSIONS + 1):
            await asyncio.sleep(0.001)
        await engine.load_weights(version, None)
    kept = [
        {"token_ids": each.token_ids.tolist(), "logprobs": each.logprobs.tolist(), "versions": each.versions}
        for each in await samples
    ]
    print(json.dumps({"pids": engine.pids(), "samples": kept}), flush=True)
    while True:
        await engine.generate(new_request())


def new_request() -> Request:
    return Request(prompt_ids=PROMPT_IDS, seeds=[1, 2, 3, 4], sampling=Sampling(max_tokens=MAX_RESPONSE_LENGTH))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
