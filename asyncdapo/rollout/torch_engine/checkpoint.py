"""Checkpoint: a Hugging Face directory becomes a `ModelShape`, rotary frequencies, stop ids and named tensors.

In: a directory (or hub id) with `config.json` and safetensors, whole or sharded. Out: values that name nothing of
Hugging Face. What the engine can't compute exactly is refused here, by name, and nothing is guessed.
Does not own: the layout in which weights are computed with (`weights.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import WHOLE, ModelFiles
from asyncdapo.model.shape import MODEL_TYPES, SIZES, Shape, read_shape
from asyncdapo.model.stop_tokens import stop_token_ids
from asyncdapo.model.type_defaults import with_defaults

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
    directory = files.fetch()
    config = with_defaults(files.config or {})
    _refuse_unknown(config, model_path)
    shape = _shape(config, model_path)
    frequencies_P, rotation_scale = _frequencies(config, shape, directory)
    return Checkpoint(
        files=files,
        shape=shape,
        frequencies_P=frequencies_P,
        rotation_scale=rotation_scale,
        stop_token_ids=stop_token_ids(files),
    )


def _refuse_unknown(config: Mapping[str, Any], model_path: str) -> None:
    if config.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            "model.path",
            f"the torch engine doesn't know the model type {config.get('model_type')!r}",
            model_path,
            f"it computes {', '.join(MODEL_TYPES)}",
        )
    rope = config["rope_parameters"]
    if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"} or _sliding_window(config):
        problem, fix = "the torch engine has no sliding window attention", ""
    elif config["hidden_act"] != "silu":
        problem, fix = f"the torch engine has no activation {config['hidden_act']!r}", ""
    elif rope["rope_type"] not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        problem = f"the torch engine doesn't know the rope_parameters {rope}"
        fix = f"it computes whole-head rotations of type {', '.join(ROPE_TYPES)}"
    else:
        return
    raise ConfigError("model.path", problem, model_path, fix)


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    return config.get("sliding_window") if config.get("use_sliding_window", True) else None


def _shape(config: Mapping[str, Any], model_path: str) -> ModelShape:
    sizes = read_shape(config)
    if sizes is None:
        missing = ", ".join(sorted(SIZES - config.keys()))
        raise ConfigError("model.path", f"config.json lacks {missing}", model_path)
    return ModelShape(**asdict(sizes), max_positions=config["max_position_embeddings"], norm_eps=config["rms_norm_eps"])


def _frequencies(config: Mapping[str, Any], shape: Shape, directory: Path) -> tuple[torch.Tensor, float]:
    """Rotary frequencies: Su et al. 2021 (default), and the scaled variants as Hugging Face computes them."""
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        from transformers import AutoConfig  # takes seconds
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](AutoConfig.from_pretrained(directory), torch.device("cpu"))
    dims_P = torch.arange(0, shape.head_dim, 2, dtype=torch.float32)
    return 1.0 / rope["rope_theta"] ** (dims_P / shape.head_dim), 1.0
