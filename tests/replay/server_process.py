"""A replay server in a process of its own, which tests kill. `python -m tests.replay.server_process RUN_DIR PORT PORT`

Prints its two addresses as a line of JSON. Then every line of stdin is a command, `["trained", 3, {}]`, which a line of
JSON answers.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.server.server import ReplayServer
from asyncdapo.replay.server.settings import ServerSettings
from tests.replay.small_run import GROUP_SIZE, prompt_at

HEARTBEAT_S = 0.2
"""The server ends after 30 of them without a word from any worker. 1.5 s were too few on a busy machine."""
START_S = 20


async def serve(run_dir: Path, ports: tuple[int, int]) -> None:
    config = ReplayConfig(prompts_per_step=2, run_ahead=1.0, max_staleness=1, heartbeat_s=HEARTBEAT_S)
    make_state = partial(ReplayState, config, FilterConfig(), max_attempts=3, num_prompts=None)
    server = ReplayServer(
        ServerSettings(replay=config, group_size=GROUP_SIZE, seed=1),
        lambda recovered: make_state(recovered=recovered),
        Journal(run_dir),
        prompt_at,
        ports=ports,
    )
    serving = asyncio.create_task(server.run())
    print(json.dumps([server.rollout_address, server.learner_address]), flush=True)
    commands = asyncio.create_task(obey(server))
    await asyncio.wait((serving, commands), return_when=asyncio.FIRST_COMPLETED)
    serving.cancel() if not serving.done() else serving.result()


async def obey(server: ReplayServer) -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        name, *args = json.loads(line)
        print(json.dumps(await getattr(server, name)(*args)), flush=True)


class ServerProcess:
    """The test's end: starts the server, kills it, starts it again, and repeats calls under which it died."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self.ports = run_dir, (0, 0)
        self._up = asyncio.Event()
        self._calling = asyncio.Lock()

    async def start(self) -> None:
        command = (sys.executable, "-m", "tests.replay.server_process", str(self._run_dir), *map(str, self.ports))
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        self.rollout_address, self.learner_address = json.loads(
            await asyncio.wait_for(self._process.stdout.readline(), START_S)
        )
        self.ports = tuple(int(address.rpartition(":")[2]) for address in (self.rollout_address, self.learner_address))
        self._up.set()

    async def kill(self) -> None:
        self._up.clear()
        self._process.kill()
        await self._process.wait()

    async def call(self, *command):
        """The answer to a command, of whichever life gives it."""
        async with self._calling:
            while True:
                await self._up.wait()
                process = self._process
                try:
                    process.stdin.write(json.dumps(command).encode() + b"\n")
                    await process.stdin.drain()
                    if answer := await process.stdout.readline():
                        return json.loads(answer)
                except ConnectionError:
                    pass
                assert not self._up.is_set(), "the server ended by itself"


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3]))))
