"""Frames that follow a message's header: the tokens and log-probs of groups, also of those that aren't complete; the
responses of an evaluation.

Tokens and log-probs are raw little-endian buffers: 8.1 bytes a token instead of 14.1 as lists, and no copy on arrival.
Where `rollout.top_p` or `rollout.top_k` narrow the sampling, the tokens that were left to draw from follow (`Support`).
Does not own: what the frames mean. Their header says that (`messages`, and `PartialGroup` here).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

import msgspec
import numpy as np
from isal.isal_zlib import crc32
from msgspec import Struct
from msgspec.structs import replace

from asyncdapo.eval_messages import EvalAnswer, EvalDone
from asyncdapo.messages import Context, FinishReason, Group, Message, Runs
from asyncdapo.transport.codec import Buffer, Malformed, decode

TOKEN_DTYPE = np.dtype("<i4")
LOGPROB_DTYPE = np.dtype("<f4")


def checksum(token_ids: np.ndarray | Sequence[int], number: int) -> int:
    """Of the `number`-th turn of a completion: what the engine read, and then what it sampled."""
    return numbered(crc32(np.ascontiguousarray(token_ids, TOKEN_DTYPE).tobytes()), number)


def numbered(crc: int, number: int) -> int:
    """The checksum of a turn from the CRC-32 of its tokens and those before them, as a payload holds them."""
    return crc32(number.to_bytes(4, "little"), crc)


@dataclass(frozen=True)
class Support:
    """The tokens of the vocabulary that each of S sampled tokens was drawn from: what top-k and top-p have left.

    counts     int32 [S]: their number; 0 is the whole vocabulary
    token_ids  int32 [sum of counts], sampled token after sampled token
    """

    counts: np.ndarray
    token_ids: np.ndarray

    def pieces(self, tokens: Iterable[slice]) -> list[Support]:
        """Of runs of sampled tokens. Views."""
        ends = np.cumsum([0, *self.counts])
        return [Support(self.counts[run], self.token_ids[ends[run.start] : ends[run.stop]]) for run in tokens]

    def of(self, is_chosen: np.ndarray) -> Support:
        """Of the sampled tokens that a mask, bool [S], chooses."""
        return Support(self.counts[is_chosen], self.token_ids[np.repeat(is_chosen, self.counts)])

    def problem(self, sampled_ids: np.ndarray) -> str | None:
        """What is wrong with it, if these tokens [S] were drawn."""
        is_drawn = self.token_ids == np.repeat(sampled_ids, self.counts)
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        num_found = np.bincount(owners[is_drawn], minlength=len(self.counts))
        return None if ((num_found == 1) | (self.counts == 0)).all() else "a token isn't among those it was drawn from"

    @staticmethod
    def of_all(num_tokens: int) -> Support:
        """Of tokens that were drawn from the whole vocabulary."""
        return Support(np.zeros(num_tokens, TOKEN_DTYPE), np.empty(0, TOKEN_DTYPE))

    @staticmethod
    def of_draws(left: Sequence[np.ndarray]) -> Support:
        """Of tokens that were each drawn from these."""
        return Support(np.array(list(map(len, left)), TOKEN_DTYPE), np.concatenate(left, dtype=TOKEN_DTYPE))

    @staticmethod
    def join(parts: Sequence[tuple[Support | None, int]]) -> Support | None:
        """Those of the parts in order, each with its number of sampled tokens; None if no part has any."""
        if all(support is None for support, _ in parts):
            return None
        given = [support or Support.of_all(num) for support, num in parts]
        counts, token_ids = zip(*((one.counts, one.token_ids) for one in given), strict=True)
        return Support(np.concatenate(counts), np.concatenate(token_ids))


@dataclass(frozen=True)
class Payload:
    """Token buffers of one group, or of some of its completions.

    prompt_ids  int32 [num_prompt_tokens]
    token_ids   int32 [sum of num_tokens], completion after completion, context after context
    logprobs    float32 [sum of num_sampled_tokens], rollout_logprobs (μ) at the sampling temperature
    support     of the sampled tokens; None if each was drawn from the whole vocabulary
    """

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    support: Support | None = None

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer, _ in self._buffers)

    def frames(self) -> tuple[memoryview, ...]:
        """The raw little-endian buffers, in the order of the fields: three, or five with `support`. Views, where no
        other dtype is needed."""
        return tuple(_bytes_of(buffer, dtype) for buffer, dtype in self._buffers)

    @property
    def _buffers(self) -> list[tuple[np.ndarray, np.dtype]]:
        of_support = [self.support.counts, self.support.token_ids] if self.support else []
        tokens = [(self.prompt_ids, TOKEN_DTYPE), (self.token_ids, TOKEN_DTYPE), (self.logprobs, LOGPROB_DTYPE)]
        return tokens + [(buffer, TOKEN_DTYPE) for buffer in of_support]

    @staticmethod
    def from_frames(frames: Sequence[bytes | memoryview], groups: Iterable[Group]) -> Payload:
        """Views on the frames, without a copy. Raises ValueError when sizes and headers disagree."""
        groups = list(groups)
        num_prompt = sum(group.num_prompt_tokens for group in groups)
        num_tokens = sum(group.num_tokens for group in groups)
        num_sampled = sum(group.num_sampled_tokens for group in groups)
        if len(frames) not in (3, 5):
            raise ValueError(f"a payload has 3 or 5 frames, got {len(frames)}")
        sizes = tuple(memoryview(frame).nbytes for frame in frames[:3])
        if sizes != (4 * num_prompt, 4 * num_tokens, 4 * num_sampled):
            raise ValueError(
                f"payload frames of {sizes} bytes don't hold {num_prompt} prompt tokens, {num_tokens} others and "
                f"{num_sampled} sampled ones"
            )
        return Payload(
            np.frombuffer(frames[0], TOKEN_DTYPE),
            np.frombuffer(frames[1], TOKEN_DTYPE),
            np.frombuffer(frames[2], LOGPROB_DTYPE),
            _support_from(frames[3:], num_sampled),
        )

    def of_completions(self, group: Group, indices: Sequence[int]) -> Payload:
        """The prompt of `group`, whose payload this is, and the tokens of these completions in this order."""
        if list(indices) == list(range(len(group.completions))):
            return self
        tokens = _slices(completion.num_tokens for completion in group.completions)
        sampled = _slices(completion.num_sampled_tokens for completion in group.completions)
        supports = self._supports([sampled[index] for index in indices])
        logprobs = [self.logprobs[sampled[index]] for index in indices]
        return Payload(
            self.prompt_ids,
            np.concatenate([self.token_ids[tokens[index]] for index in indices]),
            np.concatenate(logprobs),
            Support.join(list(zip(supports, map(len, logprobs), strict=True))),
        )

    def of_contexts(self, group: Group) -> Iterator[ContextTokens]:
        """The contexts of `group`, whose payload this is, in order. Views."""
        tokens = _slices(context.num_tokens for context in group.contexts)
        sampled = _slices(context.num_sampled_tokens for context in group.contexts)
        pieces = zip(group.contexts, tokens, sampled, self._supports(sampled), strict=True)
        for index, completion in enumerate(group.completions):
            for number, (context, own, its, support) in enumerate(islice(pieces, len(completion.contexts))):
                logprobs_S = self.logprobs[its]
                yield ContextTokens(index, number, context, self.prompt_ids, self.token_ids[own], logprobs_S, support)

    def _supports(self, sampled: Sequence[slice]) -> Sequence[Support | None]:
        """Of runs of sampled tokens."""
        return self.support.pieces(sampled) if self.support else [None] * len(sampled)


class ContextTokens(Struct, frozen=True, eq=False):
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
    support_S: Support | None = None
    """Of the sampled tokens."""

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


def _support_from(frames: Sequence[bytes | memoryview], num_sampled: int) -> Support | None:
    """Of its two frames, or of none. Raises ValueError for other tokens than `num_sampled`."""
    if not frames:
        return None
    counts, token_ids = (np.frombuffer(frame, TOKEN_DTYPE) for frame in frames)
    if len(counts) != num_sampled or counts.min(initial=0) < 0 or counts.sum(dtype=np.int64) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens to draw from in {len(counts)} draws for {num_sampled} sampled ones")
    return Support(counts, token_ids)


class PartialCompletion(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is sampled of a response of a single turn."""

    versions: Runs
    """Of its tokens; empty if it has none."""
    finish_reason: FinishReason | None
    """None: it isn't complete."""

    @property
    def num_tokens(self) -> int:
        """Sampled so far."""
        return sum(count for _, count in self.versions)


class PartialGroup(Message):
    """rollout -> replay. What is sampled of a lease that runs. Its frames are int32 token ids and float32 log-probs,
    completion after completion. The replay server keeps the newest one of each prompt, and sends header and frames
    with the prompt's next lease."""

    lease_id: int
    completions: list[PartialCompletion]
    """Empty if nothing was asked of the engine yet. Then there are no frames."""
    checksum: int
    """Of the completions and both frames, as the worker had them (`partial_checksum`)."""
    handed_back: bool = False
    """The worker has stopped, and sends nothing more for the lease. Sent again until the lease is withdrawn."""

    @property
    def num_tokens(self) -> int:
        """Sampled so far over all completions."""
        return sum(completion.num_tokens for completion in self.completions)

    @property
    def token_versions(self) -> set[int]:
        """All versions that sampled a token."""
        return {version for completion in self.completions for version, _ in completion.versions}

    def problem_with(self, buffers: Sequence[Buffer]) -> str | None:
        """What is wrong with its frames; None if they are those that the worker had."""
        sizes = [memoryview(buffer).nbytes for buffer in buffers]
        if sizes != [4 * self.num_tokens] * (2 if self.completions else 0):
            return f"frames of {sizes} bytes for {self.num_tokens} tokens"
        if self.checksum != partial_checksum(self.completions, buffers):
            return "its checksum is another one"
        return None


def partial_checksum(completions: Sequence[PartialCompletion], buffers: Sequence[Buffer]) -> int:
    """CRC-32 of versions and ends, tokens and log-probs."""
    crc = crc32(msgspec.msgpack.encode(completions))
    for buffer in buffers:
        crc = crc32(buffer, crc)
    return crc


def read_partial(frames: Sequence[Buffer]) -> tuple[PartialGroup, Sequence[memoryview]]:
    """Header and buffers from the frames that hold both. Raises Malformed unless they are as they were saved."""
    group, buffers = decode(frames, PartialGroup)
    if problem := group.problem_with(buffers):
        raise Malformed(problem)
    return group, buffers


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
