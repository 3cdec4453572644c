"""Model files: where a Hugging Face model's files are on this machine, and which tokens end its responses.

In: `model.path`, a directory or an id on the hub. Out: a directory, downloaded if need be, and token ids. Does not own:
reading weights and sizes, which is each engine's.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoConfig, PretrainedConfig

from asyncdapo.errors import ConfigError


def locate(model_path: str) -> Path:
    """The directory itself, or the local copy of a hub repository (fetched when it isn't there yet). Raises ConfigError
    for a path that is neither, and for a directory without config.json."""
    directory = Path(model_path)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(model_path, allow_patterns=["*.json", "*.safetensors"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise ConfigError(
                "model.path",
                f"is neither a directory nor a model that the hub gives out ({type(error).__name__})",
                model_path,
            ) from error
    if not (directory / "config.json").is_file():
        raise ConfigError("model.path", "has no config.json", model_path)
    return directory


def read_config(directory: Path, model_path: str) -> PretrainedConfig:
    """`config.json` with the defaults of its model type. Raises ConfigError for one that can't be read."""
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("model.path", f"config.json can't be used: {error}", model_path) from error


def stop_token_ids(directory: Path, config: PretrainedConfig) -> frozenset[int]:
    """End-of-sequence ids of `generation_config.json` and `config.json` together; either may hold a list."""
    found = [getattr(config, "eos_token_id", None)]
    generation = directory / "generation_config.json"
    if generation.is_file():
        found.append(json.loads(generation.read_text()).get("eos_token_id"))
    ids: set[int] = set()
    for value in found:
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)
