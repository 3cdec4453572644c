"""What one rank writes of a checkpoint: a copy of its shards in host memory, and where each of them belongs.

    shards on the device ──copy, which training waits for──▶ host memory ──a thread of its own──▶ their places in the
                                                                                                 files, and digests

In: sharded tensors by their names: the weights, and the averages of the optimizer. Out: pieces of files that all ranks
fill together. Each tensor set is a folder with the layout of a Hugging Face model (`layout`); the weights are the
checkpoint itself. Invariant: every byte of every file is written by one rank: replicas share out the tensors. A copy is
written once, and its memory is freed tensor by tensor. Does not own: when the checkpoint is whole (`checkpoint`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from asyncdapo import faults
from asyncdapo.disk import disk_errors, sync
from asyncdapo.learner.storage.checkpoint import Piece, checkpoint_dir, unfinished_dir
from asyncdapo.learner.storage.layout import lay_out
from asyncdapo.learner.storage.slices import rows_of
from asyncdapo.model.files import INDEX

DTYPES = {torch.float32: "F32", torch.float64: "F64"}
"""As safetensors name them."""
WRITE_BYTES = 64 << 20
"""Written and digested at a time."""


class _Part(NamedTuple):
    """What this rank writes of a file, without a break."""

    file: str
    offset: int
    content: Tensor
    """uint8, in host memory."""


class HostCopy:
    """One rank's part of a checkpoint."""

    def __init__(self, is_first: bool, write_others: Callable[[Path], None]) -> None:
        """`is_first`: whether this is rank 0, which also writes headers, and all other files by `write_others`."""
        self._is_first, self._write_others = is_first, write_others
        self._parts: list[_Part] = []
        self._indexes: dict[str, bytes] = {}

    @property
    def num_bytes(self) -> int:
        """In host memory."""
        return sum(part.content.nbytes for part in self._parts)

    def add(self, folder: str, tensors: Mapping[str, DTensor]) -> None:
        """Copy this rank's rows of a set of tensors, whose files stand in `folder`. Every rank has the same ones."""
        if not tensors:
            return
        first = next(iter(tensors.values()))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        layout = lay_out(shapes, DTYPES[first.dtype], first.dtype.itemsize)
        if self._is_first:
            for file, header in layout.headers.items():
                content = torch.frombuffer(bytearray(header), dtype=torch.uint8)
                self._parts.append(_Part(str(Path(folder, file)), 0, content))
            if layout.index:
                self._indexes[str(Path(folder, INDEX))] = layout.index
        for number, (name, tensor) in enumerate(tensors.items()):
            rows, place = rows_of(tensor), layout.places[name]
            if rows.start == rows.end or not _is_written_here(tensor, number):
                continue
            row_bytes = tensor.nbytes // tensor.shape[0]
            content = tensor.to_local().detach().to("cpu", copy=True).contiguous().flatten().view(torch.uint8)
            self._parts.append(_Part(str(Path(folder, place.file)), place.offset + rows.start * row_bytes, content))

    def write(self, run_dir: Path, step: int) -> list[Piece]:
        """Write all of it where the checkpoint of `step` was begun, and wait until it is on disk. Returns what was
        written. Raises DiskError."""
        directory, pieces, self._parts = unfinished_dir(run_dir, step), [], self._parts[::-1]
        with disk_errors(checkpoint_dir(run_dir, step)):
            faults.disk_write(self.num_bytes)
            if self._is_first:
                self._write_others(directory)
                for file, content in self._indexes.items():
                    (directory / file).write_bytes(content)
            while self._parts:
                pieces.append(_write(directory, self._parts.pop()))
            for file in {piece.file for piece in pieces}:
                sync(directory / file)
        return pieces


def _is_written_here(tensor: DTensor, number: int) -> bool:
    """Of replicas, each writes every so-manieth tensor."""
    mesh = tensor.device_mesh
    return mesh.ndim == 1 or number % mesh.size(0) == mesh.get_local_rank(0)


def _write(directory: Path, part: _Part) -> Piece:
    path, digest = directory / part.file, sha256()
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        # numpy's stubs have no buffer protocol before Python 3.12.
        content = memoryview(part.content.numpy())  # pyright: ignore[reportArgumentType]
        left, offset = content, part.offset
        while left:
            num_bytes = os.pwrite(descriptor, left[:WRITE_BYTES], offset)
            digest.update(left[:num_bytes])
            left, offset = left[num_bytes:], offset + num_bytes
    finally:
        os.close(descriptor)
    return Piece(part.file, part.offset, part.content.nbytes, digest.hexdigest())
