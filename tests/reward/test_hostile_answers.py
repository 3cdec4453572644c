"""Thousands of ordinary and hostile answers in random order, over every kind of verifier: each gets its verdict, or the
word that its verifier failed, no pool hangs, and no process is left.

By default 600 answers; with `-m soak` 10,000, which take some minutes, for the answers that have to be killed. Such
answers are in the soak only: what becomes of one of each kind is in test_pool.py and test_pool_deaths.py.
"""

import asyncio
import os
import random
import time
from pathlib import Path

import pytest

from asyncdapo.errors import RewardError, VerdictError
from asyncdapo.reward.wire import Verdict
from tests.asynchronous import until
from tests.reward.hostile import EXPECTED, make_cases
from tests.reward.processes import running

VERIFIERS = ("answer", "dapo", "exact", "gsm8k", "math_verify", "user")
MARK = "ASYNCDAPO_HOSTILE_ANSWERS"
MAX_TEXTS = 4


def marked_processes(mark):
    """Everything that was started from here on, at whatever remove."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def check(case, verdict):
    if case.outcome == "slow":
        assert verdict == Verdict(0.0, timed_out=True), case
    elif case.outcome == "answered":
        assert verdict.value in (0.0, 1.0), case
    else:
        assert not verdict.timed_out, case
        assert verdict.value in {"right": (1.0,), "wrong": (0.0,), "judged": (0.0, 1.0)}[case.outcome], case


async def judge_all(pool, cases):
    """In requests of one to four texts; what is to fail goes alone. Returns how many had an answer."""
    draw, left, num_answered = random.Random(0), list(cases), 0
    while left:
        size = draw.randint(1, MAX_TEXTS)
        failing = [place for place, case in enumerate(left[:size]) if case.outcome == "fails"]
        request = left[: max(1, failing[0])] if failing else left[:size]
        if request[0].outcome == "fails":
            with pytest.raises((RewardError, VerdictError)):
                pytest.fail(f"{request[0]} got {await pool.verify([request[0].text], EXPECTED)}")
        else:
            said = await pool.verify([case.text for case in request], EXPECTED)
            for case, verdict in zip(request, said, strict=True):
                check(case, verdict)
        num_answered += len(request)
        del left[: len(request)]
    return num_answered


async def judge_with(verifier, cases):
    async with running("obey" if verifier == "user" else verifier, timeout_s=2.0) as pool:
        return await judge_all(pool, cases)


def judge_everything(num_cases, num_deadly, monkeypatch):
    """Every verifier with a process of its own, all at once. Prints the rate."""
    mark = f"{MARK}={random.getrandbits(64):x}"
    monkeypatch.setenv(*mark.split("="))
    draw = random.Random(1)
    cases = {verifier: make_cases(verifier, num_cases // len(VERIFIERS), num_deadly, draw) for verifier in VERIFIERS}

    async def main():
        counts = await asyncio.gather(*(judge_with(verifier, cases[verifier]) for verifier in VERIFIERS))
        await until(lambda: not marked_processes(mark))
        return counts

    began = time.monotonic()
    counts = asyncio.run(main())
    seconds = time.monotonic() - began
    assert counts == [len(some) for some in cases.values()]
    print(f"{sum(counts):,} answers in {seconds:.1f} s: {sum(counts) / seconds:.0f} answers/s")


@pytest.mark.timeout(240)
def test_every_answer_of_a_sample_gets_a_verdict_and_no_process_is_left(monkeypatch):
    judge_everything(600, 0, monkeypatch)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_one_of_ten_thousand_answers_gets_a_verdict_and_no_process_is_left(monkeypatch):
    judge_everything(10_002, 25, monkeypatch)


def test_what_a_verifier_left_behind_would_be_noticed(monkeypatch):
    monkeypatch.setenv(MARK, "noticed")
    pid = os.posix_spawn("/bin/sleep", ["sleep", "5"], os.environ)
    assert marked_processes(f"{MARK}=noticed") == [pid]
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert marked_processes(f"{MARK}=noticed") == []
