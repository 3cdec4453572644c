"""Where the model's files are: a directory in Hugging Face format, or an id on the Hugging Face hub. No torch here.

`check_model_path` runs before any process starts and downloads nothing; `model_directory` runs in the process that
loads the model and downloads what is missing. Does not own: reading the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import file_exists, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError

from asyncdapo.errors import ConfigError

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def check_model_path(path: str, base_dirs: Iterable[str | Path]) -> str:
    """The absolute directory that `path` names relative to one of `base_dirs` (the first that has it), or `path` itself
    where it is an id on the hub. Raises ConfigError for a directory without config.json or weights, and for an id that
    is neither on the hub nor in the local cache."""
    base_dirs = [Path(base).absolute() for base in base_dirs]
    for directory in (base / Path(path).expanduser() for base in base_dirs):
        if directory.is_dir():
            return str(_checked_directory(path, directory))
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        looked_in = ", ".join(str(base) for base in base_dirs)
        raise ConfigError("model.path", "is not a directory", path, f"relative paths are looked up in {looked_in}")
    return _checked_hub_id(path)


def model_directory(path: str) -> Path:
    """The local directory with the model's config, weights and tokenizer; an id is downloaded first if need be."""
    if Path(path).is_dir():
        return Path(path)
    patterns = ["*.json", *WEIGHT_FILES, *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (OSError, ValueError, HTTPError) as error:
        raise ConfigError("model.path", f"can't be downloaded: {_first_line(error)}", path) from error


def _checked_directory(path: str, directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise ConfigError("model.path", "has no config.json", path, "a directory in Hugging Face format")
    if not any(next(directory.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ConfigError("model.path", f"has no weights ({' or '.join(WEIGHT_FILES)})", path)
    return directory


def _checked_hub_id(path: str) -> str:
    problem = "is neither a directory nor a model in the local Hugging Face cache or on the hub"
    try:
        if isinstance(try_to_load_from_cache(path, "config.json"), str) or file_exists(path, "config.json"):
            return path
    except (OSError, ValueError, HTTPError) as error:
        raise ConfigError("model.path", problem, path, f"asked the hub: {_first_line(error)}") from error
    raise ConfigError("model.path", problem, path)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
