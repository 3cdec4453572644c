"""Reads samples of a trained batch from the ledger, while its payloads are kept.

In: a run's directory and a step. Out: `Sample`s, two of each of the first groups. Does not own: when payloads are freed
(`replay/ledger`): until a checkpoint covers the step, they are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from asyncdapo.messages import Group
from asyncdapo.metrics.samples import Sample
from asyncdapo.model.tokenizer import TextTokenizer
from asyncdapo.replay.ledger.ledger import open_ledger, read_group
from asyncdapo.transport.payload import ContextTokens, Payload

NUM_GROUPS = 4
"""Of a batch, in the order of their prompts."""


def read_samples(run_dir: Path, step: int, tokenizer: TextTokenizer) -> list[Sample]:
    """Of each of the first groups in the batch of `step`, the completions with the lowest and the highest reward.
    Raises LookupError if payloads are freed, BadRecord for a damaged file."""
    with closing(open_ledger(run_dir)) as ledger:
        query = "SELECT group_id FROM groups WHERE step = ? ORDER BY prompt_id LIMIT ?"
        group_ids = [group_id for (group_id,) in ledger.execute(query, (step, NUM_GROUPS))]
    samples = []
    for group_id in group_ids:
        group, payload = read_group(run_dir, group_id)
        rewards = [completion.reward for completion in group.completions]
        chosen = {rewards.index(min(rewards)), rewards.index(max(rewards))}
        samples += [_sample(step, group, payload, index, tokenizer) for index in sorted(chosen)]
    return samples


def _sample(step: int, group: Group, payload: Payload, index: int, tokenizer: TextTokenizer) -> Sample:
    completion = group.completions[index]
    contexts = [context for context in payload.of_contexts(group) if context.index == index]
    versions = [version for context in completion.contexts for version, _ in context.versions]
    return Sample(
        step=step,
        prompt_id=group.prompt_id,
        prompt=tokenizer.spell(payload.prompt_ids.tolist()),
        parts=[part for context in contexts for part in _parts(context, tokenizer)],
        reward=completion.reward,
        acc=completion.metrics["acc"],
        turns=completion.num_turns,
        tokens=completion.num_sampled_tokens,
        finish_reason=completion.finish_reason,
        versions=(min(versions), max(versions)),
    )


def _parts(context: ContextTokens, tokenizer: TextTokenizer) -> Iterator[tuple[int, str]]:
    begin = 0
    for sampled, count in context.header.sampled:
        yield sampled, tokenizer.spell(context.own_ids[begin : begin + count].tolist())
        begin += count
