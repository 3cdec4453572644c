"""W&B: whether there is a login, and so whether a run goes online.

In: `metrics.wandb`, environment variables, the netrc file. Out: the mode of a run. Nothing of W&B is imported.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from asyncdapo.errors import ConfigError
from asyncdapo.metrics.config import MetricsConfig

Mode = Literal["online", "offline", "disabled"]

DEFAULT_URL = "https://api.wandb.ai"


def choose_mode(config: MetricsConfig, environ: Mapping[str, str] = os.environ) -> Mode:
    """`auto` is online when logged in, offline otherwise; W&B's own WANDB_MODE overrules `auto`. Disabled without the
    sink.

    Raises ConfigError for `online` without a login, since W&B would prompt for one."""
    if "wandb" not in config.sinks:
        return "disabled"
    if config.wandb == "online" and not logged_in(environ):
        raise ConfigError("metrics.wandb", "needs a login to W&B", "online", "run `wandb login`, or say offline")
    if config.wandb != "auto":
        return config.wandb
    wished = environ.get("WANDB_MODE", "")
    if wished in ("offline", "disabled"):
        return wished
    return "online" if logged_in(environ) else "offline"


def logged_in(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether there is an API key, in WANDB_API_KEY or in the netrc file for the server in use."""
    if environ.get("WANDB_API_KEY"):
        return True
    path = environ.get("NETRC") or str(Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    host = urlsplit(environ.get("WANDB_BASE_URL") or DEFAULT_URL).hostname or ""
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
