"""Prompts whose text the tokenizer doesn't know are counted and shown, where the model would read a placeholder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncdapo.controller.roles.replay import said_of_unknown
from asyncdapo.model.files import TokenizerFiles
from asyncdapo.model.tokenizer import load_tokenizer
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from tests.controller.runs import START_MODEL, launch


def said_of(tmp_path: Path, *questions: str) -> str:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "answer": 1}) + "\n" for text in questions))
    config, tokenizer = (
        PromptsConfig(task="file", path=str(data), max_prompt_length=48),
        load_tokenizer(TokenizerFiles(START_MODEL)),
    )
    task = open_task(config, num_eval=1, seed=0)
    stream = PromptStream(config, task, tokenizer.prompt_encoder(False), 0, tokenizer.unknown_id)
    return said_of_unknown(stream, tokenizer)


def test_prompts_with_text_that_the_tokenizer_does_not_know_are_counted_with_an_example(tmp_path: Path) -> None:
    said = said_of(tmp_path, "1+1", "2 × 3", "1+2", "4 × 5", "4 × 5" * 20)
    assert said.startswith("prompts: 2 hold text that the tokenizer doesn't know, the model reads <unk>: …'<bos>")
    assert "<unk> " in said.partition(": …")[2]


def test_nothing_is_said_of_text_that_is_known(tmp_path: Path) -> None:
    assert said_of(tmp_path, "1+1", "2*3") == ""


@pytest.mark.soak
def test_a_run_says_it_at_its_start(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Q: {n} × 3 mod 10\n", "answer": 1}) + "\n" for n in range(40)))
    keys = ["prompts.task=file", f"prompts.path={data}", "filter.enabled=false", "run.steps=1", "eval.num_prompts=4"]
    run = launch(tmp_path / "run", *keys, "eval.num_greedy_prompts=4", "replay.prompts_per_step=4")
    assert run.exit_code == 0, run.output
    assert "prompts: 40 hold text that the tokenizer doesn't know, the model reads <unk>: …'<bos>Q: " in run.output
