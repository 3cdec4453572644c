"""Applies the rules of a peer to what a user gave.

In: the peer's table and the user's settings. Out: lines of our YAML, the keys without a line, and what trains
differently, by rank. Invariant: every key that the user gave is in a line or in the list of keys without one.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from asyncdapo.convert.rules import Left, Made, Peer, Rank, Rule, plain
from asyncdapo.convert.settings import Setting, Settings
from asyncdapo.errors import UserError

SHORT = reprlib.Repr()
"""Shortens lists and mappings: YAML aliases can make a small file endless."""
SHORT.maxlist = SHORT.maxdict = SHORT.maxstring = SHORT.maxother = 100
SHORT.maxlevel = 3
OWN_DATA = "path/to/train.parquet"
"""Placeholder for data that the user has to name; a launch refuses it."""
RANKS = {"rollout": Rank.SAMPLING, "run": Rank.SCHEDULE, "replay": Rank.SCHEDULE, "learner": Rank.SCHEDULE}
RANKS |= {"model": Rank.TASK, "prompts": Rank.TASK, "reward": Rank.TASK, "loss": Rank.LOSS, "filter": Rank.LOSS}
RANKS |= {"eval": Rank.EVAL}
"""How serious it is if a key of this section of ours can't be made."""
NEUTRAL = (
    *("run.name", "run.dir", "rollout.num_workers", "rollout.engine*", "rollout.tensor_parallel", "rollout.memory*"),
    *("rollout.slots", "learner.ranks", "learner.tokens_per_microbatch", "learner.activation*", "learner.*checkpoint*"),
    *("learner.shards", "learner.reshard_after_forward", "learner.offload"),
)
"""Keys of these sections that don't change results."""


@dataclass
class Line:
    """A line of our YAML."""

    ours: str
    value: Any
    theirs: list[str]
    """The keys that it was made of."""
    why: str = ""
    shown: list[str] = field(default_factory=list)
    """`key=value` of those that the user gave, or that decide the value."""


@dataclass
class Converted:
    """Everything that is to be written."""

    lines: list[Line] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    """`key=value`, and why it has no line."""
    before: list[str] = field(default_factory=list)
    """Commands to run first."""
    notes: list[str] = field(default_factory=list)
    """Written at the top."""
    said: list[tuple[Rank, str]] = field(default_factory=list)
    """What trains differently."""
    besides: list[str] = field(default_factory=list)
    """What the framework does differently without effect on training."""

    @property
    def loud(self) -> list[str]:
        """What trains differently, most consequential first: written at the top and to stderr."""
        return [text for _, text in sorted(dict.fromkeys(self.said), key=lambda pair: pair[0])]

    @property
    def values(self) -> dict[str, Any]:
        """Our key -> the value of its line."""
        return {line.ours: line.value for line in self.lines}


def convert(peer: Peer, settings: Settings, defaults: dict[str, Any]) -> Converted:
    """Apply every rule. `defaults` are ours, by dotted key: a line that equals our default is left out, unless the user
    gave one of its keys."""
    given, names = _canonical(peer, settings)
    known = {key: Setting(value, inherited=f"{peer.title}'s default") for key, value in peer.defaults.items()} | given
    table = _Table(peer, known, names, {key for key, setting in given.items() if not setting.inherited})
    if other := next((key for key in given if any(fnmatchcase(table.shown(key), one) for one in peer.others)), ""):
        raise UserError(f"{table.shown(other)}: this trains by another method; only GRPO, PPO and similar ones convert")
    made = Converted(said=[(Rank.TASK, text) for text in settings.missing])
    for rule in peer.rules:
        if (not rule.theirs or any(key in known for key in rule.theirs)) and rule.ours not in made.values:
            table.apply(rule, made, defaults)
    _placeholders(made)
    table.list_left(made)
    for one in peer.differs:
        if one.when(made.values):
            made.said += [(one.rank, one.text)] if one.rank else []
            made.besides += [] if one.rank else [one.text]
    return made


@dataclass
class _Table:
    """Their keys, given or default, and what each was converted to."""

    peer: Peer
    known: dict[str, Setting]
    names: dict[str, str]
    """The user's name of each key, which may be that of another version."""
    asked: set[str]
    settled: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    lost: dict[str, list[str]] = field(default_factory=dict)
    """Their key with an unknown value -> our keys that depend on it."""

    def shown(self, key: str) -> str:
        return _shown(self.names.get(key, key), self.known[key])

    def apply(self, rule: Rule, made: Converted, defaults: dict[str, Any]) -> None:
        keys = [key for key in dict.fromkeys(rule.theirs) if key in self.known]
        if unknown := next((key for key in keys if self.known[key].unknown), ""):
            whose = "its" if unknown == rule.theirs[0] else f"{self.names.get(unknown, unknown)}'s"
            self.reasons.setdefault(rule.theirs[0], f"{whose} value isn't known: {self.known[unknown].unknown}")
            self.lost.setdefault(unknown, []).append(rule.ours)
            return
        result = _answer(rule, self.known, self.names)
        if isinstance(result, Left):
            key = rule.theirs[0] if rule.theirs[0] in self.known else keys[0]
            self.reasons.setdefault(rule.theirs[0], result.why)
            self.listed |= {key} if result.always or result.loud else set()
            made.said += [(result.loud, f"{self.shown(key)}: {result.why}")] if result.loud else []
        elif result is not None:
            result = result if isinstance(result, Made) else Made(result)
            deciding = _deciding(rule, keys, self.known, self.asked, result.value)
            if result.loud:
                shown = ", ".join(map(self.shown, deciding)) or f"{rule.ours}={result.value}"
                made.said.append((result.loud, f"{shown}: {result.why}"))
            if self.asked & set(keys) or rule.ours not in defaults or defaults[rule.ours] != result.value:
                self.settled |= set(deciding)
                made.lines.append(Line(rule.ours, result.value, keys, result.why, deciding))
                made.before += [command for command in result.before if command not in made.before]
                made.notes += [result.note] if result.note and result.note not in made.notes else []

    def list_left(self, made: Converted) -> None:
        """List every given key that is in no line."""
        for line in made.lines:
            without_effect = [key for key in line.theirs if key in self.asked - self.settled]
            self.settled |= set(without_effect)
            line.shown = [self.shown(key) for key in line.theirs if key in (*line.shown, *without_effect)]
        for key in sorted(self.asked - self.settled | (self.asked & set(self.reasons)) | self.listed):
            made.left.append((self.shown(key), self.reasons.get(key) or _reason(self.peer, key)))
        for key, ours in self.lost.items():
            made.said += _lost(self.shown(key), self.known[key].unknown, ours, made.values)


def _reason(peer: Peer, key: str) -> str:
    """Why a key has no line, if no rule gave a reason."""
    if why := next((why for pattern, why in peer.without if fnmatchcase(key, pattern)), ""):
        return why
    if any(key in rule.theirs for rule in peer.rules):
        return "has no effect with the other values"
    return f"unknown: not in our list of {peer.title}'s keys"


def _lost(shown: str, why: str, ours: list[str], values: dict[str, Any]) -> list[tuple[Rank, str]]:
    """The message about an unknown value: which of our defaults are used instead."""
    ours = [key for key in dict.fromkeys(ours) if key not in values and key.partition(".")[0] in RANKS]
    ours = [key for key in ours if not any(fnmatchcase(key, pattern) for pattern in NEUTRAL)]
    rank = min((RANKS[key.partition(".")[0]] for key in ours), default=None)
    return [(rank, f"{shown}: {why}; our own default is used for {', '.join(ours)}")] if rank else []


def _placeholders(made: Converted) -> None:
    """Without known data, put in a name that a launch refuses: the run must never use our toy task."""
    if "prompts.path" in made.values:
        return
    why = "no known data set is named: asyncdapo data prepare makes the file; a launch refuses this placeholder"
    made.said.insert(0, (Rank.TASK, f"prompts.path={OWN_DATA}: {why}"))
    own = [Line("prompts.task", "file", []), Line("prompts.path", OWN_DATA, [], "name your data here")]
    if "prompts.chat_template" not in made.values:
        own.append(Line("prompts.chat_template", True, [], "they always use it"))
    made.lines = own + [line for line in made.lines if line.ours not in [one.ours for one in own]]


def _canonical(peer: Peer, settings: Settings) -> tuple[dict[str, Setting], dict[str, str]]:
    """The settings under the rules' names of their keys, and the user's name of each."""
    table: dict[str, Setting] = {}
    names: dict[str, str] = {}
    for name, setting in settings.table.items():
        key = name
        for old, new in peer.aliases:
            if key == old or (old.endswith(".") and key.startswith(old)):
                key = new + key.removeprefix(old)
                break
        if key in table and not table[key].inherited and not setting.inherited:
            other = f"another version's name of {name}, which is also given and is used"
            settings.warnings.append(f"{_shown(names[key], table[key])}: {other}")
        table[key], names[key] = setting, name
    return table, names


def _answer(rule: Rule, known: dict[str, Setting], names: dict[str, str]) -> Any:
    values = [known[key].value if key in known else None for key in rule.theirs]
    try:
        return rule.value(*values)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        shown = ", ".join(_shown(names.get(key, key), known[key]) for key in rule.theirs if key in known)
        raise UserError(f"{shown}: makes no {rule.ours} ({error})") from error


def _deciding(rule: Rule, keys: list[str], known: dict[str, Setting], asked: set[str], made: Any) -> list[str]:
    """The keys of a rule to show with its line: its first key if it was given, and every key that changes the value;
    all keys if there is none."""
    own = [key for key in keys if key == rule.theirs[0] and key in asked]
    deciding = [
        key for key in keys if key in own or any(_changes(rule, key, known, made, to) for to in _others(known, key))
    ]
    return deciding or keys


def _changes(rule: Rule, key: str, known: dict[str, Setting], made: Any, to: Any) -> bool:
    values = [to if name == key else known[name].value if name in known else None for name in rule.theirs]
    try:
        return plain(rule.value(*values)) != made
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        return True


def _others(known: dict[str, Setting], key: str) -> tuple[Any, ...]:
    """Other values that a key could have, to find out whether it changes a line."""
    value = known[key].value
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int | float):
        return (2 * value, value / 2 if value % 2 else value // 2) if value else (1,)
    return () if value is None else ("another",)


def _shown(name: str, setting: Setting) -> str:
    given = setting.named or setting.value
    value = " ".join((SHORT.repr if isinstance(given, list | dict) else str)(given).split())
    value = value if len(value) <= 100 else f"{value[:97]}..."
    return f"{name}={value}" + (f" ({setting.inherited})" if setting.inherited else "")
