"""A taskset of verifiers: its agent's calls are the episode, to the exact token. With the real package: soak."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from asyncdapo.controller.commands.env_check import check, make_config
from asyncdapo.environment.in_host.verifiers_taskset import merged, nested
from asyncdapo.errors import EpisodeError, RunError
from asyncdapo.eval_messages import Sampling
from asyncdapo.model.files import TokenizerFiles
from asyncdapo.model.tokenizer import load_tokenizer
from asyncdapo.model.turn_encoder import turn_encoder
from asyncdapo.rollout.endpoint.chat import Chat
from asyncdapo.rollout.endpoint.endpoint import Endpoint
from asyncdapo.rollout.engine import Request, Sample
from asyncdapo.rollout.episodes import Episode
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.several_turns.agents import Agents
from asyncdapo.rollout.several_turns.attempt import TurnLimits
from asyncdapo.rollout.several_turns.several_turns import SeveralTurns
from tests.asynchronous import asynchronous
from tests.environment.chat_model import save_tokenizer
from tests.environment.hosting import hosting
from tests.environment.test_launches import PYTHON, needs
from tests.rollout.fakes import FakeEngine, make_lease, make_prompt

ECHO = "verifiers:verifiers_echo?renderer.name=qwen3"


class SpeakingEngine(FakeEngine):
    """Says its words, one after the other."""

    def __init__(self, tokenizer: str, *words: str, takes_s: float = 0.0) -> None:
        super().__init__()
        self.takes_s = takes_s
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.words = list(words)

    async def generate(self, request: Request) -> list[Sample]:
        self.requests.append(request)
        await asyncio.sleep(self.takes_s)
        ids = self.tokenizer.encode(self.words[len(self.requests) - 1] + "<|im_end|>")
        logprobs = np.full(len(ids), -0.5, np.float32)
        sample = Sample(
            token_ids=np.array(ids, np.int32), logprobs=logprobs, versions=[(0, len(ids))], finish_reason="stop"
        )
        return [sample]


@asynccontextmanager
async def playing(path: str, engine: SpeakingEngine, folder: Path) -> AsyncIterator[SeveralTurns]:
    tokenizer = load_tokenizer(TokenizerFiles(str(folder)))
    encoder = turn_encoder(tokenizer, chat_template=True, system_prompt=None)
    endpoint = Endpoint(2000, lambda: Chat(encoder, tokenizer))
    await endpoint.start()
    async with hosting(path, str(folder), python=PYTHON, retries=0, step_timeout_s=60.0) as hosts:
        limits = TurnLimits(max_turns=6, max_context=2000)
        yield SeveralTurns(engine, hosts, Agents(endpoint), lambda *_: [], limits, 1.0)
    await endpoint.stop()


async def play(rollouts: SeveralTurns, answer: str) -> Episode:
    prompt = msgspec.structs.replace(make_prompt(3), answer=answer)
    job = Job(make_lease(7), 1, lambda: None)
    [episode] = await rollouts.sample(job, prompt, [5], Sampling(max_tokens=500))
    return episode


@pytest.mark.soak
def test_each_turn_continues_the_one_before_and_the_reward_is_the_tasks(tmp_path, monkeypatch) -> None:
    needs("verifiers")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    save_tokenizer(tmp_path)
    asyncio.run(two_turns(tmp_path))


async def two_turns(tmp_path: Path) -> None:
    engine = SpeakingEngine(str(tmp_path), "<think>\nhm\n</think>\n\none", "<think>\nso\n</think>\n\nfive!")
    async with playing(ECHO, engine, tmp_path) as rollouts:
        episode = await play(rollouts, json.dumps({"prompt": "Say 3.", "wanted": 3}))
        [context] = episode.contexts
        spelled = engine.tokenizer.decode(context.token_ids)
        assert spelled.startswith("<|im_start|>user\nSay 3.<|im_end|>\n<|im_start|>assistant\n<think>\nhm")
        assert "one<|im_end|>\n<|im_start|>user\nyou said " in spelled
        assert spelled.endswith("five!<|im_end|>")
        assert (episode.finish_reason, episode.reward, episode.metrics["wanted"]) == ("stop", 1.0, 3.0)
        with pytest.raises(EpisodeError, match="run: ValidationError"):
            await play(rollouts, "{}")


@pytest.mark.soak
def test_a_call_waits_as_long_as_the_engine_is_busy(tmp_path, monkeypatch) -> None:
    needs("verifiers")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    save_tokenizer(tmp_path)

    async def one_episode() -> Episode:
        engine = SpeakingEngine(str(tmp_path), "one", "five!", takes_s=1.0)
        async with playing(ECHO.replace("echo", "impatient"), engine, tmp_path) as rollouts:
            return await play(rollouts, json.dumps({"prompt": "Say 3.", "wanted": 3}))

    episode = asyncio.run(one_episode())
    assert (episode.finish_reason, len(episode.turns)) == ("stop", 2)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("verifiers:nowhere?renderer.name=qwen3", "taskset 'nowhere': taskset 'nowhere' not found"),
        ("verifiers:verifiers_echo", "which of verifiers' renderers writes the model's chat template"),
        (f"{ECHO}&taskset.size=3", "taskset 'verifiers_echo': .*size"),
        (f"{ECHO}&renderer.nose=3", "taskset 'verifiers_echo': .*nose"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(path: str, problem: str, monkeypatch) -> None:
    needs("verifiers")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    async def start() -> None:
        async with hosting(path, python=PYTHON):
            pass

    with pytest.raises(RunError, match=problem) as caught:
        asyncio.run(start())
    assert "\n" not in str(caught.value)


@asynchronous
async def test_an_interpreter_without_verifiers_is_refused_in_one_line(tmp_path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(RunError, match=r"needs the package verifiers .*environment\.python of an environment that has"):
        async with hosting(ECHO, python=str(bare)):
            pass


def test_keys_of_a_query_are_nested_and_defaults_fill_what_they_leave_out() -> None:
    said = nested("a.b=1&a.c=x&d=true&a.e.f=[1]")
    assert said == {"a": {"b": 1, "c": "x", "e": {"f": [1]}}, "d": True}
    assert merged({"a": {"b": 2, "g": {"h": 3}}, "i": 4}, said) == said | {
        "a": {"b": 1, "c": "x", "e": {"f": [1]}, "g": {"h": 3}},
        "i": 4,
    }


@pytest.mark.soak
def test_the_rows_of_a_taskset_are_those_that_its_tasks_are_made_of(monkeypatch) -> None:
    needs("verifiers")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    rows = taskset_rows("verifiers_echo")
    assert [row["prompt"] for row in rows] == [f"Say {number}." for number in range(8)]
    assert json.loads(rows[3]["answer"])["wanted"] == 3
    assert [row["prompt"] for row in taskset_rows("verifiers_echo", "same=true")] == [
        "Say it.",
        *(f"Say it. (task {number})" for number in range(1, 8)),
    ]


WORDS = ("apple", "crane", "stone")


@pytest.mark.soak
def test_wordle_plays_with_the_keys_of_its_config(tmp_path, monkeypatch) -> None:
    """The game is the package's; its word lists, which it would download, are made here."""
    needs("textarena")
    folder = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    for made in (folder, tmp_path / "corpora" / "words"):
        made.mkdir(parents=True)
    for name, content in (("weights", "{}"), ("tagdict", "{}"), ("classes", '["NN"]')):
        (folder / f"{folder.name}.{name}.json").write_text(content)
    for name in ("en", "en-basic"):
        (tmp_path / "corpora" / "words" / name).write_text("\n".join(WORDS))
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    save_tokenizer(tmp_path)
    rows = taskset_rows("textarena", "game=Wordle-v0")[:500]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = [f"prompts.path={tmp_path}/tasks.jsonl", f"model.tokenizer={tmp_path}", f"environment.python={PYTHON}"]
    config = make_config("qwen3_0.6b_wordle_1gpu", None, [*keys, "prompts.max_prompt_length=2000"])  # a token a letter
    shown = io.StringIO()
    check(config, [f"[{word}]" for word in WORDS], Console(file=shown, width=200))
    for episode in shown.getvalue().split("episode ")[1:3]:
        assert episode.count("  sampled ") == episode.count("  observed ") <= len(WORDS)
        assert "reward 1" in episode


def taskset_rows(*words: str) -> list[dict[str, str]]:
    script = Path(__file__).parents[2] / "examples" / "taskset_rows.py"
    lines = subprocess.run([PYTHON, script, *words], capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in lines.splitlines()]
