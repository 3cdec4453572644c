"""A verifier process: what it can be sent, what comes back, and its place when memory runs out."""

import sys
from pathlib import Path

import pytest

from asyncdapo.reward.wire import Verdict
from tests.asynchronous import asynchronous
from tests.reward.processes import running


@asynchronous
async def test_half_a_surrogate_pair_is_judged_as_a_question_mark() -> None:
    async with running("exact") as pool:
        said = await pool.verify(["\ud800a", "a\udfff", "\0", "𝒳"], "?a")
        assert said == [Verdict(1.0, pred="?a"), *(Verdict(0.0, pred=pred) for pred in ("a?", "\0", "𝒳"))]
        assert await pool.verify(["?", "𝒳"], "\udc00") == [Verdict(1.0, pred="?"), Verdict(0.0, pred="𝒳")]


@asynchronous
async def test_numbers_of_the_verifiers_own_come_with_its_verdict() -> None:
    async with running("describe") as pool:
        [verdict] = await pool.verify(["six"], "six")
        assert verdict == Verdict(1.0, metrics={"num_chars": 3.0, "shouts": 0.0})


@asynchronous
async def test_a_plain_function_that_raises_is_tried_again_and_the_pause_is_not_held_against_it(tmp_path) -> None:
    async with running("busy_once", timeout_s=0.4, retries=1) as pool:
        said = await pool.verify([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "b"))
        assert said == [Verdict(0.0), Verdict(1.0)]
        assert pool.gauges() == {"scorer_timeouts": 0, "scorer_restarts": 0}


@pytest.mark.skipif(sys.platform != "linux", reason="the score is Linux's")
@asynchronous
async def test_it_is_the_first_to_go_when_memory_runs_out() -> None:
    async with running() as pool:
        [pid] = pool.pids()
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == 1000
