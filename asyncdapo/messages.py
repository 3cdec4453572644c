"""Every record on a wire or in the journal. msgspec and numpy, no torch.

A wire message is one msgpack header frame (a tagged `Struct` below) and, where tokens travel, raw little-endian buffers
in frames of their own (`Payload`): 8.1 bytes a token against 14.1 as lists. Nothing on a socket is ever pickled.

    prompt      one position of the endless seeded stream; it ends exactly once
    completion  one sampled response
    group       the `group_size` scored completions of one prompt: the unit of transport, filter, queue and loss
    lease       permission to generate one prompt's group; `lease_id` is never reused
    version     number of the train step whose weights these are; 0 is the initial model
    branch      grows at every rollback, so that records of an abandoned future are recognised

Every sampled token has a version: `versions` are run lengths `[(version, num_tokens), …]` since an update may land in
the middle of a response. `loss_mask` are run lengths `[(0 or 1, num_tokens), …]`, all ones for a single turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from msgspec import Struct

SCHEMA_VERSION = 3
"""Goes up when a record changes its meaning; peers of another version are refused at `Hello`."""

TOKEN_DTYPE = np.dtype("<i4")
LOGPROB_DTYPE = np.dtype("<f4")

FinishReason = Literal["stop", "length"]
Phase = Literal["waiting", "sampling", "sampled"]
"""Of a lease at its worker: no sample of it has a slot; some have; all tokens are there (it is scored, or waits for its
acknowledgement)."""
Runs = list[tuple[int, int]]


class Message(Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """A header frame; the tag is the class name."""


# ---------------------------------------------------------------------------------------------------- what is generated


class Prompt(Struct, frozen=True, kw_only=True):
    """One position of the prompt stream: what the engine continues and what the verifier compares with."""

    prompt_id: int
    epoch: int
    source: str
    row: int
    token_ids: list[int]
    answer: str


class Completion(Struct, frozen=True, kw_only=True):
    """One sampled and scored response; its tokens and rollout log-probs are in the group's payload."""

    num_tokens: int
    finish_reason: FinishReason
    versions: Runs
    loss_mask: Runs
    reward: float
    """Final sequence reward (verdict → scale → shaping): what the advantage is computed from."""
    metrics: dict[str, float]
    """Numbers of the reward function: `acc` 0/1 verdict, `score` scaled, `seq_reward` shaped, and any of its own."""


class Score(Struct, frozen=True, kw_only=True):
    """What the scorer says of one response; it becomes part of the `Completion`."""

    reward: float
    metrics: dict[str, float]


class Group(Struct, frozen=True, kw_only=True):
    """The scored completions of one prompt, as the rollout worker sends them and the learner trains on them."""

    prompt_id: int
    lease_id: int
    branch: int
    attempt: int
    worker: int
    num_prompt_tokens: int
    completions: list[Completion]
    generate_s: float
    """Wall time from the group's first sampled token to its last."""

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of all completions."""
        return sum(completion.num_tokens for completion in self.completions)

    @property
    def min_version(self) -> int:
        """Lowest version over all sampled tokens: what staleness is measured from."""
        return min(version for completion in self.completions for version, _ in completion.versions)

    @property
    def max_version(self) -> int:
        return max(version for completion in self.completions for version, _ in completion.versions)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that bear loss; a group without any ends `filtered` with reason `masked`."""
        return sum(count for completion in self.completions for value, count in completion.loss_mask if value)


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

    @staticmethod
    def join(payloads: Sequence[Payload]) -> Payload:
        """In order; of none, an empty one."""
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


# ------------------------------------------------------------------------------------------------- rollout <-> replay


class Hello(Message):
    """rollout -> replay. First message of a worker's session and of every reconnect."""

    schema: int
    worker: int
    session: str
    """Random per process start: a restarted worker is another session, and the old one's leases are lost."""
    loaded_version: int
    branch: int
    """Of the loaded weights; 0 for those that the process started with. The worker gets work when it is the run's."""
    granted: int
    """Leases and evaluation requests that the worker has counted so far: a server that began anew goes on from it."""


class Welcome(Message):
    """replay -> rollout. The session is known; groups of it are accepted. Answers every `Hello`, repeats included."""

    branch: int
    """The run's. What the worker holds of an earlier one is over."""
    granted: int
    """Leases and evaluation requests given to this session so far, as the server or as the worker counts, whichever is
    more: both go on from it, so that credits survive messages lost with a connection or with the server."""


class Ask(Message):
    """rollout -> replay. Credits: leases and evaluation requests asked for since the session began. Cumulative, so that
    a lost or repeated message changes nothing: the server owes `asked − granted`."""

    asked: int


class Lease(Message):
    """replay -> rollout. Generate this prompt's group. Sent again when the worker's heartbeats don't list it."""

    lease_id: int
    branch: int
    attempt: int
    group_size: int
    seed: int
    """Seed of the group; sample i uses `sample_seed(seed, i)`."""
    prompt: Prompt
    number: int = 0
    """How many grants this session has had, this one included: so a repeated or lost one leaves the count right. 0 in
    what an earlier server granted and the worker may not have counted: then nobody counts it."""


class Started(Message):
    """rollout -> replay. The lease's first token was sampled, with the weights of `version`."""

    lease_id: int
    version: int


class Loaded(Message):
    """rollout -> replay. From now on this worker generates with the weights of `version` of `branch`."""

    version: int
    branch: int


class GroupDone(Message):
    """rollout -> replay, with the frames of one `Payload`. Sent again until acknowledged or rejected."""

    group: Group


class GroupFailed(Message):
    """rollout -> replay. The reward function raised: the prompt ends `failed`. Sent again until acknowledged."""

    lease_id: int
    reason: str


class Progress(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How far a lease is that the worker holds."""

    num_tokens: int
    """Sampled so far over all completions; never falls."""
    phase: Phase
    started_version: int | None = None
    """As `Started` said, which may have been lost; None until then."""


class Heartbeat(Message):
    """rollout -> replay, every 2 s. `progress`: every lease that the worker holds, by `lease_id`. `evaluations`: the
    `request_id` of every evaluation request."""

    asked: int
    loaded_version: int
    branch: int
    progress: dict[int, Progress]
    evaluations: list[int]
    gauges: dict[str, float]
    """The worker's own counters (`rollout/…`), cumulative since the session began."""


class Ack(Message):
    """replay -> rollout. The journal has it (or it was late, or known already): forget it."""

    lease_id: int


class Reject(Message):
    """replay -> rollout. The group can't be decoded or breaks its lease; the lease is over."""

    lease_id: int
    reason: str


class Withdraw(Message):
    """replay -> rollout. These leases are over: stop generating them, send nothing for them."""

    lease_ids: list[int]


# ------------------------------------------------------------------------------------------------------- evaluation


class Sampling(Struct, frozen=True, kw_only=True):
    """How tokens are drawn. Training always samples plainly (`top_p` 1, `top_k` 0); temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128


class EvalRequest(Message):
    """replay -> rollout. One completion of each of these prompts; not a lease, never trained on."""

    request_id: int
    seed: int
    sampling: Sampling
    prompts: list[Prompt]
    number: int = 0
    """As in `Lease`; 0 until it is given out."""


class EvalAnswer(Struct, frozen=True, kw_only=True):
    """What one evaluated completion came to."""

    prompt_id: int
    acc: float
    num_tokens: int
    finish_reason: FinishReason
    version_min: int
    version_max: int


class EvalDone(Message):
    """rollout -> replay. Sent again until acknowledged."""

    request_id: int
    answers: list[EvalAnswer]


class EvalAck(Message):
    """replay -> rollout."""

    request_id: int


# ------------------------------------------------------------------------------------------------- replay <-> learner


MAX_RANKS = 1024
"""Of a learner; a question that claims more is damaged."""


class CutWanted(Message):
    """learner -> replay. One rank asks for its share of batch `step`; asking again for a batch that was cut returns the
    same one."""

    step: int
    rank: int = 0
    num_ranks: int = 1
    num_updates: int = 1
    """Optimizer updates in an epoch: every rank has a part of each (`shares.deal`)."""


class Batch(Message):
    """replay -> learner: batch `step`, immutable, with the frames of one `Payload` over the groups of the rank's share
    (`shares.share_of`) in order.

    Sorted by `prompt_id`. Staleness of each group is `(step − 1) − min_version` ≤ `max_staleness`.
    """

    step: int
    branch: int
    max_staleness: int
    groups: list[Group]
    copies: list[int] = []
    """How many more times each group stands in the batch (`filter.mode: replace`); empty when none does."""


class NoBatch(Message):
    """replay -> learner. The data is used up: there is no batch `step`, and the run ends well."""

    step: int
    reason: str


def sample_seed(*parts: int) -> int:
    """63-bit seed from integers (run seed, prompt id, sample index); the attempt is left out on purpose.

    SplitMix64 over the parts (Steele, Lea, Flood 2014), so that neighbours share no pattern.
    """
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFF_FFFF_FFFF_FFFF)) + 0x9E37_79B9_7F4A_7C15 & 0xFFFF_FFFF_FFFF_FFFF
        state = (state ^ state >> 30) * 0xBF58_476D_1CE4_E5B9 & 0xFFFF_FFFF_FFFF_FFFF
        state = (state ^ state >> 27) * 0x94D0_49BB_1331_11EB & 0xFFFF_FFFF_FFFF_FFFF
        state ^= state >> 31
    return state >> 1
