"""The configuration of a run: YAML and `key=value` overrides in, one frozen, checked `Config` out.

Each stage's dataclass lives in its own folder, under whose name its section, metrics and log go; this file only
composes them. A file that begins with `base: other.yaml` says what differs from that one. OmegaConf merges and
interpolates; msgspec converts and checks types; the dataclasses check values. Unknown keys are errors that suggest the
nearest. Nothing here imports torch: `--help` and a typing error answer at once.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from asyncdapo.controller.config import ControllerConfig, EvalConfig, FaultsConfig, RunConfig
from asyncdapo.errors import ConfigError, UserError
from asyncdapo.learner.config import LearnerConfig, LossConfig, ModelConfig
from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.reward.config import RewardConfig
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.weights.config import WeightsConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of, one section a stage."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
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
        if self.rollout.group_size == 1 and self.filter.enabled:
            raise ConfigError(
                "rollout.group_size",
                "a group of one has no variance, so the filter would drop every group",
                self.rollout.group_size,
                "use 2 or more, or filter.enabled=false",
            )
        if self.rollout.group_size == 1:
            raise ConfigError(
                "rollout.group_size",
                f"a group of one has no baseline: every advantage of loss.advantage={self.loss.advantage} would be 0",
                self.rollout.group_size,
                "use 2 or more",
            )
        if self.filter.mode == "replace" and not self.filter.enabled:
            raise ConfigError("filter.mode", "does nothing without filter.enabled", self.filter.mode, "use filter")
        if self.model.reference is not None and not self.loss.kl_coef:
            problem = "does nothing without loss.kl_coef"
            raise ConfigError("model.reference", problem, self.model.reference, "remove it, or set loss.kl_coef")
        if self.reward.overlong_buffer > self.rollout.max_response_length:
            raise ConfigError(
                "reward.overlong_buffer",
                f"must be at most rollout.max_response_length ({self.rollout.max_response_length})",
                self.reward.overlong_buffer,
            )
        if self.controller.stall_s <= self.reward.longest_verdict_s:
            raise ConfigError(
                "controller.stall_s",
                f"must be above the {self.reward.longest_verdict_s:g} s that a verdict may take (two tries of "
                "reward.timeout_s, with the pauses of reward.retries)",
                self.controller.stall_s,
            )
        if self.replay.prompts_per_step % self.learner.updates_per_step:
            raise ConfigError(
                "learner.updates_per_step",
                f"must divide replay.prompts_per_step ({self.replay.prompts_per_step})",
                self.learner.updates_per_step,
            )
        if self.eval.temperature:  # 0 is greedy for every engine
            self.rollout.check_temperature("eval.temperature", self.eval.temperature)
        if self.controller.placement == "shared":
            self._check_shared()

    def _check_shared(self) -> None:
        """Learner and engine on one GPU both need one."""
        for key, device in (("learner.device", self.learner.device), ("rollout.device", self.rollout.device)):
            if device == "cpu":
                problem = "leaves nothing to share a GPU with: controller.placement is shared"
                raise ConfigError(key, problem, device, "auto, or controller.placement=auto")
        if self.rollout.tensor_parallel > 1:
            problem = "must be 1 where learner and engine share a GPU (controller.placement is shared)"
            raise ConfigError("rollout.tensor_parallel", problem, self.rollout.tensor_parallel, "use separate")


BASE = "base"
"""Key of a file that gives only what differs from another one."""
SECTIONS: dict[str, type] = {name: hint for name, hint in get_type_hints(Config).items()}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge, resolve and check. Raises ConfigError that names key, value and fix."""
    try:
        merged = OmegaConf.merge(_read(path), *map(_override, overrides))
        return config_from_dict(_resolved(merged))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file (a path, or a name: {', '.join(config_names())})") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, TypeError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def _read(path: Path, above: tuple[Path, ...] = ()) -> Any:
    """The tree of a file, laid over that of its `base` if it names one. `above`: the files whose base it is."""
    tree = OmegaConf.load(path)
    if not (isinstance(tree, DictConfig) and BASE in tree):
        return tree
    name = tree.pop(BASE)
    base = path.parent / str(name)
    if base.resolve() in [file.resolve() for file in (path, *above)]:
        raise ConfigError(BASE, f"of {path} leads back to itself", name)
    if not base.is_file():
        raise ConfigError(BASE, f"of {path} is no file", name, "a YAML file, relative to this one")
    below = _read(base, (path, *above))
    return OmegaConf.merge(below, _models_beside(base, below), tree)


def _models_beside(path: Path, tree: Any) -> DictConfig:
    """What the file's models are called from elsewhere: those that lie beside it and not in the working directory."""
    section = OmegaConf.to_container(tree, resolve=False).get("model") if isinstance(tree, DictConfig) else None
    names = section if isinstance(section, dict) else {}
    beside = {
        key: str((path.parent / name).absolute())
        for key, name in names.items()
        if isinstance(name, str) and (path.parent / name).is_dir() and not Path(name).is_dir()
    }
    return OmegaConf.create({"model": beside} if beside else {})


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
    """Plain dictionaries, with every `${section.key}` replaced; defaults may be referred to as well."""
    defaults = {
        name: {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        for name, cls in SECTIONS.items()
    }
    whole = OmegaConf.merge(OmegaConf.create(_plain(defaults)), tree)
    resolved = OmegaConf.to_container(whole, resolve=True)
    if not isinstance(resolved, dict):
        raise UserError("a config is a mapping of sections")
    return resolved


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Check a tree of plain values and make the Config. Raises ConfigError."""
    sections: dict[str, Any] = {}
    for name, section in tree.items():
        _known(name, SECTIONS, prefix="")
        if not isinstance(section, dict):
            raise ConfigError(name, "is a section: it holds keys", section)
        for key in section:
            _known(key, {f.name for f in dataclasses.fields(SECTIONS[name])}, prefix=f"{name}.")
        sections[name] = _convert(name, section)
    if "model" not in sections:
        raise ConfigError("model.path", "is missing", fix="a Hugging Face id or a directory")
    return Config(**sections)


def _known(key: str, names: Any, prefix: str) -> None:
    if key in names:
        return
    near = difflib.get_close_matches(str(key), list(names), n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(sorted(names))}"
    raise ConfigError(f"{prefix}{key}", "is not a known key", fix=hint)


def _convert(name: str, section: dict[str, Any]) -> Any:
    for key, value in section.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{name}.{key}", "must be a finite number", number)
    try:
        return msgspec.convert(section, SECTIONS[name])
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise _typed_error(name, section, str(error)) from None


def _typed_error(name: str, section: dict[str, Any], error: str) -> ConfigError:
    """Say msgspec's words in ours: key, what is expected, value."""
    problem, _, where = error.partition(" - at `$")
    if "missing required field" in problem:
        return ConfigError(f"{name}.{problem.split('`')[1]}", "is missing")
    key = where.rstrip("`").lstrip(".").split("[")[0]
    hint = get_type_hints(SECTIONS[name])[key]
    options = get_args(hint)
    if "enum" in problem or get_origin(hint) is Literal:
        expected = f"must be one of {', '.join(map(str, options))}"
    else:
        expected = problem[0].lower() + problem[1:].split(", got")[0]
    return ConfigError(f"{name}.{key}", f"{expected}, got {section[key]!r}")


# ---------------------------------------------------------------------------------------------------- where configs are


def config_dirs() -> list[Path]:
    """Folders searched for a config by name: the working directory's, then the ones that come with the package."""
    package = Path(__file__).resolve().parent
    return [Path("configs"), package / "configs", package.parent / "configs"]


def config_names() -> list[str]:
    return sorted({path.stem for folder in config_dirs() if folder.is_dir() for path in folder.glob("*.yaml")})


def find_config(name_or_path: str) -> Path:
    """A path as it is, or a name looked up in `configs/`. Raises UserError that lists the names there are."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    for folder in config_dirs():
        if (folder / f"{name_or_path}.yaml").is_file():
            return folder / f"{name_or_path}.yaml"
    near = difflib.get_close_matches(name_or_path, config_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"names: {', '.join(config_names())}"
    raise UserError(f"{name_or_path}: no such config ({hint})")


# ------------------------------------------------------------------------------------------------------------ printing


def field_docs(cls: type) -> dict[str, str]:
    """The doc line under each field of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = inspect.cleandoc(following.value.value)  # type: ignore[union-attr]
    return docs


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values, ready for YAML."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, each key under its doc line; reading it back gives the same Config."""
    lines = []
    for name, section in to_dict(config).items():
        docs = field_docs(SECTIONS[name])
        lines.append(f"{name}:")
        for key, value in section.items():
            lines += [f"  # {line}" for line in textwrap.wrap(" ".join(docs[key].split()), 110, break_on_hyphens=False)]
            lines.append("  " + OmegaConf.to_yaml({key: value}).strip().replace("\n", "\n  "))
        lines.append("")
    return "\n".join(lines)
