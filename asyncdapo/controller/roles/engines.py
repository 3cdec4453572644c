"""The engine of a rollout worker, and its end of the weight group: the one place that knows which belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncdapo.config.config import Config
from asyncdapo.model.config import ModelConfig
from asyncdapo.model.stop_tokens import stop_token_ids
from asyncdapo.plugins import is_plugin
from asyncdapo.rollout.engine import Engine
from asyncdapo.rollout.own_engine import engine_class
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine
from asyncdapo.rollout.vllm_engine.vllm_engine import VllmEngine
from asyncdapo.weights.receivers import TRANSFER, WORKER_RECEIVER, EngineReceiver, LocalReceiver, Receiver


@dataclass(frozen=True)
class Fitted:
    """An engine that isn't started yet, its end, and the processes that it has started by now."""

    engine: Engine
    end: Receiver
    pids: Callable[[], list[int]]


def make_engine(config: Config, memory_fraction: float) -> Fitted:
    """What `rollout.engine` names. `memory_fraction`: share of a GPU that it may take."""
    name, timeout_s = config.rollout.engine, config.weights.timeout_s
    bounds: dict[str, Any] = {
        "max_prompt_length": config.longest_prompt,
        "max_context": config.max_context,
        "stop_token_ids": _stop_token_ids(config.model),
    }
    if name == "vllm":
        vllm = VllmEngine(
            config.model.path,
            config.rollout,
            **bounds,
            transfer=TRANSFER,
            worker_extension=WORKER_RECEIVER,
            memory_fraction=memory_fraction,
        )
        return Fitted(vllm, EngineReceiver(vllm.rpc, timeout_s), vllm.pids)
    make = engine_class(name) if is_plugin(name) else TorchEngine
    engine = make(config.model.path, config.rollout, **bounds)
    return Fitted(engine, LocalReceiver(lambda: engine.device, timeout_s), list)


def _stop_token_ids(model: ModelConfig) -> list[int] | None:
    """None leaves them to the engine, which knows those of the model and of the tokenizer beside it."""
    if model.tokenizer is None:
        return None
    model.files.fetch()
    return sorted(stop_token_ids(model.files, model.tokenizer_files))
