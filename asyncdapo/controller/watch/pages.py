"""Pages of the ledger: the groups of a step, a group, a completion token by token.

In: a run directory, and what is asked for. Out: plain values for JSON. Each page reads its own rows by an index and its
own record of the payloads, so the size of the ledger doesn't matter. Tokens are there as long as their payload is
kept, and those of a few groups of each batch for good (`metrics.keep_samples`).
Does not own: how it is shown (page.js).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from asyncdapo.messages import Group
from asyncdapo.replay.ledger.kept import learned_logprobs, places_of, read_kept, step_of
from asyncdapo.replay.ledger.ledger import is_begun, open_ledger
from asyncdapo.transport.payload import ContextTokens, Payload, expand

GROUPS = """
SELECT group_id, prompt_id, worker, min_version, max_version, state, completions, tokens, truncated, reward_mean,
    acc_mean, generate_s, segment IS NOT NULL AS kept
FROM groups WHERE step = ? ORDER BY prompt_id
"""
MAX_IN_PIECE = 8
"""Tokens that may have to stand together to be whole characters."""
PART = "\N{REPLACEMENT CHARACTER}"


class Speller(Protocol):
    """A tokenizer, as far as it is needed here."""

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens written out."""
        ...


def groups_of(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The groups in the batch of a step, by prompt. Raises BadRecord for a damaged file."""
    if not is_begun(run_dir):
        return []
    with closing(open_ledger(run_dir)) as ledger:
        rows = [dict(row) for row in ledger.execute(GROUPS, (step,))]
    samples = places_of(run_dir, step)
    return [row | {"kept": bool(row["kept"] or row["group_id"] in samples)} for row in rows]


def group_page(run_dir: Path, group_id: int, tokenizer: Speller) -> dict[str, Any]:
    """Its prompt, and what is known of each completion. Raises LookupError or BadRecord if it can't be read."""
    group, payload = read_kept(run_dir, group_id)
    return {
        "prompt_id": group.prompt_id,
        "prompt": tokenizer.spell(payload.prompt_ids.tolist()),
        "completions": [
            {
                "reward": completion.reward,
                "metrics": completion.metrics,
                "finish_reason": completion.finish_reason,
                "tokens": completion.num_sampled_tokens,
                "turns": completion.num_turns,
            }
            for completion in group.completions
        ],
    }


def completion_page(run_dir: Path, group_id: int, sample: int, tokenizer: Speller) -> list[dict[str, Any]]:
    """The pieces of a completion in order: mostly a token each, several where only together they are whole characters.
    Of one that was observed, log-prob and version are None. So is the ratio of the learner's policy to the engine's
    where the learner didn't record it. Raises LookupError or BadRecord if it can't be read."""
    group, payload = read_kept(run_dir, group_id)
    if not 0 <= sample < len(group.completions):
        raise LookupError(f"group {group_id} has completions 0 to {len(group.completions) - 1}, not {sample}")
    learned, contexts = learned_logprobs(run_dir, step_of(run_dir, group_id)), _contexts(group, payload, sample)
    of_contexts = ((context, learned.get(f"{group_id}.{sample}.{context.number}")) for context in contexts)
    return [piece for context, logprobs in of_contexts for piece in _pieces(context, tokenizer, logprobs)]


def _contexts(group: Group, payload: Payload, sample: int) -> Iterator[ContextTokens]:
    return (context for context in payload.of_contexts(group) if context.index == sample)


def _pieces(context: ContextTokens, tokenizer: Speller, learned: np.ndarray | None) -> Iterator[dict[str, Any]]:
    """`learned`: log-probs of its response under the weights that trained on it, if they are known."""
    sampled = context.is_sampled
    logprobs, versions = context.spread(context.logprobs_S), context.spread(expand(context.header.versions))
    ratios = np.full(len(sampled), np.nan)
    if learned is not None:
        ratios[context.response] = np.exp(learned - logprobs[context.response])
    for begin, end, text in spelled(context.own_ids.tolist(), tokenizer):
        whose = bool(sampled[begin])
        yield {
            "text": text,
            "logprob": float(np.sum(logprobs[begin:end])) if whose else None,
            "version": int(versions[begin]) if whose else None,
            "ratio": ratio if math.isfinite(ratio := float(np.prod(ratios[begin:end]))) else None,
        }


def spelled(token_ids: Sequence[int], tokenizer: Speller) -> Iterator[tuple[int, int, str]]:
    """Begin, end and text of each piece. A token is spelled behind the one before it, since many tokenizers write the
    first token of a text in another way."""
    begin = 0
    while begin < len(token_ids):
        before = list(token_ids[max(0, begin - 1) : begin])
        known = len(tokenizer.spell(before))
        for end in range(begin + 1, min(begin + MAX_IN_PIECE, len(token_ids)) + 1):
            text = tokenizer.spell([*before, *token_ids[begin:end]])[known:]
            if not text.endswith(PART):
                break
        yield begin, end, text
        begin = end
