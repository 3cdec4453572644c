"""The configuration of a run: YAML and `key=value` overrides in, one frozen, checked `Config` out.

Each stage's dataclass lives in its own folder, under whose name its section, metrics and log go; this file only
composes them. A file that begins with `base: other.yaml` holds what differs from that file. `yaml_file` reads,
OmegaConf merges and interpolates, msgspec converts and checks types and ranges, the dataclasses check how keys fit
together. All wrong keys are reported at once, in the words of `mistakes`. Nothing here imports torch: `--help` answers
at once.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from asyncdapo.config.field_docs import field_docs
from asyncdapo.config.found import config_names, find_config
from asyncdapo.config.mistakes import convert_section, unknown_key, unresolved
from asyncdapo.config.run import ControllerConfig, EvalConfig, RunConfig
from asyncdapo.config.yaml_file import read_yaml, with_colon
from asyncdapo.environment.config import EnvironmentConfig
from asyncdapo.errors import ConfigError, SeveralKeysError, UserError, raise_all
from asyncdapo.faults import FaultsConfig
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.model.config import ModelConfig
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.reward.config import RewardConfig
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.weights.config import WeightsConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of, one section for each stage."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    def __post_init__(self) -> None:
        raise_all(list(self._contradictions()))

    @property
    def max_context(self) -> int:
        """Most tokens of a sequence: prompt, response, and what an environment says in between."""
        return self.environment.max_context or self.prompts.max_prompt_length + self.rollout.max_response_length

    @property
    def longest_prompt(self) -> int:
        """Most tokens that the engine reads before it samples: the context of a later turn is a prompt to it."""
        return self.max_context - 1 if self.environment.enabled else self.prompts.max_prompt_length

    def _contradictions(self) -> Iterator[ConfigError]:
        """Keys of different sections that exclude each other."""
        yield from self._environment_problems()
        yield from self._advantage_problems()
        if self.filter.mode == "replace" and not self.filter.enabled:
            yield ConfigError("filter.mode", "does nothing without filter.enabled", self.filter.mode, "use filter")
        if self.model.reference is not None and not self.loss.kl_coef:
            problem = "does nothing without loss.kl_coef"
            yield ConfigError("model.reference", problem, self.model.reference, "remove it, or set loss.kl_coef")
        if self.reward.overlong_buffer > self.rollout.max_response_length:
            problem = f"must be at most rollout.max_response_length ({self.rollout.max_response_length})"
            yield ConfigError("reward.overlong_buffer", problem, self.reward.overlong_buffer)
        if self.controller.stall_s <= self.reward.longest_verdict_s:
            yield ConfigError(
                "controller.stall_s",
                f"must be above the {self.reward.longest_verdict_s:g} s that a verdict may take (two tries of "
                "reward.timeout_s, with the pauses of reward.retries)",
                self.controller.stall_s,
            )
        if self.replay.prompts_per_step % self.learner.updates_per_step:
            problem = f"must divide replay.prompts_per_step ({self.replay.prompts_per_step})"
            yield ConfigError("learner.updates_per_step", problem, self.learner.updates_per_step)
        yield from self._schedule_problems()
        if self.controller.placement == "shared":
            yield from self._unshared()
        if self.eval.temperature:  # 0 is greedy for every engine
            self.rollout.check_temperature("eval.temperature", self.eval.temperature)

    def _advantage_problems(self) -> Iterator[ConfigError]:
        """What a completion is compared with has to be there."""
        advantage, key = self.loss.advantage, "rollout.group_size"
        if self.rollout.group_size == 1 and self.filter.enabled:
            problem = "a group of one has no variance, so the filter would drop every group"
            yield ConfigError(key, problem, 1, "use 2 or more, or filter.enabled=false")
        elif self.rollout.group_size == 1 and advantage not in WITHOUT_GROUPS:
            problem = f"a group of one has no baseline: every advantage of loss.advantage={advantage} would be 0"
            yield ConfigError(key, problem, 1, "use 2 or more")
        if advantage == "maxrl" and (self.reward.incorrect < 0 or self.reward.overlong_buffer):
            problem, fix = "divides by the mean reward, which may not be below 0", "reward.incorrect=0"
            yield ConfigError("loss.advantage", problem, advantage, f"{fix} reward.overlong_buffer=0")

    def _schedule_problems(self) -> Iterator[ConfigError]:
        """A learning rate that falls over the run needs to know how long that is."""
        key, schedule, learner = "learner.lr_schedule", self.learner.lr_schedule, self.learner
        if schedule == "constant":
            return
        if self.prompts.epochs:
            problem = "falls over run.steps, but with prompts.epochs the run ends with its data"
            yield ConfigError(key, problem, schedule, "prompts.epochs=0 and as many run.steps, or constant")
        elif learner.warmup_steps >= learner.num_updates(self.run.steps):
            problem = f"has nothing to fall over: of {learner.num_updates(self.run.steps)} updates in run.steps"
            yield ConfigError(key, f"{problem}, learner.warmup_steps takes {learner.warmup_steps}", schedule)

    def _environment_problems(self) -> Iterator[ConfigError]:
        environment, key = self.environment, "environment.max_context"
        if not environment.enabled:
            if environment.max_context is not None:
                yield ConfigError(key, "does nothing without environment.path", environment.max_context, "remove it")
            return
        if self.max_context <= self.prompts.max_prompt_length:
            problem = f"must be above prompts.max_prompt_length ({self.prompts.max_prompt_length})"
            yield ConfigError(key, problem, environment.max_context)
        if self.rollout.deterministic:
            problem = "samples one group at a time, and an environment's turns are requests of their own"
            yield ConfigError("rollout.deterministic", problem, True, "remove it, or environment.path")
        if self.reward.verifier != RewardConfig.verifier:
            problem = "does nothing with environment.path: its rewards are the verdict"
            yield ConfigError("reward.verifier", problem, self.reward.verifier, "remove it")
        if self.controller.stall_s <= environment.step_timeout_s:
            problem = f"must be above environment.step_timeout_s ({environment.step_timeout_s:g})"
            yield ConfigError("controller.stall_s", problem, self.controller.stall_s)

    def _unshared(self) -> Iterator[ConfigError]:
        """Learner and engine on one GPU both need one."""
        for key, device in (("learner.device", self.learner.device), ("rollout.device", self.rollout.device)):
            if device == "cpu":
                problem = "leaves nothing to share a GPU with: controller.placement is shared"
                yield ConfigError(key, problem, device, "auto, or controller.placement=auto")
        if self.rollout.tensor_parallel > 1:
            problem = "must be 1 where learner and engine share a GPU (controller.placement is shared)"
            yield ConfigError("rollout.tensor_parallel", problem, self.rollout.tensor_parallel, "use separate")


WITHOUT_GROUPS = ("reinforce_pp",)
"""Values of `loss.advantage` that compare a completion with the whole batch: a group of one will do."""
BASE = "base"
"""Key of a file that holds only what differs from another one."""
SECTIONS: dict[str, type] = {name: hint for name, hint in get_type_hints(Config).items()}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge, resolve and check. Raises UserError that names every wrong key, its value and the fix."""
    return config_from_dict(*_merged(path, overrides))


def load_recorded(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """As `load_config`, for RUN_DIR/config.yaml, which another version may have written. Keys that this version doesn't
    know are left out, and returned."""
    tree, places = _merged(path, overrides)
    unknown = [problem.key for name, given in tree.items() for problem in _unknown(name, given)]
    gone = [key for key in unknown if key in places]
    for key in gone:
        section, _, name = key.partition(".")
        del (tree[section] if name else tree)[name or section]
    return config_from_dict(tree, places), gone


def _merged(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain values with every `${section.key}` replaced; the place in a file of each key that no override changes."""
    try:
        written, places = _read(path)
        changes = [_override(text) for text in overrides]
        changed = [text.partition("=")[0] for text in overrides]
        places = {key: place for key, place in places.items() if not _is_changed(key, changed)}
        return _resolved(OmegaConf.merge(written, *changes)), places
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file (a path, or a name: {', '.join(config_names())})") from None
    except InterpolationResolutionError as error:
        raise _placed(unresolved(error.full_key or "", str(error).splitlines()[0]), places) from error
    except (YAMLError, OmegaConfBaseException, OSError, TypeError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def _is_changed(key: str, overrides: Sequence[str]) -> bool:
    return any(f"{other}.".startswith(f"{key}.") for other in overrides)


def _read(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Keys and places of a file, laid over those of its `base` if it has one. `above`: the files whose base it is."""
    tree, places = read_yaml(path)
    lists = [name for name, given in tree.items() if name in SECTIONS and isinstance(given, list)]
    fix = "write its keys without `- `"
    raise_all([_placed(ConfigError(name, "is a section, not a list", fix=fix), places) for name in lists])
    if BASE not in tree:
        return tree, places
    name = str(tree.pop(BASE))
    base = find_config(name, beside=path.parent)
    if base.resolve() in [file.resolve() for file in (path, *above)]:
        raise ConfigError(BASE, f"of {path} leads back to itself", name)
    if not base.is_file():
        raise ConfigError(BASE, f"of {path} is not a file", name, "a YAML file, relative to this one, or a name")
    below, its_places = _read(base, (path, *above))
    whole = OmegaConf.merge(below, models_beside(base, below), tree)
    return cast(dict[str, Any], OmegaConf.to_container(whole)), its_places | places


def models_beside(path: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Absolute paths of the file's models that are in its own folder and not in the working directory."""
    section = tree.get("model")
    beside = {
        key: str((path.parent / name).absolute())
        for key, name in (section if isinstance(section, dict) else {}).items()
        if isinstance(name, str) and (path.parent / name).is_dir() and not Path(name).is_dir()
    }
    return {"model": beside} if beside else {}


def _override(text: str) -> Any:
    """`key=value` as a tree."""
    if "=" not in text:
        raise ConfigError(text, "an override is written key=value", fix="run.steps=10")
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException) as error:
        key, _, value = text.partition("=")
        raise ConfigError(key, f"is not YAML: {' '.join(str(error).split())}", value) from error


def _resolved(tree: Any) -> dict[str, Any]:
    """Plain dictionaries with every `${section.key}` replaced. It may refer to a default as well."""
    plain = cast(dict[str, Any], OmegaConf.to_container(tree))
    if _refers(plain):
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(DEFAULTS, tree), resolve=True))
    given = {name: plain[name] for name in REFERRING if name in plain}
    return plain | cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(REFERRING, given), resolve=True))


def _refers(value: Any) -> bool:
    return "${" in repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


DEFAULTS: dict[str, dict[str, Any]] = {
    name: {f.name: _plain(f.default) for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    for name, cls in SECTIONS.items()
}
REFERRING = {name: section for name, section in DEFAULTS.items() if _refers(section)}
"""Those with a default that refers to a key of its own section. Where a file refers to nothing, only they are merged:
merging all sections is most of the time of a load."""


def config_from_dict(tree: dict[str, Any], places: Mapping[str, str] | None = None) -> Config:
    """Check a tree of plain values and make the Config. Raises ConfigError, or SeveralKeysError with all wrong keys in
    the order of `places`, the keys' places in files."""
    problems, sections = [], {}
    for name, given in ({"model": {}} | tree).items():
        problems += _unknown(name, given)
        if name in SECTIONS and isinstance(given, dict):
            sections[name], wrong = _section(name, given)
            problems += wrong
        elif name in SECTIONS:
            right = with_colon(given) if isinstance(given, str) else ""
            fix = f"write `{right}`" if right else "write them below it, each indented by two spaces, or leave it out"
            problems.append(ConfigError(name, "is a section: it holds keys", given, fix))
    lines = {key: line for line, key in enumerate(places or {})}
    problems.sort(key=lambda problem: lines.get(problem.key, len(lines)))
    try:
        raise_all(problems)
        return Config(**sections)
    except (ConfigError, SeveralKeysError) as error:
        for problem in error.problems:
            _placed(problem, places or {})
        raise


def _placed(problem: ConfigError, places: Mapping[str, str]) -> ConfigError:
    problem.where = places.get(problem.key, "")
    return problem


def _unknown(name: str, given: Any) -> Iterator[ConfigError]:
    """An error for the section if it isn't known, or for each of its keys that isn't."""
    if name not in SECTIONS:
        yield unknown_key(name, SECTIONS)
    elif isinstance(given, dict):
        known = {field.name for field in dataclasses.fields(SECTIONS[name])}
        yield from (unknown_key(f"{name}.{key}", SECTIONS) for key in given if key not in known)


def _section(name: str, given: Mapping[str, Any]) -> tuple[Any, list[ConfigError]]:
    """The section, and what is wrong with it. A wrong key is taken out, so that the others are checked as well. A
    further error that names such a key may follow from its default, and isn't reported."""
    known = {field.name for field in dataclasses.fields(SECTIONS[name])}
    left, problems = {key: value for key, value in given.items() if key in known}, []
    while True:
        try:
            return convert_section(name, SECTIONS[name], left), problems
        except ConfigError as error:
            if not any(problem.key in str(error) for problem in problems):
                problems.append(error)
            key = error.key.removeprefix(f"{name}.")
            if key not in left:
                return None, problems
            del left[key]


# ------------------------------------------------------------------------------------------------------------ printing


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values, ready for YAML."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, each key under its doc line; reading it back gives the same Config."""
    lines = []
    for name, section in to_dict(config).items():
        docs = field_docs(SECTIONS[name])
        lines.append(f"{name}:")
        entries = re.split(r"\n(?=\w)", OmegaConf.to_yaml(section).strip())  # a key stands at the margin, its value not
        for key, entry in zip(section, entries, strict=True):
            lines += [f"  # {line}" for line in textwrap.wrap(" ".join(docs[key].split()), 110, break_on_hyphens=False)]
            lines.append("  " + entry.replace("\n", "\n  "))
        lines.append("")
    return "\n".join(lines)
