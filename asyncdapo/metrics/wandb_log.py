"""Weights & Biases: the same names as metrics.jsonl, on an axis of `step`.

In: the metrics of each step. Out: a W&B run with its files under RUN_DIR/wandb, and RUN_DIR/wandb.id, with which a
resumed run continues it. W&B deletes nothing: for a step that was undone and trained again it has both points. All work
of W&B is done in a thread of its own, so `log` costs the run only a queue entry (import and start take about two
seconds, an upload takes any time). It never prompts. In place of W&B's own output there is one line: the run's address,
or the command that uploads it. Does not own: the record of the run (metrics.jsonl).

Failures: if `auto` can't reach the server, it continues offline and says so. Any other error is raised at the next
`log` or at `close`.
"""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal
from urllib.parse import urlsplit

from asyncdapo.errors import ConfigError, RunError
from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.samples import COLUMNS, Sample

Mode = Literal["online", "offline", "disabled"]

DEFAULT_URL = "https://api.wandb.ai"
FINISH_TIMEOUT_S = 60.0
ID_FILE = "wandb.id"

logger = logging.getLogger("metrics")


def choose_mode(config: MetricsConfig, environ: Mapping[str, str] = os.environ) -> Mode:
    """`auto` is online when logged in, offline otherwise; W&B's own WANDB_MODE overrules `auto`.

    Raises ConfigError for `online` without a login, since W&B would prompt for one."""
    if config.wandb == "online" and not logged_in(environ):
        raise ConfigError("metrics.wandb", "needs a login to W&B", "online", "run `wandb login`, or say offline")
    if config.wandb != "auto":
        return config.wandb
    wished = environ.get("WANDB_MODE", "")
    if wished in ("offline", "disabled"):
        return wished
    return "online" if logged_in(environ) else "offline"


def logged_in(environ: Mapping[str, str]) -> bool:
    """Whether there is an API key, in WANDB_API_KEY or in the netrc file for the server in use."""
    if environ.get("WANDB_API_KEY"):
        return True
    path = environ.get("NETRC") or str(Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    host = urlsplit(environ.get("WANDB_BASE_URL") or DEFAULT_URL).hostname or ""
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbLog:
    """One W&B run. `settings`: the run's configuration, shown beside its curves."""

    def __init__(
        self, run_dir: Path, config: MetricsConfig, mode: Mode, name: str, settings: Mapping[str, Any]
    ) -> None:
        arguments = {
            "project": config.wandb_project,
            "name": name,
            "id": run_id(run_dir),
            "resume": "allow",
            "dir": str(run_dir),
            "config": dict(settings),
            "allow_val_change": True,
        }
        self._lines: SimpleQueue[dict[str, float] | Sequence[Sample] | None] = SimpleQueue()
        self._error: Exception | None = None
        self._thread = Thread(target=self._write, args=(arguments, mode, config.wandb == "auto"), daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Queue one step. Raises RunError if W&B has failed."""
        self._raise_failure()
        self._lines.put(dict(metrics))

    def log_samples(self, samples: Sequence[Sample]) -> None:
        """Queue a table of one step's samples, at least one. Raises RunError if W&B has failed."""
        self._raise_failure()
        self._lines.put(samples)

    def close(self) -> None:
        """Wait for the upload, at most a minute. Raises RunError if W&B has failed."""
        self._lines.put(None)
        self._thread.join(FINISH_TIMEOUT_S)
        self._raise_failure()
        if self._thread.is_alive():
            logger.warning("W&B is still uploading after %g s; `wandb sync` sends the rest", FINISH_TIMEOUT_S)

    def _raise_failure(self) -> None:
        if self._error:
            raise RunError(f"W&B: {self._error} (metrics.wandb=offline goes without its server)") from self._error

    def _write(self, arguments: Mapping[str, Any], mode: Mode, may_go_offline: bool) -> None:
        """The thread's main. Nobody waits for it, so its error is kept for the next caller."""
        try:
            self._upload(arguments, mode, may_go_offline)
        except Exception as error:  # noqa: BLE001 - raised by `_raise_failure`
            self._error = error

    def _upload(self, arguments: Mapping[str, Any], mode: Mode, may_go_offline: bool) -> None:
        """Open the run, and write lines until there are no more."""
        import wandb

        def start(chosen: Mode) -> Any:
            quiet = wandb.Settings(silent=True, console="off")
            return wandb.init(mode=chosen, settings=quiet, **arguments)

        run = open_run(start, mode, may_go_offline, wandb.Error)
        logger.info(describe(None if run.offline else run.url, run.dir))
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        for line in iter(self._lines.get, None):
            if isinstance(line, dict):
                run.log(line)
            else:
                table = wandb.Table(columns=list(COLUMNS), data=[sample.row() for sample in line])
                run.log({"step": line[0].step, "samples": table})
        run.finish()
        wandb.teardown()  # end its process now, not when this one ends


def describe(url: str | None, files_dir: str) -> str:
    """Where to see the run: its address, or the upload command if it is offline. `files_dir`: W&B's folder of files."""
    return f"W&B: {url}" if url else f"W&B is offline: wandb sync {os.path.relpath(Path(files_dir).parent)} uploads it"


def run_id(run_dir: Path) -> str:
    """The id of this run directory at W&B, made at the first launch."""
    path = run_dir / ID_FILE
    known = path.read_text().strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        path.write_text(known + "\n")
    return known


def open_run(start: Callable[[Mode], Any], mode: Mode, may_go_offline: bool, error_type: type[Exception]) -> Any:
    """Start a run in `mode`, or offline if the server can't be reached and `mode` allows it."""
    try:
        return start(mode)
    except error_type as error:
        if mode != "online" or not may_go_offline:
            raise
        logger.warning("W&B continues offline: %s", error)
        return start("offline")
