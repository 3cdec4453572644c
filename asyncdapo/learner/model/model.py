"""From a model's files to a policy that is ready to compute, or to be trained.

    files ──▶ Hugging Face causal LM ──▶ checkpointing, compile ──▶ shards ──▶ checked on the device and in the dtype
              without dropout, our       (`blocks`)                (`sharding`)   that it computes in (`policy`)
              attention

Does not own: what the files say (`model/files`), checkpoints of a run.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncdapo.errors import ConfigError
from asyncdapo.learner.config import LearnerConfig
from asyncdapo.learner.model.attention import NAME
from asyncdapo.learner.model.blocks import compiles, settle_blocks
from asyncdapo.learner.model.names import check_names
from asyncdapo.learner.model.policy import Policy, check_policy
from asyncdapo.learner.model.sharding import shard
from asyncdapo.model.files import ModelFiles
from asyncdapo.model.location import KEY

WEIGHTS_DTYPE = torch.float32
"""Of weights, gradients and optimizer states, whatever passes compute in."""


def device_of(config: LearnerConfig) -> torch.device:
    """Where a rank computes. Raises ConfigError where there is no GPU for it."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("learner.device", "there is no GPU here", config.device, "use auto or cpu")
    if config.offload != "none" and not has_gpu:
        problem = "needs GPUs: on a CPU everything is in host memory already"
        raise ConfigError("learner.offload", problem, config.offload, "none")
    return torch.device("cuda" if has_gpu and config.device != "cpu" else "cpu")


def load_policy(
    files: ModelFiles,
    mesh: DeviceMesh,
    config: LearnerConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    temperature: float,
    trained: bool,
) -> Policy:
    """The model, sharded on the mesh; passes compute in `dtype`. One that isn't `trained` is rounded to it and has no
    gradient. Every rank has to call it. Raises ConfigError for a model that can't be used, or not with this config."""
    compiled = compiles(config.compile, device)
    model = load_model(files.fetch(), device, files.key)
    if trained:
        check_names(model, files)
    else:
        _round(model.requires_grad_(False), dtype)
    settle_blocks(model, compile=compiled, checkpointing=config.activation_checkpointing if trained else "none")
    policy = Policy(model, temperature)
    offload = config.offload == "optimizer"
    shard(policy, mesh, dtype=dtype, reshard_after_forward=config.reshard_after_forward, offload=offload)
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():  # its import takes two seconds
        check_policy(policy, files.key)
    return policy


def load_model(directory: Path, device: torch.device, key: str = KEY) -> PreTrainedModel:
    """The model of a directory in Hugging Face format, float32, without dropout. Raises ConfigError, for the config's
    `key`, when it can't be loaded."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=WEIGHTS_DTYPE, attn_implementation=NAME, output_loading_info=True
        )
        model, report = loaded
    except (OSError, ValueError) as error:
        raise ConfigError(key, f"can't be loaded: {error}", str(directory)) from error
    except KeyError as error:
        raise ConfigError(key, f"can't be trained packed: it knows no attention {error}", str(directory)) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(key, f"lacks {len(report['missing_keys'])} weights ({missing}…)", str(directory))
    return model.eval().to(device)


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """The parameters to this dtype; tied ones stay tied, buffers (such as the frequencies of the rotation) as they
    are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
