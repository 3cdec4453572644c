"""TRL's own trainer plays and trains with a class of its shape: its episodes are ours, token by token."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest

from asyncdapo.controller.commands.env_check import ScriptedEngine
from asyncdapo.eval_messages import Sampling
from asyncdapo.model.files import TokenizerFiles
from asyncdapo.model.tokenizer import TextTokenizer, load_tokenizer
from asyncdapo.model.turn_encoder import turn_encoder
from asyncdapo.rollout.episodes import Episode
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.several_turns.attempt import TurnLimits
from asyncdapo.rollout.several_turns.several_turns import SeveralTurns
from asyncdapo.rollout.several_turns.steps import Steps
from tests.environment.chat_model import MAX_CONTEXT, save_chat_model
from tests.environment.hosting import SHAPES, hosting
from tests.environment.test_launches import PYTHON, needs
from tests.rollout.fakes import make_lease, make_prompt

OWN_LOOP = SHAPES.with_name("trl_own_loop.py")
TEMPLATES = "import trl; print(trl.__path__[0])"
ROW = {"prompt": "Reach 5.", "answer": "5", "source": "counts", "row": 1}


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


RESPONSES = ["First. " + call("add", number=2), call("weigh", what="a feather") + "\n" + call("add", number=3), "done"]
"""Their template writes the results of two calls of one response as two."""


async def ours(path: str, folder: str, tokenizer: TextTokenizer) -> Episode:
    engine = ScriptedEngine(tokenizer, RESPONSES)
    engine.begin("", seed=5)
    encoder = turn_encoder(tokenizer, chat_template=True, system_prompt=None)
    player, limits = Steps(encoder, tokenizer.decode), TurnLimits(max_turns=8, max_context=MAX_CONTEXT)
    prompt = msgspec.structs.replace(make_prompt(1), text=ROW["prompt"], answer=ROW["answer"], source=ROW["source"])
    async with hosting(path, folder) as hosts:
        rollouts = SeveralTurns(engine, hosts, player, lambda *_: [], limits, 1.0)
        job = Job(make_lease(7), 1, lambda: None)
        [episode] = await rollouts.sample(job, prompt, [5], Sampling(max_tokens=400))
    return episode


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_episodes_of_trls_own_trainer_are_ours_token_by_token(tmp_path: Path) -> None:
    needs("trl")
    folder = save_chat_model(tmp_path)
    package = subprocess.run([PYTHON, "-c", TEMPLATES], capture_output=True, text=True, check=True).stdout.strip()
    template = (Path(package) / "chat_templates" / "qwen2_5.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template)
    asked = {"model": folder, "path": str(SHAPES), "name": "Scales", "row": ROW, "responses": RESPONSES}
    done = subprocess.run([PYTHON, OWN_LOOP, json.dumps(asked)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert (theirs["steps"], len(theirs["episodes"])) == (3, 6)

    tokenizer = load_tokenizer(TokenizerFiles(folder))
    episode = asyncio.run(ours(f"{SHAPES}:Scales", folder, tokenizer))
    [context] = episode.contexts
    parts = [part for turn in context.turns for part in (np.zeros(len(turn.observed)), turn.sample.token_ids * 0 + 1)]
    for one in theirs["episodes"]:
        assert tokenizer.spell(one["token_ids"]) == tokenizer.spell(context.token_ids.tolist())
        assert one["token_ids"] == context.token_ids.tolist()
        assert one["sampled"] == np.concatenate(parts).tolist()
        assert one["reward"] == episode.reward == 1.0
