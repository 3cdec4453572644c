"""What counts as a verdict, further tries after an exception, and texts that an async function judges side by side."""

import asyncio
import gc
import warnings

import pytest

from asyncdapo.reward import judge as judge_module
from asyncdapo.reward.config import pauses_s
from asyncdapo.reward.judge import read_verdict
from asyncdapo.reward.verifier_main import make_judge
from asyncdapo.reward.wire import METRICS, NoVerdict, Raised, Verdict


def told_by(verify, texts, answer="6", concurrency=1, retries=0):
    """What is told of a request's texts."""
    told = []
    make_judge(verify, concurrency, retries)(texts, [answer] * len(texts), told.append)
    return told


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that are slept, instead of sleeping them."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(judge_module.time, "sleep", slept.append)
    monkeypatch.setattr("asyncdapo.reward.async_judge.asyncio.sleep", sleep)
    return slept


# ---------------------------------------------------------------------------------------------------------- a verdict


class Odd:
    def __float__(self):
        raise LookupError


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (True, Verdict(1.0)),
        (0, Verdict(0.0)),
        (0.25, Verdict(0.25)),
        ({"acc": 1}, Verdict(1.0)),
        ({"acc": False, "style": 0.5, "num_steps": 7}, Verdict(0.0, metrics={"style": 0.5, "num_steps": 7.0})),
        ({"acc": 1.0, "judge/mean-2.x": -1e300}, Verdict(1.0, metrics={"judge/mean-2.x": -1e300})),
        ({"acc": 1.0, "pred": "six"}, Verdict(1.0, pred="six")),
        ({"acc": 0.0, "pred": 6, "style": 1}, Verdict(0.0, pred="6", metrics={"style": 1.0})),
        ({"acc": 0.0, "pred": None}, Verdict(0.0)),
        ({"acc": 0.0, "pred": "\ud800" + "x" * 2000}, Verdict(0.0, pred="?" + "x" * 999)),
    ],
)
def test_a_verdict_is_a_number_from_0_to_1_or_numbers_with_acc(said, verdict):
    assert read_verdict(said) == verdict


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (None, "a verdict is a number from 0 to 1, got None"),
        (1.5, "a verdict is a number from 0 to 1, got 1.5"),
        (float("nan"), "a verdict is a number from 0 to 1, got nan"),
        (-1, "a verdict is a number from 0 to 1, got -1"),
        (Odd(), "a verdict is a number from 0 to 1, got <"),
        ("1", "a verdict is a number from 0 to 1, got '1'"),
        ({"acc": b"1"}, "a verdict is a number from 0 to 1, got {'acc': b'1'}"),
        ([1.0], "a verdict is a number from 0 to 1, got [1.0]"),
        ({}, "a dict of numbers needs `acc`, the verdict from 0 to 1, got {}"),
        ({"score": 1.0}, "a dict of numbers needs `acc`"),
        ({"acc": 2}, "a verdict is a number from 0 to 1, got {'acc': 2}"),
        ({"acc": 1, "style": float("inf")}, "metric 'style' must be a finite number, got inf"),
        ({"acc": 1, "style": "good"}, "metric 'style' must be a finite number, got 'good'"),
        ({"acc": 1, 7: 0.5}, "a metric's name may have letters, digits, `_`, `.`, `/` and `-`, got 7"),
        ({"acc": 1, "two words": 0.5}, "a metric's name may have letters"),
        ({"acc": 1, "\ud800": 0.5}, r"a metric's name may have letters, digits, `_`, `.`, `/` and `-`, got '\ud800'"),
        ({"acc": 1, **dict.fromkeys(map(str, range(101)), 0)}, "a verdict may have 100 numbers besides `acc`, got 101"),
        *(({"acc": 1, name: 0.5}, f"'{name}' is reserved (acc, ") for name in METRICS[1:]),
    ],
)
def test_anything_else_is_none_and_says_why(said, problem):
    assert isinstance(read_verdict(said), NoVerdict)
    assert read_verdict(said).problem.startswith(problem)


class Later:
    """Can be awaited, and is no coroutine."""

    def __await__(self):
        yield 1.0


@pytest.mark.parametrize("later", [lambda text, answer: Slow()(text, answer), lambda text, answer: Later()])
def test_a_function_that_hands_on_what_another_would_return_later_is_told_to_be_async(later):
    """Nobody would await it; nor is it complained of that nobody has."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [raised] = told_by(later, ["6"])
        gc.collect()
    assert raised == NoVerdict("returned an awaitable: make the function itself `async def`")


def test_what_an_error_says_can_always_be_sent():
    def verify(text, answer):
        raise LookupError("half a pair: \ud800")

    [raised] = told_by(verify, ["6"])
    assert raised.problem.startswith(r"LookupError: half a pair: \ud800 (in verify, ")


def test_an_error_of_several_lines_is_told_in_one():
    def verify(text, answer):
        raise LookupError("no answer\n  in this row\n")

    [raised] = told_by(verify, ["6"])
    assert raised.problem.startswith("LookupError: no answer in this row (in verify, ")


# ------------------------------------------------------------------------------------------------------- further tries


def raising(num_times, error=LookupError):
    """A function that raises at the first tries of each text, and its async twin."""
    num_tries = {}

    def verify(text, answer):
        num_tries[text] = num_tries.get(text, 0) + 1
        if num_tries[text] <= num_times:
            raise error(f"try {num_tries[text]}")
        return text == answer

    async def verify_async(text, answer):
        return verify(text, answer)

    return verify, verify_async


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("error", [LookupError, SystemExit])
def test_what_raises_is_tried_again_after_pauses_that_double(pauses, kind, error):
    assert told_by(raising(3, error)[kind], ["6", "7"], retries=3) == [Verdict(1.0), Verdict(0.0)]
    assert pauses == [0.5, 1.0, 2.0] * 2
    assert sum(pauses_s(3)) == 3.5


@pytest.mark.parametrize("kind", [0, 1])
def test_the_last_try_has_the_last_word_and_the_texts_after_it_are_not_told(pauses, kind):
    [raised] = told_by(raising(3)[kind], ["6", "6", "6"], retries=2)
    assert raised.problem.startswith("LookupError: try 3 (in verify, ")
    assert pauses[:2] == [0.5, 1.0]


def test_a_result_that_isnt_a_verdict_is_not_tried_again(pauses):
    assert len(told_by(lambda text, answer: None, ["6"], retries=5)) == 1
    assert pauses == []


# -------------------------------------------------------------------------------------------------------- side by side


class Slow:
    """An async function in the shape of an object: text `3` takes three turns of the loop. Counts those under way."""

    def __init__(self):
        self.num_under_way = self.most_under_way = 0
        self.begun, self.ended, self.loops = [], [], set()

    async def __call__(self, text, answer):
        self.loops.add(asyncio.get_running_loop())
        self.begun.append(text)
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        try:
            for _ in range(int(text)):
                await asyncio.sleep(0)
        finally:
            self.num_under_way -= 1
        self.ended.append(text)
        return text == answer


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_an_async_function_judges_so_many_texts_at_a_time_and_verdicts_keep_their_order(concurrency):
    slow = Slow()
    texts = ["9", "1", "6", "2", "6", "30", "3", "6"]
    assert told_by(slow, texts, concurrency=concurrency) == [Verdict(float(text == "6")) for text in texts]
    assert slow.most_under_way == min(concurrency, len(texts))
    assert slow.begun == texts
    assert (slow.ended == texts) == (concurrency == 1)


def test_a_verdict_is_told_before_later_texts_are_judged():
    ended_when_told, slow = [], Slow()
    make_judge(slow, 2, 0)(["1", "50", "50", "50"], ["1"] * 4, lambda said: ended_when_told.append(len(slow.ended)))
    assert ended_when_told[0] == 1


def test_the_event_loop_lives_as_long_as_the_process():
    slow = Slow()
    judge = make_judge(slow, 2, 0)
    for _ in range(3):
        judge(["1", "2"], ["2", "2"], lambda said: None)
    assert len(slow.loops) == 1


def test_one_that_raises_ends_the_others_before_it_is_told():
    told_when, under_way = [], Slow()

    async def verify(text, answer):
        if text == "raise":
            raise LookupError("no such answer")
        return await under_way(text, answer)

    def tell(said):
        told_when.append((said, under_way.num_under_way))

    make_judge(verify, 4, 0)(["1", "raise", "1000", "1000", "1000"], ["1"] * 5, tell)
    assert [type(said) for said, _ in told_when] == [Verdict, Raised]
    assert told_when[1][1] == 0
    assert under_way.ended == ["1"]


def test_a_function_that_cancels_itself_has_raised():
    async def verify(text, answer):
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    [raised] = told_by(verify, ["6", "6"], concurrency=2, retries=2)
    assert raised.problem.startswith("CancelledError: ")
