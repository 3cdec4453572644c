"""From a model's files to a policy that is ready to compute, or to be trained.

    config ──▶ Hugging Face causal LM ──▶ checkpointing, compile ──▶ shards ──▶ filled ──▶ checked on the device and
               without dropout, our       (`blocks`)                (`sharding`)    ▲        in the dtype that it
               attention, no memory                                                 │        computes in (`policy`)
                                                         each rank's rows of the files (`storage/slices`)

The model is made on the meta device, so no rank ever holds more than its own shard. What Hugging Face has to convert
while it loads (pickles, joined or renamed tensors, buffers that are stored) is loaded whole by each rank.

Does not own: what the files say (`model/files`), checkpoints of a run.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from asyncdapo.errors import ConfigError
from asyncdapo.learner.attention.attention import NAME
from asyncdapo.learner.config import LearnerConfig
from asyncdapo.learner.model.blocks import compiles, settle_blocks
from asyncdapo.learner.model.fusing import fuse
from asyncdapo.learner.model.names import check_names, once
from asyncdapo.learner.model.policy import Policy, check_policy
from asyncdapo.learner.model.sharding import named_shards, shard
from asyncdapo.learner.storage.slices import read_slices
from asyncdapo.model.files import ModelFiles
from asyncdapo.model.location import KEY

WEIGHTS_DTYPE = torch.float32
"""Of weights, gradients and optimizer states, whatever passes compute in."""
GENERATION = "generation_config.json"


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
    compiled, directory = compiles(config.compile, device), files.fetch()
    model = _in_slices(files, device) or load_model(directory, device, files.key)
    if trained:
        check_names(model, files)
    else:
        _round(model.requires_grad_(False), dtype)
    checkpointing = config.activation_checkpointing if trained else "none"
    if device.type == "cpu" and not compiled:
        fuse(model)
    settle_blocks(model, device, compile=compiled, checkpointing=checkpointing)
    policy = Policy(model, temperature, device)
    offload = config.offload == "optimizer"
    shard(policy, mesh, dtype=dtype, reshard_after_forward=config.reshard_after_forward, offload=offload)
    if any(parameter.is_meta for parameter in policy.parameters()):
        _fill(policy, files, torch.device("cpu") if offload else device)
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


def _in_slices(files: ModelFiles, device: torch.device) -> PreTrainedModel | None:
    """The model without memory for its weights, where each of them stands in the files as it is; else none. Buffers are
    made as Hugging Face makes them, on the device."""
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(files.directory)
            model = AutoModelForCausalLM.from_config(config, dtype=WEIGHTS_DTYPE, attn_implementation=NAME)
    except (OSError, ValueError, KeyError):
        return None  # `load_model` says why
    live = model.state_dict(keep_vars=True)
    weights = once(live)
    if any(not isinstance(weight, nn.Parameter) for weight in weights.values()):
        return None
    if files.tensors.keys() & live.keys() != weights.keys():  # something else is stored, or a tied tensor twice
        return None
    if (files.directory / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(files.directory)
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        for name, buffer in own.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if own:
            model._init_weights(module)  # of weights on the meta device it changes nothing
    return model.eval()


def _fill(policy: Policy, files: ModelFiles, device: torch.device) -> None:
    """Memory for this rank's shards, and what the files have for them."""
    policy._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    read_slices(named_shards(policy), files)


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """The parameters to this dtype; tied ones stay tied, buffers (such as the frequencies of the rotation) as they
    are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
