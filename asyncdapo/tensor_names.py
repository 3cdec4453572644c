"""Which tensors of a model's files are its weights: one rule for the learner, which sends them, and for the engines.

In: a directory with safetensors, and whether the model's config ties its output layer to the embedding. Out: names and
shapes, read from the files' headers. Some files hold more than the weights: a second copy of a tied embedding, angles
of the rotation. Nobody sends or asks for those. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from asyncdapo.errors import ConfigError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
TIED_HEAD = "lm_head.weight"
"""The output layer: where it is tied, a copy of the embedding."""
FETCH = "fetch the model's files again"
DERIVED = "rotary_emb.inv_freq"
"""Old files hold these, which every model computes by itself."""


def weight_names(names: Iterable[str], *, tied: bool) -> set[str]:
    """Those that are weights of a model whose output layer is tied to its embedding, or isn't."""
    passed_over = (TIED_HEAD, DERIVED) if tied else (DERIVED,)
    return {name for name in names if not name.endswith(passed_over)}


def weight_files(directory: Path, key: str = "model.path") -> list[Path]:
    """The safetensors that make up the model; none where it is in another format. Other ones may lie beside them.
    Raises ConfigError, for the config's `key`, for an index that can't be read."""
    index = directory / INDEX
    if not index.is_file():
        return [directory / WHOLE] if (directory / WHOLE).is_file() else []
    try:
        return [directory / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(key, f"can't read {INDEX}: {error}", str(directory), FETCH) from error


def read_shapes(directory: Path, key: str = "model.path") -> dict[str, tuple[int, ...]]:
    """Of every tensor in the model's files. Raises ConfigError, for the config's `key`, where one is missing, cut short
    or has a damaged header."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory, key):
        try:
            with safe_open(file, "np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigError(key, f"can't read {file.name}: {error}", str(directory), FETCH) from error
    return shapes
