"""Kept samples: a few groups of each batch can be read when their segments are freed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from asyncdapo.controller.watch.pages import completion_page, groups_of
from asyncdapo.records.record import PAYLOAD_FOLDER, BadRecord
from asyncdapo.replay.ledger.kept import FOLDER, keep_samples, places_of, read_kept
from asyncdapo.replay.ledger.ledger import read_group
from tests.controller.watch.test_pages import Bytes
from tests.replay.small_run import SmallRun


def begun(run_dir: Path) -> SmallRun:
    """A run whose batch 1 is trained."""
    run = SmallRun(run_dir, segment_bytes=1)
    run.join(0)
    run.advance(0, 1)
    return run


def members(run_dir: Path, step: int) -> list[int]:
    return [row["group_id"] for row in groups_of(run_dir, step)]


def test_samples_are_read_when_their_segments_are_freed_and_the_others_are_named(tmp_path: Path) -> None:
    run = begun(tmp_path)
    first, second = members(tmp_path, 1)
    keep_samples(tmp_path, 1, 1)
    run.advance(0, 2)
    run.journal.free(run.journal.covered(2))
    with pytest.raises(LookupError, match="isn't kept"):
        read_group(tmp_path, first)
    group, payload = read_kept(tmp_path, first)
    assert group.lease_id == first
    assert len(payload.token_ids) == group.num_tokens
    with pytest.raises(LookupError, match=f"group {second} isn't kept"):
        read_kept(tmp_path, second)
    assert [row["kept"] for row in groups_of(tmp_path, 1)] == [True, False]
    assert len(completion_page(tmp_path, first, 0, Bytes())) == 4


def test_a_step_that_is_trained_again_has_its_new_samples(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.advance(0, 2)
    keep_samples(tmp_path, 2, 2)
    before = set(places_of(tmp_path, 2))
    run.roll_back(0)
    run.train(1)
    run.advance(0, 2)
    assert not before & set(members(tmp_path, 2))
    keep_samples(tmp_path, 2, 2)
    assert set(places_of(tmp_path, 2)) == set(members(tmp_path, 2))


def test_a_group_that_cannot_be_read_is_no_sample_and_a_damaged_sample_is_named(tmp_path: Path) -> None:
    begun(tmp_path)
    min((tmp_path / PAYLOAD_FOLDER).iterdir()).write_bytes(b"")
    keep_samples(tmp_path, 1, 2)
    assert len(places_of(tmp_path, 1)) == 1
    (tmp_path / FOLDER / "000001.bin").write_bytes(b"{")
    with pytest.raises(BadRecord, match="samples/000001.bin: its index can't be read"):
        places_of(tmp_path, 1)


def test_without_samples_a_group_is_read_from_its_segment(tmp_path: Path) -> None:
    begun(tmp_path)
    group_id, _ = members(tmp_path, 1)
    assert places_of(tmp_path, 1) == {}
    assert read_kept(tmp_path, group_id)[0] == read_group(tmp_path, group_id)[0]


def test_a_token_that_was_trained_on_has_the_ratio_of_learner_to_engine(tmp_path: Path) -> None:
    begun(tmp_path)
    group_id, _ = members(tmp_path, 1)
    group, payload = read_kept(tmp_path, group_id)
    (first, *_) = payload.of_contexts(group)
    learned = first.logprobs_S + np.float32(0.5)
    learned[-1] = np.nan
    (tmp_path / FOLDER).mkdir()
    np.savez(tmp_path / FOLDER / "000001.learner-1.npz", **{f"{group_id}.0.0": learned})
    *trained, last = [piece["ratio"] for piece in completion_page(tmp_path, group_id, 0, Bytes())]
    assert trained == pytest.approx([math.exp(0.5)] * 3)
    assert last is None
    assert {piece["ratio"] for piece in completion_page(tmp_path, group_id, 1, Bytes())} == {None}
    (tmp_path / FOLDER / "000001.learner-1.npz").write_bytes(b"PK")
    with pytest.raises(BadRecord, match="samples/000001.learner-1.npz"):
        completion_page(tmp_path, group_id, 0, Bytes())
