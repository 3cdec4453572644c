"""Which tokens of a group bear loss: all, but for those of cut-off completions under overlong filtering."""

import asyncio
from dataclasses import replace

import pytest

from asyncdapo.messages import GroupDone
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.episodes import SingleTurn
from asyncdapo.rollout.groups import loss_mask
from asyncdapo.rollout.jobs import Jobs
from tests.rollout.fakes import FakeEngine, make_lease, say_tokens, score_first_token


class CuttingEngine(FakeEngine):
    """Cuts off what has three tokens."""

    def _sample(self, seed, length):
        return replace(super()._sample(seed, length), finish_reason="length" if length == 3 else "stop")


@pytest.mark.parametrize(
    ("finish_reason", "overlong_filter", "value"),
    [("stop", False, 1), ("stop", True, 1), ("length", False, 1), ("length", True, 0)],
)
def test_a_completion_bears_no_loss_when_it_was_cut_off_and_the_filter_is_on(finish_reason, overlong_filter, value):
    assert loss_mask(7, finish_reason, overlong_filter) == [(value, 7)]


@pytest.mark.parametrize("overlong_filter", [False, True])
def test_a_group_keeps_its_cut_off_completions_and_their_rewards(overlong_filter):
    """Samples 0 and 2 have three tokens, the longest length; 1 and 3 stop after two."""
    config = RolloutConfig(max_response_length=3)

    async def complete():
        engine = CuttingEngine(num_tokens=lambda sample: 3 - sample % 2)
        jobs = Jobs(
            0, config, SingleTurn(engine, score_first_token), say_tokens, lambda: None, overlong_filter=overlong_filter
        )
        answer, _ = await jobs.complete(jobs.for_lease(make_lease(7), lambda lease, version: None))
        assert isinstance(answer, GroupDone)
        return answer.group

    group = asyncio.run(complete())
    masked = 0 if overlong_filter else 1
    assert [completion.contexts[0].loss_mask for completion in group.completions] == [[(masked, 3)], [(1, 2)]] * 2
    assert (group.num_tokens, group.num_loss_tokens) == (10, 4 + 6 * masked)
    assert all(completion.reward in (-1.0, 1.0) for completion in group.completions)
