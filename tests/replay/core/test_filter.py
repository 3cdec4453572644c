"""The filter: verdicts (more of them in `tests/test_vectors.py`), the keep rate, generation batches."""

from __future__ import annotations

import pytest

from asyncdapo.errors import ConfigError
from asyncdapo.replay.config import FilterConfig
from asyncdapo.replay.core.filter import MIN_KEEP_RATE, GenBatches, KeepRate, judge


def test_a_missing_metric_is_an_error_that_names_those_the_group_has() -> None:
    with pytest.raises(ConfigError) as caught:
        judge(FilterConfig(metric="bleu"), {"score": (1.0, 0.0), "acc": (1.0, 0.0)}, num_loss_tokens=5)
    assert str(caught.value) == (
        "filter.metric: a group's completions don't all have this metric, got 'bleu' (they have: acc, score)"
    )


def test_a_mixed_group_without_loss_tokens_is_masked() -> None:
    assert judge(FilterConfig(), {"acc": (1.0, 0.0)}, num_loss_tokens=0) == "masked"
    assert judge(FilterConfig(), {"acc": (1.0, 0.0)}, num_loss_tokens=1) == "kept"


def test_with_the_filter_off_every_group_is_kept_and_no_metric_is_needed() -> None:
    off = FilterConfig(enabled=False)
    assert judge(off, {"acc": (1.0, 1.0)}, num_loss_tokens=3) == "kept"
    assert judge(off, {}, num_loss_tokens=0) == "kept"


def test_the_keep_rate_starts_at_1_and_counts_a_prior_of_four_kept() -> None:
    rate = KeepRate(prompts_per_step=8)
    assert rate.value == 1.0
    for verdict in ("kept", "constant", "masked", "constant"):
        rate.count(verdict)
    assert rate.value == (4 + 1) / (4 + 4)


def test_the_keep_rate_forgets_what_is_older_than_four_batches() -> None:
    rate = KeepRate(prompts_per_step=2)
    for verdict in ["constant"] * 5 + ["kept"] * 8:
        rate.count(verdict)
    assert rate.value == 1.0
    rate.count("constant")
    assert rate.value == (4 + 7) / (4 + 8)


def test_the_keep_rate_never_falls_below_a_tenth() -> None:
    rate = KeepRate(prompts_per_step=64)
    for _ in range(256):
        rate.count("constant")
    assert rate.value == MIN_KEEP_RATE == 0.1


def test_with_the_filter_off_the_keep_rate_stays_at_1() -> None:
    rate = KeepRate(prompts_per_step=4)
    for value in (1.0, 0.0, 1.0):
        rate.count(judge(FilterConfig(enabled=False), {"acc": (value, value)}, num_loss_tokens=1))
    assert rate.value == 1.0


def test_a_generation_batch_belongs_to_the_step_of_its_first_verdict() -> None:
    batches = GenBatches(size=2)
    batches.count(step=1)
    batches.next_step()
    batches.count(step=2)
    assert batches.is_full
    assert batches.close() == (1, 1)
    assert batches.num_opened == 0
    batches.count(step=2)
    assert (batches.num_opened, batches.is_open, batches.is_full) == (1, True, False)
    assert batches.close() == (2, 1)
    batches.count(step=2)
    assert batches.close() == (2, 2)
