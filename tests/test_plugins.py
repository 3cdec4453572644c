"""The source of what a key names is found where it will be imported."""

import sys
from pathlib import Path

import pytest

from asyncdapo.disk import sha256_of
from asyncdapo.errors import ConfigError
from asyncdapo.plugins import plugin_digest

KEY = "environment.path"


def interpreter_with(folder: Path, module: str) -> tuple[str, Path]:
    """One that finds a module which this one doesn't, and the module's source."""
    source = folder / "elsewhere" / f"{module}.py"
    source.parent.mkdir()
    source.write_text("print('a module may say something')\nclass Counter: ...\n")
    interpreter = folder / "python"
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH={source.parent} exec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    return str(interpreter), source


def test_a_module_that_another_interpreter_alone_has_is_known_by_its_source(tmp_path: Path) -> None:
    interpreter, source = interpreter_with(tmp_path, "counting_elsewhere")
    assert plugin_digest(KEY, "counting_elsewhere:Counter", interpreter) == sha256_of(source)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_module_that_nobody_has_is_named(elsewhere: bool, tmp_path: Path) -> None:
    interpreter = interpreter_with(tmp_path, "counting_elsewhere")[0] if elsewhere else None
    with pytest.raises(ConfigError, match="no module nobody_has_this"):
        plugin_digest(KEY, "nobody_has_this:Counter", interpreter)
