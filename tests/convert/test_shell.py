"""Scripts are read as a shell would read them, and nothing in them is ever run."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.convert.shell import read_script
from asyncdapo.errors import UserError

TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=30)
PIECES = st.sampled_from(
    [
        "a",
        " b",
        "${x}",
        '"$x"',
        "'$x'",
        "${y:-d e}",
        '"${y:-d}"',
        "$((n * 3 - 1))",
        "\\ ",
        "=",
        '"q\\"r"',
        "-1",
    ]
)
"""What words of training scripts are made of; joined in any order they are a script that only prints."""


def words_of(script: str, program: str = "python") -> list[str]:
    """Words of the last command, behind its first."""
    commands = [command for command in read_script(script).commands if command.words[0].text == program]
    return [word.text for word in commands[-1].words[1:]]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("python a=1 b='2 3' c=\"4\"", ["a=1", "b=2 3", "c=4"]),
        ("x=$((1024 * 20))\npython a=${x} b=$x", ["a=20480", "b=20480"]),
        ("n=7\npython a=$((n / 2)) b=$((-n / 2)) c=$(((n + 1) * 2 % 5))", ["a=3", "b=-3", "c=1"]),
        ("python a=1 \\\n  b=2 # not this\npython2 c=3", ["a=1", "b=2"]),
        ("export A=x\n: ${B:=y}\npython a=$A b=${B} c=${C:-z} d=${A:-no}", ["a=x", "b=y", "c=z", "d=x"]),
        ('list=(1 "b c")\nlist+=(d)\npython "${list[@]}" e', ["1", "b c", "d", "e"]),
        ("x='a=1 b=2'\npython $x", ["a=1", "b=2"]),
        ('C=(python a=\\$v)\nv=7\nrun() { eval "${C[@]}" "$@"\n}', ["a=7"]),
        ("cat <<EOF\npython b=1\nEOF\npython a=1 > log 2>&1", ["a=1"]),
        ("A=1 python a=1", ["a=1"]),
        ("if [ x = y ]; then v=1; fi\npython a=$v", ["a=1"]),
        ('python a=${1:-4} b="${2:-no}" c=${3:+3} $@ ${@:2} d=1', ["a=4", "b=no", "c=", "d=1"]),
        ('x=A\npython a=${x,,} b="${x^^}"', ["a=a", "b=A"]),
    ],
)
def test_a_command_has_the_words_that_a_shell_gives_it(script: str, words: list[str]) -> None:
    assert words_of(script) == words


@given(st.lists(TEXT, max_size=5))
def test_quoted_text_comes_back_as_it_was(texts: list[str]) -> None:
    assert words_of("python " + " ".join(map(shlex.quote, texts))) == texts


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash to compare with")
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(PIECES, min_size=1, max_size=5).map("".join), min_size=1, max_size=4))
def test_words_are_those_of_a_real_bash(words: list[str]) -> None:
    script = "x='u v'; n=7\n"
    line = " ".join(words)
    printed = subprocess.run(
        ["bash", "-c", f"{script}printf '%s\\0' . {line}"], capture_output=True, text=True, check=True
    ).stdout
    assert words_of(f"{script}python {line}") == printed.split("\0")[1:-1]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab$(){}[]'\"\\`=+- \n;|&<>#~*/%:1", max_size=60))
def test_any_text_is_read_or_refused_in_words(script: str) -> None:
    with contextlib.suppress(UserError):
        read_script(script)


HOSTILE = (
    "python a=$(touch {target})",
    "python a=`touch {target}`",
    'python a="$(touch {target})" b="`touch {target}`"',
    "eval 'touch {target}'; python a=1",
    "X='$(touch {target})'; eval python a=$X",
    "python a=$((a[$(touch {target})]))",
    "python a=${{b:-$(touch {target})}} c=${{d:=`touch {target}`}}",
    "cat <(touch {target}) >(touch {target}); python a=1",
    "python a=1; touch {target} & python b=$(<{target})",
    "trap 'touch {target}' EXIT; PROMPT_COMMAND='touch {target}' python a=1",
)


@pytest.mark.parametrize("script", HOSTILE)
def test_nothing_of_a_script_is_run(tmp_path: Path, script: str) -> None:
    target = tmp_path / "run"
    read_script(script.format(target=target))
    assert not target.exists()


def test_what_only_a_shell_could_know_is_unknown_with_the_reason() -> None:
    words = read_script("python a=$(date) b=$UNSET c=${x%.*} d=$((1 / 0)) f=$1 g=$$ e=1").commands[0].words[1:]
    assert [bool(word.unknown) for word in words] == [True] * 6 + [False]
    assert "argument 1 of the script isn't known" in words[4].unknown
    assert "no command is run" in words[0].unknown
    assert "doesn't set UNSET" in words[1].unknown


def test_a_value_assigned_in_a_branch_is_marked() -> None:
    words = read_script("if true; then\n  a=1\nfi\nb=2\npython a=$a b=$b c=$((a + 1))").commands[-1].words[1:]
    assert "line 2: a is assigned in a branch" in words[0].note
    assert not words[1].note
    assert words[2].note


@pytest.mark.parametrize(
    "script",
    [
        "a=xxxxxxxxxxxxxxxx\n" + "a=$a$a$a$a\n" * 60 + "python a=$a",
        'x=\'eval "$x"\'\neval "$x"',
        "python a=" + "${b:-" * 500 + "}" * 500,
        "python a=$((" + "(" * 5000 + "1" + ")" * 5000 + "))",
        "a=9\n" + "a=$((a * a))\n" * 60 + "python a=$a",
    ],
)
def test_scripts_that_grow_without_end_come_to_one(script: str) -> None:
    commands = read_script(script).commands
    assert all(len(word.text) <= 1 << 16 for command in commands for word in command.words)
    assert all(word.unknown for command in commands for word in command.words[1:])


def test_what_is_not_closed_is_refused_with_its_line() -> None:
    with pytest.raises(UserError, match="line 2: a quote ' that isn't closed"):
        read_script("a=1\nb='2\n")
