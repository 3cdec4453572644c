from __future__ import annotations

import math

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.weights.manifest import ALIGN_BYTES, Manifest, TensorSpec, elements_of, part_of, plan_buckets

specs = st.builds(
    TensorSpec,
    name=st.text(max_size=5),
    dtype=st.just("any"),
    shape=st.lists(st.integers(0, 12), max_size=3).map(tuple),
    itemsize=st.sampled_from([1, 2, 4, 8, 16]),
)
manifests = st.lists(specs, max_size=12).map(lambda tensors: Manifest(tensors=tuple(tensors)))
bucket_sizes = st.integers(1, 20).map(lambda lines: lines * ALIGN_BYTES)


@given(manifests, bucket_sizes)
def test_buckets_cover_the_stream_once_in_order_and_none_is_too_large(manifest: Manifest, bucket_bytes: int):
    buckets = plan_buckets(manifest, bucket_bytes)
    borders = [0, *(bucket.stop for bucket in buckets)]
    assert [bucket.start for bucket in buckets] == borders[:-1]
    assert borders[-1] == manifest.offsets[-1]
    assert all(0 < bucket.stop - bucket.start <= bucket_bytes for bucket in buckets)


@given(manifests, bucket_sizes)
def test_every_element_has_one_place_which_is_where_the_receiver_looks(manifest: Manifest, bucket_bytes: int):
    places = []
    for bucket in plan_buckets(manifest, bucket_bytes):
        for piece in bucket.pieces:
            itemsize = manifest.tensors[piece.tensor].itemsize
            for number, element in enumerate(range(piece.start, piece.stop)):
                byte = bucket.start + piece.offset + number * itemsize
                assert byte + itemsize <= bucket.stop
                places.append((piece.tensor, element, byte))
    assert places == [
        (tensor, element, manifest.offsets[tensor] + element * spec.itemsize)
        for tensor, spec in enumerate(manifest.tensors)
        for element in range(math.prod(spec.shape))
    ]


@given(manifests, bucket_sizes)
def test_a_tensor_that_fits_a_bucket_is_never_cut(manifest: Manifest, bucket_bytes: int):
    pieces = [piece.tensor for bucket in plan_buckets(manifest, bucket_bytes) for piece in bucket.pieces]
    for tensor, spec in enumerate(manifest.tensors):
        if 0 < spec.num_bytes <= bucket_bytes:
            assert pieces.count(tensor) == 1


def test_tensors_that_fill_a_bucket_exactly_share_it():
    manifest = Manifest.of({"one": torch.zeros(16), "two": torch.zeros(48)})
    assert len(plan_buckets(manifest, 256)) == 1


@given(manifests)
def test_tensors_start_aligned_and_do_not_overlap(manifest: Manifest):
    offsets = manifest.offsets
    assert all(offset % ALIGN_BYTES == 0 for offset in offsets)
    for spec, start, after in zip(manifest.tensors, offsets, offsets[1:], strict=False):
        assert 0 <= after - (start + spec.num_bytes) < ALIGN_BYTES


@pytest.mark.parametrize("bucket_bytes", [0, -64, 100])
def test_a_bucket_size_that_can_not_work_is_refused(bucket_bytes: int):
    with pytest.raises(ValueError, match="multiple of 64"):
        plan_buckets(Manifest(tensors=()), bucket_bytes)


def test_bytes_are_those_of_the_tensors_without_gaps():
    tensors = {"weight": torch.zeros(3, 5), "steps": torch.zeros(2, dtype=torch.int64)}
    assert Manifest.of(tensors).num_bytes == 60 + 16
    assert Manifest.of(tensors, torch.bfloat16).num_bytes == 30 + 16


def test_a_manifest_survives_the_wire_and_any_change_changes_its_digest():
    spec = TensorSpec(name="weight", dtype="float32", shape=(2, 3), itemsize=4)
    other = TensorSpec(name="bias", dtype="float32", shape=(3,), itemsize=4)
    manifest = Manifest(tensors=(spec, other))
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=Manifest)
    assert copy == manifest
    changed = [
        manifest,
        Manifest(tensors=(other, spec)),
        Manifest(tensors=(spec,)),
        Manifest(tensors=(msgspec.structs.replace(spec, shape=(3, 2)), other)),
        Manifest(tensors=(msgspec.structs.replace(spec, dtype="int32"), other)),
        Manifest(tensors=(msgspec.structs.replace(spec, name="Weight"), other)),
    ]
    digests = {one.digest for one in changed}
    assert len(digests) == len(changed)
    assert copy.digest == manifest.digest
    assert all(0 <= digest < 1 << 63 for digest in digests)


@given(manifests, bucket_sizes, st.integers(1, 5))
def test_the_parts_of_all_shards_are_the_bucket(manifest: Manifest, bucket_bytes: int, num_shards: int):
    def elements(pieces) -> list[tuple[int, int, int]]:
        return sorted(
            (piece.tensor, element, piece.offset + number * manifest.tensors[piece.tensor].itemsize)
            for piece in pieces
            for number, element in enumerate(range(piece.start, piece.stop))
        )

    for bucket in plan_buckets(manifest, bucket_bytes):
        parts = [part_of(bucket, manifest, shard, num_shards) for shard in range(num_shards)]
        assert elements(piece for part in parts for piece in part.pieces) == elements(bucket.pieces)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 5))
def test_a_shard_has_the_rows_that_torch_gives_it(shape: list[int], num_shards: int):
    whole = torch.arange(math.prod(shape)).view(shape)
    chunks = [chunk.flatten().tolist() for chunk in whole.chunk(num_shards)]
    chunks += [[]] * (num_shards - len(chunks))
    ranges = [elements_of(shape, shard, num_shards) for shard in range(num_shards)]
    assert [whole.flatten()[first:last].tolist() for first, last in ranges] == chunks


@given(manifests, bucket_sizes, st.integers(1, 5))
def test_packed_pieces_are_the_same_elements_aligned_without_overlap(
    manifest: Manifest, bucket_bytes: int, num_shards: int
):
    for bucket in plan_buckets(manifest, bucket_bytes):
        part = part_of(bucket, manifest, num_shards - 1, num_shards)
        ranges = [[(piece.tensor, piece.start, piece.stop) for piece in some] for some in (part.pieces, part.packed)]
        assert ranges[0] == ranges[1]
        ends = [
            piece.offset + (piece.stop - piece.start) * manifest.tensors[piece.tensor].itemsize for piece in part.packed
        ]
        assert all(piece.offset % ALIGN_BYTES == 0 for piece in part.packed)
        starts = [*(piece.offset for piece in part.packed), part.num_bytes]
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=True))
