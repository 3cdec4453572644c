"""Reads what a user gives to `convert` into one table: a script, a YAML or arguments in, each key with its value out.

Nested keys are dotted. Of a script only the command that trains is used. Arguments after a file replace the script's
own (`"$@"`), so they win. An unknown value has the reason instead of a value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from asyncdapo.convert.shell import Command, read_script
from asyncdapo.convert.words import Word
from asyncdapo.errors import UserError

FILE_ENDINGS = (".sh", ".bash", ".yaml", ".yml")
PROGRAM = re.compile(r"(python[\d.]*|uv|swift|megatron|torchrun|accelerate)$")
HYDRA = re.compile(r"(?:\+\+|[+~])?([A-Za-z_][\w./@-]*)=")
STARTS_SCRIPT = re.compile(r"(ba|z)?sh$|source$|\.$")
ENVIRONMENT = ("NNODES", "NPROC_PER_NODE")
"""Shell variables that count like arguments."""
FLAG = re.compile(r"--([A-Za-z_][\w.-]*)(?:=|$)")
PRODUCT = re.compile(r"mul:\s*(\d{1,18})\s*,\s*(\d{1,18})\s*")
"""The resolver function of NeMo RL with which its recipes compute batch sizes."""
COLON = re.compile(r"""(?<=[{,])(\s*[A-Za-z_][\w.-]*):(?=[^\s/])""")
"""Hydra's `{a:1}`, which YAML would read as a key without a value."""
MAX_KEYS = 20_000
"""Limit, since YAML aliases can make a small file endless."""
MAX_REFERENCES = 20
MAX_TEXT = 1 << 16
"""Most bytes of a text file that an argument names."""


@dataclass(frozen=True)
class Setting:
    """The value of one key of theirs."""

    value: Any
    unknown: str = ""
    """Why the value isn't known."""
    inherited: str = ""
    """The file of defaults that it comes from; "" if the user gave it."""
    named: str = ""
    """The name that the user gave, if the value is the text of a file."""


@dataclass
class Settings:
    """All keys that were given."""

    table: dict[str, Setting] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Files that a YAML builds on but that don't exist here."""


def read_settings(words: Sequence[str], *, flags: bool, texts: Sequence[str] = ()) -> Settings:
    """Read a file and arguments, or arguments alone. `flags`: arguments are `--key value`, otherwise `key=value`.
    `texts`: keys whose value may name a text file. Raises UserError."""
    settings = Settings()
    first = words[0] if words else ""
    if not first:
        raise UserError("nothing to convert: give a file, or the arguments themselves")
    names_file = first.endswith(FILE_ENDINGS) and not HYDRA.match(first)
    if names_file or os.path.isfile(first):  # Path.is_file raises for too long a name
        _read_file(Path(first), settings, flags)
        words = words[1:]
    _read_arguments([Word(word) for word in words], settings, flags)
    _resolve(settings)
    for key in settings.table.keys() & set(texts):
        settings.table[key] = _read_text(settings.table[key], Path(first).absolute().parents)
    return settings


def _read_text(setting: Setting, folders: Sequence[Path]) -> Setting:
    """The text of the file that the value names, relative to this folder or to any folder above the script."""
    name = setting.value
    if setting.unknown or not isinstance(name, str) or not name.endswith(".txt"):
        return setting
    file = next((file for folder in (Path(), *folders) if (file := folder / name).is_file()), None)
    if file is None:
        return replace(setting, unknown="no such file here")
    if file.stat().st_size > MAX_TEXT:
        return replace(setting, unknown=f"a text of more than {MAX_TEXT} bytes")
    return replace(setting, value=_text(file), named=name)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error


def _read_file(path: Path, settings: Settings, flags: bool) -> None:
    if path.suffix in (".yaml", ".yml"):
        _read_yaml(path, settings, inherited="")
        return
    script = read_script(_text(path))
    trainings = sorted(
        ((len(_arguments(command, flags)), command) for command in script.commands), key=lambda pair: -pair[0]
    )
    if not trainings or not trainings[0][0]:
        what = "--key value" if flags else "key=value"
        raise UserError(f"{path}: no command with {what} arguments in it{_started(script.commands)}")
    for count, command in trainings[1:]:
        if count:
            settings.warnings.append(f"line {command.line}: another command with arguments, not converted")
    for command in script.commands:
        if (FLAG if flags else HYDRA).match(command.words[0].text):
            what = " ".join(word.text for word in command.words)
            why = "follows the end of a command (a comment between its lines ends it), not read"
            settings.warnings.append(f"line {command.line}: {what}: {why}")
    command = trainings[0][1]
    seen = dict(command.assigned)
    for name in script.exported & {*ENVIRONMENT} - {*seen} if flags else ():
        value = script.variables.get(name)
        seen |= {name: value} if isinstance(value, Word) else {}
    settings.table |= {key: Setting(scalar(word.text), word.unknown) for key, word in sorted(seen.items())}
    words = _after_program(command)
    settings.warnings += [word.note for word in words if word.note]
    _read_arguments(words, settings, flags, folder=path.parent)


def _started(commands: Sequence[Command]) -> str:
    """A hint at the script that may hold the command."""
    started = [
        command.words[1].text
        for command in commands
        if STARTS_SCRIPT.match(command.words[0].text) and len(command.words) > 1
    ]
    return f" (it starts {started[-1]}: convert that, with the arguments given to it)" if started else ""


def _arguments(command: Command, flags: bool) -> list[Word]:
    pattern = FLAG if flags else HYDRA
    return [word for word in _after_program(command) if pattern.match(word.text)]


def _after_program(command: Command) -> Sequence[Word]:
    """The arguments of the training itself: what follows `python … -m module`, `python file.py`, `swift rlhf`."""
    programs = [at for at, word in enumerate(command.words) if PROGRAM.match(word.text.rpartition("/")[2])]
    if not programs:
        return ()
    words = command.words[programs[-1] + 1 :]
    for at, word in enumerate(words):
        if word.text == "-m":
            return words[at + 2 :]
        if word.text.endswith(".py") or word.text in ("rlhf", "grpo"):
            return words[at + 1 :]
        if HYDRA.match(word.text):
            break
    return words


def _read_arguments(words: Sequence[Word], settings: Settings, flags: bool, folder: Path = Path()) -> None:
    if flags:
        _read_flags(words, settings, folder)
        return
    rest, given = iter(words), set[str]()
    for word in rest:
        found = HYDRA.match(word.text)
        if word.text in ("--config", "--config-path", "--config-name", "-cp", "-cn"):
            value = next(rest, Word(""))
            if word.text == "--config" and not _inherit(value.text, folder, settings):
                settings.warnings.append(f"--config {value.text}: no such file here, so their defaults are used")
            elif word.text != "--config":
                settings.table[word.text] = Setting(value.text, value.unknown)
        elif found:
            _put(settings, found[1], scalar(word.text[found.end() :]), word.unknown, given)
        elif word.text and word.text not in ("\\", "--"):
            settings.warnings.append(f"{word.text}: not key=value, not read")


def _read_flags(words: Sequence[Word], settings: Settings, folder: Path) -> None:
    """Read `--key value …` and `--key=value`. Several values make a list; a key without one is true."""
    key, values, given = "", [], set[str]()
    for word in [*words, Word("--end-of-flags")]:
        found = FLAG.match(word.text)
        if not found:
            if not key and word.text.endswith((".yaml", ".yml")):
                _read_yaml(folder / word.text, settings, inherited="")
            elif not key and word.text and word.text != "--":
                settings.warnings.append(f"{word.text}: not an argument of the form --key value, not read")
            values.append(word)
            continue
        if key:
            made = [scalar(value.text) for value in values] or [True]
            unknown = next((value.unknown for value in values if value.unknown), "")
            _set(settings, key, made[0] if len(made) == 1 else made, unknown, given)
        key = found[1].replace("-", "_")
        values = [replace(word, text=word.text[found.end() :])] if word.text.endswith("=") or "=" in found[0] else []


def _inherit(name: str, folder: Path, settings: Settings) -> bool:
    for path in (folder / name, Path(name)):
        if path.is_file():
            _read_yaml(path, settings, inherited="")
            return True
    return False


class _Loader(yaml.SafeLoader):
    """Notes the values that it drops: those of keys that a mapping gives more than once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        last = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and last[key.value] is not value:
                shown = value.value if isinstance(value, yaml.ScalarNode) else "…"
                self.repeated.append(f"line {key.start_mark.line + 1}: {key.value}={shown}")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, settings: Settings, inherited: str, depth: int = 0) -> None:
    """Read the keys of a file. They override those of the files that its `defaults` name."""
    try:
        loader = _Loader(_text(path))
        tree = loader.get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not a mapping of keys")
    bases = tree.pop("defaults", [])
    for base in bases if isinstance(bases, list) else [bases]:
        file = path.parent / str(base)
        if depth < MAX_REFERENCES and file.suffix in (".yaml", ".yml") and file.is_file():
            _read_yaml(file, settings, inherited=file.name, depth=depth + 1)
        elif file.suffix in (".yaml", ".yml"):
            why = "no such file here, so their own defaults replace it: convert the config where that file exists"
            settings.missing.append(f"defaults: {base}: {why}")
        elif base != "_self_":
            settings.warnings.append(f"defaults: {base}: their own defaults are used instead")
    settings.warnings += [f"{path.name}, {key}: given again later, not read" for key in loader.repeated]
    for key, value in _flat(tree):
        if value is None:  # removes a whole section of the file that this one builds on
            settings.table = {name: one for name, one in settings.table.items() if not name.startswith(f"{key}.")}
        settings.table[key] = Setting(value, inherited=inherited)
        if len(settings.table) > MAX_KEYS:
            raise UserError(f"{path}: more than {MAX_KEYS} keys")


def _put(settings: Settings, key: str, value: Any, unknown: str, given: set[str]) -> None:
    """Set a key; a mapping sets the keys in it. `given`: keys that the same arguments gave before."""
    for inner, item in _flat(value, key) if isinstance(value, dict) and value else [(key, value)]:
        _set(settings, inner, item, unknown, given)


def _set(settings: Settings, key: str, value: Any, unknown: str, given: set[str]) -> None:
    """Set a key. The last value counts; a warning names the one before it."""
    if key in given and settings.table[key].value != value:
        settings.warnings.append(f"{key}={settings.table[key].value}: given again later, not read")
    given.add(key)
    settings.table[key] = Setting(value, unknown)


def _flat(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            if name.count(".") > MAX_REFERENCES:
                raise UserError(f"{name}: nested too deeply")
            yield from _flat(value, name)
        else:
            yield name, scalar(value) if isinstance(value, str) else value


def scalar(text: str) -> Any:
    """The value of a text: number, boolean, null, list or mapping, otherwise the text without its quotes."""
    text = text.strip()
    if re.fullmatch(r"[+-]?(0|[1-9]\d{0,29})", text):  # 007 is text
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d{1,3})?", text):
        return float(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("null", "none", "~"):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text[:1] in ("[", "{") and not text.startswith("{{"):
        try:
            return _scalars(yaml.safe_load(COLON.sub(r"\1: ", text)))
        except (yaml.YAMLError, RecursionError):
            return text
    return text


def _scalars(value: Any) -> Any:
    if isinstance(value, list):
        return [_scalars(item) for item in value]
    if isinstance(value, dict):
        return {key: _scalars(item) for key, item in value.items()}
    return scalar(value) if isinstance(value, str) else value


# ----------------------------------------------------------------------------------------------------------- references


def _resolve(settings: Settings) -> None:
    """Replace every `${other.key}` and `${.sibling}` by its value."""
    for key in list(settings.table):
        settings.table[key] = _resolved(settings.table, key, depth=0)


def _resolved(table: dict[str, Setting], key: str, depth: int) -> Setting:
    setting = table[key]
    if not isinstance(setting.value, str) or "${" not in setting.value or setting.unknown:
        return setting
    text = setting.value
    while found := re.search(r"\$\{([^${}]*)\}", text):  # the innermost first
        product = PRODUCT.fullmatch(found[1])
        name = f"{key.rpartition('.')[0]}{found[1]}" if found[1].startswith(".") else found[1]
        if product:
            other = Setting(int(product[1]) * int(product[2]))
        elif name in table and depth <= MAX_REFERENCES:
            other = _resolved(table, name, depth + 1)
        else:
            return replace(setting, unknown=f"{found[0]} isn't known here")
        if other.unknown or found[0] == text:
            return replace(setting, value=text if other.unknown else other.value, unknown=other.unknown)
        text = f"{text[: found.start()]}{other.value}{text[found.end() :]}"
        if len(text) > 1 << 16:
            return replace(setting, unknown="it grows without end")
    return replace(setting, value=text)
