"""The command line's help."""

from __future__ import annotations

import pytest

from asyncdapo.controller.commands.arguments import parser


@pytest.mark.parametrize("words", ["scale", "launch", "data prepare", "ps"])
def test_every_command_says_in_its_own_help_what_it_does(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args([*words.split(), "--help"])
    _, description, *_ = capsys.readouterr().out.split("\n\n")
    assert description.endswith(".")
    assert not description.startswith("positional")
