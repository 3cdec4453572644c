"""Model files: where a Hugging Face model's files are on this machine, and which tokens end its responses.

In: `model.path`, a directory or an id on the hub, and `model.tokenizer`. Out: a directory, downloaded if need be, and
token ids. Does not own: reading weights and sizes, which is each engine's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tokenizers import Tokenizer
from transformers import AutoConfig, PretrainedConfig

from asyncdapo.errors import ConfigError

HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
TOKENIZER_JSON = "tokenizer.json"
SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def locate(model_path: str) -> Path:
    """The directory itself, or the local copy of a hub repository (fetched when it isn't there yet). Raises ConfigError
    for a path that is neither, and for a directory without config.json."""
    directory = Path(model_path)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(model_path, allow_patterns=["*.json", "*.safetensors"]))
        except HUB_ERRORS as error:
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


def stop_token_ids(directory: Path, config: PretrainedConfig, tokenizer: str | None = None) -> frozenset[int]:
    """End-of-sequence ids of `generation_config.json`, of `config.json` (either may hold a list) and of the tokenizer,
    together: a model that was taught to chat often names the end of a turn in only one of them. `tokenizer` is
    `model.tokenizer`, where that isn't the model's own. Raises ConfigError for files that can't be read."""
    found = [getattr(config, "eos_token_id", None)]
    generation = directory / "generation_config.json"
    if generation.is_file():
        found.append(_read_object("model.path", generation).get("eos_token_id"))
    key, named_by = ("model.tokenizer", _tokenizer_directory(tokenizer)) if tokenizer else ("model.path", directory)
    found.append(_tokenizer_eos(key, named_by))
    ids: set[int] = set()
    for value in found:
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)


def _tokenizer_directory(tokenizer: str) -> Path:
    if Path(tokenizer).is_dir():
        return Path(tokenizer)
    try:
        return Path(snapshot_download(tokenizer, allow_patterns=[TOKENIZER_JSON, *SPECIAL_TOKEN_FILES]))
    except HUB_ERRORS as error:
        problem = f"is neither a directory nor a tokenizer that the hub gives out ({type(error).__name__})"
        raise ConfigError("model.tokenizer", problem, tokenizer) from error


def _tokenizer_eos(key: str, directory: Path) -> int | None:
    """None where there is no tokenizer, or one that names no end."""
    for name in SPECIAL_TOKEN_FILES:
        file = directory / name
        token = _read_object(key, file).get("eos_token") if file.is_file() else None
        token = token["content"] if isinstance(token, dict) else token
        if token and (directory / TOKENIZER_JSON).is_file():
            return _token_id(key, directory / TOKENIZER_JSON, token)
    return None


def _token_id(key: str, file: Path, token: str) -> int | None:
    try:
        return Tokenizer.from_file(str(file)).token_to_id(token)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exceptions
        raise ConfigError(key, f"tokenizer.json can't be used: {error}", str(file.parent)) from error


def _read_object(key: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(key, f"{file.name} can't be read: {error}", str(file.parent)) from error
    if not isinstance(content, dict):
        raise ConfigError(key, f"{file.name} holds no JSON object", str(file.parent))
    return content
