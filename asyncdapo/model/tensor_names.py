"""Which tensors of a model's files are its weights: one rule for the learner, which sends them, and for the engines.

In: a directory with safetensors, and whether the model's config ties its output layer to the embedding. Out: names and
shapes, read from the files' headers. Some files hold more than the weights: a second copy of a tied embedding, angles
of the rotation. Nobody sends or asks for those. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from asyncdapo.errors import ConfigError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
TIED_HEAD = "lm_head.weight"
"""The output layer: where it is tied, a copy of the embedding."""
FETCH = "fetch the model's files again"
DERIVED = "rotary_emb.inv_freq"
"""Old files hold these, which every model computes by itself."""


class _Index(msgspec.Struct):
    """What is read of the index."""

    weight_map: dict[str, str]


def weight_names(names: Iterable[str], *, tied: bool) -> set[str]:
    """Those that are weights of a model whose output layer is tied to its embedding, or isn't."""
    passed_over = (TIED_HEAD, DERIVED) if tied else (DERIVED,)
    return {name for name in names if not name.endswith(passed_over)}


def weight_files(directory: Path, key: str = "model.path") -> list[Path]:
    """The safetensors that make up the model; none where it is in another format. Other ones may lie beside them.
    Raises ConfigError, for the config's `key`, for an index that can't be read."""
    if (directory / INDEX).is_file():
        return [directory / name for name in sorted(set(read_index(directory, key).values()))]
    return [directory / WHOLE] if (directory / WHOLE).is_file() else []


def read_index(directory: Path, key: str = "model.path") -> dict[str, str]:
    """The file of each tensor, of a model in several files. Raises ConfigError."""
    try:
        return msgspec.json.decode((directory / INDEX).read_bytes(), type=_Index).weight_map
    except (OSError, ValueError) as error:
        raise ConfigError(key, f"can't read {INDEX}: {error}", str(directory), FETCH) from error


def check_whole(directory: Path, key: str, *, may_lack_files: bool) -> None:
    """Whether the files are all there and as long as their headers say, and hold every tensor of the index. Reads no
    tensor. Raises ConfigError. `may_lack_files`: what isn't there is still to be downloaded."""
    files = weight_files(directory, key)
    if not files and (parts := sorted(directory.glob("*.safetensors"))) and not may_lack_files:
        problem = f"has {parts[0].name}, and neither {WHOLE} nor {INDEX}"
        raise ConfigError(key, problem, str(directory), FETCH)
    missing = [file.name for file in files if not file.is_file()]
    if missing and not may_lack_files:
        problem = f"lacks {len(missing)} of the {len(files)} files that {INDEX} names, first {missing[0]}"
        raise ConfigError(key, problem, str(directory), FETCH)
    shapes = {name for file in files if file.name not in missing for name in _shapes_of(file, key)}
    listed = read_index(directory, key) if (directory / INDEX).is_file() else {}
    if absent := sorted(name for name, file in listed.items() if file not in missing and name not in shapes):
        problem = f"lacks {len(absent)} tensors that {INDEX} names, first {absent[0]} of {listed[absent[0]]}"
        raise ConfigError(key, problem, str(directory), FETCH)


def read_shapes(directory: Path, key: str = "model.path") -> dict[str, tuple[int, ...]]:
    """Of every tensor in the model's files. Raises ConfigError, for the config's `key`, where one is missing, cut short
    or has a damaged header."""
    return {name: shape for file in weight_files(directory, key) for name, shape in _shapes_of(file, key).items()}


def _shapes_of(file: Path, key: str) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, "np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(key, f"can't read {file.name}: {error}", str(file.parent), FETCH) from error
