"""Codec: what was encoded comes back, and whatever else arrives is `Malformed` and costs no memory."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncdapo.eval_messages import EvalAnswer, EvalDone, EvalRequest, Sampling
from asyncdapo.messages import (
    Ack,
    Ask,
    Completion,
    Context,
    Group,
    GroupDone,
    Heartbeat,
    Hello,
    Lease,
    Message,
    Progress,
    Prompt,
    Welcome,
)
from asyncdapo.records.record import Place
from asyncdapo.shares import Batch, Deal
from asyncdapo.transport.codec import Limits, Malformed, decode, encode
from asyncdapo.transport.payload import Payload, pack_answers, unpack_answers

PROMPT = Prompt(prompt_id=3, epoch=0, source="sums", row=7, token_ids=[5, 6, 7], answer="12")
COMPLETION = Completion(
    contexts=[Context.of_turn([(4, 1), (5, 1)], [(1, 2)], 77)], finish_reason="stop", reward=-1.0, metrics={"acc": 0.0}
)
GROUP = Group(
    prompt_id=3,
    lease_id=9,
    branch=0,
    attempt=1,
    worker=0,
    num_prompt_tokens=3,
    completions=[COMPLETION, COMPLETION],
    generate_s=0.5,
)
PROGRESS = Progress(num_tokens=12, phase="sampling", started_version=1)
PAYLOAD = Payload(np.array([5, 6, 7]), np.array([1, 2, 1, 2]), np.array([-0.5, -0.1, -0.25, -2.0]))
DEAL = Deal(updates=[0], ranks=[0])
MESSAGES = [
    Hello(schema=1, worker=0, session="a", loaded_version=0, branch=0, granted=0),
    Welcome(branch=0, granted=3),
    Ask(asked=4),
    Lease(lease_id=9, branch=0, attempt=1, group_size=2, seed=1 << 62, prompt=PROMPT, number=3),
    GroupDone(group=GROUP),
    Heartbeat(
        asked=4,
        loaded_version=1,
        branch=2,
        progress={9: Progress(num_tokens=12, phase="sampling")},
        evaluations=[5],
        gauges={"tokens": 12.0},
    ),
    EvalRequest(request_id=0, seed=1, sampling=Sampling(temperature=0.0), prompts=[PROMPT]),
    Batch(step=1, branch=0, max_staleness=2, groups=[GROUP], deal=DEAL, places=[Place(1, 0, 90)]),
    Ack(lease_id=9),
]
ACCEPTS = Hello | Welcome | Ask | Lease | GroupDone | Heartbeat | EvalRequest | Batch | Ack


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert decode(encode(message), ACCEPTS) == (message, [])


def test_a_payload_travels_as_raw_buffers_that_are_read_without_a_copy() -> None:
    frames = encode(GroupDone(group=GROUP), PAYLOAD.frames())
    assert [len(frame) for frame in frames[1:]] == [12, 16, 16]
    message, buffers = decode(frames, GroupDone)
    payload = Payload.from_frames(buffers, [message.group])
    np.testing.assert_array_equal(payload.token_ids, [1, 2, 1, 2])
    assert np.shares_memory(payload.token_ids, np.frombuffer(frames[2], "<i4"))


ANSWER = EvalAnswer(prompt_id=3, acc=1.0, num_tokens=2, finish_reason="stop", version_min=0, version_max=0)


@given(st.lists(st.text(), max_size=5))
def test_responses_of_an_evaluation_travel_beside_the_header(responses: list[str]) -> None:
    answers = [replace(ANSWER, sample=sample, response=text) for sample, text in enumerate(responses)]
    message, buffers = decode(encode(*pack_answers(7, answers)), EvalDone)
    assert len(encode(message)[0]) < 100 + 150 * len(answers)
    assert (message.request_id, unpack_answers(message, buffers)) == (7, answers)


def test_half_a_surrogate_pair_in_a_response_becomes_a_question_mark() -> None:
    done, frames = pack_answers(7, [replace(ANSWER, response="a\ud800b")])
    assert unpack_answers(done, frames)[0].response == "a?b"


@pytest.mark.parametrize(
    ("response_bytes", "frames"),
    [
        ([2], [b"ab"]),
        ([3, 2], [b"abcd"]),
        ([5, -1], [b"abcd"]),
        ([2, 2], []),
        ([2, 2], [b"ab", b"cd"]),
        ([2, 2], [b"\xffbcd"]),
    ],
)
def test_responses_that_are_not_those_of_the_header_are_refused(response_bytes: list[int], frames: list[bytes]) -> None:
    with pytest.raises(ValueError, match="responses|utf-8"):
        unpack_answers(EvalDone(request_id=7, answers=[ANSWER, ANSWER], response_bytes=response_bytes), frames)


def test_a_type_that_this_end_does_not_expect_is_malformed() -> None:
    with pytest.raises(Malformed, match="Ack"):
        decode(encode(Ack(lease_id=1)), Ask | Hello)


def test_an_unknown_field_is_malformed() -> None:
    with pytest.raises(Malformed, match="surprise"):
        decode([b"\x83\xa4type\xa3Ask\xa5asked\x01\xa8surprise\x01"], Ask)


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([], "0 frames"),
        ([b"\x80"] * 5, "5 frames"),
        ([b"\x80" * 101], "header of 101 bytes, at most 100"),
        ([b"\x80", b"x" * 1001], "frame of 1001 bytes, at most 1000"),
    ],
)
def test_more_than_the_limits_allow_is_malformed_and_never_sent(frames: list[bytes], why: str) -> None:
    limits = Limits(header_bytes=100, num_frames=4, frame_bytes=1000)
    with pytest.raises(Malformed, match=why):
        decode(frames, Ask, limits)


def test_a_message_above_the_limits_is_not_sent_for_ever_but_refused_at_once() -> None:
    with pytest.raises(ValueError, match="GroupDone can't be sent: frame of 16 bytes, at most 15"):
        encode(GroupDone(group=GROUP), PAYLOAD.frames(), Limits(frame_bytes=15))


@pytest.mark.parametrize("kind", ["array", "map", "str"])
def test_a_claimed_size_allocates_nothing_in_proportion(kind: str) -> None:
    claim = struct.pack(">I", 1 << 31)
    fields = {
        "array": b"\xafnum_prompt_tokens" + b"\x00" + b"\xabcompletions\xdd" + claim,
        "map": b"\xabcompletions\x91\x81\xa7metrics\xdf" + claim,
        "str": b"\xa7session\xdb" + claim,
    }
    header = b"\x82\xa4type\xa9GroupDone\xa5group\x8f" + fields[kind] + b"\x90" * 64
    tracemalloc.start()
    with pytest.raises(Malformed):
        decode([header], ACCEPTS)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000


NESTED = b"\x82\xa4type\xa9GroupDone\xa5group\x81\xa1x" + b"\x91" * 100_000 + b"\x01"
BAD_TEXT = b"\x82\xa4type\xa5Hello\xa7session\xa3\xff\xfe\xfd"


@example([NESTED])
@example([BAD_TEXT])
@given(st.lists(st.binary(max_size=200), max_size=6))
def test_any_bytes_decode_or_are_malformed(frames: list[bytes]) -> None:
    decode_or_malformed(frames)


@given(st.sampled_from(MESSAGES), st.data())
def test_any_change_to_a_message_decodes_or_is_malformed(message: Message, data: st.DataObject) -> None:
    header = bytearray(encode(message)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(header) - 1))
        header[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not header:
            break
    decode_or_malformed([bytes(header), *PAYLOAD.frames()])


def decode_or_malformed(frames: list[bytes]) -> None:
    """Another exception than Malformed fails the test."""
    with suppress(Malformed):
        message, _ = decode(frames, ACCEPTS)
        assert isinstance(message, ACCEPTS)
