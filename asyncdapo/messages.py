"""Every record on a wire or in the journal, except those of evaluations (`eval_messages`). Uses msgspec, without numpy
and torch.

A wire message is one msgpack header frame (a tagged `Struct` below). Tokens follow as raw little-endian buffers, in
frames of their own (`payload`). Nothing on a socket is ever pickled.

    prompt      one position of the seeded prompt stream; it ends exactly once
    completion  one sampled response
    group       the `group_size` scored completions of one prompt: the unit of transport, filter, queue and loss
    lease       permission to generate one prompt's group; `lease_id` is never reused
    version     number of the train step whose weights these are; 0 is the initial model
    branch      grows at every rollback, so that records from before the rollback are recognised

Every sampled token has a version. `versions` are run lengths `[(version, num_tokens), …]`, since new weights may be
loaded in the middle of a response. `loss_mask` are run lengths `[(0 or 1, num_tokens), …]`, all ones for a single turn.
"""

from __future__ import annotations

from typing import Literal, dataclass_transform

from msgspec import Struct, field

SCHEMA_VERSION = 4
"""Raised when a record changes its meaning. A peer with another version is refused at `Hello`."""

FinishReason = Literal["stop", "length"]
Phase = Literal["waiting", "sampling", "sampled"]
"""Of a lease at its worker. `waiting`: none of its samples has a slot. `sampling`: some have. `sampled`: all tokens are
there, and it is being scored or waits for its acknowledgement."""
Runs = list[tuple[int, int]]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))  # a subclass is frozen without saying so
class Message(Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """A header frame; the tag is the class name."""


# ---------------------------------------------------------------------------------------------------- what is generated


class Prompt(Struct, frozen=True, kw_only=True):
    """One position of the prompt stream: the tokens for the engine, and the answer for the verifier."""

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
    """Final sequence reward (verdict → scale → shaping). The advantage is computed from it."""
    metrics: dict[str, float]
    """Numbers of the reward function: `acc` is the 0/1 verdict, `score` the scaled one, `seq_reward` the shaped one. It
    may add others."""

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that bear loss."""
        return sum(count for value, count in self.loss_mask if value)


class Score(Struct, frozen=True, kw_only=True):
    """The scorer's result for one response. Reward and metrics become part of the `Completion`."""

    reward: float
    metrics: dict[str, float]
    pred: str | None = None
    """The answer that the verifier found in the response; None if it found none or doesn't tell."""


def staleness(step: int, min_version: int) -> int:
    """Staleness in batch `step`, in train steps: batch k is trained on with weights of version k − 1. `min_version`:
    that of the oldest sampled token."""
    return step - 1 - min_version


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
        """Lowest version over all sampled tokens. Staleness is measured from it."""
        return min(version for completion in self.completions for version, _ in completion.versions)

    def staleness(self, step: int) -> int:
        """Train steps between the weights of its oldest token and those that train on it in batch `step`."""
        return staleness(step, self.min_version)

    @property
    def max_version(self) -> int:
        return max(version for completion in self.completions for version, _ in completion.versions)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that bear loss. A group without any ends `filtered` with reason `masked`."""
        return sum(completion.num_loss_tokens for completion in self.completions)


class Sampling(Struct, frozen=True, kw_only=True):
    """How tokens are drawn. Training always samples plainly (`top_p` 1, `top_k` 0); temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128


# ------------------------------------------------------------------------------------------------- rollout <-> replay


class Hello(Message):
    """rollout -> replay. First message of a session, and after every reconnect."""

    schema: int
    worker: int
    session: str
    """Random for each process start. A restarted worker has a new session, and the old session's leases are lost."""
    loaded_version: int
    branch: int
    """Of the loaded weights; 0 for those that the process started with. The worker gets work only if it equals the
    run's branch."""
    granted: int
    """Leases and evaluation requests that the worker has counted so far. A restarted server resumes its count here."""


class Welcome(Message):
    """replay -> rollout. The session is known, and its groups are accepted. Answers every `Hello`, repeats included."""

    branch: int
    """The run's branch. Whatever the worker holds of an earlier one is over."""
    granted: int
    """Leases and evaluation requests given to this session so far: the larger of the server's count and the worker's.
    Both resume their count here, so that credits survive lost messages and a restart of the server."""


class Ask(Message):
    """rollout -> replay. Credits: the number of leases and evaluation requests asked for since the session began. The
    number is cumulative, so that a lost or repeated message does no harm: the server owes `asked − granted`."""

    asked: int


class Lease(Message):
    """replay -> rollout. Generate this prompt's group. Sent again if the worker's heartbeats don't list it."""

    lease_id: int
    branch: int
    attempt: int
    group_size: int
    seed: int
    """Seed of the group. Sample i uses `sample_seed(seed, i)`."""
    prompt: Prompt
    number: int = 0
    """Grants of this session so far, this one included. It keeps the count right if a grant is repeated or lost. 0 =
    don't count: granted by an earlier server."""


class Started(Message):
    """rollout -> replay. The lease's first token was sampled, with the weights of `version`."""

    lease_id: int
    version: int


class Loaded(Message):
    """rollout -> replay. From now on this worker generates with weights `version` of `branch`."""

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
    """Progress of one lease that the worker holds."""

    num_tokens: int
    """Tokens sampled so far over all completions; never falls."""
    phase: Phase
    started_version: int | None = None
    """Repeats `Started`, which may have been lost; None before the first token."""


class Heartbeat(Message):
    """rollout -> replay, every 2 s. `progress`: every lease that the worker holds, by `lease_id`. `evaluations`: the
    `request_id` of every evaluation request that it holds."""

    asked: int
    loaded_version: int
    branch: int
    progress: dict[int, Progress]
    evaluations: list[int]
    gauges: dict[str, float]
    """The worker's counters (`rollout/…`), cumulative since the session began."""


class Ack(Message):
    """replay -> rollout. The group is in the journal, or it was late or known already. Forget it."""

    lease_id: int


class Reject(Message):
    """replay -> rollout. The group can't be decoded or doesn't fit its lease. The lease is over."""

    lease_id: int
    reason: str


class Withdraw(Message):
    """replay -> rollout. These leases are over. Stop generating them, and send nothing for them."""

    lease_ids: list[int]


# ------------------------------------------------------------------------------------------------- replay <-> learner


NOBODY = -1
"""In a `Deal`: at no update, at no rank."""


class CutWanted(Message):
    """learner -> replay. One rank asks for its share of batch `step`. A repeated request gets the same batch."""

    step: int
    rank: int = 0


class Deal(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Who trains on what of a batch (`shares`)."""

    updates: list[int]
    """Optimizer update of each group, from 0; NOBODY for a group without a loss-bearing token."""
    ranks: list[int]
    """Rank of each completion, group after group; NOBODY for one that bears no loss."""

    @property
    def num_updates(self) -> int:
        return max(self.updates, default=NOBODY) + 1


class Batch(Message):
    """replay -> learner: batch `step`, immutable, with the frames of one `Payload` over the rank's share
    (`shares.share_of`) in order. All but the frames is the same for every rank.

    Sorted by `prompt_id`. `Group.staleness(step)` of each group is at most `max_staleness`.
    """

    step: int
    branch: int
    max_staleness: int
    groups: list[Group]
    deal: Deal
    copies: list[int] = []
    """Extra copies of each group in the batch (`filter.mode: replace`); empty if there are none."""


class NoBatch(Message):
    """replay -> learner. The data is used up: there is no batch `step`, and the run ends successfully."""

    step: int
    reason: str
    unreadable: bool = False
    """Batch `step` was cut, but its payloads are damaged: the run has to roll back to its checkpoint."""
