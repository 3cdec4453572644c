"""What an evaluation is made of: what its directory is held to when the same command is given again.

    OUT/eval.json      digests of model and data, the values that an answer depends on, how many answers are asked for
        config.yaml    the configuration in force, every key
        launch.lock    held by the command that works here

In: the configuration of an evaluation. Out: OUT, which is this process's as long as the context lasts. Raises
ConfigError for a directory of something else, and for one of another evaluation, with all that differs. Invariant: an
evaluation only grows: answers that are there stay part of it. A directory without answers may become any evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from asyncdapo.config.config import Config, to_dict, to_yaml
from asyncdapo.controller.checks.identity import Identity, different_files, identify
from asyncdapo.controller.checks.preflight import FORMER_LAUNCH_S, LOCK_FILE, lock_directory, usable
from asyncdapo.controller.eval.answers import ANSWERS_FILE, METRICS_FILE
from asyncdapo.controller.process.roster import end_survivors
from asyncdapo.disk import disk_errors, replace_file
from asyncdapo.errors import ConfigError
from asyncdapo.replay.ledger.audit import CONFIG_FILE

KEY = "--out"
RECORD_FILE = "eval.json"
RECORD_SCHEMA = 1

FIXED_KEYS = {
    "run.seed",
    "rollout.engine",
    "rollout.dtype",
    "rollout.engine_args",
    "rollout.max_response_length",
    "eval.temperature",
    "eval.top_p",
    "eval.top_k",
    "reward.verifier",
}
FREE_PROMPT_KEYS = {"path", "eval_path", "epochs", "max_attempts"}
"""Keys of `prompts` that may change: the data's digest counts, not where it is."""
GROWING_KEYS = ("num_prompts", "num_samples", "num_greedy_prompts")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """OUT/eval.json."""

    schema: int = RECORD_SCHEMA
    step: int
    """Version of the weights."""
    files: Identity
    values: dict[str, Any]
    asked: dict[str, int]

    @classmethod
    def of(cls, config: Config, step: int) -> Record:
        """Reads the files that `config` names."""
        values = {
            f"{section}.{key}": value
            for section, entries in to_dict(config).items()
            for key, value in entries.items()
            if f"{section}.{key}" in FIXED_KEYS or (section == "prompts" and key not in FREE_PROMPT_KEYS)
        }
        where, colon, function = config.reward.verifier.rpartition(":")
        values["reward.verifier"] = f"{Path(where).name}{colon}{function}"  # its file may move
        if config.prompts.task == "file" and config.prompts.path != config.prompts.eval_path:
            values["rows held out"] = config.eval.num_held_out
        asked = {key: getattr(config.eval, key) for key in GROWING_KEYS}
        return cls(step=step, files=identify(config), values=values, asked=asked)

    def differences(self, now: Record, config: Config) -> Iterator[str]:
        """What makes `now`, which is of `config`, another evaluation than this one."""
        yield from different_files(self.files, now.files, config)
        for key in self.values | now.values:
            if self.values.get(key) != now.values.get(key):
                yield f"{key} ({self.values.get(key)} there, {now.values.get(key)} here)"
        for key, there in self.asked.items():
            if there > now.asked[key]:
                yield f"eval.{key} ({there} there, {now.asked[key]} here: an evaluation only grows)"


@contextmanager
def hold_directory(config: Config, step: int) -> Iterator[bool]:
    """Make OUT this evaluation's and hold it. Gives whether all its answers are there."""
    out, now = Path(config.run.dir), Record.of(config, step)
    with usable(config.run.dir, KEY):
        _check_usable(out)
    with lock_directory(config.run.dir, KEY):
        end_survivors(out, FORMER_LAUNCH_S)
        known = _read(out)
        if known and (different := list(known.differences(now, config))) and _has_answers(out):
            problem = f"holds an evaluation that differs in {', '.join(different)}"
            raise ConfigError(KEY, problem, config.run.dir, "choose another --out, or the values of that one")
        with disk_errors(out):
            if known and known.asked != now.asked:  # before the record says so, or those of fewer pass for all
                (out / METRICS_FILE).unlink(missing_ok=True)
            if known != now:
                replace_file(out / RECORD_FILE, msgspec.json.format(msgspec.json.encode(now)) + b"\n")
            replace_file(out / CONFIG_FILE, to_yaml(config).encode())
        yield _is_complete(out)


def _check_usable(out: Path) -> None:
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if RECORD_FILE not in names and names - {LOCK_FILE, f".{RECORD_FILE}.new"}:
        raise ConfigError(KEY, "is in use by something else", str(out), "choose another")


def _read(out: Path) -> Record | None:
    """What stands there; None where nothing does."""
    path = out / RECORD_FILE
    try:
        known = msgspec.json.decode(path.read_bytes(), type=Record) if path.exists() else None
    except (OSError, ValueError) as error:
        raise ConfigError(KEY, f"{path.name} can't be read: {error}", str(out), "choose another --out") from error
    if known and known.schema != RECORD_SCHEMA:
        problem = f"holds an evaluation of schema {known.schema}, this program reads {RECORD_SCHEMA}"
        raise ConfigError(KEY, problem, str(out), "choose another --out")
    return known


def _is_complete(out: Path) -> bool:
    """Whether every answer is there, and judged."""
    metrics = out / METRICS_FILE
    try:
        return metrics.exists() and not msgspec.json.decode(metrics.read_bytes()).get("eval/failed_answers")
    except (OSError, ValueError):
        return False


def _has_answers(out: Path) -> bool:
    path = out / ANSWERS_FILE
    return path.exists() and path.stat().st_size > 0
