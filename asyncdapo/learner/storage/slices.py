"""Slices: the rows of each tensor that one rank holds, and how they come from a model's files.

In: sharded parameters on the device, and where the files have each tensor (`model/files`). Out: the same parameters,
filled; a rank reads its own rows and no others, one tensor at a time. Does not own: which rows a shard has (`rows`),
which names belong together (`names`), writing (`host_copy`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import FETCH, ModelFiles
from asyncdapo.model.rows import Rows, rows_of_shard


def rows_of(tensor: DTensor) -> Rows:
    """Those that this rank holds; maybe none."""
    mesh = tensor.device_mesh
    rows = rows_of_shard(tensor.shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.size(-1))
    assert tensor.to_local().shape[0] == rows.end - rows.start, "shards are equal parts of the first dimension"
    return rows


@torch.no_grad()
def read_slices(tensors: Mapping[str, DTensor], files: ModelFiles) -> None:
    """Fill the tensors with what the files have under their names, rounded to their dtype. Raises ConfigError, with
    nothing changed, where one is missing or has another shape."""
    check_stored(tensors, files)
    for name, tensor in tensors.items():
        rows, local = rows_of(tensor), tensor.to_local()
        if rows.start < rows.end:
            local.copy_(_read(files, name, rows))


def check_stored(tensors: Mapping[str, Tensor], files: ModelFiles) -> None:
    """Raises ConfigError unless the files have tensors of these names and shapes."""
    stored = files.tensors
    if missing := [name for name in tensors if name not in stored]:
        raise ConfigError(files.key, f"lacks {len(missing)} weights ({', '.join(missing[:3])}…)", files.path)
    for name, tensor in tensors.items():
        if stored[name].shape != tuple(tensor.shape):
            problem = f"its {name} has the shape {list(stored[name].shape)}, the model one of {list(tensor.shape)}"
            raise ConfigError(files.key, problem, files.path, "take a model of the same shape")


def _read(files: ModelFiles, name: str, rows: Rows) -> Tensor:
    """A file stays mapped for as long as it is open, so it is opened for each tensor: what was read before is freed."""
    file = files.tensors[name].file
    try:
        with safe_open(file, "pt") as stored:
            return stored.get_slice(name)[rows.start : rows.end]
    except (SafetensorError, OSError) as error:
        raise ConfigError(files.key, f"can't read {name} of {file.name}: {error}", files.path, FETCH) from error
