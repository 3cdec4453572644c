"""Runs on a mixture of files, and with a tokenizer of their own: checked before they start, resumed at the next row."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.controller.checks.identity import check_same_run, identify
from asyncdapo.controller.checks.preflight import prepare_run
from asyncdapo.controller.commands.plan import plan
from asyncdapo.errors import ConfigError
from asyncdapo.model.tokenizer import load_tokenizer
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.prompts.tasks.chain import draw_chain
from tests.controller.interruptions import go_on, interrupt, query
from tests.controller.runs import START_MODEL

FILE_TASK = ("prompts.task=file", "eval.num_prompts=8", "eval.num_greedy_prompts=4", "metrics.wandb=disabled")


def write_chains(path: Path, num: int, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    chains = [draw_chain(seed, row, held_out=False) for row in range(num)]
    records = [{"prompt": chain.prompt, "answer": chain.answer} for chain in chains]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def mixture(weights: dict[Path, float]) -> str:
    return "prompts.path=" + json.dumps({str(path): weight for path, weight in weights.items()})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_chains(tmp_path / "easy.jsonl", 40, seed=1), write_chains(tmp_path / "hard.jsonl", 25, seed=2)


def prepare(run_dir: Path, *overrides: str) -> None:
    with prepare_run("quickstart", [f"run.dir={run_dir}", *FILE_TASK, *overrides]):
        pass


def refused(run_dir: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(run_dir, *overrides)
    return str(caught.value)


def test_the_files_of_a_mixture_may_move_but_neither_they_nor_their_weights_may_change(tmp_path, files):
    easy, hard = files
    run_dir = tmp_path / "run"
    prepare(run_dir, mixture({easy: 3, hard: 1}))
    moved = [path.rename(tmp_path / f"moved_{path.name}") for path in files]
    prepare(run_dir, mixture({moved[0]: 30, moved[1]: 10}))
    message = refused(run_dir, mixture({moved[0]: 2, moved[1]: 1}))
    assert "the weights of prompts.path ((3, 1) in the run, (2, 1) here)" in message
    assert "prompts.path (other data), prompts.path, file 2 (other data)" in refused(
        run_dir, mixture({moved[1]: 3, moved[0]: 1})
    )
    assert "prompts.path, file 2 (other data)" in refused(run_dir, f"prompts.path={moved[0]}")
    moved[1].write_text(moved[0].read_text())
    assert "prompts.path, file 2 (other data)" in refused(run_dir, mixture({moved[0]: 3, moved[1]: 1}))


def test_relative_files_of_a_mixture_are_found_from_any_process(tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(START_MODEL, tmp_path / "model")
    overrides = [*FILE_TASK, "prompts.path={easy.jsonl: 3, hard.jsonl: 1}", "run.dir=run", "model.path=model"]
    with prepare_run("quickstart", overrides) as (config, _):
        assert config.prompts.path == {str(files[0]): 3, str(files[1]): 1}
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_a_plan_shows_the_share_of_each_file(files):
    easy, hard = files
    lines = plan("quickstart", [*FILE_TASK, mixture({easy: 0.75, hard: 0.25}), "eval.num_prompts=5"]).splitlines()
    assert any(line.endswith("3 of every 4 prompts") and "easy.jsonl" in line for line in lines)
    assert any(line.endswith("1 of every 4 prompts") and "hard.jsonl" in line for line in lines)


# ----------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """The start model's, with a chat template."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(START_MODEL / name, directory)
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    return directory


CHAT = ("prompts.chat_template=true", "prompts.task=chain")


def test_a_tokenizer_is_checked_before_anything_starts(tmp_path, tokenizer):
    run_dir = tmp_path / "run"
    assert "prompts.chat_template: the model's tokenizer has none" in refused(run_dir, *CHAT)
    assert "model.tokenizer: no such directory" in refused(run_dir, *CHAT, "model.tokenizer=./nowhere")
    (tokenizer / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    words = "prompts.system_prompt: the model's chat template leaves it out"
    assert words in refused(run_dir, *CHAT, f"model.tokenizer={tokenizer}", "prompts.system_prompt=Be brief.")
    text = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(text[:-20])
    assert "model.tokenizer: tokenizer.json can't be read" in refused(run_dir, *CHAT, f"model.tokenizer={tokenizer}")
    assert not run_dir.exists()


def test_another_chat_template_makes_another_run(tmp_path, tokenizer):
    keys = (*CHAT, f"model.tokenizer={tokenizer}")
    prepare(tmp_path / "run", *keys)
    prepare(tmp_path / "run", *(CHAT), f"model.tokenizer={tokenizer.rename(tmp_path / 'moved')}")
    (tmp_path / "moved" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    message = refused(tmp_path / "run", *CHAT, f"model.tokenizer={tmp_path / 'moved'}")
    assert "model.tokenizer (other chat_template.jinja)" in message


def test_another_tokenizer_makes_another_run(tmp_path, tokenizer):
    prepare(tmp_path / "run", "prompts.task=chain")
    message = refused(tmp_path / "run", "prompts.task=chain", f"model.tokenizer={tokenizer}")
    assert "model.tokenizer (the model's own in the run, another here)" in message


def test_a_run_of_before_tokenizers_were_on_record_is_gone_on_with(tmp_path):
    run_dir = tmp_path / "run"
    prepare(run_dir, "prompts.task=chain")
    recorded = json.loads((run_dir / "identity.json").read_text())
    del recorded["tokenizer"]
    (run_dir / "identity.json").write_text(json.dumps(recorded))
    config = load_config(run_dir / "config.yaml")
    assert check_same_run(run_dir, config, identify(config)) == config


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_run_killed_in_the_middle_of_an_epoch_of_a_mixture_resumes_at_the_next_row(tmp_path):
    files = write_chains(tmp_path / "easy.jsonl", 24, seed=1), write_chains(tmp_path / "hard.jsonl", 14, seed=2)
    keys = (*FILE_TASK, mixture({files[0]: 3, files[1]: 2}))
    before = interrupt(tmp_path / "run", signal.SIGKILL, 2.0, *keys)
    go_on(tmp_path / "run", before, 4, *keys)
    config = load_config(tmp_path / "run" / "config.yaml")
    task = open_task(config.prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
    stream = PromptStream(config.prompts, task, load_tokenizer(config.model.tokenizer_files).encode, config.run.seed)
    leased = query(tmp_path / "run", "SELECT prompt_id, epoch, source, row FROM prompts ORDER BY prompt_id")
    expected = [stream.prompt_at(prompt_id) for prompt_id in range(len(leased))]
    assert leased == [(prompt.prompt_id, prompt.epoch, prompt.source, prompt.row) for prompt in expected]
    drawn = [(source, epoch, row) for _, epoch, source, row in leased]
    assert len(set(drawn)) == len(drawn), "no row twice in an epoch of its file"
    assert len({epoch for _, epoch, _ in drawn}) > 1, "the run was long enough to begin another epoch"
