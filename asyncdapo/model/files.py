"""What a model's files say: one home for every fact about the model that is known before it is loaded. No torch here.

In: `model.path`, `model.reference` or `model.tokenizer`: a directory in Hugging Face format, or an id on the Hugging
Face hub. Out: `ModelFiles` and `TokenizerFiles`: directory, config, shape, tensors. `fetch` downloads what is missing.
All the rest asks nobody and says what the files on this machine say; config.json and the headers of the tensors are
read once. Does not own: where a path in a config leads (`location`), the values of the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import msgspec
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (httpx or httpx2, by the hub's version)
from safetensors import SafetensorError, safe_open

from asyncdapo.disk import sha256_of
from asyncdapo.errors import ConfigError
from asyncdapo.model.location import (
    CONFIG,
    KEY,
    KINDS,
    TOKENIZER,
    TOKENIZER_KEY,
    WEIGHT_FILES,
    check_directory,
    first_line,
    is_path,
    weight_files,
)
from asyncdapo.model.shape import PUBLISHED, Shape, read_shape

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
FETCH = "fetch the model's files again"
SAFETENSORS, PICKLES = WEIGHT_FILES
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


class _Index(msgspec.Struct):
    """What is read of the index."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, by the header of its file: `safe_open(file, …).get_slice(name)` reads a part of it."""

    file: Path
    dtype: str
    """As safetensors name it, such as `BF16`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Files:
    """A directory of this machine, or what a repository of the hub holds."""

    path: str
    """The directory, or the id on the hub."""
    key: str
    """The config key that has this path, for errors."""

    marker: ClassVar[str]
    """The file without which the directory is something else."""

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Another process reads for itself: it may be on another machine."""
        return type(self), (self.path, self.key)

    @property
    def here(self) -> Path | None:
        """The directory on this machine. None for an id still to be downloaded, and for a directory that isn't here.
        Raises ConfigError for what can't be an id."""
        if Path(self.path).is_dir():
            return Path(self.path)
        if is_path(self.path):
            return None
        try:
            cached = huggingface_hub.try_to_load_from_cache(self.path, self.marker)
        except ValueError as error:
            raise ConfigError(self.key, f"is neither a directory nor an id: {first_line(error)}", self.path) from error
        return Path(cached).parent if isinstance(cached, str) else None

    @property
    def directory(self) -> Path:
        """As `here`, for whoever needs it. Raises ConfigError where it isn't on this machine."""
        if (directory := self.here) is None:
            raise ConfigError(self.key, "is not on this machine", self.path)
        return directory

    def fetch(self) -> Path:
        """The directory on this machine, whole; an id is downloaded first if need be. Raises ConfigError."""
        if Path(self.path).is_dir():
            check_directory(self.path, Path(self.path), self.key, self.marker)
            return Path(self.path)
        try:
            return self._download()
        except (OSError, ValueError, HTTPError) as error:
            problem = f"is neither a directory nor a {KINDS[self.marker]} that the hub gives out: {first_line(error)}"
            raise ConfigError(self.key, problem, self.path) from error

    def _download(self) -> Path:
        return Path(huggingface_hub.snapshot_download(self.path, allow_patterns=list(TOKENIZER_FILES)))


@dataclass(frozen=True)
class TokenizerFiles(_Files):
    """A tokenizer, of its own or beside a model's weights."""

    key: str = TOKENIZER_KEY
    marker: ClassVar[str] = TOKENIZER

    def check_vocabulary(self, known: int | None) -> None:
        """Whether the tokenizer is there, and its vocabulary without added tokens within the `known` tokens of the
        model; added ones may lie beyond, as long as no prompt has one. Raises ConfigError."""
        check_directory(self.path, self.directory, self.key, self.marker)
        try:
            vocabulary = json.loads((self.directory / self.marker).read_text(encoding="utf-8"))["model"]["vocab"]
            num_tokens = max(vocabulary.values()) + 1 if isinstance(vocabulary, dict) else len(vocabulary)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"tokenizer.json can't be read: {type(error).__name__}: {first_line(error)}"
            raise ConfigError(self.key, problem, self.path) from error
        if known is not None and num_tokens > known:
            problem = f"its tokenizer is of another model: it has {num_tokens:,} tokens, the model {known:,}"
            raise ConfigError(self.key, problem, self.path, "take the tokenizer that the model was trained with")

    def digests(self) -> dict[str, str]:
        """What makes a text tokens: a digest of the tokenizer and of the files that may hold its chat template. Of a
        tokenizer that is still to be downloaded its id."""
        names = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja")
        return _digests(self.here / name for name in names) if self.here else {"id": self.path}


@dataclass(frozen=True)
class ModelFiles(_Files):
    """A model's config, its weights by the headers of their files, and what follows from them."""

    key: str = KEY
    marker: ClassVar[str] = CONFIG

    @property
    def config(self) -> dict[str, Any] | None:
        """What config.json says; None where it isn't here. Raises ConfigError where it can't be read."""
        return self._config if self.here else None

    @property
    def shape(self) -> Shape | None:
        """As config.json says, or before it is here as it was published. None where neither is known, or the formulas
        don't know this kind of model."""
        return read_shape(self.config or PUBLISHED.get(self.path, {}))

    @property
    def vocab_size(self) -> int | None:
        """As config.json says, where it is here."""
        config = self.config or {}
        return config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))

    @property
    def weights(self) -> list[Path]:
        """The files of the first format that is here, since only that one is loaded; none for a model still to be
        downloaded."""
        return weight_files(self.here) if self.here else []

    @property
    def safetensors(self) -> list[Path]:
        """The safetensors that make up the model; none where it isn't here, or is in another format. Other ones may lie
        beside them. Raises ConfigError for an index that can't be read."""
        if index := self._index():
            return [self.directory / name for name in sorted(set(index.values()))]
        return [self.here / WHOLE] if self.here and (self.here / WHOLE).is_file() else []

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor in `safetensors` by its name. Raises ConfigError where a file is missing, cut short or has a
        damaged header."""
        return {name: tensor for file in self.safetensors for name, tensor in self._header(file).items()}

    def check_whole(self) -> None:
        """Whether the files of the weights are all there and as long as their headers say, and hold every tensor of the
        index. What the hub's cache lacks is still to be downloaded. Raises ConfigError."""
        files, index, in_cache = self.safetensors, self._index(), not Path(self.path).is_dir()
        if not files and (parts := sorted(self.directory.glob(SAFETENSORS))) and not in_cache:
            raise self._broken(f"has {parts[0].name}, and neither {WHOLE} nor {INDEX}")
        missing = [file.name for file in files if not file.is_file()]
        if missing and not in_cache:
            raise self._broken(f"lacks {len(missing)} of the {len(files)} files that {INDEX} names, first {missing[0]}")
        stored = {name for file in files if file.name not in missing for name in self._header(file)}
        absent = sorted(name for name, file in index.items() if file not in missing and name not in stored)
        if absent:
            first = f"first {absent[0]} of {index[absent[0]]}"
            raise self._broken(f"lacks {len(absent)} tensors that {INDEX} names, {first}")

    def digests(self) -> dict[str, str]:
        """What the model is, wherever its directory stands: a digest of its config, its tokenizer and each weight file.
        Of a model that is still to be downloaded its id."""
        if not (files := self.weights):
            return {"id": self.path}
        small = sum(file.stat().st_size for file in files) <= WHOLE_DIGEST_BYTES
        others = _digests(files[0].parent / name for name in (CONFIG, TOKENIZER))
        return others | {file.name: sha256_of(file) if small else _digest_of_ends(file) for file in files}

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            return json.loads((self.directory / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(self.key, f"config.json can't be read: {first_line(error)}", self.path) from error

    def _index(self) -> dict[str, str]:
        """The file of each tensor, of a model in several files."""
        if not self.here or not (self.here / INDEX).is_file():
            return {}
        try:
            return msgspec.json.decode((self.here / INDEX).read_bytes(), type=_Index).weight_map
        except (OSError, ValueError) as error:
            raise self._broken(f"can't read {INDEX}: {error}") from error

    def _header(self, file: Path) -> dict[str, StoredTensor]:
        try:
            with safe_open(file, "np") as stored:
                slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
                return {
                    name: StoredTensor(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise self._broken(f"can't read {file.name}: {error}") from error

    def _broken(self, problem: str) -> ConfigError:
        return ConfigError(self.key, problem, self.path, FETCH)

    def _download(self) -> Path:
        """Without the weights in a second format."""
        patterns = ["*.json", *TOKENIZER_FILES]
        directory = Path(huggingface_hub.snapshot_download(self.path, allow_patterns=[*patterns, SAFETENSORS]))
        return (
            directory
            if weight_files(directory)
            else Path(huggingface_hub.snapshot_download(self.path, allow_patterns=[*patterns, PICKLES]))
        )


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in files if file.is_file()}


def _digest_of_ends(path: Path) -> str:
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(0, num_bytes - END_BYTES))
        digest.update(file.read())
    return f"{num_bytes} bytes, ends {digest.hexdigest()}"
