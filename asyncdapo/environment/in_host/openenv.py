"""A server of OpenEnv: `openenv:http://host:8000`. Each episode is one connection to its `/ws` (openenv-core 0.3).

    GET /schema                                         ──▶ {"action": JSON schema, …}
    {"type": "reset", "data": {"seed", the row}}        ──▶ {"type": "observation",
                                                             "data": {"observation", "reward", "done"}}
    {"type": "step", "data": action}                    ──▶ the same, or {"type": "error", "data": {"message", "code"}}
    {"type": "close"}

In: rows, responses. Out: observations and rewards. An action with one text in it is the response; any other is JSON,
which the response has to be, and the model is told if it isn't. An observation with one text in it is that text; any
other is shown as JSON. What the server says at first stands behind the row's prompt. Does not own: the server, which
the user starts.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from asyncdapo.environment.in_host.answers import UnusableError
from asyncdapo.environment.in_host.native import Run

ANSWER_S = 10.0
MAX_MESSAGE_BYTES = 1 << 24
NOT_SHOWN = ("done", "reward", "metadata")
INVALID_ACTION = "VALIDATION_ERROR"


class OpenEnvError(Exception):
    """The server reports an error of the environment."""


class OpenEnv:
    """What `openenv:` names."""

    tools: tuple[()] = ()

    def __init__(self, url: str) -> None:
        """Raises UnusableError if websockets isn't installed, or the server doesn't answer."""
        try:
            import websockets.asyncio.client  # noqa: F401 - of the interpreter that hosts environments
        except ImportError:
            raise UnusableError("needs the package websockets: pip install 'asyncdapo[openenv]'") from None
        url = url.rstrip("/")
        self.socket_url = f"ws{url.removeprefix('http')}/ws"
        self.action = _read_schema(url)

    def episode(self, run: Run) -> OpenEnvEpisode:
        return OpenEnvEpisode(self)


class OpenEnvEpisode:
    """One connection."""

    def __init__(self, server: OpenEnv) -> None:
        self._server = server
        self._socket: Any = None

    async def reset(self, row: dict[str, Any]) -> str | None:
        from websockets.asyncio.client import connect

        self._socket = await connect(self._server.socket_url, max_size=MAX_MESSAGE_BYTES)
        said = await self._ask("reset", row | {"seed": row["row"]})
        text = shown(said["observation"])
        return f"{row['prompt']}\n\n{text}" if text else None

    async def step(self, response: str) -> tuple[str | None, float]:
        try:
            said = await self._ask("step", action_of(response, self._server.action))
        except InvalidActionError as error:
            return f"Error: {error}", 0.0
        return None if said["done"] else shown(said["observation"]), said["reward"] or 0.0

    async def end(self) -> tuple[dict[str, float], float]:
        return {}, 0.0

    async def close(self) -> None:
        if self._socket is not None:
            await self._socket.close()

    async def _ask(self, what: str, data: dict[str, Any]) -> dict[str, Any]:
        await self._socket.send(json.dumps({"type": what, "data": data}))
        said = json.loads(await self._socket.recv())
        if said["type"] == "observation":
            return said["data"]
        if said["data"].get("code") == INVALID_ACTION and what == "step":
            problems = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in said["data"]["errors"])
            raise InvalidActionError("; ".join(problems))
        raise OpenEnvError(said["data"]["message"])


class InvalidActionError(Exception):
    """A response is no action."""


def action_of(response: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Raises InvalidActionError for a response that had to be JSON."""
    fields = {name: one for name, one in schema["properties"].items() if name not in NOT_SHOWN}
    wanted = [name for name in fields if name in schema.get("required", fields)]
    if len(wanted) == 1 and fields[wanted[0]].get("type") == "string":
        return {wanted[0]: response}
    try:
        action = json.loads(response)
    except (ValueError, RecursionError):
        action = None
    if not isinstance(action, dict):
        raise InvalidActionError(f"an action is a JSON object with {', '.join(fields)}")
    return action


def shown(observation: dict[str, Any]) -> str:
    """What the model reads of it."""
    fields = {name: value for name, value in observation.items() if name not in NOT_SHOWN}
    texts = [value for value in fields.values() if isinstance(value, str)]
    return texts[0] if len(fields) == len(texts) == 1 else json.dumps(fields, ensure_ascii=False) if fields else ""


def _read_schema(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{url}/schema", timeout=ANSWER_S) as answer:
            return json.load(answer)["action"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", error)
        raise UnusableError(f"no server of OpenEnv answers at {url}/schema: {reason}") from None
