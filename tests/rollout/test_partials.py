"""What a worker saves of groups that aren't complete, and how it continues what another one has sampled."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.messages import Ask, GroupDone, Heartbeat, Recall, Started, Withdraw
from asyncdapo.rollout.engine import Request, Sample, Sampled
from asyncdapo.rollout.partials import pack, unpack
from asyncdapo.transport.codec import Malformed
from asyncdapo.transport.payload import PartialGroup, Payload
from tests.asynchronous import asynchronous
from tests.rollout.fakes import GROUP_SIZE, HEARTBEAT_S, FakeEngine, joined, make_lease, tokens_of

RUNS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=3)


@st.composite
def sampled(draw: st.DrawFn) -> Sampled:
    versions = draw(RUNS)
    num_tokens = sum(count for _, count in versions)
    ids = draw(st.lists(st.integers(0, 1000), min_size=num_tokens, max_size=num_tokens))
    one = Sampled(
        token_ids=np.array(ids, np.int32), logprobs=-np.arange(num_tokens, dtype=np.float32), versions=versions
    )
    return Sample(**vars(one), finish_reason="stop") if num_tokens and draw(st.booleans()) else one


def same(one: Sampled, other: Sampled) -> bool:
    arrays = np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.logprobs, other.logprobs)
    reasons = [getattr(each, "finish_reason", None) for each in (one, other)]
    return arrays and one.versions == other.versions and reasons[0] == reasons[1]


@given(st.lists(sampled(), min_size=1, max_size=4))
def test_what_is_saved_is_what_is_continued(found: list[Sampled]) -> None:
    message, frames = pack(7, found, handed_back=False)
    assert message.num_tokens == sum(len(one.token_ids) for one in found)
    again = unpack((msgspec.msgpack.encode(message), *frames))
    assert all(same(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("torn", [True, False])
def test_a_frame_that_is_torn_or_altered_is_malformed(place: int, torn: bool) -> None:
    one = Sampled(token_ids=np.arange(3, dtype=np.int32), logprobs=np.zeros(3, np.float32), versions=[(0, 3)])
    message, buffers = pack(7, [one], handed_back=False)
    frames = [msgspec.msgpack.encode(message), *buffers]
    frame = bytearray(frames[place])
    frame[len(frame) // 2] ^= 1
    frames[place] = frames[place][:-4] if torn else bytes(frame)
    with pytest.raises(Malformed):
        unpack(frames)


class ContinuableEngine(FakeEngine):
    """Says what it has sampled: of each sample as many tokens as there were steps."""

    async def so_far(self, request: Request) -> list[Sampled]:
        num = request.num_sampled // len(request.seeds)
        return [self._so_far(seed, num) for seed in request.seeds]

    def _so_far(self, seed: int, num: int) -> Sampled:
        made = self._sample(seed, num)
        return Sampled(token_ids=made.token_ids, logprobs=made.logprobs, versions=made.versions if num else [])


def endless() -> ContinuableEngine:
    return ContinuableEngine(num_tokens=lambda _: 1 << 20)


@asynchronous
async def test_a_recalled_lease_comes_back_with_its_tokens_until_it_is_withdrawn() -> None:
    engine = endless()
    async with joined(engine) as (_, replay):
        await replay.expect(Ask)
        await replay.grant(make_lease(7))
        await replay.expect(Started)
        await replay.send(Recall(lease_ids=[7, 8]))
        first = await replay.expect(PartialGroup)
        assert (first.lease_id, first.handed_back, len(first.completions)) == (7, True, GROUP_SIZE)
        assert first.num_tokens > 0
        assert [len(frame) for frame in replay.frames] == [4 * first.num_tokens] * 2
        assert engine.num_outstanding == 0
        assert await replay.expect(PartialGroup) == first, "sent again"
        await replay.send(Withdraw(lease_ids=[7]))
        await replay.expect(Heartbeat, lambda beat: 7 not in beat.progress)
        beat = await replay.expect(Heartbeat)
        assert beat.gauges["tokens"] == first.num_tokens + beat.gauges["late_tokens"], "every token is told of"


@asynchronous
async def test_a_lease_that_is_begun_is_continued_where_it_stands() -> None:
    begun = [
        Sample(token_ids=tokens_of(1, 2), logprobs=np.full(2, -1.0), versions=[(3, 2)], finish_reason="stop"),
        Sampled(token_ids=tokens_of(2, 4), logprobs=np.full(4, -1.0), versions=[(3, 3), (4, 1)]),
        *[Sampled()] * (GROUP_SIZE - 2),
    ]
    saved, buffers = pack(1, begun, handed_back=True)
    engine = ContinuableEngine()
    async with joined(engine) as (_, replay):
        await replay.expect(Ask)
        await replay._server.send(replay.peer, make_lease(7), (msgspec.msgpack.encode(saved), *buffers))
        group = (await replay.expect(GroupDone)).group
        tokens = Payload.from_frames(replay.frames, [group])
    fresh, continued = engine.requests
    assert (fresh.prompt_ids, fresh.num_begun, len(fresh.seeds)) == ([1, 2, 107], 0, GROUP_SIZE - 2)
    assert (continued.prompt_ids, continued.num_begun) == ([1, 2, 107, *tokens_of(2, 4)], 4)
    assert fresh.sampling.max_tokens - continued.sampling.max_tokens == 4
    versions = [completion.contexts[0].versions for completion in group.completions]
    assert versions == [[(3, 2)], [(3, 3), (4, 1), (0, 3)], *[[(0, 3)]] * (GROUP_SIZE - 2)]
    np.testing.assert_array_equal(tokens.logprobs[:9], [-1] * 6 + [-0.5] * 3)
    np.testing.assert_array_equal(tokens.token_ids[:6], [*tokens_of(1, 2), *tokens_of(2, 4)])


@asynchronous
async def test_a_running_lease_is_saved_now_and_then() -> None:
    async with joined(endless(), save_partials_s=2 * HEARTBEAT_S) as (_, replay):
        await replay.expect(Ask)
        await replay.grant(make_lease(7))
        sizes = [(await replay.expect(PartialGroup)).num_tokens for _ in range(3)]
        assert sizes == sorted(set(sizes)), "each with more tokens"
        assert not any(message.handed_back for message in replay.received if isinstance(message, PartialGroup))


@asynchronous
async def test_an_engine_that_cannot_say_what_it_has_sampled_saves_nothing() -> None:
    async with joined(FakeEngine(num_tokens=lambda _: 1 << 20), save_partials_s=HEARTBEAT_S) as (_, replay):
        await replay.expect(Ask)
        await replay.grant(make_lease(7))
        assert not any(isinstance(message, PartialGroup) for message in await replay.listen(heartbeats=5))
