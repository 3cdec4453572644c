"""Programs that speak OpenAI's protocol: the contexts that they make are what was read and sampled, to the token."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asyncdapo.messages import Score
from asyncdapo.model.turn_encoder import turn_encoder
from asyncdapo.replay.ledger.contexts import header_problem, token_problem
from asyncdapo.rollout.endpoint.chat import Chat
from asyncdapo.rollout.groups import build_group
from tests.asynchronous import asynchronous
from tests.rollout.endpoint.calling import Called, called
from tests.rollout.endpoint.writing import Writer, chat_tokenizer
from tests.rollout.fakes import make_lease

TOKENIZER = chat_tokenizer()
QUESTION = [{"role": "user", "content": "What is 12*12?"}]
THOUGHT = "<think>than 12 another 12</think>\n"
TOOL = {"type": "function", "function": {"name": "multiply", "parameters": {"type": "object", "properties": {}}}}
PATH = "/v1/chat/completions"
Say = Callable[..., Awaitable[dict[str, Any]]]
"""(messages, **parameters) -> the answer's message, and `finish_reason`."""


def write(text: str) -> str:
    """The model: asks for a product until it reads one."""
    if re.search(r"(user|tool)\n144<\|im_end\|>", text):
        return THOUGHT + "It is 144<|im_end|>"
    if "Tools:" in text:
        return 'than <tool_call>{"name": "multiply", "arguments": {"a": 12, "b": 12}}</tool_call><|im_end|>'
    return THOUGHT + "12*12<|im_end|>"


@asynccontextmanager
async def conversing(tokenizer=TOKENIZER, write=write, **attempt: Any) -> AsyncIterator[tuple[Called, Writer]]:
    engine = Writer(tokenizer, write)
    encoder = turn_encoder(tokenizer, chat_template=True, system_prompt=None)
    chat = {"new_chat": lambda: Chat(encoder, tokenizer), "max_tokens": 900}
    async with called(engine, **(chat | attempt)) as it:
        yield it, engine


@asynccontextmanager
async def raw(it: Called) -> AsyncIterator[Say]:
    async def say(messages: list[dict[str, Any]], **parameters: Any) -> dict[str, Any]:
        status, answer = await it.post({"model": "any", "messages": messages} | parameters, PATH)
        assert status == 200, answer
        [choice] = answer["choices"]
        return choice["message"] | {"finish_reason": choice["finish_reason"]}

    yield say


@asynccontextmanager
async def openai(it: Called) -> AsyncIterator[Say]:
    sdk = pytest.importorskip("openai")
    async with sdk.AsyncOpenAI(base_url=f"{it.endpoint.url}/v1", api_key=it.key, max_retries=0) as client:

        async def say(messages: list[dict[str, Any]], **parameters: Any) -> dict[str, Any]:
            done = await client.chat.completions.create(model="any", messages=messages, **parameters)
            [choice] = done.choices
            return choice.message.model_dump() | {"finish_reason": choice.finish_reason}

        yield say


clients = pytest.mark.parametrize("client", [raw, pytest.param(openai, marks=pytest.mark.soak)])


async def agent(say: Say, *, strips: bool = False, between: Callable[[], Any] = lambda: None) -> str:
    """Multiplies for the model. `strips`: it leaves out what the model thought."""
    messages = list(QUESTION)
    for _ in range(3):
        said = (await say(messages))["content"]
        if "*" not in said.rpartition("</think>")[2]:
            return said
        kept = said.rpartition("</think>")[2].strip() if strips else said
        messages += [{"role": "assistant", "content": kept}, {"role": "user", "content": "144"}]
        await (between() or asyncio.sleep(0))
    raise AssertionError("the model doesn't stop asking")


def contexts_of(it: Called) -> list[tuple[str, str, list[int]]]:
    """Each context as the model read it, what of it was sampled, and its tokens. The replay server would take them."""
    lease = make_lease(7, group_size=1)
    group, payload = build_group(lease, 0, [it.attempt.episode("stop", 1.0, {})], [Score(reward=1, metrics={})], 0.1)
    assert header_problem(group.completions[0]) is None
    assert token_problem(group, payload) is None
    return [
        (
            TOKENIZER.spell(one.own_ids.tolist()),
            TOKENIZER.spell(one.own_ids[one.is_sampled].tolist()),
            one.own_ids.tolist(),
        )
        for one in payload.of_contexts(group)
    ]


FIRST = f"{THOUGHT}12*12<|im_end|>"
SECOND = f"{THOUGHT}It is 144<|im_end|>"
ASKED = "<|im_start|>user\nWhat is 12*12?<|im_end|>\n<|im_start|>assistant\n"
ANSWERED = "\n<|im_start|>user\n144<|im_end|>\n<|im_start|>assistant\n"


@clients
@asynchronous
async def test_a_history_that_is_kept_is_one_context_of_the_tokens_that_were_sampled(client) -> None:
    async with conversing() as (it, engine), client(it) as say:
        assert await agent(say) == f"{THOUGHT}It is 144"
        [(text, sampled, token_ids)] = contexts_of(it)
        assert (text, sampled) == (ASKED + FIRST + ANSWERED + SECOND, FIRST + SECOND)
        observed = [TOKENIZER.encode_more(part) for part in (ASKED, ANSWERED)]
        assert token_ids == [*observed[0], *engine.letters(FIRST), *observed[1], *engine.letters(SECOND)]
        assert TOKENIZER.encode_more(text) != token_ids  # tokenised again it would be another text to the model


@clients
@asynchronous
async def test_thoughts_that_are_left_out_begin_a_context_whose_sampled_tokens_are_its_own(client) -> None:
    async with conversing() as (it, engine), client(it) as say:
        await agent(say, strips=True)
        first, second = contexts_of(it)
        assert first[:2] == (ASKED + FIRST, FIRST)
        assert second[:2] == (ASKED + "12*12<|im_end|>" + ANSWERED + SECOND, SECOND)
        assert second[2][-len(engine.letters(SECOND)) :] == engine.letters(SECOND)


@clients
@asynchronous
async def test_calls_at_the_same_time_are_contexts_that_share_what_was_before(client) -> None:
    async with conversing() as (it, engine), client(it) as say:
        said = (await say(QUESTION))["content"]
        history = [*QUESTION, {"role": "assistant", "content": said}]
        parted = [[*history, {"role": role, "content": "144"}] for role in ("user", "tool")]
        await asyncio.gather(*(say(messages, max_tokens=100) for messages in parted))
        first, second = contexts_of(it)
        shared = [*TOKENIZER.encode_more(ASKED), *engine.letters(FIRST)]
        assert first[2][: len(shared)] == second[2][: len(shared)] == shared
        assert (first[1], second[1]) == (FIRST + SECOND, SECOND)


@asynchronous
async def test_weights_that_arrive_between_two_turns_are_recorded_token_by_token() -> None:
    async with conversing() as (it, engine), raw(it) as say:
        await agent(say, between=lambda: engine.load_weights(4, {}))
        [context] = it.attempt.episode("stop", 0.0, {}).contexts
        counts = [len(engine.letters(part)) for part in (FIRST, SECOND)]
        assert [turn.sample.versions for turn in context.turns] == [[(0, counts[0])], [(4, counts[1])]]


@clients
@asynchronous
async def test_tool_calls_come_as_the_protocol_has_them_and_go_back_without_being_tokenised(client) -> None:
    async with conversing() as (it, engine), client(it) as say:
        said = await say(QUESTION, tools=[TOOL])
        assert (said["content"], said["finish_reason"]) == ("than", "tool_calls")
        [called_tool] = said["tool_calls"]
        assert called_tool["type"] == "function"
        assert called_tool["function"]["name"] == "multiply"
        assert json.loads(called_tool["function"]["arguments"]) == {"a": 12, "b": 12}
        back = {"role": "assistant", "content": said["content"], "tool_calls": [called_tool]}
        result = {"role": "tool", "tool_call_id": called_tool["id"], "content": "144"}
        end = await say([*QUESTION, back, result], tools=[TOOL])
        assert (end["content"], end["finish_reason"]) == (f"{THOUGHT}It is 144", "stop")
        [(text, sampled, _)] = contexts_of(it)
        assert sampled == write("Tools:") + SECOND
        assert text.startswith("<|im_start|>system\nTools: ")
        await say([*QUESTION, back, result])  # the tools are gone: the model reads something else
        assert len(contexts_of(it)) == 2


@asynchronous
async def test_tool_calls_that_cant_be_read_are_text() -> None:
    broken = '<tool_call>{"name": </tool_call>'
    async with conversing(write=lambda _: f"{broken}<|im_end|>") as (it, _), raw(it) as say:
        said = await say(QUESTION, tools=[TOOL])
        assert (said["content"], said["finish_reason"]) == (broken, "stop")
        assert "tool_calls" not in said
        said = await say(QUESTION, tools=[TOOL], tool_choice="none")
        assert said["finish_reason"] == "stop"


@asynchronous
async def test_a_tool_may_have_no_parameters() -> None:
    call = "<tool_call><function=now></function></tool_call><|im_end|>"
    async with conversing(write=lambda _: call) as (it, _), raw(it) as say:
        said = await say(QUESTION, tools=[{"type": "function", "function": {"name": "now"}}])
        assert [one["function"] for one in said["tool_calls"]] == [{"name": "now", "arguments": "{}"}]


@asynchronous
async def test_a_response_that_was_cut_off_is_continued_behind_the_end_that_the_template_writes() -> None:
    async with conversing() as (it, engine), raw(it) as say:
        said = await say(QUESTION, max_tokens=5)
        assert said["finish_reason"] == "length"
        assert it.attempt.limit is None  # the program wanted no more
        await say([*QUESTION, {"role": "assistant", "content": said["content"]}, {"role": "user", "content": "144"}])
        [(text, sampled, _)] = contexts_of(it)
        assert (text, sampled) == (ASKED + FIRST[:5] + "<|im_end|>" + ANSWERED + SECOND, FIRST[:5] + SECOND)


@asynchronous
async def test_a_stream_has_the_whole_answer_in_one_piece() -> None:
    async with conversing() as (it, _):
        body = {"messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}}
        events = await it.stream(body, PATH)
    assert events[-1] == "[DONE]"
    whole, end, usage = map(json.loads, events[:-1])
    assert whole["choices"][0]["delta"]["content"] + "<|im_end|>" == FIRST
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["usage"]["completion_tokens"] == len(FIRST) - len("<|im_end|>") + 1


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_log_probs_that_are_asked_for_are_those_of_the_run_token_by_token(stream: bool) -> None:
    async with conversing() as (it, engine):
        body = {"messages": QUESTION, "logprobs": True, "stream": stream}
        answer = json.loads((await it.stream(body, PATH))[0]) if stream else (await it.post(body, PATH))[1]
        [turn] = it.attempt.episode("stop", 0.0, {}).contexts[0].turns
    said = answer["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in said] == [TOKENIZER.spell([token]) for token in engine.letters(FIRST)]
    assert [one["logprob"] for one in said] == turn.sample.logprobs.tolist()
    assert bytes(byte for one in said for byte in one["bytes"]).decode() == FIRST


@pytest.mark.soak
@asynchronous
async def test_the_sdk_reads_the_stream_and_the_errors() -> None:
    sdk = pytest.importorskip("openai")
    async with conversing(max_turns=3) as (it, _):
        client = sdk.AsyncOpenAI(base_url=f"{it.endpoint.url}/v1", api_key=it.key, max_retries=0)
        create, asked = client.chat.completions.create, {"model": "m", "messages": QUESTION}
        said = ""
        async for piece in await create(**asked, tools=[TOOL], stream=True):
            said += "".join(one.function.name for one in piece.choices[0].delta.tool_calls or ())
        assert said == "multiply"
        [choice] = (await create(**asked, logprobs=True)).choices
        assert "".join(one.token for one in choice.logprobs.content) == FIRST
        with pytest.raises(sdk.BadRequestError, match="n isn't supported"):
            await create(**asked, n=2)
        await create(**asked)
        with pytest.raises(sdk.BadRequestError, match="max_turns"):
            await create(**asked)
        with pytest.raises(sdk.AuthenticationError):
            await client.with_options(api_key="x").chat.completions.create(**asked)
        await client.close()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages"),
        ({"messages": []}, "a conversation has a message"),
        ({"messages": [{"role": "king", "content": "x"}]}, "king"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": QUESTION, "n": 2}, "n isn't supported"),
        ({"messages": QUESTION, "stop": "x"}, "stop isn't supported"),
        ({"messages": QUESTION, "logprobs": True, "top_logprobs": 5}, "top_logprobs isn't supported"),
        ({"messages": QUESTION, "response_format": {"type": "json_object"}}, "response_format isn't supported"),
        ({"messages": QUESTION, "tools": [TOOL], "tool_choice": "required"}, "tool_choice isn't supported"),
        ({"messages": QUESTION, "tools": [{}]}, "function"),
        ({"messages": QUESTION, "tools": [{"function": {"name": "f", "parameters": {"properties": 3}}}]}, "properties"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "no such request"),
        ({"messages": QUESTION, "max_completion_tokens": -1}, "max_tokens is at least 1"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "maximum context length"),
        ([1], "no such request"),
    ],
)
@asynchronous
async def test_what_cant_be_had_is_400_with_the_reason(body: object, words: str) -> None:
    async with conversing() as (it, engine):
        status, answer = await it.post(body, PATH)
    assert (status, engine.requests) == (400, [])
    assert words in answer["error"]["message"]


@asynchronous
async def test_arguments_without_an_end_to_their_depth_harm_no_one() -> None:
    async with conversing() as (it, _):
        for depth in (100, 900, 5_000, 100_000):
            call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "[" * depth + "]" * depth}}
            body = {"messages": [*QUESTION, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}
            status, _ = await it.post(body, PATH)
            assert status in (200, 400)
        failed = asyncio.ensure_future(it.endpoint.failed())
        await asyncio.sleep(0)
        assert not failed.done()
        failed.cancel()


@asynchronous
async def test_messages_may_have_parts_and_nulls_and_what_else_clients_send() -> None:
    async with conversing() as (it, _), raw(it) as say:
        parts = [{"type": "text", "text": text} for text in ("What is ", "12*12?")]
        said = await say(
            [{"role": "user", "content": parts}], user="me", store=False, metadata={}, temperature=1.0, tools=None
        )
        back = {"role": "assistant", "content": said["content"], "refusal": None, "tool_calls": None, "audio": None}
        await say([*QUESTION, back, {"role": "user", "content": "144"}])
        assert len(contexts_of(it)) == 1
