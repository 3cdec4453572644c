"""The gradient of a train step is the same for every micro-batch size and number of ranks, whatever the loss.

Ranks are real processes with a Gloo group. Each case trains one step with everything on that could tell parts apart:
two epochs of two updates, unequal lengths, copies, masks by the policy, a KL penalty, an entropy bonus. Compared are
the clipped gradients of every update and the weights at the end, in float64.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import get_args, get_type_hints

import msgspec
import numpy as np
import pytest
import torch

from asyncdapo.errors import RunError
from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.group import GradientGroup, Ranks
from asyncdapo.messages import Batch, Payload
from asyncdapo.shares import deal, share_of
from tests.learner.tiny import make_batch, make_learner, save_tiny_llama

AGGREGATIONS = get_args(get_type_hints(LossConfig)["agg"])
NUM_UPDATES = 2
TIMEOUT_S = 60.0
LONGEST = 23
"""Tokens of the longest prompt and response that `make_batch` can make."""
NUM_ROWS = 24

Result = tuple[list[torch.Tensor], torch.Tensor, dict[str, float]]
"""Clipped gradient of each update, weights at the end, metrics."""


def every_kind_of_part(agg: str) -> LossConfig:
    return LossConfig(
        agg=agg, anchor="proximal", outlier_band=(1e-4, 1e4), kl_coef=0.1, entropy_coef=0.01, dual_clip=3.0
    )


def a_batch(num_groups: int = 8) -> tuple[Batch, Payload]:
    batch, payload = make_batch(num_groups=num_groups, seed=11)
    return msgspec.structs.replace(batch, copies=[index % 3 for index in range(num_groups)]), payload


def masked_at_rank_1(batch: Batch, payload: Payload) -> Payload:
    """With two ranks, every token of rank 1 lies outside the outlier band."""
    masked = {index for by_rank in deal(batch.groups, num_updates=NUM_UPDATES, num_ranks=2) for index in by_rank[1]}
    parts = payload.split(batch.groups)
    far = [part.logprobs - 30 * (index in masked) for index, part in enumerate(parts)]
    return Payload(payload.prompt_ids, payload.token_ids, np.concatenate(far).astype(np.float32))


def of_share(batch: Batch, payload: Payload, ranks: Ranks) -> Payload:
    share = share_of(batch.groups, rank=ranks.rank, num_ranks=ranks.num_ranks, num_updates=NUM_UPDATES)
    parts = payload.split(batch.groups)
    return Payload.join([parts[index] for index in share]) if share else payload_of_nothing()


def payload_of_nothing() -> Payload:
    return Payload(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))


def train(path: str, loss: LossConfig, batch: Batch, payload: Payload, max_tokens: int, ranks: Ranks) -> Result:
    learner = make_learner(
        path, loss=loss, ranks=ranks, tokens_per_microbatch=max_tokens, updates_per_step=NUM_UPDATES, epochs=2
    )
    for model in (learner._model, learner._first_pass.reference):
        if model is not None:
            model.double()
    gradients: list[torch.Tensor] = []
    parameters = list(learner._model.parameters())
    learner._optimizer._adamw.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).clone())
    )
    metrics = learner.train(batch, of_share(batch, payload, ranks))
    return gradients, torch.cat([parameter.detach().flatten() for parameter in parameters]), metrics


Case = tuple[LossConfig, Batch, Payload, int]


def join(ranks: Ranks, addresses) -> None:
    """Make the group; rank 0 tells the others its address."""
    if ranks.rank == 0:
        group = GradientGroup.create_master("127.0.0.1", ranks.num_ranks, "gloo", TIMEOUT_S)
        for _ in range(ranks.num_ranks - 1):
            addresses.put(group.address)
        group.connect()
    else:
        group = GradientGroup.join(addresses.get(), ranks.rank, ranks.num_ranks, "gloo", TIMEOUT_S)
    ranks.join(group)


def serve_rank(path: str, ranks: Ranks, addresses, results, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    join(ranks, addresses)
    found = []
    for loss, batch, payload, max_tokens in cases:
        gradients, weights, metrics = train(path, loss, batch, payload, max_tokens, ranks)
        found.append(([gradient.numpy() for gradient in gradients], weights.numpy(), metrics))
    results.put((ranks.rank, found))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run_processes(path) -> Callable[..., list]:
    """Run a function in a process for each rank. Returns what each has put into the queue of results."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["asyncdapo.learner.learner"])

    def run(serve: Callable[..., None], num_ranks: int, *args: object) -> list:
        addresses, results = processes.Queue(), processes.Queue()
        members = [
            processes.Process(target=serve, args=(path, Ranks(rank, num_ranks), addresses, results, *args))
            for rank in range(num_ranks)
        ]
        for member in members:
            member.start()
        found = dict(results.get(timeout=2 * TIMEOUT_S) for _ in members)
        for member in members:
            member.join()
        return [found[rank] for rank in range(num_ranks)]

    return run


def as_tensors(gradients: list[np.ndarray], weights: np.ndarray, metrics: dict[str, float]) -> Result:
    return [torch.from_numpy(gradient) for gradient in gradients], torch.from_numpy(weights), metrics


def assert_equal(got: Result, expected: Result) -> None:
    assert len(got[0]) == len(expected[0])
    for gradient, reference in zip(got[0], expected[0], strict=True):
        assert torch.isfinite(gradient).all()
        assert reference.norm() > 0
        assert (gradient - reference).norm() <= 1e-6 * reference.norm()
    assert torch.isfinite(got[1]).all()
    assert (got[1] - expected[1]).norm() <= 1e-6 * expected[1].norm()
    for name in expected[2].keys() - {"learner/forward_tokens", "learner/padding_ratio", "learner/train_s"}:
        assert got[2][name] == pytest.approx(expected[2][name], rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_every_micro_batch_size_gives_the_same_gradient(path, agg):
    batch, payload = a_batch()
    loss, alone = every_kind_of_part(agg), Ranks()
    whole = train(path, loss, batch, payload, LONGEST * NUM_ROWS, alone)
    for num_rows in (1, 2, 3, 5, 8, 12, 20):
        assert_equal(train(path, loss, batch, payload, LONGEST * num_rows, alone), whole)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_number_of_ranks_gives_the_same_gradient(path, run_processes, num_ranks):
    batch, payload = a_batch()
    one_rank_masked = masked_at_rank_1(batch, payload)
    few, few_payload = a_batch(num_groups=3)
    cases = [
        (every_kind_of_part(agg), *one, max_tokens)
        for agg in AGGREGATIONS
        for one in ((batch, payload), (batch, one_rank_masked), (few, few_payload))
        for max_tokens in (LONGEST, 4 * LONGEST)
    ]
    results = [[as_tensors(*result) for result in found] for found in run_processes(serve_rank, num_ranks, cases)]
    for number, (loss, one, one_payload, max_tokens) in enumerate(cases):
        expected = train(path, loss, one, one_payload, max_tokens, Ranks())
        for of_rank in results:
            assert_equal(of_rank[number], expected)
            assert torch.equal(of_rank[number][1], results[0][number][1]), "ranks differ"


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_a_step_whose_tokens_are_all_masked_changes_nothing(path, agg):
    batch, payload = a_batch()
    far = Payload(payload.prompt_ids, payload.token_ids, payload.logprobs - 30)
    gradients, weights, metrics = train(path, every_kind_of_part(agg), batch, far, 64, Ranks())
    assert gradients == []
    learner = make_learner(path)
    assert torch.equal(weights.float(), torch.cat([p.detach().flatten() for p in learner._model.parameters()]))
    assert metrics["learner/masked_ratio"] == 1.0
    assert metrics["learner/bad_updates"] == 0


def serve_drifting_rank(path: str, ranks: Ranks, addresses, results) -> None:
    torch.set_num_threads(1)
    join(ranks, addresses)
    learner = make_learner(path, ranks=ranks, updates_per_step=NUM_UPDATES, checkpoint_every=2)
    said = []
    for step in (1, 2):
        with torch.no_grad():
            next(iter(learner.weights().values()))[0, 0] += 1e-3 * ranks.rank * (step - 1)
        batch, payload = make_batch(step, num_groups=4)
        try:
            learner.train(batch, of_share(batch, payload, ranks))
        except RunError as error:
            said.append(str(error))
    results.put((ranks.rank, said))


def test_ranks_whose_weights_drift_apart_end_the_run_at_the_next_checkpoint(path, run_processes):
    said = run_processes(serve_drifting_rank, 2)
    assert said == [["the learner's ranks [1] have other weights after step 2 than rank 0"]] * 2
