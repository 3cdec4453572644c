"""The scorer: verdict, scale, overlong punishment, metrics, the shuffled control experiment, a verifier that fails; its
configuration."""

import asyncio

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.config.mistakes import convert_section
from asyncdapo.errors import ConfigError, RewardError, VerdictError
from asyncdapo.messages import Prompt
from asyncdapo.replay.config import FilterConfig
from asyncdapo.replay.core.filter import judge
from asyncdapo.reward.config import RewardConfig
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.scorer import Scale, Scorer
from asyncdapo.reward.wire import METRICS, Verdict
from tests.reward.processes import is_alive

PROMPT = Prompt(prompt_id=7, epoch=0, source="table", row=3, token_ids=[1], answer="yes")
MAX_LENGTH = 16


def verify(text, answer):
    return text == answer


def decode(token_ids):
    return "yes" if token_ids[0] else "no"


class FakePool:
    """Judges in this process; `slow` texts time out."""

    def __init__(self, verify=verify, slow=()):
        self._verify, self._slow = verify, slow

    async def verify(self, texts, answer):
        return [Verdict(0.0, timed_out=True) if text in self._slow else self._judge(text, answer) for text in texts]

    def _judge(self, text, answer):
        said = self._verify(text, answer)
        return said if isinstance(said, Verdict) else Verdict(float(said))


def make_scorer(pool, **keys):
    return Scorer("answer", pool, decode, Scale(RewardConfig(**keys), MAX_LENGTH))


def score(verdicts, seed=0, verify=verify, slow=(), lengths=None, **keys):
    lengths = lengths or [2] * len(verdicts)
    token_ids = [np.full(length, verdict, np.int32) for verdict, length in zip(verdicts, lengths, strict=True)]
    return asyncio.run(make_scorer(FakePool(verify, slow), **keys)(PROMPT, token_ids, ["stop"] * len(verdicts), seed))


def test_each_completion_gets_its_verdict_scaled():
    right, wrong = score([1, 0])
    others = {"timed_out": 0.0, "overlong": 0.0}
    assert right.metrics == {"acc": 1.0, "score": 1.0, "seq_reward": 1.0, "seq_final_reward": 1.0} | others
    assert wrong.metrics == {"acc": 0.0, "score": -1.0, "seq_reward": -1.0, "seq_final_reward": -1.0} | others
    assert (right.reward, wrong.reward) == (1.0, -1.0)


def test_a_score_says_what_the_verifier_took_for_the_answer():
    right, wrong = score([1, 0], verify=lambda text, answer: Verdict(float(text == answer), pred=text))
    assert (right.pred, wrong.pred) == ("yes", "no")
    assert score([1])[0].pred is None


def test_the_scale_is_the_users():
    right, wrong = score([1, 0], correct=2.0, incorrect=0.5)
    assert (right.reward, wrong.reward) == (2.0, 0.5)
    assert (right.metrics["acc"], wrong.metrics["acc"]) == (1.0, 0.0)


def test_responses_that_come_near_the_longest_length_are_punished_after_the_scale():
    """A buffer of 4 before 16 tokens: the punishment falls from 0 at 12 to -0.5 at 16 (eq. 13)."""
    lengths = [2, 12, 13, 14, 16, 16]
    scores = score([1, 1, 1, 1, 1, 0], lengths=lengths, overlong_buffer=4, overlong_penalty=0.5, incorrect=-3.0)
    assert [s.metrics["overlong"] for s in scores] == [0.0, 0.0, -0.125, -0.25, -0.5, -0.5]
    assert [s.metrics["acc"] for s in scores] == [1.0] * 5 + [0.0]
    assert [s.metrics["score"] for s in scores] == [1.0] * 5 + [-3.0]
    assert [s.reward for s in scores] == [1.0, 1.0, 0.875, 0.75, 0.5, -3.5]
    assert all(s.metrics["seq_reward"] == s.metrics["seq_final_reward"] == s.reward for s in scores)


def test_without_a_buffer_length_costs_nothing():
    assert [s.metrics["overlong"] for s in score([1, 1], lengths=[2, MAX_LENGTH])] == [0.0, 0.0]


def test_a_verifiers_own_numbers_stand_beside_ours():
    def style(text, answer):
        return Verdict(1.0, metrics={"style": float(len(text))})

    [only] = score([1], verify=style)
    assert only.metrics == {"style": 3.0} | dict.fromkeys(METRICS, 1.0) | {"timed_out": 0.0, "overlong": 0.0}


def test_a_completion_that_took_too_long_has_the_same_names_with_zeros():
    """The filter may compare a number of the verifier's own, which every completion of a group has to have."""

    def style(text, answer):
        return Verdict(1.0, metrics={"style": 0.5, "facts": 2.0})

    scorer = make_scorer(FakePool(style, slow=["no"]))
    for tokens in ([1, 0], [0, 0]):
        scores = asyncio.run(scorer(PROMPT, [np.array([token]) for token in tokens], ["stop"] * 2, 0))
        assert {frozenset(s.metrics) for s in scores} == {frozenset({*METRICS, "style", "facts"})}
        assert (scores[1].metrics["style"], scores[1].metrics["facts"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("filter_metric", "own"), [("style", {"style"}), ("acc", set()), (METRICS[-1], set()), (None, set())]
)
def test_a_group_that_takes_too_long_before_any_other_was_judged_has_the_number_of_the_filter(filter_metric, own):
    """A worker that has just begun doesn't know what a verifier's own numbers are called, but for this one."""
    scorer = Scorer(
        "answer", FakePool(slow=["no"]), decode, Scale(RewardConfig(), MAX_LENGTH, filter_metric=filter_metric)
    )
    scores = asyncio.run(scorer(PROMPT, [np.array([0])] * 2, ["stop"] * 2, 0))
    assert all(s.metrics.keys() == {*METRICS} | own for s in scores)
    metrics = {name: [s.metrics[name] for s in scores] for name in scores[0].metrics}
    assert judge(FilterConfig(metric=filter_metric or "acc"), metrics, num_loss_tokens=4) == "constant"


@given(verdicts=st.lists(st.integers(0, 1), min_size=1, max_size=32), seed=st.integers(0, 2**62))
def test_shuffling_keeps_the_verdicts_of_the_group(verdicts, seed):
    shuffled = score(verdicts, seed, shuffle=True)
    assert sorted(s.metrics["acc"] for s in shuffled) == sorted(verdicts)
    assert all(s.reward == 2 * s.metrics["acc"] - 1 for s in shuffled)


def test_shuffled_verdicts_have_nothing_to_do_with_the_completions():
    verdicts = [1] * 8 + [0] * 8
    first_half = [sum(s.metrics["acc"] for s in score(verdicts, seed, shuffle=True)[:8]) for seed in range(400)]
    assert 3.8 < np.mean(first_half) < 4.2
    assert len({tuple(s.reward for s in score(verdicts, seed, shuffle=True)) for seed in range(20)}) == 20


def test_shuffling_follows_from_the_seed():
    verdicts = [1, 0, 0, 1, 0, 1, 1, 0]
    assert score(verdicts, 3, shuffle=True) == score(verdicts, 3, shuffle=True)


def test_shuffling_leaves_nothing_to_learn_from_lengths_either():
    """The long completion is punished in one place of the group after another."""
    keys = {"overlong_buffer": 4, "shuffle": True, "lengths": [16, 2, 2, 2]}
    places = [[s.metrics["overlong"] for s in score([1] * 4, seed, **keys)].index(-1.0) for seed in range(40)]
    assert set(places) == {0, 1, 2, 3}
    assert all(sorted(s.reward for s in score([1] * 4, seed, **keys)) == [0.0, 1.0, 1.0, 1.0] for seed in range(5))


def test_shuffling_leaves_a_single_completion_alone():
    assert score([1], shuffle=True)[0].metrics["acc"] == 1.0


def test_partial_credit_lies_between_the_two_rewards():
    (half,) = score([1], verify=lambda text, answer: 0.5)
    assert (half.metrics["acc"], half.reward) == (0.5, 0.0)


def test_a_completion_whose_verifier_took_too_long_is_wrong_and_says_so():
    right, slow = score([1, 0], slow=["no"])
    assert (slow.reward, slow.metrics["acc"], slow.metrics["timed_out"]) == (-1.0, 0.0, 1.0)
    assert (right.reward, right.metrics["timed_out"]) == (1.0, 0.0)
    assert list(right.metrics) == list(slow.metrics) == list(METRICS)


def test_a_shuffled_time_out_stays_a_zero():
    for seed in range(20):
        shuffled = score([1] * 6 + [0] * 2, seed, slow=["no"], shuffle=True)
        assert sum(s.metrics["timed_out"] for s in shuffled) == 2
        assert all(s.metrics["acc"] == 1 - s.metrics["timed_out"] for s in shuffled)


def test_a_verifier_that_fails_ends_the_prompt_with_its_cause():
    def divide(text, answer):
        raise RewardError("ZeroDivisionError: division by zero (in divide, mine.py:3)")

    words = (
        "verifier 'answer' failed on table row 3 .prompt 7.: ZeroDivisionError: division by zero .in divide, mine.py:3"
    )
    with pytest.raises(RewardError, match=words):
        score([1], verify=divide)


def test_a_verifier_that_returns_no_verdict_is_named_with_what_it_returned():
    def minus_one(text, answer):
        raise VerdictError("a verdict is a number from 0 to 1, got -1")

    words = "verifier 'answer' broke its contract on table row 3 .prompt 7.: a verdict is a number from 0 to 1, got -1"
    with pytest.raises(VerdictError, match=words):
        score([1], verify=minus_one)


def test_a_scorer_starts_and_stops_its_processes():
    async def lives():
        config = RewardConfig(processes=2)
        pool = ScorerPool(config.verifier, config.processes, config.timeout_s)
        scorer = Scorer(config.verifier, pool, lambda ids: "Answer: 6", Scale(config, MAX_LENGTH))
        await scorer.start()
        pids = scorer.pids()
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        prompt = msgspec.structs.replace(PROMPT, answer="6")
        [only] = await scorer(prompt, [np.zeros(1, np.int32)], ["stop"], 0)
        assert (only.reward, scorer.num_judged) == (1.0, 1)
        assert scorer.gauges() == {"scorer_timeouts": 0, "scorer_restarts": 0}
        await scorer.stop()
        assert scorer.pids() == []
        assert not any(map(is_alive, pids))

    asyncio.run(lives())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("processes", 0),
        ("concurrency", 0),
        ("retries", -1),
        ("retries", 7),
        ("timeout_s", 0.0),
        ("timeout_s", float("nan")),
        ("max_failure_ratio", -0.1),
    ]
    + [("max_failure_ratio", 1.1), ("incorrect", 1.0)],
)
def test_a_value_that_cannot_work_is_refused(key, value):
    with pytest.raises(ConfigError, match="reward.correct" if key == "incorrect" else f"reward.{key}: must be"):
        convert_section("reward", RewardConfig, {key: value})
