"""Every record on a wire or in the journal. msgspec, no numpy and no torch.

A wire message is one msgpack header frame (a tagged `Struct` below) and, where tokens travel, raw little-endian buffers
in frames of their own (`payload`). Nothing on a socket is ever pickled.

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

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

from msgspec import Struct, field
from msgspec.structs import replace

SCHEMA_VERSION = 4
"""Goes up when a record changes its meaning; peers of another version are refused at `Hello`."""

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
    """What the scorer says of one response. Reward and metrics become part of the `Completion`."""

    reward: float
    metrics: dict[str, float]
    pred: str | None = None
    """What the verifier took for the response's answer; None where it found none or doesn't say."""


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
    """replay -> rollout. Completions of these prompts, at most `group_size` together; not a lease, never trained on."""

    request_id: int
    seed: int
    """Of the evaluation; a completion uses `eval_seed(seed, prompt_id, sample)`, whatever else is in the request."""
    sampling: Sampling
    prompts: list[Prompt]
    samples: list[int] = field(default_factory=lambda: [0])
    """Numbers of the completions to sample of each prompt."""
    number: int = 0
    """As in `Lease`; 0 until it is given out."""

    @property
    def num_sequences(self) -> int:
        """Completions asked for."""
        return len(self.prompts) * len(self.samples)


class EvalAnswer(Struct, frozen=True, kw_only=True):
    """What one evaluated completion came to."""

    prompt_id: int
    sample: int = 0
    """Which of the prompt's completions."""
    acc: float
    failure: str = ""
    """Why there is no verdict: what the reward function raised. `acc` is 0 then, since nothing is known."""
    pred: str | None = None
    """As in `Score`: what maj@k counts."""
    num_tokens: int
    finish_reason: FinishReason
    version_min: int
    version_max: int
    response: str = ""
    """Its text without special tokens."""

    @property
    def failed(self) -> bool:
        """Whether it could not be judged."""
        return bool(self.failure)


class EvalDone(Message):
    """rollout -> replay, with one frame: the responses as UTF-8, one behind the other (a header has room for 8 MiB,
    and a long response takes 80 kB). Sent again until acknowledged."""

    request_id: int
    answers: list[EvalAnswer]
    """Prompt after prompt, each with the samples asked for; without their responses."""
    response_bytes: list[int]

    @staticmethod
    def pack(request_id: int, answers: Sequence[EvalAnswer]) -> tuple[EvalDone, list[bytes]]:
        """The message and its frame."""
        texts = [answer.response.encode(errors="replace") for answer in answers]
        bare = [replace(answer, response="") for answer in answers]
        return EvalDone(request_id=request_id, answers=bare, response_bytes=list(map(len, texts))), [b"".join(texts)]

    def unpack(self, frames: Sequence[bytes | memoryview]) -> list[EvalAnswer]:
        """The answers with their responses. Raises ValueError when header and frame disagree."""
        ends = list(accumulate(self.response_bytes, initial=0))
        sizes = [memoryview(frame).nbytes for frame in frames]
        if len(self.answers) != len(self.response_bytes) or min(self.response_bytes, default=0) < 0:
            raise ValueError(f"{len(self.answers)} answers with {len(self.response_bytes)} responses")
        if sizes != ends[-1:]:
            raise ValueError(f"frames of {sizes} bytes don't hold responses of {ends[-1]} bytes")
        texts = [str(frames[0][begin:end], "utf-8") for begin, end in pairwise(ends)]
        return [replace(answer, response=text) for answer, text in zip(self.answers, texts, strict=True)]


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
    unreadable: bool = False
    """There was one, and its payloads are damaged: the run has to go back to its checkpoint."""


def eval_seed(seed: int, prompt_id: int, sample: int) -> int:
    """Seed of a held-out prompt's completion, however prompts and samples are spread over requests. That of the first
    doesn't know of others."""
    return sample_seed(seed, prompt_id, sample) if sample else sample_seed(seed, prompt_id)


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
