"""Verifiers of the user's own: found by module or file, and what is said of those that can't be."""

import re
import sys
from pathlib import Path

import pytest

from asyncdapo.errors import ConfigError
from asyncdapo.plugins import absolute_plugin
from asyncdapo.reward.registry import VERIFIERS, make_verifier


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def _import_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_of_ours_is_a_function_of_its_module(name):
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="pip install -e '.[reasoning-gym]'")
    verify = make_verifier(name)
    assert (verify.__name__, verify.__module__) == ("verify", f"asyncdapo.reward.verifiers.{name}")


def test_an_unknown_verifier_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"reward.verifier: unknown, there are answer, .*'anwser' \(try answer, or"):
        make_verifier("anwser")


@pytest.mark.parametrize(("name", "extra"), [("math_verify", "math"), ("reasoning_gym", "reasoning-gym")])
def test_a_verifier_whose_library_is_missing_names_the_extra(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, f"asyncdapo.reward.verifiers.{name}", raising=False)
    said = f"needs the module {name}, which is not installed, got {name!r} (in the clone: pip install -e '.[{extra}]')"
    with pytest.raises(ConfigError, match=f"^{re.escape(f'reward.verifier: {said}')}$"):
        make_verifier(name)


def test_a_function_in_a_module_is_found_by_its_dotted_name():
    assert make_verifier("tests.reward.verifiers:equal")("6", "6") is True


def test_a_function_in_a_file_is_found_wherever_the_file_is(tmp_path, monkeypatch):
    written(tmp_path / "mine.py", "def check(text, answer):\n    return 0.25\n")
    assert make_verifier(f"{tmp_path}/mine.py:check")("", "") == 0.25
    monkeypatch.chdir(tmp_path)
    assert make_verifier("mine.py:check")("", "") == 0.25


def test_a_file_may_import_its_neighbours_and_hides_no_installed_module(tmp_path):
    written(tmp_path / "grading_rules.py", "SHARE = 0.75\n")
    written(tmp_path / "json.py", "raise SystemError('the wrong json')\n")
    text = "import json\nfrom grading_rules import SHARE\ndef check(text, answer):\n    return json.loads(str(SHARE))\n"
    assert make_verifier(f"{written(tmp_path / 'mine.py', text)}:check")("", "") == 0.75


def test_a_relative_path_is_made_absolute_and_a_name_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_plugin("rewards/mine.py:check") == f"{tmp_path}/rewards/mine.py:check"
    assert absolute_plugin("/rewards/mine.py:check") == "/rewards/mine.py:check"
    assert [absolute_plugin(name) for name in ("answer", "my.module:check")] == ["answer", "my.module:check"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.py:check", None, "no such file (/"),
        ("mine.py:check", "def chek(text, answer): ...", "mine.py has no function check"),
        ("mine.py:check", "check = 1", "mine.py has no function check"),
        ("mine.py:", "", "has no function (name it after the colon)"),
        ("mine.py:check", "import torhc", "can't be imported: ModuleNotFoundError: No module named 'torhc' (/"),
        ("mine.py:check", "\n\n1 / 0", "mine.py:3)"),
        ("mine.py:check", "def check(text, answer) return 1", "can't be imported: SyntaxError: "),
        ("mine.py:check", "import sys\nsys.exit('no')", "can't be imported: SystemExit: no"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path, monkeypatch, name, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        written(tmp_path / "mine.py", text)
    with pytest.raises(ConfigError) as caught:
        make_verifier(name)
    said = str(caught.value)
    assert said.startswith("reward.verifier: ")
    assert words in said
    assert f"got {name!r}" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package.rewards:check", "no module no_such_package, got"),
        ("json.no_such_module:check", "no module json.no_such_module, got"),
        ("json:check", "json has no function check"),
        (":check", "can't be imported: ValueError"),
    ],
)
def test_a_module_that_cannot_be_used_is_named_with_what_is_wrong(name, words):
    with pytest.raises(ConfigError, match=f"^reward.verifier: {words}"):
        make_verifier(name)
