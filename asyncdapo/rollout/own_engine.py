"""A user's engine: a class that implements the protocol of `engine.py`, checked before any process starts.

It is made as `YourEngine(model_path, config, *, max_prompt_length, max_context, stop_token_ids)`. `config` is the
RolloutConfig; `max_context` bounds prompt and response together; `stop_token_ids` is None if the model's own files name
them. In addition to the protocol it has `device`, the torch device that new weights are copied to. They reach
`load_weights` as tensors by Hugging Face names, as for the torch engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncdapo.errors import ConfigError
from asyncdapo.plugins import check_call, load_plugin
from asyncdapo.rollout.engine import Engine

KEY = "rollout.engine"
NEEDED = ("device", *(name for name in vars(Engine) if not name.startswith("_")))


def engine_class(name: str) -> Callable[..., Any]:
    """The class that `rollout.engine` names. Raises ConfigError: no such class, wrong constructor, missing methods."""
    own = load_plugin(KEY, name)
    form = "(model_path, config, *, max_prompt_length, max_context, stop_token_ids)"
    check_call(KEY, name, own, form, "model", None, max_prompt_length=1, max_context=2, stop_token_ids=None)
    if missing := [method for method in NEEDED if not hasattr(own, method)]:
        raise ConfigError(KEY, f"has no {', '.join(missing)}", name, "the protocol is asyncdapo.rollout.engine:Engine")
    return own
