"""Episodes of several turns: the learner's gradient is that of plain Hugging Face passes, written down once more.

The reference knows completions and contexts as they were made, and no rows: it takes one advantage a completion, counts
loss tokens by completion, and sums over the sampled tokens of every context, each with all tokens before it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor

from asyncdapo.algorithm.advantages import batch_advantages
from asyncdapo.errors import StalenessError
from asyncdapo.learner.batches.samples import Row, columns, rows_by_update
from asyncdapo.learner.config import AGGREGATIONS, LossConfig
from asyncdapo.learner.model.packing import pack
from asyncdapo.learner.step import learner as learner_module
from asyncdapo.messages import Group
from asyncdapo.shares import Batch
from asyncdapo.transport.payload import Payload
from tests.episodes import Episodes
from tests.learner.tiny import (
    batch_of,
    clipped_gradients,
    make_exact_learner,
    make_learner,
    payloads_of,
    save_tiny_llama,
    tiny_llama,
    train,
)
from tests.payloads import joined, split

KL_COEF = 0.1
MAX_RESPONSE_LENGTH = 16
"""As `make_learner` has it."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("reference"), seed=1)


def a_batch(step: int = 1, seed: int = 5, num_groups: int = 3) -> tuple[Batch, Payload]:
    """Groups of two to four turns with observed tokens, forks and contexts that begin elsewhere."""
    episodes = Episodes(seed, versions=(step - 1, step - 1))
    made = [episodes.group(prompt_id) for prompt_id in range(num_groups)]
    contexts = [context for group, _ in made for one in group.completions for context in one.contexts]
    assert min(map(len, (one.contexts for group, _ in made for one in group.completions))) == 1
    assert len(contexts) > 1.5 * sum(len(group.completions) for group, _ in made)
    assert {context.rooted for context in contexts} == {True, False}
    return batch_of([group for group, _ in made], step), joined([payload for _, payload in made])


def rows_of(batch: Batch, payload: Payload, rank: int = 0) -> list[Row]:
    """Of the whole payload of a batch."""
    [rows] = rows_by_update(batch, payloads_of(batch, payload, rank), rank, batch_advantages("grpo"))
    return rows


def plain_logprobs(model, tokens: list[int]) -> Tensor:
    """Of every token but the first, given those before it."""
    logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


def plain_losses(model, reference, group: Group, payload: Payload, kl_coef: float) -> tuple[list[Tensor], list[int]]:
    """Sum of the losses of each completion's tokens, and their number."""
    rewards = np.array([completion.reward for completion in group.completions])
    advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    sums, counts, at, sampled_at = [], [], 0, 0
    for completion, advantage in zip(group.completions, advantages.tolist(), strict=True):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for context in completion.contexts:
            prompt = payload.prompt_ids.tolist() if context.rooted else []
            tokens = prompt + payload.token_ids[at : (at := at + context.num_tokens)].tolist()
            logps, of_reference = plain_logprobs(model, tokens), plain_logprobs(reference, tokens).detach()
            bears_loss = [value for value, num in context.loss_mask for _ in range(num)]
            place = len(prompt)
            for is_sampled, num in context.sampled:
                for _ in range(num):
                    if is_sampled:
                        if bears_loss.pop(0):
                            ratio = (logps[place - 1] - payload.logprobs[sampled_at].item()).exp()
                            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
                            d = logps[place - 1] - of_reference[place - 1]
                            total, count = total + kl_coef * ((-d).exp() - 1 + d), count + 1
                        sampled_at += 1
                    place += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


def averaged(agg: str, groups: list[tuple[list[Tensor], list[int]]]) -> Tensor:
    completions = [pair for sums, counts in groups for pair in zip(sums, counts, strict=True) if pair[1]]
    whole = sum(total for total, _ in completions)
    return {
        "token-mean": lambda: whole / sum(count for _, count in completions),
        "token-sum": lambda: whole,
        "seq-mean-token-sum": lambda: whole / len(completions),
        "seq-mean-token-mean": lambda: sum(total / count for total, count in completions) / len(completions),
        "seq-mean-token-sum-norm": lambda: whole / len(completions) / MAX_RESPONSE_LENGTH,
        "prompt-mean": lambda: sum(sum(sums) / sum(counts) for sums, counts in groups) / len(groups),
    }[agg]()


def plain_gradient(path: str, reference_path: str, agg: str, kl_coef: float) -> Tensor:
    model = tiny_llama(attn_implementation="eager").double()
    reference = tiny_llama(seed=1, attn_implementation="eager").double()
    batch, payload = a_batch()
    parts = zip(batch.groups, split(payload, batch.groups), strict=True)
    loss = averaged(agg, [plain_losses(model, reference, *part, kl_coef) for part in parts])
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def own_gradient(path: str, reference_path: str, agg: str, kl_coef: float, max_tokens: int = 40) -> Tensor:
    loss = LossConfig(agg=agg, kl_coef=kl_coef, kl_estimator="k3", dual_clip=None)
    learner = make_exact_learner(
        path, loss=loss, reference=reference_path, grad_clip=1e9, tokens_per_microbatch=max_tokens
    )
    gradients = clipped_gradients(learner)
    train(learner, *a_batch())
    [gradient] = gradients
    return gradient


def difference(path: str, reference_path: str, agg: str, kl_coef: float = 0.0, **own) -> float:
    """Relative, of the learner's gradient from the plain one."""
    expected = plain_gradient(path, reference_path, agg, kl_coef)
    assert expected.norm() > 0
    return float((own_gradient(path, reference_path, agg, kl_coef, **own) - expected).norm() / expected.norm())


@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_the_gradient_is_that_of_plain_masked_passes(path, reference_path, agg, kl_coef) -> None:
    assert difference(path, reference_path, agg, kl_coef) <= 1e-6


def test_the_gradient_is_the_same_for_every_micro_batch_size(path, reference_path) -> None:
    whole = own_gradient(path, reference_path, "seq-mean-token-mean", KL_COEF, max_tokens=10_000)
    rows = own_gradient(path, reference_path, "seq-mean-token-mean", KL_COEF, max_tokens=1)
    assert (whole - rows).norm() <= 1e-6 * whole.norm()


def observed_bear_loss(row: Row, _: int) -> Row:
    return replace(row, loss_mask=np.ones_like(row.loss_mask))


def shared_bear_loss_twice(row: Row, _: int) -> Row:
    """What a fork shares with the context before it, as if it had been sampled again."""
    shared = np.arange(len(row.loss_mask)) < (2 if row.context else 0)
    return replace(row, loss_mask=row.loss_mask | shared)


def advantage_by_context(row: Row, num_contexts: int) -> Row:
    return replace(row, advantage=row.advantage / num_contexts)


def without_forks(row: Row, _: int) -> Row:
    return replace(row, loss_mask=row.loss_mask & (row.context == 0))


def labels_shifted_by_one(row: Row, _: int) -> Row:
    return replace(row, loss_mask=np.roll(row.loss_mask, 1))


@pytest.mark.parametrize(
    "fault",
    [observed_bear_loss, shared_bear_loss_twice, advantage_by_context, without_forks, labels_shifted_by_one],
)
def test_a_fault_in_the_rows_shows_in_the_gradient(path, reference_path, monkeypatch, fault) -> None:
    def faulty_rows(*args, **options) -> list[list[Row]]:
        updates = rows_by_update(*args, **options)
        found = [[row.index for row in rows] for rows in updates]
        pairs = zip(updates, found, strict=True)
        return [[fault(row, indices.count(row.index)) for row in rows] for rows, indices in pairs]

    monkeypatch.setattr(learner_module, "rows_by_update", faulty_rows)
    assert difference(path, reference_path, "token-mean") > 1e-3


def test_an_average_over_contexts_instead_of_completions_shows_in_the_gradient(
    path, reference_path, monkeypatch
) -> None:
    def columns_of_contexts(batch: Batch):
        counted = columns(batch)
        contexts = [len(one.contexts) for group in batch.groups for one in group.completions]
        return replace(counted, num_tokens_N=counted.num_tokens_N // torch.tensor(contexts))

    monkeypatch.setattr(learner_module, "columns", columns_of_contexts)
    assert difference(path, reference_path, "seq-mean-token-mean") > 1e-3


def test_a_row_is_a_context_with_the_advantage_of_its_completion() -> None:
    batch, payload = a_batch()
    rows = rows_of(batch, payload)
    places = [
        (index, number)
        for index, one in enumerate(one for group in batch.groups for one in group.completions)
        if one.num_loss_tokens
        for number in range(len(one.contexts))
    ]
    assert [(row.index, row.context) for row in rows] == places
    for index in {row.index for row in rows}:
        assert len({row.advantage for row in rows if row.index == index}) == 1
    counted = columns(batch)
    for index, num_tokens in enumerate(counted.num_tokens_N.tolist()):
        assert num_tokens == sum(row.num_loss_tokens for row in rows if row.index == index)


def test_rows_share_a_prompt_only_if_its_tokens_are_the_same() -> None:
    """A context that isn't rooted has its own."""
    batch, payload = a_batch()
    rows = rows_of(batch, payload)
    for row in rows:
        for other in rows:
            if row.prompt == other.prompt:
                assert row.prompt_ids.tolist() == other.prompt_ids.tolist()
    assert len({row.prompt for row in rows}) > len(batch.groups)
    packed = pack(rows, torch.device("cpu"))
    assert packed.work.num_loss_tokens == sum(row.num_loss_tokens for row in rows)


def test_staleness_is_that_of_the_oldest_token_of_any_context(path) -> None:
    """And not that of the first one, with whose weights the lease was dispatched."""
    batch, payload = a_batch(step=3)
    completion = batch.groups[1].completions[0]
    context = completion.contexts[-1]
    *newer, (version, count) = context.versions
    old = structs.replace(context, versions=[*newer, (version - 1, count)])
    completions = [structs.replace(completion, contexts=[*completion.contexts[:-1], old])]
    stale = structs.replace(batch.groups[1], completions=completions + batch.groups[1].completions[1:])
    assert (batch.groups[1].staleness(3), stale.staleness(3)) == (0, 1)
    learner = make_learner(path)
    for step in (1, 2):
        train(learner, *a_batch(step))
    groups = [batch.groups[0], stale, *batch.groups[2:]]
    with pytest.raises(StalenessError, match="has staleness 1, the bound is 0"):
        train(learner, structs.replace(batch, groups=groups), payload)
    train(learner, batch, payload)


def test_the_rows_of_all_ranks_are_those_of_one_rank() -> None:
    """Every context of a completion is at the same rank."""
    batch, payload = a_batch()
    whole = rows_of(batch, payload)
    dealt = batch_of(batch.groups, num_ranks=2)
    found = {}
    for rank in range(2):
        rows = rows_of(dealt, payload, rank)
        assert rows
        assert not {row.index for row in rows} & {index for index, _ in found}
        found |= {(row.index, row.context): row for row in rows}
    for row in whole:
        other = found.pop((row.index, row.context))
        for name in ("prompt_ids", "token_ids", "rollout_logprobs", "loss_mask"):
            assert np.array_equal(vars(row)[name], vars(other)[name])
    assert not found
