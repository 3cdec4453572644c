"""Where a model is that a config names: a directory relative to one of several, or an id on the Hugging Face hub.

In: `model.path`, `model.reference` or `model.tokenizer` as the user wrote it, and the directories that it may be
relative to. Out: an absolute directory, or the id, or ConfigError. Nothing is downloaded. Does not own: what the files
say (`files`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (httpx or httpx2, by the hub's version)

from asyncdapo.errors import ConfigError

KEY = "model.path"
TOKENIZER_KEY = "model.tokenizer"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
"""The file that makes a directory or a repository one of a model, of a tokenizer."""
KINDS = {CONFIG: "model", TOKENIZER: "tokenizer"}
FIXES = {
    CONFIG: "a directory in Hugging Face format",
    TOKENIZER: "save it with AutoTokenizer.from_pretrained(path).save_pretrained(path)",
}
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def check_model_path(path: str, base_dirs: Iterable[str | Path], key: str = KEY) -> str:
    """The absolute directory that `path` names relative to one of `base_dirs` (the first that has it), or `path` itself
    where it is an id on the hub. Raises ConfigError, for the config's `key`, for a directory without config.json or
    weights, and for an id that is neither on the hub nor in the local cache."""
    return find_directory(path, base_dirs, key) or check_hub_id(path, key)


def check_tokenizer_path(path: str, base_dirs: Iterable[str | Path]) -> str:
    """As `check_model_path`, for `model.tokenizer`: a directory with tokenizer.json, or an id of one on the hub."""
    return find_directory(path, base_dirs, TOKENIZER_KEY, TOKENIZER) or check_hub_id(path, TOKENIZER_KEY, TOKENIZER)


def find_directory(path: str, base_dirs: Iterable[str | Path], key: str = KEY, marker: str = CONFIG) -> str | None:
    """As `check_model_path`, but None for what may be an id on the hub, which isn't asked."""
    base_dirs = [Path(base).absolute() for base in base_dirs]
    for directory in (base / Path(path).expanduser() for base in base_dirs):
        if directory.is_dir():
            check_directory(path, directory, key, marker)
            if marker == CONFIG and not weight_files(directory):
                raise ConfigError(key, f"has no weights ({' or '.join(WEIGHT_FILES)})", path)
            return str(directory)
    if is_path(path):
        fix = f"give a model directory of this machine, or a hub id: {key}=ORG/NAME"
        if not Path(path).expanduser().is_absolute():
            fix += f"; relative paths are looked up in {', '.join(dict.fromkeys(map(str, base_dirs)))}"
        raise ConfigError(key, "no such directory", path, fix)
    return None


def is_path(path: str) -> bool:
    """Whether it can be nothing but a directory: no id on the hub looks like it."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def check_directory(path: str, directory: Path, key: str, marker: str) -> None:
    """Raises ConfigError for a directory without the file `marker`."""
    if not (directory / marker).is_file():
        raise ConfigError(key, f"has no {marker}", path, FIXES[marker])


def check_hub_id(path: str, key: str, marker: str = CONFIG) -> str:
    """`path` itself. Raises ConfigError where the local cache hasn't got its file `marker`, and neither has the hub."""
    problem = f"is neither a directory nor a {KINDS[marker]} in the local Hugging Face cache or on the hub"
    try:
        cached = huggingface_hub.try_to_load_from_cache(path, marker)
        if isinstance(cached, str) or huggingface_hub.file_exists(path, marker):
            return path
    except (OSError, ValueError, HTTPError) as error:
        raise ConfigError(key, problem, path, f"asked the hub: {first_line(error)}") from error
    raise ConfigError(key, problem, path)


def weight_files(directory: Path) -> list[Path]:
    """The files of the first format that is there, since only that one is loaded."""
    return next((files for pattern in WEIGHT_FILES if (files := sorted(directory.glob(pattern)))), [])


def first_line(error: Exception) -> str:
    """What an error says, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
