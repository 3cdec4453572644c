"""From their keys to ours: the table of a peer and what a user gave in, lines of our YAML and what is left over out.

Every key that was given ends in a line, or in the list of what is left, never in neither. What trains something else
is said besides, by its rank.
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
"""Of lists: aliases of YAML make a small file an endless one."""
SHORT.maxlist = SHORT.maxdict = SHORT.maxstring = SHORT.maxother = 100
SHORT.maxlevel = 3
OWN_DATA = "path/to/train.parquet"
"""Stands for data that the user has to name; a launch refuses it."""
RANKS = {"rollout": Rank.SAMPLING, "run": Rank.SCHEDULE, "replay": Rank.SCHEDULE, "learner": Rank.SCHEDULE}
RANKS |= {"model": Rank.TASK, "prompts": Rank.TASK, "reward": Rank.TASK, "loss": Rank.LOSS, "filter": Rank.LOSS}
RANKS |= {"eval": Rank.EVAL}
"""Of a section of ours whose key can't be made."""
NEUTRAL = (
    *("run.name", "run.dir", "rollout.num_workers", "rollout.engine*", "rollout.tensor_parallel", "rollout.memory*"),
    *("rollout.slots", "learner.ranks", "learner.tokens_per_microbatch", "learner.activation*", "learner.*checkpoint*"),
)
"""Keys of these sections that results don't depend on."""


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
    """All that is to be written."""

    lines: list[Line] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    """`key=value`, and why it has no line."""
    before: list[str] = field(default_factory=list)
    """Commands to run first."""
    notes: list[str] = field(default_factory=list)
    """Said at the top."""
    said: list[tuple[Rank, str]] = field(default_factory=list)
    """What trains differently."""
    besides: list[str] = field(default_factory=list)
    """What the framework does otherwise and trains the same."""

    @property
    def loud(self) -> list[str]:
        """What trains differently, most consequential first: said at the top and on stderr."""
        return [text for _, text in sorted(dict.fromkeys(self.said), key=lambda pair: pair[0])]

    @property
    def values(self) -> dict[str, Any]:
        """Of the lines, by our key."""
        return {line.ours: line.value for line in self.lines}


def convert(peer: Peer, settings: Settings, defaults: dict[str, Any]) -> Converted:
    """Apply every rule. `defaults` are ours, by dotted key: a line that nobody asked for and that says the same is left
    out."""
    given, names = _canonical(peer, settings)
    known = {key: Setting(value, inherited=f"{peer.title}'s default") for key, value in peer.defaults.items()} | given
    table = _Table(peer, known, names, {key for key, setting in given.items() if not setting.inherited})
    if other := next((key for key in given if any(fnmatchcase(table.shown(key), one) for one in peer.others)), ""):
        raise UserError(f"{table.shown(other)}: no training by GRPO, PPO or their like, which is what there is here")
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
    """Their keys: those that were given and their defaults, and what has become of each."""

    peer: Peer
    known: dict[str, Setting]
    names: dict[str, str]
    """That the user used."""
    asked: set[str]
    settled: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    lost: dict[str, list[str]] = field(default_factory=dict)
    """Keys of ours that would follow from a value that isn't known."""

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
        """Whatever was given and is in no line."""
        for line in made.lines:
            beside = [key for key in line.theirs if key in self.asked - self.settled]  # given, and without effect
            self.settled |= set(beside)
            line.shown = [self.shown(key) for key in line.theirs if key in (*line.shown, *beside)]
        for key in sorted(self.asked - self.settled | (self.asked & set(self.reasons)) | self.listed):
            made.left.append((self.shown(key), self.reasons.get(key) or _reason(self.peer, key)))
        for key, ours in self.lost.items():
            made.said += _lost(self.shown(key), self.known[key].unknown, ours, made.values)


def _reason(peer: Peer, key: str) -> str:
    """Why a key that no rule speaks of has no line."""
    if why := next((why for pattern, why in peer.without if fnmatchcase(key, pattern)), ""):
        return why
    if any(key in rule.theirs for rule in peer.rules):
        return "does nothing beside the other values"
    return f"unknown: no key of {peer.title} here"


def _lost(shown: str, why: str, ours: list[str], values: dict[str, Any]) -> list[tuple[Rank, str]]:
    """What is to be said of a value that isn't known: which of our defaults stand for it."""
    ours = [key for key in dict.fromkeys(ours) if key not in values and key.partition(".")[0] in RANKS]
    ours = [key for key in ours if not any(fnmatchcase(key, pattern) for pattern in NEUTRAL)]
    rank = min((RANKS[key.partition(".")[0]] for key in ours), default=None)
    return [(rank, f"{shown}: {why}; our own default stands for {', '.join(ours)}")] if rank else []


def _placeholders(made: Converted) -> None:
    """A run without data known is refused, and never one of our toy task."""
    if "prompts.path" in made.values:
        return
    why = "no data are named that are known here: asyncdapo data prepare makes the file, and a launch refuses this name"
    made.said.insert(0, (Rank.TASK, f"prompts.path={OWN_DATA}: {why}"))
    own = [
        Line("prompts.task", "file", []),
        Line("prompts.path", OWN_DATA, [], "name your data here"),
        Line("prompts.chat_template", True, [], "they always use it"),
    ]
    made.lines = own + [line for line in made.lines if line.ours not in [one.ours for one in own]]


def _canonical(peer: Peer, settings: Settings) -> tuple[dict[str, Setting], dict[str, str]]:
    """The settings under the names that the rules use, and by them the names that the user used."""
    table: dict[str, Setting] = {}
    names: dict[str, str] = {}
    for name, setting in settings.table.items():
        key = name
        for old, new in peer.aliases:
            if key == old or (old.endswith(".") and key.startswith(old)):
                key = new + key.removeprefix(old)
                break
        if key in table and not table[key].inherited and not setting.inherited:
            other = f"the same as {name} in another version, which is given, too, and taken"
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
    """Of the keys that a rule looked at, those to name beside its line: its own, if it was given, and every one with
    which the line changes; all where none is so."""
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
    """Other values that a key could have."""
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
