"""The scorer pool with real processes: verdicts, time-outs, deaths, cancelled requests, and nothing left behind."""

import asyncio
import logging
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncdapo.errors import RewardError, VerdictError
from asyncdapo.reward.verifier_process import VerifierProcess
from asyncdapo.reward.wire import Request, Verdict
from tests.asynchronous import asynchronous, until
from tests.reward.processes import is_alive, running

QUIET = {"scorer_timeouts": 0, "scorer_restarts": 0}


@asynchronous
async def test_verdicts_come_in_the_order_of_the_texts() -> None:
    async with running() as pool:
        said = await pool.verify(["6", "7", "return half", "6"], "6")
        assert said == [Verdict(1.0), Verdict(0.0), Verdict(0.5), Verdict(1.0)]
        assert await pool.verify([], "6") == []
        assert (pool.gauges(), pool.num_verdicts) == (QUIET, 4)


@asynchronous
async def test_requests_share_the_processes_and_each_gets_its_own_verdicts() -> None:
    async with running(num_processes=2) as pool:
        assert len(set(pool.pids())) == 2
        requests = [pool.verify([str(number), "x" * 100_000, str(number + 1)], str(number)) for number in range(30)]
        said = await asyncio.gather(*requests)
        assert said == [[Verdict(1.0), Verdict(0.0), Verdict(0.0)]] * 30
        assert pool.gauges() == QUIET


@asynchronous
async def test_processes_work_at_the_same_time(tmp_path: Path) -> None:
    async with running(num_processes=2) as pool:
        files = [tmp_path / name for name in "ab"]
        asked = [asyncio.create_task(pool.verify([f"wait {file}"], "")) for file in files]
        await until(lambda: all(file.exists() for file in files))
        for file in files:
            file.unlink()
        assert await asyncio.gather(*asked) == [[Verdict(0.0)]] * 2


# --------------------------------------------------------------------------------- texts judged by themselves


@asynchronous
async def test_single_texts_that_are_ready_together_share_a_request_and_an_error_is_its_texts_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests, ask = [], VerifierProcess.ask

    async def note(self: VerifierProcess, request: Request, *args: float) -> list:
        requests.append(len(request.texts))
        return await ask(self, request, *args)

    wanted = [("6", "6"), ("7", "6"), ("raise", "6"), ("7", "7"), ("return list", "6"), ("8", "8")]
    async with running() as pool:
        monkeypatch.setattr(VerifierProcess, "ask", note)
        said = await asyncio.gather(*(pool.verify([text], answer) for text, answer in wanted), return_exceptions=True)
    right, wrong, raised, other, no_verdict, last = said
    assert (right, wrong, other, last) == ([Verdict(1.0)], [Verdict(0.0)], [Verdict(1.0)], [Verdict(1.0)])
    assert (type(raised), type(no_verdict)) == (RewardError, VerdictError)
    assert requests == [6, 3, 1]


@asynchronous
async def test_each_of_many_single_texts_has_the_outcome_that_it_has_alone_whatever_the_others_do() -> None:
    draw = random.Random(0)
    outcomes = {"6": [Verdict(1.0)], "7": [Verdict(0.0)], "raise": RewardError, "return list": VerdictError}
    texts = [draw.choice(list(outcomes)) for _ in range(100)]
    texts.insert(40, "exit 3")
    async with running(num_processes=2) as pool:

        async def judged(text: str) -> list[Verdict] | type[Exception]:
            await asyncio.sleep(draw.random() * 0.05)
            try:
                return await pool.verify([text], "6")
            except (RewardError, VerdictError) as error:
                return type(error)

        assert await asyncio.gather(*map(judged, texts)) == [outcomes.get(text, RewardError) for text in texts]
        assert pool.gauges()["scorer_restarts"] >= 1


@asynchronous
async def test_a_shared_request_ends_with_its_process_when_all_its_callers_are_cancelled_and_no_sooner(
    tmp_path: Path,
) -> None:
    async with running() as pool:
        for num_cancelled in (1, 2):
            pids, judged = pool.pids(), tmp_path / "judged"
            callers = [asyncio.create_task(pool.verify([text], "6")) for text in (f"wait {judged}", "6")]
            await until(judged.exists)
            for caller in callers[:num_cancelled]:
                caller.cancel()
            if num_cancelled == 1:
                judged.unlink()
            said = await asyncio.gather(*callers, return_exceptions=True)
            assert said[num_cancelled:] == [[Verdict(1.0)]][num_cancelled - 1 :]
            assert await pool.verify(["6"], "6") == [Verdict(1.0)]
            assert (pool.pids() == pids) == (num_cancelled == 1)


# ----------------------------------------------------------------------------------------------------------- time-outs


@asynchronous
async def test_a_text_over_the_time_counts_0_with_the_flag_after_a_second_try_and_the_others_keep_their_verdicts() -> (
    None
):
    async with running(timeout_s=0.5) as pool:
        [first] = pool.pids()
        began = time.monotonic()
        said = await pool.verify(["6", "loop", "6", "7"], "6")
        assert said == [Verdict(1.0), Verdict(0.0, timed_out=True), Verdict(1.0), Verdict(0.0)]
        assert time.monotonic() - began > 1.0
        assert pool.pids() != [first]
        assert not is_alive(first)
        assert pool.gauges() == {"scorer_timeouts": 1, "scorer_restarts": 2}
        assert pool.num_verdicts == 4


@asynchronous
async def test_a_text_that_is_in_time_at_the_second_try_keeps_its_verdict(tmp_path) -> None:
    async with running(timeout_s=1.0) as pool:
        text = f"once {tmp_path / 'seen'}"
        assert await pool.verify(["6", text, "6"], text) == [Verdict(0.0), Verdict(1.0), Verdict(0.0)]
        assert pool.gauges() == {"scorer_timeouts": 0, "scorer_restarts": 1}


@asynchronous
async def test_the_time_is_each_texts_and_not_the_requests() -> None:
    async with running(timeout_s=1.5) as pool:
        assert await pool.verify(["sleep 0.4"] * 4, "sleep 0.4") == [Verdict(1.0)] * 4
        assert pool.gauges() == QUIET


@asynchronous
async def test_verdicts_that_came_while_the_event_loop_was_held_up_are_in_time() -> None:
    async with running(timeout_s=1.5) as pool:
        request = asyncio.create_task(pool.verify(["sleep 0.1", "sleep 0.1"], ""))
        await asyncio.sleep(0.05)
        time.sleep(2.0)  # noqa: ASYNC251 - that is the case
        assert await request == [Verdict(0.0)] * 2
        assert pool.gauges() == QUIET


@asynchronous
async def test_what_a_verifier_had_started_is_killed_with_it(tmp_path) -> None:
    async with running(timeout_s=0.7) as pool:
        await pool.verify([f"child {tmp_path / 'pid'}"], "")
        await until(lambda: not is_alive(int((tmp_path / "pid").read_text())))


# ---------------------------------------------------------------------------------------------- raising, and no verdict


@asynchronous
async def test_a_verifier_that_raises_is_told_with_the_line_and_the_process_continues() -> None:
    async with running() as pool:
        with pytest.raises(RewardError, match=r"LookupError: nothing for 6 \(in obey, .*verifiers.py:\d+\)"):
            await pool.verify(["6", "raise", "6"], "6")
        with pytest.raises(RewardError, match=r"SystemExit: no more \(in obey"):
            await pool.verify(["leave"], "6")
        assert await pool.verify(["6"], "6") == [Verdict(1.0)]
        assert pool.gauges() == QUIET


@pytest.mark.parametrize(("what", "got"), [("nan", "nan"), ("none", "None"), ("two", "2"), ("list", r"\[1\]")])
@asynchronous
async def test_only_a_number_from_0_to_1_is_a_verdict(what, got) -> None:
    async with running() as pool:
        with pytest.raises(VerdictError, match=f"a verdict is a number from 0 to 1, got {got}"):
            await pool.verify([f"return {what}"], "6")


@asynchronous
async def test_a_verifier_may_print_and_read() -> None:
    async with running() as pool:
        assert await pool.verify(["print hello", "read", "6"], "6") == [Verdict(0.0), Verdict(1.0), Verdict(1.0)]
        assert pool.gauges() == QUIET


@asynchronous
async def test_what_a_verifier_forks_says_nothing_in_its_name() -> None:
    async with running() as pool:
        assert await pool.verify(["fork", "sleep 0.3", "6"], "6") == [Verdict(0.0), Verdict(0.0), Verdict(1.0)]
        assert await pool.verify(["6", "7"], "6") == [Verdict(1.0), Verdict(0.0)]
        assert pool.gauges() == QUIET


@asynchronous
async def test_what_a_verifier_prints_is_in_the_log(caplog) -> None:
    caplog.set_level(logging.INFO, "reward")
    async with running() as pool:
        await pool.verify(["print hello\n" + "x" * 10_000], "")
        [pid] = pool.pids()
        await until(lambda: caplog.text.count("hello") == 2)
    assert f"verifier process {pid}: hello" in caplog.text
    assert max(len(record.getMessage()) for record in caplog.records) < 5_000


# ---------------------------------------------------------------------------------------------------- given-up requests


@asynchronous
async def test_a_request_given_up_in_the_middle_disturbs_no_other(tmp_path: Path) -> None:
    async with running() as pool:
        [pid] = pool.pids()
        given_up = asyncio.create_task(pool.verify(["6", f"wait {tmp_path / 'judged'}", "6", "6"], "6"))
        waiting = asyncio.create_task(pool.verify(["7"], "6"))
        await until(lambda: pool.num_verdicts == 1)
        given_up.cancel()
        assert await waiting == [Verdict(0.0)]
        assert await pool.verify(["6", "7", "6"], "6") == [Verdict(1.0), Verdict(0.0), Verdict(1.0)]
        assert given_up.cancelled()
        assert not is_alive(pid)
        assert pool.gauges() == QUIET


@asynchronous
async def test_a_request_given_up_before_its_turn_takes_no_process(tmp_path: Path) -> None:
    async with running() as pool:
        pids, judged = pool.pids(), tmp_path / "judged"
        first = asyncio.create_task(pool.verify([f"wait {judged}"], ""))
        given_up = asyncio.create_task(pool.verify(["6"], "6"))
        last = asyncio.create_task(pool.verify(["6"], "6"))
        await until(judged.exists)
        given_up.cancel()
        judged.unlink()
        assert [await first, await last] == [[Verdict(0.0)], [Verdict(1.0)]]
        assert pool.pids() == pids


@asynchronous
async def test_requests_given_up_at_any_moment_leave_a_pool_that_works() -> None:
    async with running(num_processes=2) as pool:
        for number in range(12):
            requests = [asyncio.create_task(pool.verify(["a", f"sleep 0.0{number}", "b"], "a")) for _ in range(3)]
            await asyncio.sleep(0.008 * number)
            for request in requests[::2]:
                request.cancel()
            assert await requests[1] == [Verdict(1.0), Verdict(0.0), Verdict(0.0)]
        assert await pool.verify(["a"] * 3, "a") == [Verdict(1.0)] * 3
        assert len(pool.pids()) == 2


def test_a_verifier_process_imports_nothing_heavy() -> None:
    code = "import sys, asyncdapo.reward.verifier_main; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "transformers", "numpy", "zmq", "asyncio"} & set(modules)
