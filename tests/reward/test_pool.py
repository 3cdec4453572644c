"""The scorer pool with real processes: verdicts, time-outs, deaths, cancelled requests, and nothing left behind."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from asyncdapo.errors import RewardError, RunError, VerdictError
from asyncdapo.reward import verifier_process
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.wire import Verdict
from tests.asynchronous import asynchronous, until
from tests.reward.processes import FILE, cpu_s, gone_within, is_alive, running

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
async def test_processes_work_at_the_same_time() -> None:
    async with running(num_processes=2) as pool:
        began = time.monotonic()
        await asyncio.gather(*(pool.verify(["sleep 1"], "") for _ in range(2)))
        assert time.monotonic() - began < 1.8


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
    async with running(timeout_s=1.0) as pool:
        assert await pool.verify(["sleep 0.4"] * 4, "sleep 0.4") == [Verdict(1.0)] * 4
        assert pool.gauges() == QUIET


@asynchronous
async def test_verdicts_that_came_while_the_event_loop_was_held_up_are_in_time() -> None:
    async with running(timeout_s=0.5) as pool:
        request = asyncio.create_task(pool.verify(["sleep 0.1", "sleep 0.1"], ""))
        await asyncio.sleep(0.05)
        time.sleep(1.0)  # noqa: ASYNC251 - that is the case
        assert await request == [Verdict(0.0)] * 2
        assert pool.gauges() == QUIET


@asynchronous
async def test_what_a_verifier_had_started_is_killed_with_it(tmp_path) -> None:
    async with running(timeout_s=0.7) as pool:
        await pool.verify([f"child {tmp_path / 'pid'}"], "")
        assert gone_within([int((tmp_path / "pid").read_text())], 2.0)


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


# -------------------------------------------------------------------------------------------------------------- deaths


@asynchronous
async def test_a_process_killed_while_idle_is_replaced() -> None:
    async with running(num_processes=2) as pool:
        killed, other = pool.pids()
        os.kill(killed, signal.SIGKILL)
        await until(lambda: pool.pids() == [other])
        assert await asyncio.gather(pool.verify(["6"], "6"), pool.verify(["6"], "6")) == [[Verdict(1.0)]] * 2
        assert len(pool.pids()) == 2
        assert killed not in pool.pids()
        assert pool.gauges() == {"scorer_timeouts": 0, "scorer_restarts": 1}


@asynchronous
async def test_a_process_killed_at_work_is_replaced_and_its_text_judged_again(tmp_path) -> None:
    async with running() as pool:
        [killed] = pool.pids()
        seen = tmp_path / "seen"
        request = asyncio.create_task(pool.verify(["6", f"once {seen}", "6"], "6"))
        await until(seen.exists)
        os.kill(killed, signal.SIGKILL)
        assert await request == [Verdict(1.0), Verdict(0.0), Verdict(1.0)]
        assert pool.gauges() == {"scorer_timeouts": 0, "scorer_restarts": 1}


@asynchronous
async def test_texts_on_which_one_process_dies_are_judged_by_the_next(tmp_path) -> None:
    async with running() as pool:
        texts = [f"die_once {tmp_path / name}" for name in "ab"]
        assert await pool.verify([*texts, "6"], texts[1]) == [Verdict(0.0), Verdict(1.0), Verdict(0.0)]
        assert pool.gauges() == {"scorer_timeouts": 0, "scorer_restarts": 2}


@pytest.mark.parametrize(("text", "how"), [("segfault", "killed by SIGSEGV"), ("exit 3", "ended with exit code 3")])
@asynchronous
async def test_a_text_on_which_two_processes_die_is_the_verifiers_failure(text, how) -> None:
    async with running() as pool:
        with pytest.raises(RewardError, match=f"its process ended 2 times, the last one {how}"):
            await pool.verify(["6", text, "6"], "6")
        assert await pool.verify(["6"], "6") == [Verdict(1.0)]


@asynchronous
async def test_processes_that_die_one_after_another_are_started_ever_more_slowly() -> None:
    async with running() as pool:
        for _ in range(2):
            with pytest.raises(RewardError):
                await pool.verify(["exit 3"], "")
        began = time.monotonic()
        assert await pool.verify(["6"], "6") == [Verdict(1.0)]
        assert time.monotonic() - began > 1.9
        os.kill(pool.pids()[0], signal.SIGKILL)
        began = time.monotonic()
        await pool.verify(["6"], "6")
        assert time.monotonic() - began < 1.0


@asynchronous
async def test_ctrl_c_leaves_the_processes_alone() -> None:
    async with running() as pool:
        pids = pool.pids()
        assert os.getpgid(pids[0]) != os.getpgid(0)
        os.kill(pids[0], signal.SIGINT)
        assert await pool.verify(["sleep 0.1"], "") == [Verdict(0.0)]
        assert pool.pids() == pids


# ----------------------------------------------------------------------------------------------------- the worker's end

WORKER = """
import asyncio, sys
from tests.reward.processes import running

async def main():
    async with running(num_processes=2) as pool:
        request = asyncio.create_task(pool.verify([sys.argv[1]], ""))
        await asyncio.sleep(0.3)
        print(*pool.pids(), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("text", ["loop", "6"])
def test_the_workers_death_leaves_no_process_behind(text) -> None:
    command = [sys.executable, "-c", WORKER, text]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=FILE.parents[2]) as worker:
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        worker.kill()
    assert gone_within(pids, 2.0)


@asynchronous
async def test_a_stop_ends_a_process_in_the_middle_of_a_text() -> None:
    async with running() as pool:
        [pid] = pool.pids()
        request = asyncio.create_task(pool.verify(["loop"], ""))
        await until(lambda: cpu_s(pid) > 0.2)
        await pool.stop()
        assert not is_alive(pid)
        with pytest.raises(RunError, match="has been stopped"):
            await request
        assert pool.pids() == []


# ---------------------------------------------------------------------------------------------------- given-up requests


@asynchronous
async def test_a_request_given_up_in_the_middle_disturbs_no_other() -> None:
    async with running() as pool:
        [pid] = pool.pids()
        given_up = asyncio.create_task(pool.verify(["6", "sleep 0.3", "6", "6"], "6"))
        waiting = asyncio.create_task(pool.verify(["7"], "6"))
        await until(lambda: pool.num_verdicts == 1)
        given_up.cancel()
        assert await waiting == [Verdict(0.0)]
        assert await pool.verify(["6", "7", "6"], "6") == [Verdict(1.0), Verdict(0.0), Verdict(1.0)]
        assert given_up.cancelled()
        assert not is_alive(pid)
        assert pool.gauges() == QUIET


@asynchronous
async def test_a_request_given_up_before_its_turn_takes_no_process() -> None:
    async with running() as pool:
        pids = pool.pids()
        first = asyncio.create_task(pool.verify(["sleep 0.3"], ""))
        given_up = asyncio.create_task(pool.verify(["6"], "6"))
        last = asyncio.create_task(pool.verify(["6"], "6"))
        await asyncio.sleep(0.1)
        given_up.cancel()
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


# --------------------------------------------------------------------------------------------------- that can't start


@asynchronous
async def test_a_verifier_that_cannot_be_imported_ends_the_start_with_the_cause(tmp_path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nowhere_to_be_found\n")
    pool = ScorerPool(f"{path}:verify", 2, 1.0)
    with pytest.raises(
        RunError, match=r"can't be imported: ModuleNotFoundError: .*nowhere.*\(.*broken.py:1\)"
    ) as caught:
        await pool.start()
    assert not isinstance(caught.value, RewardError)
    assert pool.pids() == []


@asynchronous
async def test_a_process_that_dies_at_its_start_is_told_with_its_last_lines(tmp_path) -> None:
    path = tmp_path / "dying.py"
    path.write_text("import os\nprint('no licence for today')\nos._exit(9)\n")
    with pytest.raises(RunError, match="can be started: ended with exit code 9: no licence for today"):
        await ScorerPool(f"{path}:verify", 1, 1.0).start()


@asynchronous
async def test_a_process_that_never_comes_to_its_verifier_is_given_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(verifier_process, "START_TIMEOUT_S", 0.7)
    path = tmp_path / "slow.py"
    path.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    with pytest.raises(RunError, match=r"no answer in 0.7 s: waiting"):
        await ScorerPool(f"{path}:verify", 1, 1.0).start()


@asynchronous
async def test_a_verifier_that_breaks_during_the_run_ends_the_worker_and_not_a_group(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE.read_text())
    pool = ScorerPool(f"{path}:equal", 1, 1.0)
    await pool.start()
    path.write_text("1 / 0\n")
    os.kill(pool.pids()[0], signal.SIGKILL)
    with pytest.raises(RunError, match="ZeroDivisionError") as caught:
        await pool.verify(["6"], "6")
    assert not isinstance(caught.value, RewardError)
    path.write_text(FILE.read_text())
    assert await pool.verify(["6"], "6") == [Verdict(1.0)]
    await pool.stop()


def test_a_verifier_process_imports_nothing_heavy() -> None:
    code = "import sys, asyncdapo.reward.verifier_main; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "transformers", "numpy", "zmq", "asyncio"} & set(modules)
