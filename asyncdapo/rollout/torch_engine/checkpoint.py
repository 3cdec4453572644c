"""Checkpoint: a Hugging Face directory becomes a `ModelShape`, rotary frequencies, stop ids and named tensors.

In: a directory (or hub id) with `config.json` and safetensors, whole or sharded. Out: values that name nothing of
Hugging Face. What the engine can't compute exactly is refused here, by name, and nothing is guessed.
Does not own: the layout in which weights are computed with (`weights.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import WHOLE, ModelFiles
from asyncdapo.model.shape import MODEL_TYPES, Shape, read_shape
from asyncdapo.model.stop_tokens import read_config, stop_token_ids

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose frequencies don't depend on the length of the sequence."""


@dataclass(frozen=True, kw_only=True)
class ModelShape(Shape):
    """What the engine needs to know besides the sizes."""

    max_positions: int
    norm_eps: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a directory says about its model, without the weights."""

    files: ModelFiles
    shape: ModelShape
    frequencies_P: torch.Tensor
    """Angle per position of each of the P = head_dim / 2 rotated pairs, float32."""
    rotation_scale: float
    """Factor on the rotated queries and keys (YaRN's attention factor); 1 elsewhere."""
    stop_token_ids: frozenset[int]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights by their Hugging Face names. Raises ConfigError for unreadable files."""
        weights: dict[str, torch.Tensor] = {}
        if not (files := self.files.safetensors):
            raise ConfigError(self.files.key, f"has no {WHOLE}", self.files.path, "save the model as safetensors")
        for file in files:
            try:
                weights.update(load_file(file))
            except (SafetensorError, OSError) as error:
                raise ConfigError(self.files.key, f"can't read {file.name}: {error}", self.files.path) from error
        return weights


def read_checkpoint(model_path: str) -> Checkpoint:
    """Raises ConfigError for a directory that isn't there or a model that this engine doesn't compute."""
    files = ModelFiles(model_path)
    files.fetch()
    config = read_config(files)
    _refuse_unknown(config, model_path)
    frequencies_P, rotation_scale = _frequencies(config, model_path)
    return Checkpoint(
        files=files,
        shape=_shape(config),
        frequencies_P=frequencies_P,
        rotation_scale=rotation_scale,
        stop_token_ids=stop_token_ids(files, config),
    )


def _refuse_unknown(config: PretrainedConfig, model_path: str) -> None:
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(
            "model.path",
            f"the torch engine doesn't know the model type {config.model_type!r}",
            model_path,
            f"it computes {', '.join(MODEL_TYPES)}",
        )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"} or _sliding_window(config):
        raise ConfigError("model.path", "the torch engine has no sliding window attention", model_path)
    if config.hidden_act != "silu":
        raise ConfigError("model.path", f"the torch engine has no activation {config.hidden_act!r}", model_path)


def _sliding_window(config: PretrainedConfig) -> int | None:
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def _shape(config: PretrainedConfig) -> ModelShape:
    sizes = read_shape(config.to_dict())
    assert sizes is not None, f"{config.model_type} has no formula for its size"
    return ModelShape(**asdict(sizes), max_positions=config.max_position_embeddings, norm_eps=config.rms_norm_eps)


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _frequencies(config: PretrainedConfig, model_path: str) -> tuple[torch.Tensor, float]:
    """Rotary frequencies: Su et al. 2021 (default), and the scaled variants as Hugging Face computes them."""
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            "model.path",
            f"the torch engine doesn't know the rope_parameters {rope}",
            model_path,
            f"it computes whole-head rotations of type {', '.join(ROPE_TYPES)}",
        )
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    dims_P = torch.arange(0, _head_dim(config), 2, dtype=torch.float32)
    return 1.0 / rope["rope_theta"] ** (dims_P / _head_dim(config)), 1.0
