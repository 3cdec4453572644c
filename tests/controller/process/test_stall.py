"""Stalls: since when no counter of a run moves."""

from __future__ import annotations

from asyncdapo.controller.process.waits import (
    Stall,
)


def test_a_stall_lasts_while_no_counter_moves() -> None:
    stall = Stall(now=0.0)
    assert stall.feed(5.0, {"tokens": 10, "steps": 0}) == 0.0
    assert stall.feed(9.0, {"tokens": 10, "steps": 0}) == 4.0
    assert stall.feed(65.0, {"tokens": 10, "steps": 0}) == 60.0
    assert stall.feed(70.0, {"tokens": 10, "steps": 1}) == 0.0


def test_a_run_that_never_moves_stalls_from_its_beginning() -> None:
    assert Stall(now=0.0).feed(30.0, {"tokens": 0}) == 30.0


def test_a_process_that_is_silent_and_comes_back_unchanged_isnt_progress() -> None:
    stall = Stall(now=0.0)
    stall.feed(1.0, {"replay tokens": 10, "steps": 3})
    assert stall.feed(11.0, {"steps": 3}) == 10.0
    assert stall.feed(21.0, {"replay tokens": 10, "steps": 3}) == 20.0


def test_a_restarted_process_counts_from_zero_and_has_moved() -> None:
    stall = Stall(now=0.0)
    stall.feed(1.0, {"tokens": 10})
    assert stall.feed(2.0, {"tokens": 0}) == 0.0


def test_what_no_counter_shows_can_be_told() -> None:
    stall = Stall(now=0.0)
    stall.reset(50.0)
    assert stall.feed(60.0, {}) == 10.0
