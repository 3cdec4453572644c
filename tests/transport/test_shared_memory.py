"""Memory that one process makes and another one maps."""

from __future__ import annotations

import multiprocessing
import os

import msgspec
import pytest
import torch

from asyncdapo.transport import shared_memory
from asyncdapo.transport.shared_memory import make_block, open_block

HOST = torch.device("cpu")

processes = multiprocessing.get_context("forkserver")


def add_one(handle: bytes) -> None:
    open_block(handle, HOST).bytes_U.add_(1)


def test_what_another_process_writes_is_read_here() -> None:
    block = make_block(1000, HOST)
    other = processes.Process(target=add_one, args=(block.handle,))
    other.start()
    other.join()
    assert block.bytes_U.tolist() == [1] * 1000


def test_memory_stays_mapped_when_its_maker_has_let_go_of_it() -> None:
    made = make_block(8, HOST)
    made.bytes_U.fill_(3)
    opened = open_block(made.handle, HOST)
    del made
    assert opened.bytes_U.tolist() == [3] * 8


def test_a_handle_of_memory_that_is_gone_is_refused() -> None:
    handle = make_block(8, HOST).handle
    with pytest.raises(OSError, match="fd"):
        open_block(handle, HOST)


def test_another_file_under_the_same_number_is_not_taken_for_the_memory() -> None:
    block = make_block(8, HOST)
    kind, pid, _, name, size = msgspec.msgpack.decode(block.handle)
    with open(os.devnull) as other:
        handle = msgspec.msgpack.encode((kind, pid, other.fileno(), name, size))
        with pytest.raises(OSError, match="the process that made this memory is gone, or on another machine"):
            open_block(handle, HOST)


def test_memory_of_a_gpu_that_cuda_does_not_open_is_refused_alike() -> None:
    handle = msgspec.msgpack.encode(("cuda", 0, b"of nobody", 8, 0, b"nor this", 0, bytes(64), True))
    with pytest.raises(OSError, match="."):
        open_block(handle, torch.device("cuda", 0))


def test_an_empty_block_is_a_block() -> None:
    block = make_block(0, HOST)
    assert len(open_block(block.handle, HOST).bytes_U) == 0


def test_memory_of_a_gpu_that_can_not_be_shared_names_the_setting_that_may_be_the_cause(monkeypatch) -> None:
    """Memory of the host in the place of a GPU's: torch refuses to share it as such."""
    monkeypatch.setattr(shared_memory.torch, "zeros", lambda size, dtype, device: torch.empty(size, dtype=dtype))
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    with pytest.raises(OSError, match="; use weights.backend=gloo$"):
        make_block(8, torch.device("cuda", 0))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(OSError, match="; leave expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF, or use"):
        make_block(8, torch.device("cuda", 0))
