"""Probe: what the policy makes of tokens that an engine has sampled, for a comparison of the two.

In: prompts with their responses. Out: the log-prob of each response token, through the forward pass of training: the
same dtype, the sampling temperature, what the token was drawn from, packed micro-batches. Invariant: weights and random
state stay as they are, so that a run with probes trains as one without. Does not own: who sampled, what a difference
means.

Shapes: B sequences, T tokens (prompt and response), P prompt tokens, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from asyncdapo.learner.batches.samples import Row
from asyncdapo.learner.model.packing import micro_batches, pack
from asyncdapo.learner.model.policy import Policy
from asyncdapo.transport.payload import Support

Pair = tuple[Sequence[int], np.ndarray, Support | None]
"""Prompt ids [P], response ids int32 [R], and what these were drawn from."""


@torch.no_grad()
def response_logprobs(policy: Policy, pairs: Sequence[Pair], max_tokens: int) -> list[np.ndarray]:
    """float32 [R] for each pair, in their order. `max_tokens`: computed tokens in one forward pass. Where weights are
    sharded every rank has to call it, with the same pairs."""
    found: dict[int, np.ndarray] = {}
    for chunk in micro_batches([_row(index, *pair) for index, pair in enumerate(pairs)], max_tokens):
        logp_BT, _ = policy(pack(chunk, policy.device))
        lines = zip(chunk, logp_BT.cpu().numpy(), strict=True)
        found |= {row.index: logp_T[row.response] for row, logp_T in lines}
    return [found[index] for index in range(len(pairs))]


def _row(index: int, prompt_ids: Sequence[int], token_ids: np.ndarray, support: Support | None) -> Row:
    """A response whose tokens all count."""
    return Row(
        index,
        index,
        np.asarray(prompt_ids, np.int32),
        token_ids,
        rollout_logprobs=np.zeros(len(token_ids), np.float32),
        loss_mask=np.ones(len(token_ids), bool),
        advantage=0.0,
        staleness=0,
        support=support,
    )
