"""Which tokens end a model's responses.

In: the files of a model, and of its tokenizer where that isn't the model's own. Out: token ids. Does not own: where the
files are (`model.files`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import ModelFiles, TokenizerFiles
from asyncdapo.model.location import CONFIG, TOKENIZER
from asyncdapo.model.shape import MODEL_TYPES
from asyncdapo.model.type_defaults import with_defaults

SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def stop_token_ids(files: ModelFiles, tokenizer: TokenizerFiles | None = None) -> frozenset[int]:
    """End-of-sequence ids of `generation_config.json`, of `config.json` (either may hold a list) and of the tokenizer,
    together: a model that was taught to chat often names the end of a turn in only one of them. `tokenizer`: where it
    isn't the model's own; downloaded if need be. Raises ConfigError for files that can't be read."""
    found = [_of_config(files)]
    generation = files.directory / "generation_config.json"
    if generation.is_file():
        found.append(_read_object(files.key, generation).get("eos_token_id"))
    found.append(
        _tokenizer_eos(tokenizer.key, tokenizer.fetch()) if tokenizer else _tokenizer_eos(files.key, files.directory)
    )
    ids: set[int] = set()
    for value in found:
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)


def _of_config(files: ModelFiles) -> int | list[int] | None:
    """As config.json says, or else its model type."""
    config = _read_object(files.key, files.directory / CONFIG)
    if config.get("model_type") in MODEL_TYPES:
        return with_defaults(config).get("eos_token_id")
    from transformers import AutoConfig  # knows all types, and takes seconds

    try:
        return getattr(AutoConfig.from_pretrained(files.directory), "eos_token_id", None)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(files.key, f"config.json can't be used: {error}", files.path) from error


def _tokenizer_eos(key: str, directory: Path) -> int | None:
    """None where there is no tokenizer, or one that names no end."""
    for name in SPECIAL_TOKEN_FILES:
        file = directory / name
        token = _read_object(key, file).get("eos_token") if file.is_file() else None
        token = token["content"] if isinstance(token, dict) else token
        if token and (directory / TOKENIZER).is_file():
            return _token_id(key, directory / TOKENIZER, token)
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
