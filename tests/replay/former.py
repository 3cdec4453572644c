"""Records of groups as they were written before completions had contexts."""

from __future__ import annotations

import struct
from zlib import crc32

import msgspec

from asyncdapo.messages import Group
from asyncdapo.transport.payload import Payload


def former_record(group: Group, payload: Payload, *, marked: bool = True) -> bytes:
    """The bytes in a segment; those not `marked` are of before records had checksums."""
    fields = msgspec.to_builtins(group)
    for completion, of_today in zip(fields["completions"], group.completions, strict=True):
        [context] = of_today.contexts
        del completion["contexts"]
        completion |= {
            "num_tokens": context.num_tokens,
            "versions": context.versions,
            "loss_mask": context.loss_mask,
        }
    header, buffers = msgspec.msgpack.encode(fields), b"".join(payload.frames())
    if not marked:
        return b"".join((struct.pack("<I", len(header)), header, buffers))
    sizes = struct.pack("<II", len(header), crc32(buffers))
    return b"".join((b"RC2\xff", sizes, struct.pack("<I", crc32(header, crc32(sizes))), header, buffers))
