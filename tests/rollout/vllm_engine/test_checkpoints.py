"""vLLM loads what a learner has written as it is: a checkpoint, and the model that was exported from it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from asyncdapo.cli import main
from asyncdapo.config.config import load_config, to_yaml
from tests.learner.tiny import make_batch, make_learner, save, train
from tests.test_configs import FOLDER

from ..torch_engine.models import request, saved
from .models import model_of, vllm_engine

pytestmark = [pytest.mark.vllm, pytest.mark.soak]


def greedy_tokens(path: Path | str) -> list[list[int]]:
    """Of some prompts, from an engine of its own."""

    async def generate() -> list[list[int]]:
        engine = vllm_engine(str(path))
        await engine.start()
        try:
            asked = [request(12, range(1), prompt_seed, temperature=0.0, max_tokens=40) for prompt_seed in range(4)]
            return [sample.token_ids.tolist() for one in asked for sample in await engine.generate(one)]
        finally:
            await engine.stop()

    return asyncio.run(asyncio.wait_for(generate(), 240))


@pytest.mark.timeout(900)
def test_a_checkpoint_and_its_export_have_the_same_greedy_answers(tmp_path: Path) -> None:
    start, run_dir, exported = saved(model_of(0), tmp_path / "start"), tmp_path / "run", tmp_path / "exported"
    learner = make_learner(start, lr=0.05)
    train(learner, *make_batch())
    checkpoint = save(learner, run_dir, 1)
    (run_dir / "config.yaml").write_text(to_yaml(load_config(FOLDER / "quickstart.yaml")))
    assert main(["export", str(checkpoint), "--out", str(exported)]) == 0
    of_start, of_checkpoint, of_export = (greedy_tokens(path) for path in (start, checkpoint, exported))
    assert of_checkpoint == of_export
    assert of_checkpoint != of_start, "the weights are the trained ones"
