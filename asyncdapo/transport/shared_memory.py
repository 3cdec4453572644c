"""Memory that one process makes and others on the same machine map: host memory, or memory of a GPU that they share.

In: a size and a device. Out: a block of bytes, and a handle of a few hundred bytes with which others open it; the name
of a device, by which processes know whether they share it. Host memory is an anonymous file that others open through
the maker's file descriptors, so nothing is left behind if a process is killed. GPU memory is shared by CUDA's own
handles. Does not own: when a block may be written or read.

Shape: U bytes (uint8).
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import weakref
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from asyncdapo.transport.backend import CPU, HOST_ID, name_device

EXPANDABLE = "expandable_segments:True"
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables in which a user may ask torch for memory that grows in place."""


@dataclass(frozen=True)
class Block:
    """Shared memory: uint8 [U]. In the process that made it, also the handle that opens it elsewhere."""

    bytes_U: torch.Tensor
    handle: bytes = b""


def make_block(num_bytes: int, device: torch.device) -> Block:
    """A block of zeros on this device; it lives until no process maps it. Raises OSError if the GPU's memory can't be
    shared."""
    if device.type == "cpu":
        return _make_on_host(num_bytes)
    bytes_U = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    try:
        shared = bytes_U.untyped_storage()._share_cuda_()
    except RuntimeError as error:
        raise _not_shared(error) from error
    return Block(bytes_U, msgspec.msgpack.encode(("cuda", *shared)))


def open_block(handle: bytes, device: torch.device) -> Block:
    """The block of another process. `device`: the GPU that both share; ignored for host memory. Raises OSError if the
    block can't be opened: its maker is gone, or on another machine."""
    kind, *parts = msgspec.msgpack.decode(handle)
    if kind == "host":
        return _open_on_host(*parts)
    _, *shared = parts  # the maker's number of the GPU, which may be another here
    try:
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *shared)
    except RuntimeError as error:
        raise _not_shared(error) from error
    return Block(torch.empty(0, dtype=torch.uint8, device=device).set_(storage))


def _not_shared(error: RuntimeError) -> OSError:
    """CUDA's error with the most likely cause: expandable segments. CUDA shares those in another way, which needs
    access to another process's files."""
    settings = next((name for name in ALLOCATOR_SETTINGS if EXPANDABLE in os.environ.get(name, "")), None)
    fix = f"leave {EXPANDABLE} out of {settings}, or " if settings else ""
    said = str(error).partition("\n")[0]
    return OSError(f"{said}; {fix}use weights.backend=gloo")


def _make_on_host(num_bytes: int) -> Block:
    name = f"asyncdapo-{secrets.token_hex(8)}"
    file = os.memfd_create(name)
    os.ftruncate(file, max(num_bytes, 1))
    block = Block(_mapped(file, num_bytes), msgspec.msgpack.encode(("host", os.getpid(), file, name, num_bytes)))
    weakref.finalize(block, os.close, file)  # until then others reach the memory through it
    return block


def _open_on_host(pid: int, file: int, name: str, num_bytes: int) -> Block:
    path = Path(f"/proc/{pid}/fd/{file}")
    if name not in os.readlink(path):
        raise OSError(f"{path} is another file: the process that made this memory is gone, or on another machine")
    opened = os.open(path, os.O_RDWR)
    try:
        return Block(_mapped(opened, num_bytes))
    finally:
        os.close(opened)


def _mapped(file: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, max(num_bytes, 1)), dtype=torch.uint8)[:num_bytes]


def numbered(device: torch.device) -> torch.device:
    """The same device with its number: plain `cuda` becomes the current GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def device_name(device: torch.device) -> str:
    """A unique name of the device, the same in every process of this host (`backend`). Containers that can't see each
    other's processes count as separate hosts, and so do processes with different values of `HOST_ID`."""
    kind = CPU if device.type == "cpu" else f"cuda {torch.cuda.get_device_properties(device).uuid}"
    host = f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"
    return name_device(kind, "/".join([host, *filter(None, [os.environ.get(HOST_ID)])]))
