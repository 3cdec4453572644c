"""The verdict: what limits a run, from its accounts; each rule with the accounts of a run that it is about."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.accounting.names import WORKER_STATES
from asyncdapo.metrics.verdict.advice import KEYS, RULES, advise, words
from asyncdapo.metrics.verdict.running_verdict import RunningVerdict, final_words, verdict_of
from asyncdapo.metrics.verdict.verdict import BALANCED, LIMITS, UNSURE, judge, lost_shares
from asyncdapo.metrics.verdict.window import FATES, LOOP, Window
from tests.metrics.accounts_of import STEP_S, lines_of

KEYS_IN_FORCE = dict.fromkeys(KEYS, 1.0) | {
    "rollout.slots": 64.0,
    "rollout.group_size": 16.0,
    "replay.max_staleness": 2.0,
    "eval.every": 4.0,
    "learner.tokens_per_microbatch": 1024.0,
}
WAITING = {"wait": 0.5, "train": 0.45, "publish": 0.05}
TRAINING = {"wait": 0.02, "train": 0.9, "publish": 0.08}

PLANTED = {
    "rollout": {"loop": WAITING, "workers": {"generate": 1.0}},
    "straggler": {
        "loop": WAITING,
        "workers": {"generate": 1.0},
        "num_workers": 2,
        "rollout__worker_tokens_per_s_mean": 55.0,
        "rollout__worker_tokens_per_s_min": 10.0,
        "rollout__slowest_worker": 1,
        "fates": {"trained": 0.5, "filtered": 0.5},
    },
    "data": {"loop": WAITING, "workers": {"generate": 1.0}, "fates": {"trained": 0.2, "filtered": 0.8}},
    "evaluation": {"loop": WAITING, "workers": {"generate": 1.0}, "fates": {"trained": 0.3, "evaluation": 0.7}},
    "dropped": {"loop": WAITING, "workers": {"generate": 1.0}, "fates": {"trained": 0.3, "expired": 0.4, "late": 0.3}},
    "reward": {"loop": WAITING, "workers": {"generate": 0.3, "score": 0.7}, "reward__time__busy_s": 0.0},
    "environment": {"loop": WAITING, "workers": {"generate": 0.3, "environment": 0.7}},
    "transport": {"loop": WAITING, "workers": {"generate": 0.3, "send": 0.7}},
    "publish": {"loop": {"wait": 0.02, "train": 0.3, "publish": 0.68}, "workers": {"generate": 0.4, "lease": 0.6}},
    "learner": {"loop": TRAINING, "workers": {"generate": 0.4, "lease": 0.6}},
    "checkpoint": {"loop": {"train": 0.4, "checkpoint": 0.6}, "workers": {"generate": 0.5, "lease": 0.5}},
    "run_ahead": {"loop": WAITING, "workers": {"generate": 0.5, "lease": 0.5}},
}


def window_of(**planted) -> Window:
    window = Window.of(lines_of(**planted))
    assert window is not None
    return window


@pytest.mark.parametrize("limit", LIMITS)
def test_a_planted_bottleneck_gets_its_verdict_and_its_advice(limit: str) -> None:
    window = window_of(**PLANTED[limit])
    verdict = judge(lost_shares(window))
    assert verdict.limit == limit
    assert verdict.lost >= 0.2
    advice = advise(verdict, window, KEYS_IN_FORCE)
    assert advice is not None
    assert all(value > KEYS_IN_FORCE[key] for key, value in advice.changes.items())
    said = list(words(verdict, window, KEYS_IN_FORCE))
    assert said == [f"{limit}-bound, {verdict.lost:.0%} of the time is lost: {LIMITS[limit]}", advice.text]
    assert all(len(f"12:00:00  verdict: {line}") <= 120 for line in said)
    assert any(key in advice.text for key in (*KEYS, "controller.placement", "prompts.path", "reward.concurrency"))


def test_a_publish_beside_which_the_learner_computes_costs_nothing() -> None:
    planted = PLANTED["publish"]
    assert judge(lost_shares(window_of(**planted))).limit == "publish"
    window = window_of(**planted, learner__ahead_s=0.68 * STEP_S)
    assert judge(lost_shares(window)).limit == "learner"
    assert window.loop == pytest.approx(dict.fromkeys(LOOP, 0.0) | {"wait": 0.02, "train": 0.98})
    assert window.overlap == pytest.approx(0.98)


def test_of_what_lies_between_two_steps_only_a_part_may_be_beside_a_gradient() -> None:
    loop = {"wait": 0.2, "train": 0.4, "publish": 0.3, "checkpoint": 0.1}
    window = window_of(loop=loop, workers={"generate": 1.0}, learner__ahead_s=0.1 * STEP_S)
    expected = {"wait": 0.2, "train": 0.5, "publish": 0.225, "checkpoint": 0.075}
    assert window.loop == pytest.approx(dict.fromkeys(LOOP, 0.0) | expected)


def test_there_is_a_rule_and_a_planted_run_for_every_limit() -> None:
    assert set(RULES) == set(LIMITS) == set(PLANTED)


def test_a_run_in_which_nobody_waits_is_balanced() -> None:
    window = window_of(loop={"wait": 0.04, "train": 0.96}, workers={"generate": 0.95, "lease": 0.05})
    verdict = judge(lost_shares(window))
    assert verdict.limit == BALANCED
    assert advise(verdict, window, KEYS_IN_FORCE) is None
    assert list(words(verdict, window, KEYS_IN_FORCE)) == ["balanced"]


def test_two_limits_that_cost_the_same_are_not_told_apart() -> None:
    window = window_of(loop=WAITING, workers={"generate": 0.5, "score": 0.5})
    verdict = judge(lost_shares(window))
    assert verdict.limit == UNSURE
    assert set(verdict.rivals) == {"rollout", "reward"}
    [said] = words(verdict, window, KEYS_IN_FORCE)
    assert said.startswith("not sure, ")
    assert all(LIMITS[limit] in said for limit in verdict.rivals)


def test_workers_without_a_lease_beside_a_straggler_wait_for_it() -> None:
    slow = {"num_workers": 2, "rollout__worker_tokens_per_s_mean": 2500.0, "rollout__worker_tokens_per_s_min": 1300.0}
    workers = {"generate": 0.42, "score": 0.3, "lease": 0.28}
    lost = lost_shares(window_of(loop={"wait": 0.68, "train": 0.32}, workers=workers, **slow))
    assert judge(lost).limit == "straggler"
    assert sum(lost.values()) == pytest.approx(0.68)


@pytest.mark.parametrize(("all_correct", "said"), [(0.8, "harder prompts"), (0.1, "easier prompts")])
def test_the_advice_on_data_depends_on_which_groups_teach_nothing(all_correct: float, said: str) -> None:
    planted = {"filter__all_correct_ratio": all_correct, "filter__all_wrong_ratio": 0.9 - all_correct}
    window = window_of(**PLANTED["data"], **planted)
    advice = advise(judge(lost_shares(window)), window, KEYS_IN_FORCE)
    assert advice is not None
    assert said in advice.text


def test_workers_with_empty_slots_are_not_given_more_of_them() -> None:
    window = window_of(loop=WAITING, workers={"generate": 1.0})
    advice = advise(judge(lost_shares(window)), window, KEYS_IN_FORCE | {"rollout.slots": 256.0})
    assert advice is not None
    assert set(advice.changes) == {"replay.run_ahead"}


def test_a_measured_run_ahead_is_told_and_only_its_bound_can_be_raised() -> None:
    keys = KEYS_IN_FORCE | {"replay.run_ahead": math.nan, "replay.max_staleness": 2.0}
    window = window_of(**PLANTED["run_ahead"], replay__run_ahead=1.63)
    advice = advise(judge(lost_shares(window)), window, keys)
    assert advice is not None
    assert advice.text == "replay.run_ahead=auto is 1.6: raise replay.max_staleness from 2 to 3"
    assert advice.changes == {"replay.max_staleness": 3.0}


def test_more_run_ahead_than_staleness_allows_raises_both() -> None:
    keys = KEYS_IN_FORCE | {"replay.run_ahead": 2.0}
    window = window_of(**PLANTED["run_ahead"])
    advice = advise(judge(lost_shares(window)), window, keys)
    assert advice is not None
    assert advice.changes == {"replay.run_ahead": 2.5, "replay.max_staleness": 3.0}


shares = st.floats(0, 1)


@given(
    wait=shares,
    loop=st.dictionaries(st.sampled_from(LOOP[1:]), shares),
    workers=st.dictionaries(st.sampled_from(WORKER_STATES), shares, min_size=1),
    fates=st.dictionaries(st.sampled_from(FATES), shares),
)
def test_what_is_lost_sums_to_the_larger_of_the_two_waits(wait, loop, workers, fates) -> None:
    loop, workers, fates = (
        {name: share / sum(parts.values()) for name, share in parts.items()} if sum(parts.values()) else {}
        for parts in ({"wait": wait, **loop}, workers, fates)
    )
    window = Window.of(lines_of(loop=loop, workers=workers, fates=fates))
    if window is None:
        return
    lost = lost_shares(window)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in lost.values())
    whole = max(window.loop["wait"], window.workers["lease"])
    worked = any(window.loop[state] for state in ("train", "publish", "checkpoint"))
    assert sum(lost.values()) == pytest.approx(whole, abs=1e-6) or not worked


def test_too_few_steps_or_missing_heartbeats_give_no_verdict() -> None:
    planted = PLANTED["rollout"]
    running = RunningVerdict(KEYS_IN_FORCE)
    assert [running.add(line) for line in lines_of(2, **planted)] == [({}, [])] * 3
    assert Window.of(lines_of(6, loop=WAITING, workers={"generate": 0.4})) is None
    assert Window.of([]) is None
    assert verdict_of({"verdict/rollout_ratio": 1.0}) is None
    assert list(final_words(lines_of(2, **planted), KEYS_IN_FORCE)) == []


def test_a_verdict_that_stands_is_said_once_and_the_next_one_when_it_stands() -> None:
    running = RunningVerdict(KEYS_IN_FORCE)
    told = [text for line in lines_of(12, **PLANTED["rollout"]) for text in running.add(line)[1]]
    assert [text.partition(",")[0] for text in told] == [
        "verdict: rollout-bound",
        "verdict: raise rollout.slots from 64 to 128",
    ]
    running.begin()
    told = [text for line in lines_of(12, **PLANTED["learner"]) for text in running.add(line)[1]]
    assert [text.partition(",")[0] for text in told][0] == "verdict: learner-bound"
    assert len(told) == 2


def test_a_line_holds_its_verdict() -> None:
    running = RunningVerdict(KEYS_IN_FORCE)
    metrics = [running.add(line)[0] for line in lines_of(6, **PLANTED["reward"])][-1]
    verdict = verdict_of(metrics)
    assert verdict is not None
    assert verdict.limit == "reward"
    assert metrics["verdict/overlap_ratio"] == pytest.approx(1.0)
    assert all(math.isfinite(number) for number in metrics.values())


def test_the_last_words_say_what_a_step_took_and_what_it_could_take() -> None:
    said = list(final_words(lines_of(8, **PLANTED["learner"]), KEYS_IN_FORCE))
    assert said[0].startswith("verdict on 8 steps: learner-bound, 53% of the time is lost: ")
    assert said[2:] == [
        f"verdict: a step takes {STEP_S:.2f} s; the busiest stage works {0.98 * STEP_S:.2f} s of it",
        "verdict: the learner: train 90%, publish 8%, wait 2%",
        "verdict: workers: lease 60%, generate 40%",
        "verdict: tokens: trained 100%",
    ]
