"""Samples of a batch: read from the ledger, with what was sampled and what was observed apart."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from asyncdapo.controller.roles.samples import NUM_GROUPS, read_samples
from asyncdapo.metrics.samples import COLUMNS, MAX_CHARS, Sample, cut
from asyncdapo.replay.ledger.ledger import open_ledger, read_group
from tests.replay.run_of_episodes import run_of_episodes
from tests.replay.small_run import finished_run


class Numbers:
    """Spells a token as its number."""

    def spell(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


def batch_of(run_dir: Path, step: int) -> list[int]:
    with closing(open_ledger(run_dir)) as ledger:
        rows = ledger.execute("SELECT group_id FROM groups WHERE step = ? ORDER BY prompt_id", (step,))
        return [group_id for (group_id,) in rows]


def test_the_parts_of_a_sample_are_its_tokens_in_order_and_say_who_wrote_them(tmp_path: Path) -> None:
    run_dir = run_of_episodes(tmp_path)
    samples = read_samples(run_dir, 2, Numbers())  # pyright: ignore[reportArgumentType] (it only spells)
    group, payload = read_group(run_dir, batch_of(run_dir, 2)[0])
    [first, *_] = samples
    contexts = [context for context in payload.of_contexts(group) if context.index == 0]
    assert [int(number) for _, text in first.parts for number in text.split()] == [
        int(number) for context in contexts for number in context.own_ids
    ]
    assert [who for who, _ in first.parts] == [who for context in contexts for who, _ in context.header.sampled]
    assert {0, 1} == {who for who, _ in first.parts}
    assert (first.step, first.prompt_id, first.turns) == (2, group.prompt_id, group.completions[0].num_turns)
    assert first.versions == (1, 1)


def test_each_group_shows_its_best_and_its_worst_completion_and_a_batch_only_its_first_groups(tmp_path: Path) -> None:
    samples = read_samples(finished_run(tmp_path), 1, Numbers())  # pyright: ignore[reportArgumentType]
    rewards: dict[int, set[float]] = {}
    for sample in samples:
        rewards.setdefault(sample.prompt_id, set()).add(sample.reward)
    assert 0 < len(rewards) <= NUM_GROUPS
    assert all(both == {-1.0, 1.0} for both in rewards.values())


def test_the_samples_of_a_step_whose_tokens_are_freed_can_not_be_read(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    with closing(sqlite3.connect(run_dir / "ledger.db")) as ledger, ledger:
        ledger.execute("UPDATE groups SET segment = NULL")
    with pytest.raises(LookupError, match="isn't kept"):
        read_samples(run_dir, 1, Numbers())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ([(1, "47*86=4042<eos>")], "47*86=4042<eos>"),
        ([(1, "47*86"), (0, "4042"), (1, "Answer")], "[model]\n47*86\n[environment]\n4042\n[model]\nAnswer"),
    ],
)
def test_a_row_names_the_speaker_where_there_are_two(parts: list[tuple[int, str]], shown: str) -> None:
    sample = Sample(
        step=3,
        prompt_id=7,
        prompt="Q",
        parts=parts,
        reward=1.0,
        acc=1.0,
        turns=2,
        tokens=9,
        finish_reason="stop",
        versions=(2, 3),
    )
    row = dict(zip(COLUMNS, sample.row(), strict=True))
    assert (row["completion"], row["versions"], row["finish_reason"]) == (shown, "2 to 3", "stop")


def test_a_long_text_keeps_its_beginning_and_its_end_and_says_what_is_missing() -> None:
    text = cut("a" * 9_000 + "b" * 9_000)
    assert text.startswith("aaa")
    assert text.endswith("bbb")
    assert "8,000 characters" in text
    assert len(text) < MAX_CHARS + 50
