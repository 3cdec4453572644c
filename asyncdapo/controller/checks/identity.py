"""What a run is made of: what a run directory is held to when it is launched again.

In: the effective configuration of a launch, the model's and the data's files. Out: RUN_DIR/identity.json, digests of
model and data, written at the first launch; later, whatever differs. Model and data are compared by content, so that
they and the run directory may move; the rest by the values in RUN_DIR/config.yaml. Invariant: what a completion, its
reward or its place in a batch depends on can't change within a run; whatever only says how fast, how long, where and
with which step size may. Does not own: reading a configuration, where a run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from asyncdapo.config.config import Config, load_recorded, to_dict
from asyncdapo.disk import sha256_of
from asyncdapo.errors import ConfigError, UserError
from asyncdapo.model.files import ModelFiles, TokenizerFiles
from asyncdapo.plugins import is_plugin, plugin_digest
from asyncdapo.prompts.mixture import whole_numbers
from asyncdapo.replay.ledger.audit import CONFIG_FILE

IDENTITY_FILE = "identity.json"
IDENTITY_SCHEMA = 1

FIXED_SECTIONS = ("prompts", "environment", "reward", "filter", "loss")
FIXED_KEYS = {
    "run.seed",
    "rollout.group_size",
    "rollout.max_response_length",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.top_k",
    "replay.prompts_per_step",
    "replay.max_staleness",
}
FREE_KEYS = {
    "prompts.path",
    "prompts.eval_path",
    "prompts.epochs",
    "environment.processes",
    "environment.concurrency",
    "environment.max_seconds",
    "environment.step_timeout_s",
    "environment.retries",
    "environment.oversubscribe",
    "environment.python",
    "reward.processes",
    "reward.concurrency",
    "reward.retries",
    "reward.timeout_s",
    "reward.max_failure_ratio",
}
"""Keys of fixed sections that may change: where the data is (its digest counts), how long the run is, and how
patient it is with its verifier or environment."""

EXTENSIONS = ("prompts.task", "environment.path", "loss.variant", "loss.advantage", "loss.agg", "rollout.engine")
"""Keys that may name something of the user's, whose source can't change within a run."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """RUN_DIR/identity.json."""

    schema: int = IDENTITY_SCHEMA
    model: dict[str, str]
    """Digest of each file; of a model that is still to be downloaded its id on the hub."""
    reference: dict[str, str] = {}
    """The same of the reference model; empty without one."""
    tokenizer: dict[str, str] = {}
    """The same of `model.tokenizer`, or of the model's own where its chat template counts; else the model's digest has
    to do. Empty in runs of before."""
    data: dict[str, str]
    """Digest of each file that a key of `prompts` names; none for a task that makes its questions."""
    extensions: dict[str, str] = {}
    """Digest of the source that each key of EXTENSIONS names, where it is the user's. Empty in older runs."""


def identify(config: Config) -> Identity:
    """Reads the files that `config` names. Raises ConfigError for one that can't be read."""
    reference = config.model.reference_files
    return Identity(
        model=_file_digests(config.model.files),
        reference=_file_digests(reference) if reference else {},
        tokenizer=_tokenizer_digests(config),
        data={name: _data_digest(key, path) for name, (key, path) in _data_files(config).items()},
        extensions={
            key: plugin_digest(key, name, config.environment.python if key == "environment.path" else None)
            for key, name in _extensions(config).items()
        },
    )


def to_json(identity: Identity) -> bytes:
    return msgspec.json.format(msgspec.json.encode(identity), indent=2) + b"\n"


def check_same_run(run_dir: Path, config: Config, identity: Identity) -> Config:
    """The configuration of the run's last launch. Raises ConfigError that lists whatever makes this another run."""
    with _needed(run_dir / CONFIG_FILE, "config.1.yaml, if there is one, has the values of a launch before"):
        recorded, gone = load_recorded(run_dir / CONFIG_FILE)
    with _needed(run_dir / IDENTITY_FILE, "that of any run with the same model and data is the same"):
        known = msgspec.json.decode((run_dir / IDENTITY_FILE).read_bytes(), type=Identity)
    for problem in unknown_keys(run_dir / CONFIG_FILE, gone):
        print(f"not used: {problem}")
    different = [*different_files(known, identity, config), *_different_values(recorded, config)]
    if different:
        problem = f"holds a run that differs in {', '.join(different)}"
        fix = f"choose another run.dir, or the values of that run, as {CONFIG_FILE} and {IDENTITY_FILE} there have them"
        raise ConfigError("run.dir", problem, str(run_dir), fix)
    return recorded


def unknown_keys(recorded: Path, gone: Sequence[str]) -> list[str]:
    """A message for keys recorded by another version; empty if there are none."""
    return [f"{recorded}: {', '.join(gone)}: unknown to this version of asyncdapo"] if gone else []


@contextmanager
def _needed(path: Path, where_else: str) -> Iterator[None]:
    """Wraps the reading of a file that resuming needs. `where_else`: what can take its place."""
    try:
        yield
    except (UserError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " · ".join(str(error).splitlines())
        problem = f"holds a run that can't be resumed: {path.name}: {reason}"
        fix = f"put a sound {path.name} there: {where_else}; or choose another run.dir"
        raise ConfigError("run.dir", problem, str(path.parent), fix) from error


def different_files(known: Identity, identity: Identity, config: Config) -> Iterator[str]:
    """Which key's files are others than they were. A model that was not yet downloaded at the first launch is known by
    its id."""
    models = (
        ("model.path", config.model.path, known.model, identity.model),
        ("model.reference", config.model.reference, known.reference, identity.reference),
    )
    for key, path, there, now in models:
        if changed := _different(there, {"id": path} if "id" in there else now):
            yield f"{key} (other {', '.join(changed)})"
    there, now = known.tokenizer, identity.tokenizer
    if there and (changed := _different(there, {"id": config.model.tokenizer_files.path} if "id" in there else now)):
        yield f"{config.model.tokenizer_files.key} (other {', '.join(changed)})"
    for key in _different(known.data, identity.data):
        yield f"{key} (other data)"
    for key, digest in identity.extensions.items():
        if known.extensions.get(key, digest) != digest:
            yield f"{key} (other source)"


def _different_values(recorded: Config, config: Config) -> Iterator[str]:
    there, now = _fixed_values(recorded), _fixed_values(config)
    for key in _different(there, now):
        yield f"{key} ({there.get(key)} in the run, {now.get(key)} here)"


def _fixed_values(config: Config) -> dict[str, object]:
    values = {
        f"{section}.{key}": value
        for section, entries in to_dict(config).items()
        for key, value in entries.items()
        if section in FIXED_SECTIONS or f"{section}.{key}" in FIXED_KEYS
    }
    if config.prompts.path and not config.prompts.eval_path:  # they say which rows are left for training
        values["the larger of eval.num_prompts and eval.num_greedy_prompts"] = config.eval.num_held_out
    values["model.tokenizer"] = "the model's own" if config.model.tokenizer is None else "another"
    if len(config.prompts.weights) > 1:
        values["the weights of prompts.path"] = whole_numbers(list(config.prompts.weights.values()))
    for key in ("reward.verifier", *EXTENSIONS):  # files may move; a verifier's may be fixed, the others' are digested
        if key in values:
            where, colon, function = str(values[key]).rpartition(":")
            values[key] = f"{Path(where).name}{colon}{function}"
    return {key: value for key, value in values.items() if key not in FREE_KEYS}


def _extensions(config: Config) -> dict[str, str]:
    """Keys whose value says where something of the user's is."""
    values = (
        (f"{section}.{key}", value) for section, entries in to_dict(config).items() for key, value in entries.items()
    )
    keys = set(EXTENSIONS) - (set() if config.environment.has_source else {"environment.path"})
    return {key: value for key, value in values if key in keys and value and is_plugin(value)}


def _different(there: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [key for key in {**there, **now} if there.get(key) != now.get(key)]


def _tokenizer_digests(config: Config) -> dict[str, str]:
    if config.model.tokenizer is None and not config.prompts.chat_template:
        return {}
    return _file_digests(config.model.tokenizer_files)


def _file_digests(files: ModelFiles | TokenizerFiles) -> dict[str, str]:
    try:
        return files.digests()
    except OSError as error:
        raise ConfigError(files.key, f"can't be read ({error.strerror})", files.path) from error


def _data_files(config: Config) -> dict[str, tuple[str, str]]:
    """Key and path of each data file, by what a message calls it. Those of a mixture go by their number, since they may
    move."""
    paths = list(config.prompts.weights)
    names = ["prompts.path", *(f"prompts.path, file {number}" for number in range(2, len(paths) + 1))]
    files = {name: ("prompts.path", path) for name, path in zip(names, paths, strict=False)}
    if config.prompts.eval_path:
        files["prompts.eval_path"] = ("prompts.eval_path", config.prompts.eval_path)
    return files


def _data_digest(key: str, path: str) -> str:
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise ConfigError(key, f"can't be read ({error.strerror})", path) from error
