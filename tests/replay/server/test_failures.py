"""When failures of single leases end the run."""

import pytest

from asyncdapo.replay.server.failures import MAX_REJECTED, MIN_FAILED, WINDOW, Failures


def count(failures, outcomes):
    """The first reason to end the run, with the number of outcomes until then."""
    for number, outcome in enumerate(outcomes, start=1):
        if reason := failures.count(outcome, f"words {number}"):
            return number, reason
    return None


def mixed(ratio, num):
    """So many outcomes, of which this share failed, spread evenly."""
    return ["failed" if int((i + 1) * ratio) > int(i * ratio) else "done" for i in range(num)]


def test_a_few_failures_at_the_start_end_nothing():
    assert count(Failures(0.1), ["failed"] * (MIN_FAILED - 1)) is None


def test_from_then_on_the_ratio_decides_and_the_last_words_are_said():
    number, reason = count(Failures(0.1), ["failed"] * MIN_FAILED)
    assert number == MIN_FAILED
    assert reason.startswith("reward.max_failure_ratio: ")
    assert reason.endswith("the last: words 20")


@pytest.mark.parametrize(("allowed", "share", "ends"), [(0.3, 0.25, False), (0.3, 0.35, True), (1.0, 1.0, False)])
def test_only_a_share_above_the_allowed_one_ends_the_run(allowed, share, ends):
    assert (count(Failures(allowed), mixed(share, 1000)) is not None) == ends


def test_every_failure_is_counted_and_the_last_words_are_kept():
    failures = Failures(1.0)
    count(failures, [*["failed", "done"] * 100, "lost"])
    assert (failures.num_failed, failures.last_words) == (100, "words 199")


def test_what_lies_behind_the_window_is_forgotten():
    failures = Failures(0.5)
    assert count(failures, ["done"] * 10_000) is None
    number, _ = count(failures, ["failed"] * WINDOW)
    assert number == WINDOW // 2 + 1


def test_leases_that_end_otherwise_are_not_counted():
    outcomes = [outcome for _ in range(100) for outcome in ("lost", "withdrawn", "late")]
    failures = Failures(0.1)
    assert count(failures, outcomes) is None
    assert count(failures, ["failed"] * MIN_FAILED)[0] == MIN_FAILED


def test_rejected_groups_end_the_run_only_in_a_row():
    failures = Failures(1.0)
    assert count(failures, (["rejected"] * (MAX_REJECTED - 1) + ["done"]) * 3) is None
    number, reason = count(failures, ["rejected"] * MAX_REJECTED)
    assert (number, reason) == (MAX_REJECTED, "100 groups in a row were rejected, the last: words 100")
