"""Shards: how the parts of each bucket come from the ranks of a sharded learner to the one that sends.

    the sender, shard 0                    the ranks of the other shards
    where its two buckets are    ───────▶  on its machine: map them             (once for each sender)
    says that it wants a bucket  ───────▶  on its machine: write their parts into it
                                           elsewhere: pack them, in the dtypes of the wire
    its own part into the bucket ◀───────  what was packed, in one collective; nothing says that a part is written
    says that there is no more   ───────▶  over

In: tensors that FSDP2 has divided by rows among the ranks of one replica; plain ones are a single shard, for which
there is no collective. Out: buckets at the sender, the same bits as from whole tensors. Memory: for packed parts alone,
at the sender those of one bucket, elsewhere this rank's part of one. Buckets on a GPU aren't mapped: NCCL brings the
parts. Invariants: a rank writes into a bucket only between the word that it is wanted and the collective. Whatever ends
a transfer, the other ranks are told, so that all stay in step and the learner continues. A rank that is gone fails the
others' collectives with PyTorch's own error. Does not own: what follows from that (`learner/step/ranks`), how buckets
get to the engines.

Shape: U bytes (uint8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import msgspec
import torch
import torch.distributed as dist

from asyncdapo.errors import RunError
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.shared_memory import Block, open_block
from asyncdapo.weights.manifest import Manifest, Piece, elements_of, part_of, plan_buckets

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SENDER = 0
"""The shard of the rank that sends."""
OVER, NEXT = 0, 1
"""Words of the sender."""
MARGIN_S = 5.0
"""What the others wait beyond a transfer's own timeout, to be told that it is over."""


class Shards:
    """This rank's place among the shards of one replica."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Of these tensors. Raises ValueError if they are divided in another way than by rows."""
        divided = {name: one for name, one in tensors.items() if is_divided(one)}
        for name, one in divided.items():
            if not one.placements[-1].is_shard(0):
                raise ValueError(f"{name} is not divided by rows: {one.placements}")
        self.number, self.count = 0, 1
        self.device = next((local_shard(one).device for one in tensors.values()), torch.device("cpu"))
        self._group: dist.ProcessGroup | None = None
        """None where there is one shard, for which every collective is nothing."""
        if divided:
            mesh = next(iter(divided.values())).device_mesh
            self.number, self.count = mesh.get_local_rank(mesh.ndim - 1), mesh.size(-1)
            self._group = mesh.get_group(mesh.ndim - 1) if self.count > 1 else None

    @contextmanager
    def one_transfer(self) -> Iterator[None]:
        """At the sender, around a transfer: tells the others in the end that it is over, also where it has failed.
        After an error that isn't a RunError this rank has to leave the group."""
        try:
            yield
        except RunError:
            self.tell(Deadline(MARGIN_S), more=False)
            raise
        self.tell(Deadline(MARGIN_S), more=False)

    def offer(self, memory: Sequence[Block], deadline: Deadline) -> list[bool]:
        """At the sender, before the first bucket: where its buckets are. Returns for each shard whether it writes its
        parts into them."""
        if self._group is None:
            return [True]
        shareable = self.device.type == "cpu" and all(block.handle for block in memory)
        handles = msgspec.msgpack.encode([block.handle for block in memory] if shareable else [])
        self._broadcast(torch.tensor([NEXT + len(handles)]), deadline)
        self._broadcast(torch.frombuffer(bytearray(handles), dtype=torch.uint8), deadline)
        answers_U = torch.zeros(self.count - 1, dtype=torch.uint8)
        if work := self.collect(answers_U, [0, *[1] * (self.count - 1)], deadline):
            work.wait()
        return [True, *map(bool, answers_U.tolist())]

    def reach(self, num_bytes: int, deadline: Deadline) -> list[Block]:
        """Elsewhere: the sender's buckets, of which `hear` has told, if they can be mapped here."""
        handles_U = torch.zeros(num_bytes, dtype=torch.uint8)
        self._broadcast(handles_U, deadline)
        try:
            memory = [open_block(handle, self.device) for handle in msgspec.msgpack.decode(handles_U.numpy().tobytes())]
        except OSError:  # the sender is on another machine
            memory = []
        self.give(torch.tensor([bool(memory)], dtype=torch.uint8), deadline)
        return memory

    def tell(self, deadline: Deadline, *, more: bool) -> None:
        """At the sender: whether it wants another bucket."""
        self._broadcast(torch.tensor([NEXT if more else OVER]), deadline)

    def hear(self, deadline: Deadline) -> int:
        """Elsewhere: what the sender says. `NEXT`: it wants another bucket. `OVER`: no more. More than `NEXT`: it says
        where its buckets are, in so many bytes more."""
        word = torch.zeros(1, dtype=torch.int64)
        self._broadcast(word, deadline)
        return int(word.item())

    def collect(self, memory_U: torch.Tensor, num_bytes: Sequence[int], deadline: Deadline) -> dist.Work | None:
        """At the sender: start to receive the packed parts of one bucket, so many bytes of each shard, into this memory
        by shards. It ends after every shard has called `give`, also with 0 bytes. None if there is one shard."""
        return self._all_to_all(memory_U, memory_U[:0], list(num_bytes), [0] * self.count, deadline)

    def give(self, packed_U: torch.Tensor, deadline: Deadline) -> None:
        """Elsewhere: this rank's part to the sender, or nothing once it's written."""
        to_sender = [len(packed_U), *[0] * (self.count - 1)]
        if work := self._all_to_all(packed_U[:0], packed_U, [0] * self.count, to_sender, deadline):
            work.wait()

    def _all_to_all(
        self, come_U: torch.Tensor, gone_U: torch.Tensor, come: list[int], gone: list[int], deadline: Deadline
    ) -> dist.Work | None:
        if self._group is None:
            return None
        options = dist.AllToAllOptions()
        options.timeout = deadline.left()
        return self._group.alltoall_base(come_U, gone_U, come, gone, options)

    def _broadcast(self, word: torch.Tensor, deadline: Deadline) -> None:
        if self._group is None:
            return
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = SENDER, deadline.left()
        self._group.broadcast([word], options).wait()


@dataclass(frozen=True)
class Copies:
    """Copies this rank's pieces of some tensors into memory, each converted to its dtype in the manifest."""

    pieces: tuple[Piece, ...]
    """Elements count from the first one of this rank's shard."""
    targets: list[torch.Tensor]
    """Views of the memory, one for each piece."""

    @staticmethod
    def into(memory_U: torch.Tensor, pieces: Sequence[Piece], manifest: Manifest, shards: Shards) -> Copies:
        """`pieces`: of this rank's shard, as the manifest counts elements, at offsets in the memory."""
        own: list[Piece] = []
        for piece in pieces:
            first, _ = elements_of(manifest.tensors[piece.tensor].shape, shards.number, shards.count)
            own.append(Piece(piece.tensor, piece.start - first, piece.stop - first, piece.offset))
        return Copies(tuple(own), views(memory_U, pieces, manifest))

    def run(self, sources: Sequence[torch.Tensor]) -> None:
        """`sources`: this rank's shards of the manifest's tensors (`local_shards`), in any dtype, on any device."""
        copy(self.targets, [sources[piece.tensor].reshape(-1)[piece.start : piece.stop] for piece in self.pieces])


class Giver:
    """At a rank that has another shard than the sender's: gives its part of each bucket of at most `bucket_bytes`."""

    def __init__(self, shards: Shards, manifest: Manifest, bucket_bytes: int) -> None:
        self._shards, self._manifest = shards, manifest
        buckets = plan_buckets(manifest, bucket_bytes)
        self._parts = [part_of(bucket, manifest, shards.number, shards.count) for bucket in buckets]
        self._ways: list[tuple[Copies, torch.Tensor]] = []
        """How each part gets to the sender that was met last: what is copied, and what is sent then."""

    def give(self, tensors: Mapping[str, torch.Tensor], timeout_s: float) -> bool:
        """Take part in one transfer of these tensors, whose deadline is `timeout_s`. Returns whether every part was
        given; if not, the transfer has failed. Raises PyTorch's error if another rank is gone or late."""
        sources, deadline = local_shards(tensors, self._manifest), Deadline(timeout_s + MARGIN_S)
        for number in range(len(self._parts)):
            if not self._wanted(deadline):
                return False
            copies, packed_U = self._ways[number]
            copies.run(sources)
            self._shards.give(packed_U, deadline)
        return not self._wanted(deadline)

    def _wanted(self, deadline: Deadline) -> bool:
        """Whether the sender wants another bucket. A new sender says first where its buckets are."""
        word = self._shards.hear(deadline)
        if word > NEXT:
            memory = self._shards.reach(word - NEXT, deadline)
            self._ways = self._into(memory) if memory else self._packed()
            word = self._shards.hear(deadline)
        return word == NEXT

    def _into(self, memory: Sequence[Block]) -> list[tuple[Copies, torch.Tensor]]:
        """Into the sender's two buckets, in turn; nothing is sent."""
        nothing_U = torch.empty(0, dtype=torch.uint8)
        return [
            (Copies.into(memory[number % 2].bytes_U, part.pieces, self._manifest, self._shards), nothing_U)
            for number, part in enumerate(self._parts)
        ]

    def _packed(self) -> list[tuple[Copies, torch.Tensor]]:
        """Into memory of this rank, for one part, which is sent."""
        most = max((part.num_bytes for part in self._parts), default=0)
        memory_U = torch.zeros(most, dtype=torch.uint8, device=self._shards.device)
        return [
            (Copies.into(memory_U, part.packed, self._manifest, self._shards), memory_U[: part.num_bytes])
            for part in self._parts
        ]


def local_shards(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> list[torch.Tensor]:
    """This rank's shards of the manifest's tensors, in its order. Raises ValueError if the tensors don't fit it."""
    if differing := tensors.keys() ^ {spec.name for spec in manifest.tensors}:
        raise ValueError(f"tensors and manifest differ in {sorted(differing)[:3]}")
    for spec in manifest.tensors:
        if (shape := tuple(tensors[spec.name].shape)) != spec.shape:
            raise ValueError(f"{spec.name} has shape {shape}, the manifest says {spec.shape}")
    return [local_shard(tensors[spec.name]) for spec in manifest.tensors]


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, live and without gradient; of a plain tensor all of it."""
    return (tensor.to_local() if is_divided(tensor) else tensor).detach()


def is_divided(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether FSDP2 has divided it. A worker has no such tensor, and doesn't load their type, which takes a second."""
    return hasattr(tensor, "placements")


def views(memory_U: torch.Tensor, pieces: Sequence[Piece], manifest: Manifest) -> list[torch.Tensor]:
    """The pieces' places in the memory, in their dtypes."""
    found: list[torch.Tensor] = []
    for piece in pieces:
        spec = manifest.tensors[piece.tensor]
        num_bytes = (piece.stop - piece.start) * spec.itemsize
        found.append(memory_U[piece.offset : piece.offset + num_bytes].view(getattr(torch, spec.dtype)))
    return found


def copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Each source into its target."""
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage] (no public name)
