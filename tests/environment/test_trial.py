"""The trial before a launch: whatever is wrong with an environment is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdapo.errors import ConfigError
from tests.controller.runs import prepare
from tests.docs.blocks import ROOT
from tests.environment.hosting import FILE

TAKES_NO_ROW = """
class Mine:
    def reset(self): pass
    def step(self, response): pass
"""
TOOL = """
class Mine:
    def reset(self, row): pass
    def tool(self):
        'A tool.'
"""
MESSAGES = """
class Mine:
    def reset(self, row):
        assert row["prompt"].startswith("Q: ") and row["answer"] and row["source"] == "chain"
    def step(self, response):
        return [{"role": "user", "content": response}]
"""


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("class Mine:\n    pass\n", "a trial failed: .*: can't be loaded: Mine has no method reset"),
        (TAKES_NO_ROW, "reset: TypeError: Mine.reset.. takes 1 positional argument"),
        (TOOL, "a trial failed: its tools need prompts.chat_template"),
        ("class Yours:\n    pass\n", "a trial failed: no environment host can be started: .*has no 'Mine'"),
        ("1 / 0\n", "can't be loaded: ZeroDivisionError: division by zero"),
        (MESSAGES, "a trial failed: messages need prompts.chat_template; without it an observation is a text"),
    ],
)
def test_what_is_wrong_is_told_once_before_a_process_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, problem: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=problem) as caught:
        prepare(tmp_path / "run", f"environment.path={path}:Mine")
    assert caught.value.key == "environment.path"
    assert "\n" not in str(caught.value)
    assert [record for record in caplog.records if record.name == "environment"] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("run = 1\n", "an agent is called as .row, base_url, api_key.: 1 is not a callable object"),
        ("def run(row): ...\n", "an agent is called as .row, base_url, api_key.: too many positional arguments"),
    ],
)
def test_what_is_wrong_with_a_program_that_calls_the_model_is_told_as_early(
    tmp_path: Path, source: str, problem: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=problem):
        prepare(tmp_path / "run", f"environment.path=agent:{path}:run")
    path.write_text("def run(row, base_url, api_key): ...\n")
    config, _ = prepare(tmp_path / "run", f"environment.path=agent:{path}:run")
    assert config.environment.path == f"agent:{path}:run"


def test_a_resumed_run_has_the_same_environment(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE.read_text())
    prepare(tmp_path / "run", f"environment.path={path}:Plain")
    moved = tmp_path / "elsewhere" / "mine.py"
    moved.parent.mkdir()
    moved.write_text(path.read_text())
    prepare(tmp_path / "run", f"environment.path={moved}:Plain", "environment.processes=2")
    moved.write_text(path.read_text() + "\n# changed\n")
    with pytest.raises(ConfigError, match=r"differs in environment.path \(other source\)"):
        prepare(tmp_path / "run", f"environment.path={moved}:Plain")
    with pytest.raises(ConfigError, match=r"differs in .*environment.max_turns"):
        prepare(tmp_path / "run", f"environment.path={path}:Plain", "environment.max_turns=3")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("environment.max_context=48", "environment.max_context: must be above prompts.max_prompt_length"),
        ("rollout.deterministic=true", "rollout.deterministic: samples one group at a time"),
        ("reward.verifier=exact", "reward.verifier: does nothing with environment.path"),
        ("controller.stall_s=25", r"controller.stall_s: must be above environment.step_timeout_s \(30\)"),
        ("environment.step_timeout_s=1000", "environment.step_timeout_s: must be at most environment.max_seconds"),
        ("environment.path=mine.py", "environment.path: names no class"),
        ("environment.max_context=1000", "environment.max_context: is above the 256 positions of the model"),
    ],
)
def test_keys_that_exclude_each_other_are_named(tmp_path: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        prepare(tmp_path / "run", f"environment.path={FILE}:Plain", override)


def test_the_example_of_the_page_is_the_file_and_passes_its_trial(tmp_path: Path) -> None:
    example = ROOT / "asyncdapo" / "environment" / "calculator.py"
    assert f"```python\n{example.read_text()}```" in (ROOT / "docs" / "environments.md").read_text()
    prepare(tmp_path / "run", f"environment.path={example}:Calculator")


def test_an_agent_is_loaded_and_not_run(tmp_path: Path) -> None:
    prepare(tmp_path / "run", f"environment.path=agent:{FILE.with_name('agents.py')}:run")
    with pytest.raises(ConfigError, match="environment.path: a trial failed: .*has no 'runs'"):
        prepare(tmp_path / "other", f"environment.path=agent:{FILE.with_name('agents.py')}:runs")
