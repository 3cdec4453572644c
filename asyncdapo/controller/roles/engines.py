"""The engine of a rollout worker, and its end of the weight group: the one place that knows which belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from asyncdapo.config.config import Config
from asyncdapo.model.config import ModelConfig
from asyncdapo.plugins import is_plugin
from asyncdapo.rollout.engine import Engine
from asyncdapo.rollout.own_engine import engine_class
from asyncdapo.rollout.stop_tokens import read_config, stop_token_ids
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
    timeout_s, max_prompt_length, max_context = config.weights.timeout_s, config.longest_prompt, config.max_context
    stop = _stop_token_ids(config.model)
    if config.rollout.engine == "torch":
        torch = TorchEngine(
            config.model.path,
            config.rollout,
            max_prompt_length=max_prompt_length,
            max_context=max_context,
            stop_token_ids=stop,
        )
        return Fitted(torch, LocalReceiver(lambda: torch.device, timeout_s), list)
    if is_plugin(config.rollout.engine):
        own = engine_class(config.rollout.engine)(
            config.model.path, config.rollout, max_prompt_length=max_prompt_length, stop_token_ids=stop
        )
        return Fitted(own, LocalReceiver(lambda: own.device, timeout_s), list)
    vllm = VllmEngine(
        config.model.path,
        config.rollout,
        max_prompt_length=max_prompt_length,
        max_context=max_context,
        transfer=TRANSFER,
        worker_extension=WORKER_RECEIVER,
        memory_fraction=memory_fraction,
        stop_token_ids=stop,
    )
    return Fitted(vllm, EngineReceiver(vllm.rpc, timeout_s), vllm.pids)


def _stop_token_ids(model: ModelConfig) -> list[int] | None:
    """None leaves them to the engine, which knows those of the model and of the tokenizer beside it."""
    if model.tokenizer is None:
        return None
    model.files.fetch()
    return sorted(stop_token_ids(model.files, read_config(model.files), model.tokenizer_files))
