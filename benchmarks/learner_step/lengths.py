"""Lengths of the sequences that a bench trains on: of the quickstart's task, mixed, or all the same. Seeded.

    quickstart    prompts of the task `chain`, and their solutions one step a line, in tokens of the shipped model
    mixed[:MEAN]  log-normal responses, a few several times the mean; MEAN tokens a sequence on average (1024)
    fixed:N       every sequence has N tokens, a quarter of them its prompt

Out: for each group its prompt's length and those of its responses. No torch here. Does not own: the tokens.

Shapes: G responses of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asyncdapo.errors import ConfigError
from asyncdapo.prompts.tasks.chain import Chain, draw_chain

KEY = "--lengths"
MEAN_TOKENS = 1024
ODD_SHARE = 1 / 64
"""Of 128 responses that the quickstart's first model sampled, 127 had its solution's length and one had two lines less;
as many here are a line or two off."""
LINE_TOKENS, ANSWER_TOKENS = 6, 3
"""`6+4=0` and a newline; `Answer: `, a digit and the end."""
PROMPT_TOKENS = 5
"""The beginning, `Q: `, the first digit, and what follows the last: one token a phrase, so ` mod 10` is one."""
SPREAD = 0.8
"""σ of the logarithm of mixed responses."""


@dataclass(frozen=True)
class GroupLengths:
    """Tokens of one group's sequences."""

    num_prompt: int
    num_responses_G: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens, the prompt counted for each response."""
        return sum(self.sequences)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(self.num_prompt + num_tokens for num_tokens in self.num_responses_G)


def draw_lengths(name: str, num_groups: int, group_size: int, seed: int) -> list[GroupLengths]:
    """The groups of one batch. Raises ConfigError for a name that isn't known."""
    kind, _, number = name.partition(":")
    if kind == "quickstart" and not number:
        return _quickstart(num_groups, group_size, seed)
    if kind == "mixed":
        return _mixed(num_groups, group_size, seed, _number(name, number or str(MEAN_TOKENS), least=64))
    if kind == "fixed":
        num_tokens = _number(name, number, least=4)
        return [GroupLengths(num_tokens // 4, (num_tokens - num_tokens // 4,) * group_size)] * num_groups
    raise ConfigError(KEY, "is unknown", name, "use quickstart, mixed, mixed:MEAN or fixed:N")


def prompt_tokens(chain: Chain) -> int:
    """Of its prompt, as the shipped model's tokenizer counts."""
    return PROMPT_TOKENS - 1 + 2 * len(chain.operators)


def solution_tokens(chain: Chain) -> int:
    """Of its solution, one step a line, then the answer."""
    return LINE_TOKENS * len(chain.operators) + ANSWER_TOKENS


def _quickstart(num_groups: int, group_size: int, seed: int) -> list[GroupLengths]:
    rng = np.random.default_rng(seed)
    groups = []
    for row in range(num_groups):
        chain = draw_chain(seed, row, held_out=False)
        off_G = rng.choice([-2, -1, 1, 2], group_size) * (rng.random(group_size) < ODD_SHARE) * LINE_TOKENS
        responses_G = np.maximum(solution_tokens(chain) + off_G, ANSWER_TOKENS)
        groups.append(GroupLengths(prompt_tokens(chain), tuple(responses_G.tolist())))
    return groups


def _mixed(num_groups: int, group_size: int, seed: int, mean_tokens: int) -> list[GroupLengths]:
    rng = np.random.default_rng(seed)
    prompts_N = rng.integers(mean_tokens // 16, mean_tokens // 4, num_groups)
    responses_NG = rng.lognormal(0.0, SPREAD, (num_groups, group_size))
    room = num_groups * group_size * mean_tokens - int(prompts_N.sum()) * group_size
    responses_NG = np.maximum(1, responses_NG / responses_NG.sum() * room).astype(int)
    return [
        GroupLengths(num_prompt, tuple(responses_G))
        for num_prompt, responses_G in zip(prompts_N.tolist(), responses_NG.tolist(), strict=True)
    ]


def _number(name: str, number: str, *, least: int) -> int:
    if not number.isdecimal() or int(number) < least:
        raise ConfigError(KEY, f"needs a whole number of at least {least} behind the colon", name)
    return int(number)
