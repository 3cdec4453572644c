"""`asyncdapo env check`: the tokens of two scripted episodes, and the first thing that is wrong with an environment."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asyncdapo.cli import main
from asyncdapo.controller.commands.env_check import STYLES, check, make_config, printable
from asyncdapo.errors import ConfigError
from asyncdapo.model.turn_encoder import REWRITES
from tests.docs.blocks import ROOT

TOKENIZER = ROOT / "configs" / "models" / "tool_start"
CALCULATOR = "asyncdapo.environment.calculator:Calculator"


def checked(path: str, *responses: str, keys: Sequence[str] = (), **options: object) -> str:
    shown = io.StringIO()
    console = Console(file=shown, width=200, highlight=False, soft_wrap=True, **options)  # pyright: ignore[reportArgumentType]
    check(make_config(path, None, keys), responses, console)
    return shown.getvalue()


def test_the_transcript_has_every_token_of_the_episodes_and_says_who_wrote_it() -> None:
    first, second, last = checked("quickstart_tools", "12*12", "Answer: {answer}").rstrip().split("\n\n")
    answer = re.search(r"answer (\d+)", first)
    assert answer
    assert first.splitlines()[2:] == [
        "  sampled      6  12*12<eos>",
        "  observed     4  144⏎",
        f"  sampled      6  Answer: {answer[1]}<eos>",
        "  stop after 2 turns; reward 1; calls 1",
    ]
    assert re.fullmatch(r"  observed     8  <bos>Q: \d\d\*\d\d⏎", first.splitlines()[1])
    assert second.startswith("episode 2: product row ")
    assert last == f"{CALCULATOR}: nothing is wrong in 2 episodes"


def test_on_a_terminal_sampled_and_observed_tokens_differ_in_colour() -> None:
    shown = checked("quickstart_tools", "12*12", "Answer: 1", force_terminal=True, color_system="standard")
    colours = {word: re.search(rf"{word} +\d+  \x1b\[([\d;]+)m", shown) for word in STYLES}
    assert colours["sampled"]
    assert colours["observed"]
    assert colours["sampled"][1] != colours["observed"][1]


FORKS = """
from tests.environment.agents import call

def run(row, base_url, api_key):
    first = call(base_url, api_key, [1, 10, 11])
    call(base_url, api_key, [1, 10, 11, *first, 12])
    call(base_url, api_key, [1, 13])
    return 1.0
"""


def test_a_program_that_calls_the_model_shows_its_contexts_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "forks.py").write_text(FORKS)
    shown = io.StringIO()
    config = make_config(f"agent:{tmp_path / 'forks.py'}:run", "quickstart_tools", [])
    check(config, ["1", "2"], Console(file=shown, width=200, highlight=False, soft_wrap=True))
    first = shown.getvalue().split("\n\n")[0]
    assert [line.split()[:2] for line in first.splitlines()[1:5]] == [
        ["observed", "3"],
        ["sampled", "2"],
        ["observed", "1"],
        ["sampled", "2"],
    ]
    assert [line.split()[:2] for line in first.splitlines()[6:8]] == [["observed", "2"], ["sampled", "2"]]
    assert "a context that doesn't continue those before" in first.splitlines()[5]
    assert "stop after 3 turns; reward 1" in first


RAISES = "raise ValueError('no such city')"
WRONG = [
    (RAISES, "the environment failed on product row .*: step: ValueError: no such city"),
    ("return None, float('nan')", "step: a reward is a finite number, got nan"),
    ("return 'Kyōto'", "the tokenizer doesn't know all of an observation; the model reads 'Ky<unk>to'"),
    ("return [{'role': 'user', 'content': '1'}]", "messages need prompts.chat_template"),
    ("return '1' * 60", r"an episode was cut off: rollout.max_response_length \(32\) .* give shorter observations"),
    ("self.metrics = lambda: {'acc': 1.0}", "the environment's metric 'acc' needs another name"),
]


@pytest.mark.parametrize(("step", "problem"), WRONG)
def test_the_first_thing_that_is_wrong_is_one_line_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str, problem: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"class Mine:\n    def reset(self, row): pass\n    def step(self, response):\n        {step}\n")
    code = main(["env", "check", f"{path}:Mine", "--config", "quickstart_tools", "environment.max_context=80"])
    said = capsys.readouterr().err
    assert code == 2
    assert re.fullmatch(rf"asyncdapo: {re.escape(str(path))}:Mine: .*{problem}.*\n", said)


def with_template(folder: Path, template: str) -> list[str]:
    """Keys of a run with the quickstart's tokenizer and this chat template."""
    for file in TOKENIZER.glob("tokenizer*.json"):
        (folder / file.name).write_text(file.read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return [f"model.tokenizer={folder}", "prompts.chat_template=true"]


def test_a_template_that_writes_an_observation_by_what_was_said_before_is_told(tmp_path: Path) -> None:
    template = "{% for one in messages %}{{ messages[0].content }}{{ one.content }}{% endfor %}"
    config = make_config("quickstart_tools", None, with_template(tmp_path, template))
    with pytest.raises(ConfigError, match="writes an observation differently after other words"):
        check(config, ["1"], Console(file=io.StringIO()))


def test_a_template_that_leaves_thoughts_out_of_earlier_turns_is_told_and_is_no_error(tmp_path: Path) -> None:
    template = "{% for one in messages %}{{ one.content.split('</think>')[-1] }}{% endfor %}"
    shown = checked("quickstart_tools", "12*12", "Answer: {answer}", keys=with_template(tmp_path, template))
    *_, warning, last = shown.rstrip().split("\n\n")
    assert warning == REWRITES
    assert last == f"{CALCULATOR}: nothing is wrong in 2 episodes"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([CALCULATOR], "needs the rows and the tokenizer of a config"),
        (["quickstart_tools", "--config", "quickstart"], "is a config itself"),
        (["quickstart"], "environment.path: names no environment to check"),
        (["quickstart_tolls"], "did you mean quickstart_tools"),
        (["quickstart_tools", "environment.python=/bin/true"], "environment.python: is no interpreter of Python 3.11"),
        (["quickstart_tools", "environment.python=/nowhere"], "environment.python: can't be run (No such file"),
        ([f"{CALCULATOR}s", "--config", "quickstart_tools"], "has no 'Calculators'"),
    ],
)
def test_what_is_no_environment_is_told(capsys: pytest.CaptureFixture[str], words: list[str], problem: str) -> None:
    assert main(["env", "check", *words]) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1


@given(st.text())
def test_no_text_moves_the_cursor(text: str) -> None:
    shown = printable(text, indent=4)
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert shown.count("⏎") >= text.count("\n")
