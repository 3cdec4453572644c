"""Main of a host process: `host_main PID`. PID is the worker's process.

    worker ──{"name", "import_path", "tokenizer", "concurrency", "max_chars"}──▶ host
           ◀──{"call": 0, "tools"}, or {"call": 0, "raised"}
    worker ──{"call", "episode", "do": "reset" | "step" | "tools" | "end" | "run" | "drop", "given"}──▶ host
           ◀──{"call", "observation", "reward", "metrics", "num_chars"}──  or {"call", "raised"}, {"call", "broke"}

In: JSON lines on standard input, which is a socket. Out: an answer to each call, on the same socket, in the order in
which the environments answer. The environment is the user's code and may do anything (`child/entry`); its output goes
to the worker's log. The process ends when the worker closes the socket.

The interpreter may be another virtual environment's. So the modules of this folder, and what they import, need the
standard library and nothing of the package's dependencies. Does not own: time-outs, limits, retries (the worker).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from typing import Any

from asyncdapo.child.entry import enter
from asyncdapo.environment.in_host.answers import Answer, describe
from asyncdapo.environment.in_host.episodes import Episodes
from asyncdapo.environment.in_host.loading import load

MAX_REQUEST_BYTES = 1 << 26


async def serve(sock: socket.socket) -> None:
    """Answer until the worker closes the socket."""
    reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_REQUEST_BYTES)

    def tell(call: int, answer: Answer) -> None:
        line = json.dumps({"call": call} | answer, ensure_ascii=False)
        writer.write(line.encode(errors="replace") + b"\n")  # half a surrogate pair becomes a question mark

    setup = json.loads(await reader.readline())
    sys.path[:0] = [path for path in setup["import_path"] if path not in sys.path]
    try:
        environment = load(setup["name"], setup["tokenizer"])
    except BaseException as error:  # noqa: BLE001 - the user's module runs its own code when it is imported
        tell(0, {"raised": describe(error)})
        await writer.drain()
        return
    episodes, answering = Episodes(environment, setup["concurrency"], setup["max_chars"]), set()
    tell(0, {"tools": environment.tools})

    async def handle(request: dict[str, Any]) -> None:
        tell(request["call"], await episodes.answer(request))

    while line := await reader.readline():
        task = asyncio.create_task(handle(json.loads(line)))
        answering.add(task)
        task.add_done_callback(answering.discard)


def main(parent: int) -> None:
    asyncio.run(serve(enter(parent)))
    os._exit(0)  # threads may still be in the user's code


if __name__ == "__main__":
    main(int(sys.argv[1]))
