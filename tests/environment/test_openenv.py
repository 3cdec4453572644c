"""A server of OpenEnv: an episode is a connection, and what the server says is what the model reads."""

from __future__ import annotations

import asyncio
import sys

import pytest

from asyncdapo.environment.config import EnvironmentConfig
from asyncdapo.errors import ConfigError, EpisodeError, RunError
from tests.asynchronous import asynchronous, until
from tests.controller.runs import prepare
from tests.environment.hosting import hosting, scripted
from tests.environment.openenv_server import MOVES, SAYS, serving

ROW = {"prompt": "Say it.", "answer": "42", "source": "game", "row": 7}


@asynchronous
async def test_an_action_with_one_text_is_the_response_and_each_episode_has_its_own_connection() -> None:
    async with serving(SAYS) as server, hosting(f"openenv:{server.url}/") as hosts:
        for _ in range(2):
            said = await hosts.in_environment(ROW, scripted("41", "it is 42"))
            assert said == ["Say it.\n\ngo 7", "you said 41", None, 1.0, {}]
        await until(lambda: server.num_open == 0)
    assert (
        server.heard
        == [
            [
                {"type": "reset", "data": ROW | {"seed": 7}},
                {"type": "step", "data": {"message": "41"}},
                {"type": "step", "data": {"message": "it is 42"}},
            ]
        ]
        * 2
    )


@asynchronous
async def test_any_other_action_is_json_and_the_model_is_told_what_is_wrong_with_its_own() -> None:
    async with serving(MOVES) as server, hosting(f"openenv:{server.url}") as hosts:
        said = await hosts.in_environment(ROW, scripted("north", "[1]", '{"column": 2}', '{"row": 1, "column": 2}'))
    wanted = "Error: an action is a JSON object with row, column"
    assert said[1:] == [wanted, wanted, "Error: row: Field required", '{"board": [1], "legal": true}', 0.5, {}]


@asynchronous
async def test_an_error_of_the_server_is_a_failure_of_the_environment() -> None:
    async with serving(SAYS) as server, hosting(f"openenv:{server.url}", retries=0) as hosts:
        with pytest.raises(EpisodeError, match="step: OpenEnvError: on fire"):
            await hosts.in_environment(ROW, scripted("boom"))
        assert (await hosts.in_environment(ROW, scripted("42")))[-2] == 1.0


@asynchronous
async def test_a_url_that_does_not_answer_is_refused_in_one_line() -> None:
    with pytest.raises(RunError, match=r"no server of OpenEnv answers at http://127.0.0.1:\d+/schema: .*refused"):
        async with serving(SAYS) as server:
            gone = server.url
        async with hosting(f"openenv:{gone}"):
            pass


@asynchronous
async def test_an_interpreter_without_websockets_is_refused_in_one_line(tmp_path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(RunError, match=r"needs the package websockets: pip install 'asyncdapo\[openenv\]'"):
        async with hosting("openenv:http://127.0.0.1:1", python=str(bare)):
            pass


@asynchronous
async def test_a_launch_tries_the_server_and_a_resume_finds_the_same_run(tmp_path) -> None:
    async with serving(SAYS) as server:
        for _ in "ab":
            await asyncio.to_thread(prepare, tmp_path / "run", f"environment.path=openenv:{server.url}")
    assert {messages[0]["type"] for messages in server.heard} == {"reset"}
    with pytest.raises(ConfigError, match=r"a trial failed: .*no server of OpenEnv answers at"):
        await asyncio.to_thread(prepare, tmp_path / "other", f"environment.path=openenv:{server.url}")


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"environment\.path: names no server, got 'openenv:game'"):
        EnvironmentConfig(path="openenv:game")
