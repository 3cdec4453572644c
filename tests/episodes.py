"""Groups of episodes: turns with observed tokens between them, forks, contexts that begin elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from asyncdapo.messages import Completion, Context, Group, SampledTurn
from asyncdapo.transport.payload import Payload, Support, checksum

VOCAB_SIZE = 29


@dataclass
class MadeContext:
    """A context while it grows, as an engine and an environment would let it grow."""

    prompt_ids: list[int]
    """What the engine is given before its own tokens; none if it isn't rooted."""
    rooted: bool = True
    token_ids: list[int] = field(default_factory=list)
    sampled: list[tuple[int, int]] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    turns: list[SampledTurn] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def observe(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        self.sampled += [(0, len(token_ids))] if token_ids else []

    def sample(self, number: int, token_ids: list[int], logprobs: list[float], versions: list[tuple[int, int]]) -> None:
        """One turn."""
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.sampled.append((1, len(token_ids)))
        self.versions += versions
        crc = checksum([*self.prompt_ids, *self.token_ids], number)
        self.turns.append(SampledTurn(number, len(token_ids), crc))

    def header(self, bears_loss: bool) -> Context:
        return Context(
            rooted=self.rooted,
            sampled=self.sampled,
            versions=self.versions,
            loss_mask=[(int(bears_loss), len(self.logprobs))],
            turns=self.turns,
        )


class Episodes:
    """Draws episodes. `versions`: of the weights, from low to high."""

    def __init__(self, seed: int, versions: tuple[int, int] = (0, 0)) -> None:
        self.rng = np.random.default_rng(seed)
        self._versions = versions

    def tokens(self, low: int, high: int) -> list[int]:
        return self.rng.integers(0, VOCAB_SIZE, self.rng.integers(low, high + 1)).tolist()

    def take_turns(self, context: MadeContext, turns: int, numbers: Iterator[int]) -> MadeContext:
        for turn in range(turns):
            context.observe(self.tokens(0, 4) if turn or context.token_ids else [])
            token_ids = self.tokens(1, 6)
            first = int(self.rng.integers(1, len(token_ids) + 1))
            low, high = sorted(self.rng.integers(self._versions[0], self._versions[1] + 1, 2).tolist())
            versions = [(low, first), (high, len(token_ids) - first)]
            logprobs = self.rng.normal(-3, 0.5, len(token_ids)).clip(max=0).tolist()
            context.sample(next(numbers), token_ids, logprobs, [run for run in versions if run[1]])
        return context

    def completion(self, prompt_ids: list[int], turns: int, forks: int, elsewhere: bool) -> list[MadeContext]:
        """A context with so many turns; others that fork from one before; one that begins with a prompt of its own."""
        numbers = count()
        contexts = [self.take_turns(MadeContext(prompt_ids), turns, numbers)]
        for _ in range(forks):
            earlier = contexts[self.rng.integers(len(contexts))]
            fork = MadeContext(earlier.prompt_ids, earlier.rooted)
            shared = int(self.rng.integers(0, len(earlier.token_ids) + 1))
            fork.observe(earlier.token_ids[:shared] + self.tokens(1, 3))
            contexts.append(self.take_turns(fork, int(self.rng.integers(1, 3)), numbers))
        if elsewhere:
            alone = MadeContext([], rooted=False)
            alone.observe(self.tokens(1, 7))
            contexts.append(self.take_turns(alone, 1, numbers))
        return contexts

    def group(
        self,
        prompt_id: int = 0,
        *,
        group_size: int = 3,
        prompt_ids: list[int] | None = None,
        change: Callable[[list[list[MadeContext]]], object] = lambda episodes: None,
        **identity: int,
    ) -> tuple[Group, Payload]:
        """`change` may harm the episodes before the group is made of them."""
        prompt_ids = prompt_ids or self.tokens(1, 6)
        shapes = self.rng.integers(0, [4, 3, 2], (group_size, 3)).tolist()
        episodes = [self.completion(prompt_ids, 1 + turns, forks, bool(other)) for turns, forks, other in shapes]
        change(episodes)
        completions = [
            Completion(
                contexts=[context.header(bears_loss=self.rng.random() < 0.8 or not number) for context in contexts],
                finish_reason="stop",
                reward=float(self.rng.normal()),
                metrics={"acc": float(number % 2)},
            )
            for number, contexts in enumerate(episodes)
        ]
        group = Group(
            **{"prompt_id": prompt_id, "lease_id": prompt_id, "branch": 0, "attempt": 1, "worker": 0} | identity,
            num_prompt_tokens=len(prompt_ids),
            completions=completions,
            generate_s=0.1,
        )
        return group, payload_of(prompt_ids, [context for contexts in episodes for context in contexts])


def narrowed(group: Group, payload: Payload, seed: int) -> Payload:
    """As if top-p had left some tokens to draw each one from, and for some the whole vocabulary."""
    rng, left = np.random.default_rng(seed), []
    contexts = list(payload.of_contexts(group))
    for token in np.concatenate([tokens.own_ids[tokens.is_sampled] for tokens in contexts]).tolist():
        others = rng.choice(VOCAB_SIZE, rng.integers(0, 5), replace=False)
        left.append(np.union1d(others, [token]) if rng.random() < 0.8 else np.empty(0, np.int32))
    return replace(payload, support=Support.of_draws(left))


def payload_of(prompt_ids: list[int], contexts: list[MadeContext]) -> Payload:
    return Payload(
        np.array(prompt_ids, np.int32),
        np.array([token for context in contexts for token in context.token_ids], np.int32),
        np.array([logprob for context in contexts for logprob in context.logprobs], np.float32),
    )
