"""Every record on a wire or in the journal, except those of batches (`shares`) and of evaluations
(`eval_messages`). Uses msgspec, without numpy and torch.

A wire message is one msgpack header frame (a tagged `Struct` below). Tokens follow as raw little-endian buffers, in
frames of their own (`payload`). Nothing on a socket is ever pickled.

    prompt      one position of the seeded prompt stream; it ends exactly once
    completion  one sampled attempt at a prompt: a response, or an episode of several turns
    turn        one sampled response of an episode
    context     what the model has read and written in a completion, token by token; an episode has one, or several
                where it forked
    observed    tokens that the environment gave; the model reads them, and they bear no loss
    group       the `group_size` scored completions of one prompt: the unit of transport, filter, queue and loss
    lease       permission to generate one prompt's group; `lease_id` is never reused
    version     number of the train step whose weights these are; 0 is the initial model
    branch      grows at every rollback, so that records from before the rollback are recognised

Every sampled token has a version. `versions` are run lengths `[(version, num_tokens), …]`, since new weights may be
loaded in the middle of a response. `loss_mask` are run lengths `[(0 or 1, num_tokens), …]` of the sampled tokens alone:
an observed token can't bear loss.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any, Literal, dataclass_transform

from msgspec import Struct, field

SCHEMA_VERSION = 6
"""Raised when a record changes its meaning. A peer with another version is refused at `Hello`."""

FinishReason = Literal["stop", "length", "turns", "time"]
"""Of a completion. `length`: a limit on tokens cut it off. Of an episode alone: `turns`, it had as many as it may have;
`time`, a step of its environment took too long."""
Limit = Literal["length", "turns"]
"""That an episode may reach."""
Phase = Literal["waiting", "sampling", "environment", "sampled"]
"""Of a lease at its worker. `waiting`: none of its samples has a slot. `sampling`: some have. `environment`: none has,
and some wait for their environments. `sampled`: all tokens are there, and it is being scored or waits for its
acknowledgement."""
Text = str | list[dict[str, Any]]
"""What an environment says: a text, or messages with `role` and `content` for the model's chat template."""
Runs = list[tuple[int, int]]
NO_CHECKSUM = -1
"""Of a turn in a record from before they were taken."""


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
    text: str = ""
    """Its question, for an environment; empty without one."""


class SampledTurn(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One response in a context: tokens that the engine sampled in one go."""

    number: int
    """In its completion, from 0, in the order in which the engine answered. No other turn of any context has it."""
    num_tokens: int
    checksum: int
    """Taken where the engine answers (`payload.checksum`): of all that it had read and sampled, and of the number. So
    it shows behind which tokens the turn was sampled, and that it stands in one place."""


class Context(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """What the model has read and written, token by token; the last token is sampled. The tokens, and the rollout
    log-probs of the sampled ones, are in the group's payload."""

    rooted: bool = True
    """Whether its tokens stand behind the group's prompt. If not, it begins elsewhere: with observed tokens."""
    sampled: Runs
    """`[(1, num_tokens), …]` of sampled tokens, `[(0, num_tokens), …]` of observed ones. What a context shares with an
    earlier one of its completion counts as observed, so that a token is sampled, and may bear loss, only once."""
    versions: Runs
    """Of the sampled tokens."""
    loss_mask: Runs
    """Of the sampled tokens."""
    turns: list[SampledTurn]
    """The sampled tokens, turn by turn."""

    @staticmethod
    def of_turn(versions: Runs, loss_mask: Runs, checksum: int) -> Context:
        """A single turn behind the group's prompt."""
        num_tokens = sum(count for _, count in versions)
        turn = SampledTurn(0, num_tokens, checksum)
        return Context(sampled=[(1, num_tokens)], versions=versions, loss_mask=loss_mask, turns=[turn])

    @property
    def num_tokens(self) -> int:
        """Sampled and observed."""
        return sum([count for _, count in self.sampled])

    @property
    def num_sampled_tokens(self) -> int:
        return sum([count for is_sampled, count in self.sampled if is_sampled])

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that bear loss."""
        return sum([count for bears_loss, count in self.loss_mask if bears_loss])


class Completion(Struct, frozen=True, kw_only=True):
    """One sampled and scored response, or episode of several turns."""

    contexts: list[Context]
    finish_reason: FinishReason
    reward: float
    """Final sequence reward (verdict → scale → shaping). The advantage is computed from it."""
    metrics: dict[str, float]
    """Numbers of the reward function: `acc` is the 0/1 verdict, `score` the scaled one, `seq_reward` the shaped one. It
    may add others."""

    @property
    def num_turns(self) -> int:
        """Sampled responses in it."""
        return sum([len(context.turns) for context in self.contexts])

    @property
    def num_tokens(self) -> int:
        """Sampled and observed tokens of all contexts."""
        return sum([count for context in self.contexts for _, count in context.sampled])

    @property
    def num_sampled_tokens(self) -> int:
        """Sampled tokens of all contexts."""
        return sum([count for context in self.contexts for is_sampled, count in context.sampled if is_sampled])

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that bear loss."""
        return sum([count for context in self.contexts for bears_loss, count in context.loss_mask if bears_loss])


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


class Group(Struct, frozen=True, kw_only=True, dict=True):
    """The scored completions of one prompt, as the rollout worker sends them and the learner trains on them. What is
    counted over all of them is kept (`dict`): the server needs each number several times."""

    prompt_id: int
    lease_id: int
    branch: int
    attempt: int
    worker: int
    num_prompt_tokens: int
    completions: list[Completion]
    generate_s: float
    """Wall time from the group's first sampled token to its last."""

    @cached_property
    def contexts(self) -> list[Context]:
        """Of all completions, in order."""
        return [context for completion in self.completions for context in completion.contexts]

    @cached_property
    def num_tokens(self) -> int:
        """Sampled and observed tokens of all completions."""
        return sum([count for context in self.contexts for _, count in context.sampled])

    @cached_property
    def completion_tokens(self) -> list[int]:
        """Sampled tokens of each completion."""
        return [completion.num_sampled_tokens for completion in self.completions]

    @cached_property
    def num_sampled_tokens(self) -> int:
        """Sampled tokens of all completions."""
        return sum(self.completion_tokens)

    @cached_property
    def min_version(self) -> int:
        """Lowest version over all sampled tokens of all contexts. Staleness is measured from it."""
        return min(self._versions)

    def staleness(self, step: int) -> int:
        """Train steps between the weights of its oldest token and those that train on it in batch `step`."""
        return staleness(step, self.min_version)

    @cached_property
    def max_version(self) -> int:
        """Highest version over the same tokens."""
        return max(self._versions)

    @cached_property
    def reward_mean(self) -> float:
        return sum([completion.reward for completion in self.completions]) / len(self.completions)

    @cached_property
    def finish_reasons(self) -> Counter[str]:
        """How many completions ended for each reason."""
        return Counter([completion.finish_reason for completion in self.completions])

    @cached_property
    def _versions(self) -> set[int]:
        return {version for context in self.contexts for version, _ in context.versions}

    @cached_property
    def metrics(self) -> dict[str, list[float]]:
        """Each number of the reward function, of the completions that have it."""
        numbers: dict[str, list[float]] = {}
        for completion in self.completions:
            for name, number in completion.metrics.items():
                numbers.setdefault(name, []).append(number)
        return numbers

    @cached_property
    def num_loss_tokens(self) -> int:
        """Tokens that bear loss. A group without any ends `filtered` with reason `masked`."""
        return sum([count for context in self.contexts for bears_loss, count in context.loss_mask if bears_loss])


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
    continues: bool = False
    """Whether it continues completions that another worker has begun."""


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
    """replay -> rollout. Generate this prompt's group. Sent again if the worker's heartbeats don't list it. Its frames
    are those of a `PartialGroup`, header first, if some of it is sampled already."""

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


class Recall(Message):
    """replay -> rollout. Stop these leases, and hand back what is sampled of them."""

    lease_ids: list[int]
