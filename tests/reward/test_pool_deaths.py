"""Verifier processes that die, outlive their worker, or can't start."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from asyncdapo.child import place
from asyncdapo.errors import RewardError, RunError
from asyncdapo.reward import verifier_process
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.wire import Verdict
from tests.asynchronous import asynchronous, until
from tests.reward.processes import FILE, cpu_s, gone_within, is_alive, running

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
async def test_processes_that_die_one_after_another_are_started_ever_more_slowly(monkeypatch) -> None:
    async with running() as pool:
        for _ in range(2):
            with pytest.raises(RewardError):
                await pool.verify(["exit 3"], "")
        began = time.monotonic()
        assert await pool.verify(["6"], "6") == [Verdict(1.0)]
        assert time.monotonic() - began > 1.9
        monkeypatch.setattr(place, "BACKOFF_S", (*place.BACKOFF_S[:2], 600.0))  # at once, or never
        os.kill(pool.pids()[0], signal.SIGKILL)
        assert await pool.verify(["6"], "6") == [Verdict(1.0)]


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
    assert gone_within(pids, 20.0)


@asynchronous
async def test_a_stop_ends_a_process_in_the_middle_of_a_text() -> None:
    async with running() as pool:
        [pid] = pool.pids()
        request = asyncio.create_task(pool.verify(["loop"], ""))
        await until(lambda: cpu_s(pid) > 0.2)
        await pool.stop()
        assert not is_alive(pid)
        with pytest.raises(RunError, match="has been closed"):
            await request
        assert pool.pids() == []


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
    with pytest.raises(RunError, match="can be started: verifier .*: ended with exit code 9: no licence for today"):
        await ScorerPool(f"{path}:verify", 1, 1.0).start()


@asynchronous
async def test_a_process_that_never_comes_to_its_verifier_is_given_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(verifier_process, "START_TIMEOUT_S", 2.0)
    path = tmp_path / "slow.py"
    path.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    with pytest.raises(RunError, match=r"no answer in 2 s: waiting"):
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
