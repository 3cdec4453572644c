"""Frames that follow a message's header: the tokens and log-probs of groups, the responses of an evaluation.

Tokens and log-probs are raw little-endian buffers: 8.1 bytes a token instead of 14.1 as lists, and no copy on arrival.
Does not own: what the frames mean. Their header says that (`messages`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from zlib import crc32

import numpy as np
from msgspec.structs import replace

from asyncdapo.eval_messages import EvalAnswer, EvalDone
from asyncdapo.messages import Context, Group, Runs

TOKEN_DTYPE = np.dtype("<i4")
LOGPROB_DTYPE = np.dtype("<f4")


def checksum(token_ids: np.ndarray | Sequence[int], number: int) -> int:
    """Of the `number`-th turn of a completion: what the engine read, and then what it sampled."""
    return numbered(crc32(np.ascontiguousarray(token_ids, TOKEN_DTYPE).tobytes()), number)


def numbered(crc: int, number: int) -> int:
    """The checksum of a turn from the CRC-32 of its tokens and those before them, as a payload holds them."""
    return crc32(number.to_bytes(4, "little"), crc)


@dataclass(frozen=True)
class Payload:
    """Token buffers of one group, or of several joined in order.

    prompt_ids  int32 [sum of num_prompt_tokens]
    token_ids   int32 [sum of num_tokens], completion after completion, context after context
    logprobs    float32 [sum of num_sampled_tokens], rollout_logprobs (μ) at the sampling temperature
    """

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray

    @property
    def num_bytes(self) -> int:
        return self.prompt_ids.nbytes + self.token_ids.nbytes + self.logprobs.nbytes

    def frames(self) -> tuple[memoryview, memoryview, memoryview]:
        """The three raw little-endian buffers, in the order of the fields. Views, where no other dtype is needed."""
        return (
            _bytes_of(self.prompt_ids, TOKEN_DTYPE),
            _bytes_of(self.token_ids, TOKEN_DTYPE),
            _bytes_of(self.logprobs, LOGPROB_DTYPE),
        )

    @staticmethod
    def from_frames(frames: Sequence[bytes | memoryview], groups: Iterable[Group]) -> Payload:
        """Views on the frames, without a copy. Raises ValueError when sizes and headers disagree."""
        groups = list(groups)
        num_prompt = sum(group.num_prompt_tokens for group in groups)
        num_tokens = sum(group.num_tokens for group in groups)
        num_sampled = sum(group.num_sampled_tokens for group in groups)
        if len(frames) != 3:
            raise ValueError(f"a payload has 3 frames, got {len(frames)}")
        sizes = tuple(memoryview(frame).nbytes for frame in frames)
        if sizes != (4 * num_prompt, 4 * num_tokens, 4 * num_sampled):
            raise ValueError(
                f"payload frames of {sizes} bytes don't hold {num_prompt} prompt tokens, {num_tokens} others and "
                f"{num_sampled} sampled ones"
            )
        return Payload(
            np.frombuffer(frames[0], TOKEN_DTYPE),
            np.frombuffer(frames[1], TOKEN_DTYPE),
            np.frombuffer(frames[2], LOGPROB_DTYPE),
        )

    def of_completions(self, group: Group, indices: Sequence[int]) -> Payload:
        """The prompt of `group`, whose payload this is, and the tokens of these completions in this order."""
        if list(indices) == list(range(len(group.completions))):
            return self
        tokens = _slices(completion.num_tokens for completion in group.completions)
        sampled = _slices(completion.num_sampled_tokens for completion in group.completions)
        return Payload(
            self.prompt_ids,
            np.concatenate([self.token_ids[tokens[index]] for index in indices]),
            np.concatenate([self.logprobs[sampled[index]] for index in indices]),
        )

    def of_contexts(self, group: Group) -> Iterator[ContextTokens]:
        """The contexts of `group`, whose payload this is, in order. Views."""
        contexts = [one for completion in group.completions for one in completion.contexts]
        tokens = _slices(context.num_tokens for context in contexts)
        sampled = _slices(context.num_sampled_tokens for context in contexts)
        pieces = zip(contexts, tokens, sampled, strict=True)
        for index, completion in enumerate(group.completions):
            for number, (context, own, its) in enumerate(islice(pieces, len(completion.contexts))):
                yield ContextTokens(index, number, context, self.prompt_ids, self.token_ids[own], self.logprobs[its])

    @staticmethod
    def join(payloads: Sequence[Payload]) -> Payload:
        """The payloads in order as one; an empty one for none."""
        if not payloads:
            return Payload(np.empty(0, TOKEN_DTYPE), np.empty(0, TOKEN_DTYPE), np.empty(0, LOGPROB_DTYPE))
        columns = zip(*((part.prompt_ids, part.token_ids, part.logprobs) for part in payloads), strict=True)
        return Payload(*map(np.concatenate, columns))

    def split(self, groups: Iterable[Group]) -> list[Payload]:
        """One payload per group, views on the joined buffers."""
        groups = list(groups)
        prompts = _slices(group.num_prompt_tokens for group in groups)
        tokens = _slices(group.num_tokens for group in groups)
        sampled = _slices(group.num_sampled_tokens for group in groups)
        return [
            Payload(self.prompt_ids[prompt], self.token_ids[own], self.logprobs[its])
            for prompt, own, its in zip(prompts, tokens, sampled, strict=True)
        ]


@dataclass(frozen=True)
class ContextTokens:
    """One context with its buffers: P prompt tokens, S sampled ones."""

    index: int
    """Of its completion in the group."""
    number: int
    """Of the context in its completion."""
    header: Context
    group_prompt_ids: np.ndarray
    own_ids: np.ndarray
    """int32: all that `header.sampled` counts."""
    logprobs_S: np.ndarray

    @property
    def prompt_ids(self) -> np.ndarray:
        """int32 [P]: the group's prompt, or what a context that isn't rooted begins with."""
        return self.group_prompt_ids if self.header.rooted else self.own_ids[: self.response.start]

    @property
    def response(self) -> slice:
        """Of its own tokens, those behind its prompt."""
        return slice(0 if self.header.rooted else self.header.sampled[0][1], None)

    def spread(self, values_S: np.ndarray, observed: int = 0) -> np.ndarray:
        """Numbers of the sampled tokens at their places among its own; `observed` at those of the observed ones."""
        if len(values_S) == len(self.own_ids):
            return values_S
        values = np.full(len(self.own_ids), observed, values_S.dtype)
        values[self.is_sampled] = values_S
        return values

    @property
    def is_sampled(self) -> np.ndarray:
        """bool, of each of its own tokens."""
        return expand(self.header.sampled) == 1


def expand(runs: Runs) -> np.ndarray:
    """int64 [number of tokens] from run lengths `[(value, num_tokens), …]`."""
    values, counts = zip(*runs, strict=True)
    return np.repeat(np.array(values, np.int64), counts)


def _bytes_of(array: np.ndarray, dtype: np.dtype) -> memoryview:
    return np.ascontiguousarray(array, dtype).view(np.uint8).data


def _slices(lengths: Iterable[int]) -> list[slice]:
    """Where pieces of these lengths stand one after the other."""
    return [slice(begin, end) for begin, end in pairwise(accumulate(lengths, initial=0))]


def pack_answers(request_id: int, answers: Sequence[EvalAnswer]) -> tuple[EvalDone, list[bytes]]:
    """The message to an evaluation request, and its one frame: all responses as UTF-8."""
    texts = [answer.response.encode(errors="replace") for answer in answers]
    bare = [replace(answer, response="") for answer in answers]
    return EvalDone(request_id=request_id, answers=bare, response_bytes=list(map(len, texts))), [b"".join(texts)]


def unpack_answers(done: EvalDone, frames: Sequence[bytes | memoryview]) -> list[EvalAnswer]:
    """The answers with their responses. Raises ValueError if header and frame disagree."""
    ends = list(accumulate(done.response_bytes, initial=0))
    sizes = [memoryview(frame).nbytes for frame in frames]
    if len(done.answers) != len(done.response_bytes) or min(done.response_bytes, default=0) < 0:
        raise ValueError(f"{len(done.answers)} answers with {len(done.response_bytes)} responses")
    if sizes != ends[-1:]:
        raise ValueError(f"frames of {sizes} bytes don't hold responses of {ends[-1]} bytes")
    texts = [str(frames[0][begin:end], "utf-8") for begin, end in pairwise(ends)]
    return [replace(answer, response=text) for answer, text in zip(done.answers, texts, strict=True)]
