"""Frames that follow a message's header: the tokens and log-probs of groups, the responses of an evaluation.

Tokens and log-probs are raw little-endian buffers: 8.1 bytes a token instead of 14.1 as lists, and no copy on arrival.
Does not own: what the frames mean. Their header says that (`messages`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from msgspec.structs import replace

from asyncdapo.eval_messages import EvalAnswer, EvalDone
from asyncdapo.messages import Group

TOKEN_DTYPE = np.dtype("<i4")
LOGPROB_DTYPE = np.dtype("<f4")


@dataclass(frozen=True)
class Payload:
    """Token buffers of one group, or of several joined in order.

    prompt_ids  int32 [sum of num_prompt_tokens]
    token_ids   int32 [sum of num_tokens], completion after completion
    logprobs    float32 [sum of num_tokens], rollout_logprobs (μ) at the sampling temperature
    """

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray

    @property
    def num_bytes(self) -> int:
        return self.prompt_ids.nbytes + self.token_ids.nbytes + self.logprobs.nbytes

    def frames(self) -> tuple[bytes, bytes, bytes]:
        """The three raw little-endian buffers, in the order of the fields."""
        return (
            np.ascontiguousarray(self.prompt_ids, TOKEN_DTYPE).tobytes(),
            np.ascontiguousarray(self.token_ids, TOKEN_DTYPE).tobytes(),
            np.ascontiguousarray(self.logprobs, LOGPROB_DTYPE).tobytes(),
        )

    @staticmethod
    def from_frames(frames: Sequence[bytes | memoryview], groups: Iterable[Group]) -> Payload:
        """Views on the frames, without a copy. Raises ValueError when sizes and headers disagree."""
        groups = list(groups)
        num_prompt = sum(group.num_prompt_tokens for group in groups)
        num_tokens = sum(group.num_tokens for group in groups)
        if len(frames) != 3:
            raise ValueError(f"a payload has 3 frames, got {len(frames)}")
        sizes = tuple(memoryview(frame).nbytes for frame in frames)
        if sizes != (4 * num_prompt, 4 * num_tokens, 4 * num_tokens):
            raise ValueError(
                f"payload frames of {sizes} bytes don't hold {num_prompt} prompt and {num_tokens} sampled tokens"
            )
        return Payload(
            np.frombuffer(frames[0], TOKEN_DTYPE),
            np.frombuffer(frames[1], TOKEN_DTYPE),
            np.frombuffer(frames[2], LOGPROB_DTYPE),
        )

    def of_completions(self, group: Group, indices: Sequence[int]) -> Payload:
        """The prompt of `group`, whose payload this is, and the tokens of these completions in this order."""
        ends = list(accumulate((completion.num_tokens for completion in group.completions), initial=0))
        kept = [slice(ends[index], ends[index + 1]) for index in indices]
        cut = [np.concatenate([column[part] for part in kept]) for column in (self.token_ids, self.logprobs)]
        return Payload(self.prompt_ids, *cut)

    @staticmethod
    def join(payloads: Sequence[Payload]) -> Payload:
        """The payloads in order as one; an empty one for none."""
        if not payloads:
            return Payload(np.empty(0, TOKEN_DTYPE), np.empty(0, TOKEN_DTYPE), np.empty(0, LOGPROB_DTYPE))
        columns = zip(*((part.prompt_ids, part.token_ids, part.logprobs) for part in payloads), strict=True)
        return Payload(*map(np.concatenate, columns))

    def split(self, groups: Iterable[Group]) -> list[Payload]:
        """One payload per group, views on the joined buffers."""
        parts, prompt_at, token_at = [], 0, 0
        for group in groups:
            prompt_end, token_end = prompt_at + group.num_prompt_tokens, token_at + group.num_tokens
            parts.append(
                Payload(
                    self.prompt_ids[prompt_at:prompt_end],
                    self.token_ids[token_at:token_end],
                    self.logprobs[token_at:token_end],
                )
            )
            prompt_at, token_at = prompt_end, token_end
        return parts


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
