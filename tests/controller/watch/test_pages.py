"""The groups of a step, a group, a completion token by token, read from a ledger."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.controller.watch.pages import completion_page, group_page, groups_of, spelled
from asyncdapo.replay.ledger.ledger import read_group
from tests.replay.run_of_episodes import run_of_episodes
from tests.replay.small_run import finished_run


class Bytes:
    """A token is a byte."""

    def spell(self, token_ids: Sequence[int]) -> str:
        return bytes(token % 256 for token in token_ids).decode(errors="replace")


@settings(max_examples=40)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}")))
def test_pieces_are_whole_characters_in_order_and_every_token_is_in_one(text: str) -> None:
    pieces = list(spelled(list(text.encode()), Bytes()))
    assert "".join(piece for _, _, piece in pieces) == text
    assert [begin for begin, _, _ in pieces] == [0, *(end for _, end, _ in pieces)][: len(pieces)]
    assert all(piece == text or len(piece) == 1 for _, _, piece in pieces)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_tokens_that_are_no_text_are_spelled_all_the_same(token_ids: list[int]) -> None:
    ends = [end for _, end, _ in spelled(token_ids, Bytes())]
    assert ends[-1:] == [len(token_ids)][: len(token_ids)]
    assert ends == sorted(set(ends))


def test_a_step_leads_to_its_groups_and_each_to_its_tokens(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    groups = groups_of(run_dir, 1)
    assert len(groups) == 2
    assert all(row["kept"] and row["completions"] == 2 for row in groups)
    page = group_page(run_dir, groups[0]["group_id"], Bytes())
    assert page["prompt_id"] == groups[0]["prompt_id"]
    assert {each["reward"] for each in page["completions"]} == {1.0, -1.0}
    _, payload = read_group(run_dir, groups[0]["group_id"])
    pieces = completion_page(run_dir, groups[0]["group_id"], 0, Bytes())
    assert sum(piece["logprob"] for piece in pieces) == pytest.approx(float(payload.logprobs[:4].sum()))
    assert {piece["version"] for piece in pieces} == {0}


def test_what_was_observed_has_neither_log_prob_nor_version(tmp_path: Path) -> None:
    run_dir = run_of_episodes(tmp_path)
    pieces = completion_page(run_dir, groups_of(run_dir, 2)[0]["group_id"], 0, Bytes())
    assert {(piece["logprob"] is None, piece["version"]) for piece in pieces} == {(True, None), (False, 1)}


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert groups_of(tmp_path, 1) == []
    run_dir = finished_run(tmp_path)
    with pytest.raises(LookupError, match="completions 0 to 1, not 2"):
        completion_page(run_dir, groups_of(run_dir, 1)[0]["group_id"], 2, Bytes())
    with closing(sqlite3.connect(run_dir / "ledger.db")) as ledger, ledger:
        ledger.execute("UPDATE groups SET segment = NULL")
    (row, *_) = groups_of(run_dir, 1)
    assert row["kept"] == 0
    with pytest.raises(LookupError, match="isn't kept"):
        group_page(run_dir, row["group_id"], Bytes())
