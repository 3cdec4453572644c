"""Where the model's files are: a directory in Hugging Face format, or an id on the Hugging Face hub. No torch here.

`find_directory` and `model_config` ask nobody; `check_…`, `local_…` and `…_digests` run before any process starts and
download nothing; `model_directory` and `tokenizer_directory` run in the process that loads the model and download what
is missing. Does not own: reading the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import file_exists, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError

from asyncdapo.disk import sha256_of
from asyncdapo.errors import ConfigError

KEY = "model.path"
TOKENIZER_KEY = "model.tokenizer"

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
WHOLE_DIGEST_BYTES = 2 * 1000**3
"""Weights of up to this size are digested whole; of larger ones the size and the ends of each file have to do."""
END_BYTES = 1 << 20


def check_model_path(path: str, base_dirs: Iterable[str | Path], key: str = KEY) -> str:
    """The absolute directory that `path` names relative to one of `base_dirs` (the first that has it), or `path` itself
    where it is an id on the hub. Raises ConfigError, for the config's `key`, for a directory without config.json or
    weights, and for an id that is neither on the hub nor in the local cache."""
    return find_directory(path, base_dirs, key) or checked_hub_id(path, key)


def check_tokenizer_path(path: str, base_dirs: Iterable[str | Path]) -> str:
    """As `check_model_path`, for `model.tokenizer`: a directory with tokenizer.json, or an id of one on the hub."""
    found = find_directory(path, base_dirs, TOKENIZER_KEY, _checked_tokenizer)
    return found or checked_hub_id(path, TOKENIZER_KEY, "tokenizer.json")


def find_directory(
    path: str,
    base_dirs: Iterable[str | Path],
    key: str = KEY,
    checked: Callable[[str, Path, str], Path] | None = None,
) -> str | None:
    """As `check_model_path`, but None for what may be an id on the hub, which isn't asked."""
    base_dirs = [Path(base).absolute() for base in base_dirs]
    for directory in (base / Path(path).expanduser() for base in base_dirs):
        if directory.is_dir():
            return str((checked or _checked_directory)(path, directory, key))
    if is_path(path):
        fix = f"give a model directory of this machine, or a hub id: {key}=ORG/NAME"
        if not Path(path).expanduser().is_absolute():
            fix += f"; relative paths are looked up in {', '.join(dict.fromkeys(map(str, base_dirs)))}"
        raise ConfigError(key, "no such directory", path, fix)
    return None


def is_path(path: str) -> bool:
    """Whether it can be nothing but a directory: no id on the hub looks like it."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def model_directory(path: str, key: str = KEY) -> Path:
    """The local directory with the model's config, weights and tokenizer; an id is downloaded first if need be."""
    return _downloaded(path, ["*.json", *WEIGHT_FILES, *TOKENIZER_FILES], key)


def tokenizer_directory(path: str) -> Path:
    """The local directory with the files of `model.tokenizer`; those of an id are downloaded first if need be."""
    return _downloaded(path, list(TOKENIZER_FILES), TOKENIZER_KEY)


def _downloaded(path: str, patterns: list[str], key: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (OSError, ValueError, HTTPError) as error:
        raise ConfigError(key, f"can't be downloaded: {_first_line(error)}", path) from error


def local_directory(path: str) -> Path | None:
    """The model's directory where it is on this machine already, whole; None for an id still to be downloaded."""
    if Path(path).is_dir():
        return Path(path)
    cached = try_to_load_from_cache(path, "config.json")
    directory = Path(cached).parent if isinstance(cached, str) else None
    return directory if directory and _weight_files(directory) else None


def local_tokenizer(path: str) -> Path | None:
    """The directory of a tokenizer that is on this machine already; None for an id still to be downloaded."""
    if Path(path).is_dir():
        return Path(path)
    cached = try_to_load_from_cache(path, "tokenizer.json")
    return Path(cached).parent if isinstance(cached, str) else None


def model_config(path: str) -> dict[str, Any] | None:
    """What the model's config.json says, where that is on this machine already; None for an id that isn't cached,
    and for a directory that isn't here. Raises ConfigError for a file that can't be read, and for what can't be an id.
    """
    if is_path(path) and not Path(path).is_dir():
        return None
    try:
        file = Path(path) / "config.json" if Path(path).is_dir() else try_to_load_from_cache(path, "config.json")
        return json.loads(Path(file).read_text(encoding="utf-8")) if isinstance(file, str | Path) else None
    except (OSError, ValueError) as error:
        raise ConfigError(KEY, f"config.json can't be read: {_first_line(error)}", path) from error


def vocab_size(path: str) -> int | None:
    """As the model's config.json says, where it is here."""
    config = model_config(path) or {}
    return config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))


def check_vocabulary(directory: Path, key: str, known: int | None) -> None:
    """Whether the tokenizer is there, and its vocabulary without added tokens within the `known` tokens of the model;
    added ones may lie beyond, as long as no prompt has one. Raises ConfigError."""
    file = _checked_tokenizer(str(directory), directory, key) / "tokenizer.json"
    try:
        vocabulary = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
        num_tokens = max(vocabulary.values()) + 1 if isinstance(vocabulary, dict) else len(vocabulary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"tokenizer.json can't be read: {type(error).__name__}: {_first_line(error)}"
        raise ConfigError(key, problem, str(directory)) from error
    if known is not None and num_tokens > known:
        problem = f"its tokenizer is of another model: it has {num_tokens:,} tokens, the model {known:,}"
        raise ConfigError(key, problem, str(directory), "take the tokenizer that the model was trained with")


def model_digests(directory: Path) -> dict[str, str]:
    """What the model is, wherever its directory stands: a digest of its config, its tokenizer and each weight file."""
    weights = _weight_files(directory)
    small = sum(path.stat().st_size for path in weights) <= WHOLE_DIGEST_BYTES
    others = [path for name in ("config.json", "tokenizer.json") if (path := directory / name).is_file()]
    return {
        **{path.name: sha256_of(path) for path in others},
        **{path.name: sha256_of(path) if small else _digest_of_ends(path) for path in weights},
    }


def tokenizer_digests(directory: Path) -> dict[str, str]:
    """What makes a text tokens: a digest of the tokenizer and of the files that may hold its chat template."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return {name: sha256_of(directory / name) for name in names if (directory / name).is_file()}


def _weight_files(directory: Path) -> list[Path]:
    """Of the first format that is there, since only that one is loaded."""
    return next((files for pattern in WEIGHT_FILES if (files := sorted(directory.glob(pattern)))), [])


def _digest_of_ends(path: Path) -> str:
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(0, num_bytes - END_BYTES))
        digest.update(file.read())
    return f"{num_bytes} bytes, ends {digest.hexdigest()}"


def _checked_directory(path: str, directory: Path, key: str) -> Path:
    if not (directory / "config.json").is_file():
        raise ConfigError(key, "has no config.json", path, "a directory in Hugging Face format")
    if not _weight_files(directory):
        raise ConfigError(key, f"has no weights ({' or '.join(WEIGHT_FILES)})", path)
    return directory


def _checked_tokenizer(path: str, directory: Path, key: str) -> Path:
    if not (directory / "tokenizer.json").is_file():
        fix = "save it with AutoTokenizer.from_pretrained(path).save_pretrained(path)"
        raise ConfigError(key, "has no tokenizer.json", path, fix)
    return directory


def checked_hub_id(path: str, key: str, file: str = "config.json") -> str:
    what = "model" if file == "config.json" else "tokenizer"
    problem = f"is neither a directory nor a {what} in the local Hugging Face cache or on the hub"
    try:
        if isinstance(try_to_load_from_cache(path, file), str) or file_exists(path, file):
            return path
    except (OSError, ValueError, HTTPError) as error:
        raise ConfigError(key, problem, path, f"asked the hub: {_first_line(error)}") from error
    raise ConfigError(key, problem, path)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
