"""`asyncdapo convert`: another framework's script, config or arguments in, our YAML out.

Each line names the keys that it was made from; the end lists the keys without a line. Our own loader checks the result
before it is shown, and its errors name the other framework's key.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from asyncdapo.config import config
from asyncdapo.convert.applying import Converted, convert
from asyncdapo.convert.peers import ms_swift, nemo_rl, siirl, skyrl, verl
from asyncdapo.convert.rules import Peer
from asyncdapo.convert.settings import Settings, read_settings
from asyncdapo.errors import ConfigError, SeveralKeysError, UserError

PEERS = {
    "verl": verl.PEER,
    "skyrl": skyrl.PEER,
    "nemo-rl": nemo_rl.PEER,
    "ms-swift": ms_swift.PEER,
    "siirl": siirl.PEER,
}
WIDTH = 118
STAND_IN = "model:\n  path: named-at-launch\n"


def command(args: argparse.Namespace) -> int:
    """Print or write the YAML, and report keys without a line on stderr. Raises UserError."""
    words = args.source[1:] if args.source[:1] == ["--"] else args.source
    text, made = converted(args.peer, words)
    if args.out:
        _write(args.out, text, force=args.force)
    else:
        print(text, end="")
    for line in _numbered(made.loud):
        print(f"asyncdapo: {line}", file=sys.stderr)
    left = len(made.left)
    if left:
        where = f"at the end of {args.out}" if args.out else "at its end"
        keys = "1 key" if left == 1 else f"{left} keys"
        print(f"asyncdapo: {keys} without a line, listed with the reason {where}", file=sys.stderr)
    return 0


def _write(path: Path, text: str, *, force: bool) -> None:
    """Write the file; `force` overwrites other content, which the user may have edited."""
    try:
        if path.exists() and not force and path.read_bytes() != text.encode():
            raise UserError(f"{path}: exists with other content; --force replaces it")
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def converted(peer_name: str, words: list[str]) -> tuple[str, Converted]:
    """The YAML, and what it was made of. Raises UserError."""
    peer = PEERS[peer_name]
    settings = read_settings(words, flags=peer.flags, texts=peer.texts)
    made = convert(peer, settings, _our_defaults())
    text = _rendered(peer, settings, made)
    _check(text, made)
    return text, made


def _our_defaults() -> dict[str, Any]:
    defaults = {}
    for section, cls in config.SECTIONS.items():
        for entry in dataclasses.fields(cls):
            if entry.default is not dataclasses.MISSING:
                defaults[f"{section}.{entry.name}"] = entry.default
    return defaults


def _check(text: str, made: Converted) -> None:
    """Check the YAML with the loader that a launch uses."""
    if not any(line.ours == "model.path" for line in made.lines):
        text += STAND_IN
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "converted.yaml")
        path.write_text(text)
        try:
            config.load_config(path)
        except (ConfigError, SeveralKeysError) as error:
            raise UserError("\n".join(_with_source(problem, made) for problem in error.problems)) from error


def _with_source(problem: ConfigError, made: Converted) -> str:
    """The problem with the key of theirs that it comes from, since the user hasn't seen our file."""
    line = next((line for line in made.lines if line.ours.startswith(problem.key)), None)
    return f"{problem.args[0]} [made from {', '.join(line.shown)}]" if line and line.shown else problem.args[0]


# ------------------------------------------------------------------------------------------------------------- printing


def _rendered(peer: Peer, settings: Settings, made: Converted) -> str:
    parts = [_comment(f"Converted from {peer.title} ({peer.source}) by asyncdapo convert.")]
    if made.loud:
        parts.append("#\n" + "".join(_comment(line, hang="   ") for line in _numbered(made.loud)))
    for note in made.notes:
        parts.append("#\n" + _comment(note))
    if made.before:
        parts.append("#\n# Run first:\n" + "".join(f"#   {_printable(line)}\n" for line in made.before))
    if not any(line.ours == "model.path" for line in made.lines):
        parts.append("#\n# No model was named: add model.path, or give it at launch as model.path=…\n")
    for section in config.SECTIONS:
        lines = [line for line in made.lines if line.ours.startswith(f"{section}.")]
        if lines:
            parts.append(f"\n{section}:\n")
        inside = ""
        for line in lines:
            keys = line.ours.split(".")[1:]
            if keys[:-1] and keys[0] != inside:
                inside = keys[0]
                parts.append(f"  {inside}:\n")
            indent = "    " if keys[:-1] else "  "
            origin = ", ".join(line.shown)
            note = "; ".join(part for part in (origin, line.why) if part)
            parts.append(_comment(note, indent) + f"{indent}{keys[-1]}: {_value(line.value)}\n")
    if made.left:
        parts.append("\n# Without a line here:\n")
        for reason in dict.fromkeys(why for _, why in made.left):
            parts.append(_comment(f"{reason}:", begin="#   "))
            parts += [_comment(what, begin="#       ") for what, why in made.left if why == reason]
    inherited = sum(bool(setting.inherited) for setting in settings.table.values())
    if inherited:
        parts.append(
            _comment(f"{inherited} keys come from the files that this one builds on; they are listed only if used")
        )
    if settings.warnings:
        parts.append("\n# Note:\n")
        parts += [_comment(warning, hang="    ", begin="#   ") for warning in dict.fromkeys(settings.warnings)]
    if made.besides:
        parts.append(f"\n# What {peer.title} does differently, without effect on training:\n")
        parts += [_comment(note, hang="    ", begin="#   ") for note in made.besides]
    return "".join(parts)


def _numbered(said: list[str]) -> list[str]:
    """The differences, numbered, under a heading; nothing if there are none."""
    heading = "What trains differently here, most consequential first:"
    return [heading, *(f"{number}. {_printable(text)}" for number, text in enumerate(said, 1))] if said else []


def _comment(text: str, indent: str = "", hang: str = "", begin: str = "# ") -> str:
    lines = textwrap.wrap(_printable(text), WIDTH - len(indent), break_on_hyphens=False, break_long_words=False)
    return "".join(f"{indent}{begin}{hang if index else ''}{line}\n" for index, line in enumerate(lines))


def _printable(text: str) -> str:
    """The text on one line, so that a comment stays a comment."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _value(value: Any) -> str:
    """The value as YAML on one line, in a form that every YAML reader reads alike."""
    if isinstance(value, float):
        return repr(value) if "." in repr(value) else repr(value).replace("e", ".0e")
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10_000, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def own_options_first(argv: Sequence[str]) -> Sequence[str]:
    """`convert` takes arguments of others, which begin with -- as well: its own are put in front of a bare --."""
    if "--" in argv:
        return argv
    own: list[str] = []
    others: list[str] = []
    rest = iter(argv[1:])
    for word in rest:
        if word in ("--from", "--out"):
            own += [word, *itertools.islice(rest, 1)]
        elif word in ("-h", "--help", "--force") or word.startswith(("--from=", "--out=")):
            own.append(word)
        else:
            others.append(word)
    return ["convert", *own, "--", *others]
