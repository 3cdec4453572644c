"""Alarms: what is said of a line, when, and that it names what there is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from asyncdapo.metrics.alarms import LIMITS, MIN_GROUPS, Alarms
from tests.metrics.documented import METRIC, PAGE, UNITS

KEYS = (Path(__file__).parents[1] / "config_keys.txt").read_text().split()
SOUND = {
    "step": 5,
    "replay/dropped_ratio": 0.02,
    "filter/kept_ratio": 0.1,
    "rollout/truncated_ratio": 0.5,
    "learner/ess": 0.5,
    "learner/masked_ratio": 0.5,
    "learner/k3": 0.1,
    "learner/entropy": 0.5,
    "learner/bad_updates": 0.0,
    "reward/failed_ratio": 0.02,
    "rollout/arrived_groups": MIN_GROUPS,
    "filter/prompts_consumed": MIN_GROUPS,
}
"""Every number at its limit."""
BROKEN = {
    "replay/dropped_ratio": 0.021,
    "filter/kept_ratio": 0.09,
    "rollout/truncated_ratio": 0.51,
    "learner/ess": 0.49,
    "learner/masked_ratio": 0.51,
    "learner/k3": 0.11,
    "learner/entropy": 0.049,
    "learner/bad_updates": 1.0,
    "reward/failed_ratio": 0.021,
}


def new_run() -> Alarms:
    """After a first step in which all was well."""
    alarms = Alarms({}, {})
    assert alarms.check(SOUND) == []
    return alarms


def all_sentences() -> list[str]:
    return new_run().check(SOUND | BROKEN)


def test_a_line_at_its_limits_raises_nothing() -> None:
    assert new_run().check(SOUND) == []


@pytest.mark.parametrize("metric", BROKEN)
def test_a_number_beyond_its_limit_raises_one_alarm_that_names_it(metric: str) -> None:
    [sentence] = new_run().check(SOUND | {metric: BROKEN[metric]})
    assert sentence.startswith(f"{metric.partition('/')[0]} warning: {metric} ")


def test_an_alarm_says_value_and_limit() -> None:
    [sentence] = new_run().check(SOUND | {"filter/kept_ratio": 0.04})
    assert "filter/kept_ratio is 0.04, below 0.1: nearly all groups are too easy or too hard" in sentence
    [sentence] = new_run().check(SOUND | {"learner/entropy": 0.01})
    assert "learner/entropy is 0.01, below a tenth of the first step's 0.5: " in sentence
    [sentence] = new_run().check(SOUND | {"learner/bad_updates": 2.0})
    assert "learner/bad_updates rose from 0 to 2: " in sentence


@pytest.mark.parametrize("metric", sorted(BROKEN.keys() - {"learner/bad_updates"}))
def test_an_alarm_is_said_when_it_begins_and_again_only_after_it_had_ended(metric: str) -> None:
    alarms, bad = new_run(), SOUND | {metric: BROKEN[metric]}
    said = [len(alarms.check(line)) for line in (bad, bad, SOUND, SOUND, bad, bad)]
    assert said == [1, 0, 0, 0, 1, 0]


def test_skipped_updates_are_said_when_they_begin_and_again_after_a_step_without_one() -> None:
    alarms = new_run()
    counts = (1.0, 2.0, 2.0, 2.0, 3.0)
    assert [len(alarms.check(SOUND | {"learner/bad_updates": count})) for count in counts] == [1, 0, 0, 0, 1]


def test_skipped_updates_that_a_rollback_took_back_are_said_when_they_come_again() -> None:
    alarms = new_run()
    counts = (1.0, 0.0, 1.0)
    assert [len(alarms.check(SOUND | {"learner/bad_updates": count})) for count in counts] == [1, 0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("metric", BROKEN)
def test_a_number_that_is_none_or_missing_raises_nothing_and_ends_nothing(metric: str, value: float | None) -> None:
    unknown = {name: number for name, number in SOUND.items() if name != metric}
    if value is not None:
        unknown[metric] = value
    assert new_run().check(unknown) == []
    if metric != "learner/bad_updates":
        alarms, bad = new_run(), SOUND | {metric: BROKEN[metric]}
        assert [len(alarms.check(line)) for line in (bad, unknown, bad)] == [1, 0, 0]


def test_a_ratio_of_a_few_groups_raises_nothing_until_enough_steps_have_gathered() -> None:
    """0 of 4 groups were kept, step after step: said once a hundred groups are behind it, whatever the steps' size."""
    alarms, few = new_run(), SOUND | {"filter/kept_ratio": 0.0, "reward/failed_ratio": 0.0, "rollout/arrived_groups": 4}
    said = [len(alarms.check(few)) for _ in range(MIN_GROUPS // 4 + 1)]
    assert said == [0] * (MIN_GROUPS // 4 - 1) + [1, 0]


def test_a_bad_step_of_few_groups_among_good_ones_raises_nothing() -> None:
    alarms, sound = new_run(), SOUND | {"reward/failed_ratio": 0.0}
    lines = [sound | {"filter/kept_ratio": kept, "rollout/arrived_groups": 20} for kept in (0.5, 0.0, 0.0, 0.0, 0.5)]
    assert [alarms.check(line) for line in lines] == [[]] * 5


def test_dropped_groups_raise_nothing_before_the_run_has_enough() -> None:
    """The ratio is of the run so far, and so is the number of groups."""
    alarms, bad = Alarms({}, {}), SOUND | {"replay/dropped_ratio": 0.25}
    assert alarms.check(bad | {"filter/prompts_consumed": 8}) == []
    assert alarms.check(bad | {"filter/prompts_consumed": MIN_GROUPS - 1}) == []
    assert len(alarms.check(bad | {"filter/prompts_consumed": MIN_GROUPS})) == 1


def test_low_entropy_is_no_alarm_while_most_prompts_are_solved_and_is_one_when_they_no_longer_are() -> None:
    alarms = new_run()
    low = SOUND | {"learner/entropy": 0.01}
    assert alarms.check(low | {"filter/all_correct_ratio": 0.6}) == []
    assert len(alarms.check(low | {"filter/all_correct_ratio": 0.4})) == 1
    assert alarms.check(low | {"filter/all_correct_ratio": 0.3}) == []


def test_the_entropy_of_the_first_step_is_the_first_one_that_is_known() -> None:
    alarms = Alarms({}, {})
    assert alarms.check({"learner/entropy": math.nan}) == []
    assert alarms.check({"learner/entropy": 2.0}) == []
    assert len(alarms.check({"learner/entropy": 0.19})) == 1


def test_a_run_that_resumes_compares_with_its_first_step_and_its_last_line() -> None:
    alarms = Alarms({"step": 1, "learner/entropy": 2.0}, {"step": 9, "learner/bad_updates": 3.0})
    assert alarms.check({"learner/entropy": 0.3, "learner/bad_updates": 3.0}) == []
    assert len(alarms.check({"learner/entropy": 0.1, "learner/bad_updates": 4.0})) == 2


def test_alarms_name_only_keys_and_metrics_that_exist() -> None:
    sections = "|".join({key.partition(".")[0] for key in KEYS})
    for sentence in all_sentences():
        keys = re.findall(rf"\b(?:{sections})\.[a-z_]+", sentence)
        assert keys
        assert set(keys) <= set(KEYS)
        assert set(METRIC.findall(sentence)) <= UNITS.keys()


def test_the_page_lists_every_alarm() -> None:
    _, _, section = PAGE.partition("## Alarms")
    listed = set(re.findall(r"^\| `([^`]+)` \| ([a-z]+) ", section, re.MULTILINE))
    limits = {(limit.metric, limit.alarms) for limit in LIMITS}
    assert listed == limits | {("learner/entropy", "below"), ("learner/bad_updates", "rises")}
    for limit in LIMITS:
        assert re.search(rf"^\| `{limit.metric}` \| {limit.alarms} {limit.number:g} ", section, re.MULTILINE)
