"""The example of a program that calls the model: what the page shows, and what it does with an endpoint."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from asyncdapo.child.entry import load_file
from asyncdapo.environment.in_host.loading import load
from asyncdapo.model.turn_encoder import turn_encoder
from asyncdapo.rollout.endpoint.chat import Chat
from tests.asynchronous import asynchronous
from tests.controller.runs import command, launch
from tests.docs.blocks import ROOT
from tests.rollout.endpoint.calling import called
from tests.rollout.endpoint.writing import Writer, chat_tokenizer

AGENT = ROOT / "examples" / "agent.py"


def test_the_page_shows_the_example() -> None:
    assert f"```python\n{AGENT.read_text()}```" in (ROOT / "docs" / "environments.md").read_text()


def test_a_host_loads_it() -> None:
    assert load(f"agent:{AGENT}:run", tokenizer="") is not None


@pytest.mark.parametrize(("end", "reward"), [("Answer: 4042", 1.0), ("Answer: 4", 0.0)])
@asynchronous
async def test_it_multiplies_for_the_model_and_judges_the_answer(end: str, reward: float) -> None:
    tokenizer = chat_tokenizer()
    encoder = turn_encoder(tokenizer, chat_template=False, system_prompt=None, joins=True)
    engine = Writer(tokenizer, lambda text: (end if text.endswith("4042\n") else "47*86") + "<|im_end|>")
    async with called(engine, lambda: Chat(encoder, tokenizer), max_tokens=200) as it:
        row, url = {"prompt": "Q: 47*86\n", "answer": "4042"}, f"{it.endpoint.url}/v1"
        assert await asyncio.to_thread(load_file(AGENT).run, row, url, it.key) == (reward, {"calls": 1})
        [context] = it.attempt.episode("stop", reward, {}).contexts
    whole = tokenizer.spell(context.token_ids.tolist())
    assert whole == f"Q: 47*86\n47*86<|im_end|>4042\n{end}<|im_end|>"


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_it_trains(tmp_path: Path, engine: str) -> None:
    run = launch(
        tmp_path / "run",
        f"environment.path=agent:{AGENT}:run",
        f"rollout.engine={engine}",
        "run.steps=3",
        config="quickstart_tools",
    )
    assert run.exit_code == 0, run.output
    assert run.lines[-1]["rollout/contexts_mean"] == 1.0
    assert run.lines[-1]["rollout/turns_mean"] > 1.0
    audit = subprocess.run(command("audit", str(run.dir)), capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
