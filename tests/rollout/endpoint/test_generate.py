"""Token ids in, tokens out: what is answered is what is captured, and the run decides how tokens are drawn."""

from __future__ import annotations

import asyncio

import pytest

from asyncdapo.messages import SampledTurn, Score
from asyncdapo.rollout.endpoint.wire import MODEL
from asyncdapo.rollout.groups import build_group
from asyncdapo.seeds import sample_seed
from asyncdapo.transport.payload import checksum
from tests.asynchronous import asynchronous, until
from tests.rollout.endpoint.calling import MAX_CONTEXT, MAX_RESPONSE_LENGTH, SEED, ask, called, make_attempt
from tests.rollout.fakes import FakeEngine, make_lease, tokens_of

PROMPT = make_lease(7).prompt.token_ids


def turn(number: int) -> list[int]:
    """What the fake engine samples in the episode's call of this number."""
    return tokens_of(sample_seed(SEED, number), 3).tolist()


@asynchronous
async def test_a_call_is_answered_with_its_tokens_logprobs_and_versions() -> None:
    async with called() as it:
        status, answer = await it.generate(PROMPT, temperature=1.0, max_tokens=9, logprobs=1, skip_special_tokens=False)
    [choice] = answer["choices"]
    assert (status, choice["index"], choice["finish_reason"], choice["token_ids"]) == (200, 0, "stop", turn(0))
    content = [{"token": f"token_id:{token}", "token_id": token, "logprob": -0.5} for token in turn(0)]
    assert choice["logprobs"] == {"content": content}
    assert answer["weight_versions"] == [[0, 3]]
    assert it.endpoint.gauges() == {"endpoint_calls": 1, "refused_calls": 0, "overridden_calls": 0}


@asynchronous
async def test_a_call_that_repeats_a_context_continues_it_and_any_other_forks() -> None:
    async with called() as it:
        await it.generate(PROMPT)
        await it.generate([*PROMPT, *turn(0), 50, 51])
        await it.generate([*PROMPT, *turn(0)[1:], 52])  # a token of the first turn is left out
        await it.generate([9, 9])
        await it.generate([*PROMPT, *turn(0), 50, 51, *turn(1)])  # nothing was observed
        episode = it.attempt.episode("stop", 1.0, {})
    lease = make_lease(7, group_size=1)
    group, payload = build_group(lease, 0, [episode], [Score(reward=1.0, metrics={})], 0.1)
    [completion] = group.completions
    first, forked, elsewhere = payload.of_contexts(group)
    assert first.own_ids.tolist() == [*turn(0), 50, 51, *turn(1), *turn(4)]
    assert forked.own_ids.tolist() == [*turn(0)[1:], 52, *turn(2)]
    assert elsewhere.own_ids.tolist() == [9, 9, *turn(3)]
    assert [one.rooted for one in completion.contexts] == [True, True, False]
    assert [one.sampled for one in completion.contexts] == [
        [(1, 3), (0, 2), (1, 6)],
        [(0, 3), (1, 3)],
        [(0, 2), (1, 3)],
    ]
    whole = [*PROMPT, *first.own_ids.tolist()]
    ends = ((0, 6), (1, 11), (4, 14))
    assert completion.contexts[0].turns == [SampledTurn(n, 3, checksum(whole[:end], n)) for n, end in ends]


@asynchronous
async def test_calls_at_the_same_time_fork_behind_what_they_share() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with called(engine) as it:
        calls = [asyncio.create_task(it.generate(PROMPT, max_tokens=5)) for _ in range(2)]
        await until(lambda: len(engine.requests) == 2)
        assert it.busy == [True]
        engine.gate.set()
        assert {tuple(answer["choices"][0]["token_ids"]) for _, answer in await asyncio.gather(*calls)} == {
            tuple(turn(0)),
            tuple(turn(1)),
        }
        assert it.busy == [True, False]
        contexts = it.attempt.episode("stop", 0.0, {}).contexts
    assert [(one.rooted, len(one.turns), one.turns[0].observed) for one in contexts] == [(True, 1, [])] * 2


@asynchronous
async def test_sampling_is_the_runs_and_what_differs_is_counted() -> None:
    engine = FakeEngine()
    async with called(engine, temperature=0.7) as it:
        assert (await it.generate(PROMPT, temperature=0.7, top_p=1.0, top_k=-1, seed=None))[0] == 200
        assert it.endpoint.gauges()["overridden_calls"] == 0
        for override in ({"temperature": 0.0}, {"top_p": 0.5}, {"seed": 1}, {"repetition_penalty": 1.1}):
            assert (await it.generate(PROMPT, **override))[0] == 200
        assert it.endpoint.gauges()["overridden_calls"] == 4
    assert {(one.sampling.temperature, one.sampling.top_p, one.sampling.top_k) for one in engine.requests} == {
        (0.7, 1.0, 0)
    }


@asynchronous
async def test_max_tokens_is_what_the_limits_leave_and_no_more() -> None:
    engine = FakeEngine()
    async with called(engine) as it:
        for asked in (5, 1000, None):
            await it.generate(PROMPT, max_tokens=asked)
        await it.generate([1] * (MAX_CONTEXT - 2))
    assert [one.sampling.max_tokens for one in engine.requests] == [
        5,
        MAX_RESPONSE_LENGTH - 3,
        MAX_RESPONSE_LENGTH - 6,
        2,
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no such request"),
        (b"{", "no such request"),
        (b"[" * 100_000, "no such request"),
        (b"\xff\xfe", "no such request"),
        ({}, "token_ids"),
        ({"token_ids": ["a"]}, "token_ids"),
        ({"token_ids": [1.5]}, "token_ids"),
        ({"token_ids": [1], "sampling_params": {"n": 2}}, "n isn't supported"),
        ({"token_ids": [1], "sampling_params": {"stop": ["\n"]}}, "stop isn't supported"),
        ({"token_ids": [1], "sampling_params": {"max_tokens": 0}}, "max_tokens is at least 1"),
        ({"token_ids": [1], "sampling_params": {"max_tokens": "all"}}, "max_tokens is at least 1"),
        ({"token_ids": [1], "stream": True}, "stream isn't supported"),
        ({"token_ids": [1] * MAX_CONTEXT}, "maximum context length"),
    ],
)
@asynchronous
async def test_what_cant_be_done_is_400_with_the_reason_and_nothing_is_sampled(body: object, words: str) -> None:
    engine = FakeEngine()
    async with called(engine) as it:
        status, answer = await it.post(body)
    assert (status, engine.requests) == (400, [])
    assert words in answer["error"]["message"]


@asynchronous
async def test_token_ids_that_the_model_hasnt_are_400() -> None:
    class Strict(FakeEngine):
        async def generate(self, request):
            raise ValueError("a prompt's token ids are 0 to 9, got -1 to 3")

    async with called(Strict()) as it:
        status, answer = await it.generate([-1, 3])
    assert (status, answer["error"]["message"]) == (400, "a prompt's token ids are 0 to 9, got -1 to 3")


@asynchronous
async def test_limits_of_the_episode_end_it_and_are_remembered_until_a_call_succeeds() -> None:
    async with called(max_turns=2) as it:
        assert (await it.generate([1] * MAX_CONTEXT))[0] == 400
        assert it.attempt.limit == "length"
        assert (await it.generate(PROMPT))[0] == 200
        assert it.attempt.limit is None
        assert (await it.generate(PROMPT))[0] == 200
        status, answer = await it.generate(PROMPT)
    assert (status, it.attempt.limit) == (400, "turns")
    assert "environment.max_turns" in answer["error"]["message"]


@asynchronous
async def test_a_refused_call_is_remembered_while_those_beside_it_succeed() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with called(engine) as it:
        beside = asyncio.create_task(it.generate(PROMPT, max_tokens=5))
        await until(lambda: engine.num_outstanding == 1)
        assert (await it.generate([1] * MAX_CONTEXT))[0] == 400
        engine.gate.set()
        assert (await beside)[0] == 200
        assert it.attempt.limit == "length"


@asynchronous
async def test_sampled_tokens_of_calls_at_the_same_time_stay_within_the_limit_of_all() -> None:
    engine = FakeEngine(num_tokens=lambda _: MAX_RESPONSE_LENGTH - 5)
    attempt = make_attempt(engine)
    engine.gate.clear()
    calls = [asyncio.create_task(attempt.sample(list(PROMPT))) for _ in range(2)]
    await until(lambda: len(engine.requests) == 1)  # the other waits for what the first leaves
    engine.gate.set()
    first, _ = await asyncio.gather(*calls)
    assert len(first.token_ids) == MAX_RESPONSE_LENGTH - 5
    assert [request.sampling.max_tokens for request in engine.requests] == [MAX_RESPONSE_LENGTH, 5]


@asynchronous
async def test_weights_that_arrive_between_two_calls_are_recorded_token_by_token() -> None:
    engine = FakeEngine()
    async with called(engine) as it:
        await it.generate(PROMPT)
        await engine.load_weights(3, {})
        _, answer = await it.generate([*PROMPT, *turn(0), 50])
        [context] = it.attempt.episode("stop", 0.0, {}).contexts
    assert answer["weight_versions"] == [[3, 3]]
    assert [one.sample.versions for one in context.turns] == [[(0, 3)], [(3, 3)]]


@asynchronous
async def test_keys_are_of_one_attempt_and_worthless_afterwards() -> None:
    engine = FakeEngine()
    async with called(engine) as it:
        async with it.endpoint.session(make_attempt(engine), lambda _: None) as other:
            headers = {"x-session-id": other, "authorization": "Bearer one-config-for-all"}
            assert (await it.post({"token_ids": [1]}, **headers))[0] == 200
            assert it.attempt.num_turns == 0
        assert (await it.post({"token_ids": [1]}, **headers))[0] == 410
        assert (await it.post({"token_ids": [1]}, authorization="Bearer x"))[0] == 401
        assert (await ask(it.endpoint.url, "GET", "/v1/models"))[0] == 401
        status, answer = await ask(it.endpoint.url, "GET", "/v1/models", None, {"x-session-id": it.key})
        assert (status, [(one["id"], one["max_model_len"]) for one in answer["data"]]) == (200, [(MODEL, MAX_CONTEXT)])
        assert (await it.post({}, "/v1/elsewhere"))[0] == 404
        assert it.endpoint.gauges()["refused_calls"] == 4
