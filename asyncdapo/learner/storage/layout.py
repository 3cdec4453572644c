"""Where each tensor stands in the safetensors files of a model, known before any of them is written.

In: names, dtype and shapes, in the order in which they are to stand. Out: a `Layout`: what the files begin with, and
the place of each tensor. In a file the rows of a tensor stand one behind the other, so whoever holds some of its rows
writes them where they belong, without asking anybody: the files are a plain Hugging Face model, whatever the number of
writers. Pure. Does not own: the bytes of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from asyncdapo.model.files import WHOLE

FILE_BYTES = 5 * 1000**3
"""Tensors of one file, one tensor at least: as Hugging Face cuts its own."""
ALIGNED = 8
"""Headers end at a multiple of it, as the format wants."""


class Place(NamedTuple):
    """Of a tensor."""

    file: str
    offset: int
    """Of its first byte in the file."""


class Layout(NamedTuple):
    """Of one model."""

    headers: dict[str, bytes]
    """What each file begins with."""
    places: dict[str, Place]
    index: bytes | None
    """Content of `model.safetensors.index.json`, where there are several files."""


def lay_out(shapes: Mapping[str, tuple[int, ...]], dtype: str, item_bytes: int, file_bytes: int = FILE_BYTES) -> Layout:
    """All tensors have one `dtype`, as safetensors name it (`F32`)."""
    sizes = {name: item_bytes * math.prod(shape) for name, shape in shapes.items()}
    parts = list(_parts(sizes, file_bytes))
    headers, places = {}, {}
    for number, names in enumerate(parts, 1):
        file = WHOLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + sizes[name]
            header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": (offset, end)}
            places[name], offset = Place(file, offset), end
        headers[file] = _with_length(msgspec.json.encode(header))
    places = {name: Place(file, len(headers[file]) + offset) for name, (file, offset) in places.items()}
    weight_map = {name: place.file for name, place in places.items()}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return Layout(headers, places, msgspec.json.encode(index) if len(parts) > 1 else None)


def _parts(sizes: Mapping[str, int], file_bytes: int) -> Iterator[list[str]]:
    part, num_bytes = [], 0
    for name, size in sizes.items():
        if part and num_bytes + size > file_bytes:
            yield part
            part, num_bytes = [], 0
        part.append(name)
        num_bytes += size
    yield part


def _with_length(header: bytes) -> bytes:
    padded = header + b" " * (-len(header) % ALIGNED)
    return len(padded).to_bytes(8, "little") + padded
