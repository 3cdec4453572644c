"""The engine of a rollout worker, and its end of the weight group: the one place that knows which belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from asyncdapo.config import Config
from asyncdapo.rollout.engine import Engine
from asyncdapo.rollout.torch_engine.engine import TorchEngine
from asyncdapo.rollout.vllm_engine.engine import VllmEngine
from asyncdapo.weights.ends import TRANSFER, WORKER_END, End, EngineEnd, LocalEnd


@dataclass(frozen=True)
class Fitted:
    """An engine that isn't started yet, its end, and the processes that it has started by now."""

    engine: Engine
    end: End
    pids: Callable[[], list[int]]


def make_engine(config: Config, memory_fraction: float) -> Fitted:
    """What `rollout.engine` names. `memory_fraction`: share of a GPU that it may take."""
    timeout_s, max_prompt_length = config.weights.timeout_s, config.prompts.max_prompt_length
    if config.rollout.engine == "torch":
        torch = TorchEngine(config.model.path, config.rollout, max_prompt_length=max_prompt_length)
        return Fitted(torch, LocalEnd(lambda: torch.device, timeout_s), list)
    vllm = VllmEngine(
        config.model.path,
        config.rollout,
        max_prompt_length=max_prompt_length,
        transfer=TRANSFER,
        worker_extension=WORKER_END,
        memory_fraction=memory_fraction,
    )
    return Fitted(vllm, EngineEnd(vllm.rpc, timeout_s, vllm.paused), vllm.pids)
