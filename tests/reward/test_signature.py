"""Functions that can't be called as verifiers: refused before anything starts, with the lines that adapt them, which
really do."""

import re

import pytest

from asyncdapo.errors import ConfigError
from asyncdapo.reward.registry import make_verifier
from asyncdapo.reward.verifier_main import make_judge
from asyncdapo.reward.wire import Verdict

JUDGE = """
def right(text, answer):
    return float(text.strip() == answer)

"""
VERL = "def reward(data_source, solution_str, ground_truth, extra_info=None): return right(solution_str, ground_truth)"
TRL = "def reward(completions, **kwargs): return [right(*pair) for pair in zip(completions, kwargs['answer'])]"
TRL_COLUMN = "def reward(completions, solution, **kwargs): return [right(*pair) for pair in zip(completions, solution)]"
TRL_PROMPTS = (
    "def reward(prompts, completions, solution, **kwargs):\n"
    "    return [right(*pair) for _, *pair in zip(prompts, completions, solution)]"
)
TRL_ASYNC = "async " + TRL_COLUMN


def refused(folder, text, name="mine_reward"):
    (folder / f"{name}.py").write_text(JUDGE + text + "\n")
    with pytest.raises(ConfigError) as caught:
        make_verifier(f"{folder}/{name}.py:reward")
    return str(caught.value)


@pytest.mark.parametrize(
    ("whose", "text"),
    [("verl", VERL), ("TRL", TRL), ("TRL", TRL_COLUMN), ("TRL", TRL_PROMPTS), ("TRL", TRL_ASYNC)],
)
def test_a_reward_function_of_another_framework_is_recognised_and_the_lines_shown_adapt_it(tmp_path, whose, text):
    name = f"mine_{abs(hash(text))}"
    first, *lines = refused(tmp_path, text, name).splitlines()
    assert first.startswith(f"reward.verifier: takes {whose}'s arguments (")
    assert "a verifier is given (text, answer)" in first
    assert len(lines) == 3
    (tmp_path / "adapter.py").write_text("".join(line.removeprefix("    ") + "\n" for line in lines))
    adapted, told = make_verifier(f"{tmp_path}/adapter.py:verify"), []
    make_judge(adapted, 1, 0)(["6", "7"], ["6", "6"], told.append)
    assert told == [Verdict(1.0), Verdict(0.0)]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("def reward(text): return 1", "(text)"),
        ("def reward(): return 1", "()"),
        ("def reward(text, answer, extra): return 1", "(text, answer, extra)"),
        ("def reward(text, *, answer): return 1", "(text, *, answer)"),
        ("class Reward:\n    def __call__(self, queries, prompts, labels): return 1\nreward = Reward()", "(queries, "),
    ],
)
def test_one_that_cannot_be_called_with_text_and_answer_is_refused(tmp_path, text, arguments):
    assert f"reward.verifier: takes the arguments {arguments}" in refused(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "def reward(solution_str, ground_truth, method='strict'): return right(solution_str, ground_truth)",
        "def reward(*args): return right(*args)",
        "reward = lambda text, answer, **kwargs: right(text, answer)",
        "class Reward:\n    async def __call__(self, text, answer): return right(text, answer)\nreward = Reward()",
        "from functools import partial\ndef judge(scale, text, answer): return right(text, answer)\n"
        "reward = partial(judge, 1.0)",
        "import operator\nreward = operator.eq",
    ],
)
def test_any_that_can_be_is_taken(tmp_path, text):
    (tmp_path / "mine.py").write_text(JUDGE + text + "\n")
    assert callable(make_verifier(f"{tmp_path}/mine.py:reward"))


def test_a_function_of_a_module_is_imported_from_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rewards_of_verl.py").write_text(JUDGE + VERL + "\n")
    with pytest.raises(ConfigError, match=re.escape("from rewards_of_verl import reward")):
        make_verifier("rewards_of_verl:reward")
