"""A converted config, with the quickstart's model, data and sizes in place of its own, trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdapo.convert.command import converted
from tests.controller.runs import START_MODEL, launch
from tests.convert.test_convert import SNIPPETS

pytestmark = pytest.mark.soak

QUICKSTART = (
    f"model.path={START_MODEL}",
    *("prompts.task=chain", "prompts.path=null", "prompts.eval_path=null", "prompts.epochs=0"),
    *("prompts.chat_template=false", "prompts.system_prompt=null", "prompts.max_prompt_length=48"),
    *("rollout.engine=torch", "rollout.num_workers=1", "rollout.tensor_parallel=1", "rollout.memory_fraction=null"),
    *("rollout.engine_args=null", "rollout.slots=64", "rollout.max_response_length=128", "rollout.dtype=float32"),
    *("reward.verifier=answer", "reward.overlong_buffer=16", "controller.placement=auto", "learner.ranks=1"),
    *("replay.prompts_per_step=16", "learner.updates_per_step=2", "learner.tokens_per_microbatch=2048", "run.steps=2"),
)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_a_converted_snippet_trains_two_steps(snippet: Path, tmp_path: Path) -> None:
    config = tmp_path / "converted.yaml"
    config.write_text(converted(snippet.stem, [str(snippet)])[0])
    run = launch(tmp_path / "run", *QUICKSTART, config=str(config))
    assert run.exit_code == 0, run.output
    assert [line["step"] for line in run.lines][-1] == 2
