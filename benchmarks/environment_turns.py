"""What a turn costs beside the engine: 64 episodes at once with the calculator of `quickstart_tools`, without tokens.

    python benchmarks/environment_turns.py

Out: wall and CPU time a turn, of the worker and of its host.
"""

from __future__ import annotations

import asyncio
import resource
import time

from asyncdapo.environment.config import EnvironmentConfig
from asyncdapo.environment.hosts import Hosts, Session

CALCULATOR = "asyncdapo.environment.calculator:Calculator"
NUM_EPISODES, NUM_TURNS, NUM_REPEATS = 64, 20, 4


async def play(session: Session) -> None:
    await session.reset()
    for _ in range(NUM_TURNS):
        await session.step("12*12")
    await session.end()


async def main() -> None:
    hosts = Hosts(EnvironmentConfig(path=CALCULATOR), max_context=1000)
    await hosts.start()
    began, began_cpu = time.monotonic(), time.process_time()
    for _ in range(NUM_REPEATS):
        await asyncio.gather(*(hosts.in_environment({"answer": "144"}, play) for _ in range(NUM_EPISODES)))
    wall_ms, cpu_ms = 1e3 * (time.monotonic() - began), 1e3 * (time.process_time() - began_cpu)
    await hosts.stop()
    used, num = resource.getrusage(resource.RUSAGE_CHILDREN), NUM_REPEATS * NUM_EPISODES * NUM_TURNS
    host_ms = 1e3 * (used.ru_utime + used.ru_stime)
    print(f"a turn of {NUM_EPISODES} episodes at once: {wall_ms / num:.3f} ms of wall time")
    print(f"CPU a turn: worker {cpu_ms / num:.3f} ms, host {host_ms / num:.3f} ms with its start")


if __name__ == "__main__":
    asyncio.run(main())
