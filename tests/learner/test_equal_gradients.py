"""The gradient of a train step is the same for every micro-batch size and mesh of ranks, whatever the loss.

Ranks are real processes with a Gloo group, replicas × shards. A case trains one step of two epochs with two updates
each, on groups of unequal lengths and numbers of copies; under every aggregation with all that could tell parts apart
(masks by the policy, a KL penalty, an entropy bonus), then under other variants. Compared are the clipped gradients of
every update and the weights at the end, in float64.
"""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from asyncdapo.learner.attention.attention import NAME
from asyncdapo.learner.config import AGGREGATIONS, LossConfig
from asyncdapo.learner.model import sharding
from asyncdapo.learner.step.ranks import ALONE, Ranks
from asyncdapo.shares import Batch, Dealer, share_of
from asyncdapo.transport.payload import Payload
from tests.learner.ranks import in_processes, with_shards
from tests.learner.tiny import (
    CUT,
    MEASURED,
    SHAPE,
    clipped_gradients,
    make_batch,
    make_exact_learner,
    make_learner,
    needs_compiler,
    save_tiny_llama,
    with_equal_rewards,
)
from tests.learner.tiny import train as train_step

NUM_UPDATES = 2
LONGEST = 23
"""Tokens of the longest prompt and response that `make_batch` can make."""
NUM_ROWS = 24

OUTLIERS = {"outlier_band": (1e-4, 1e4)}
EVERYTHING = {"anchor": "proximal", "kl_coef": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0, **OUTLIERS}
LOSSES = {
    **{agg: LossConfig(agg=agg, **EVERYTHING) for agg in AGGREGATIONS},
    "default": LossConfig(),
    "gspo": LossConfig(variant="gspo", clip_low=0.1, clip_high=0.2, agg="seq-mean-token-mean", **OUTLIERS),
    "cispo": LossConfig(variant="cispo", anchor="proximal", outlier_scope="sequence", **OUTLIERS),
    "icepop": LossConfig(anchor="proximal", correction_mode="mask", correction_band=(0.5, 2.0)),
    "sequence": LossConfig(anchor="proximal", correction="sequence", **OUTLIERS),
    "geometric": LossConfig(anchor="proximal", correction="geometric", correction_mode="mask"),
    "m2po": LossConfig(variant="m2po", m2po_threshold=0.1, **OUTLIERS),
    "estr": LossConfig(variant="estr", estr_threshold=0.3, advantage="reinforce_pp"),
    "uncorrected": LossConfig(anchor="proximal", correction="none", advantage="rloo", kl_coef=0.1, kl_estimator="k2"),
}

Result = tuple[list[torch.Tensor], torch.Tensor, dict[str, float]]
"""Clipped gradient of each update, weights at the end, metrics."""
Case = tuple[LossConfig, Batch, Payload, int]
"""Loss, batch, payload of the whole batch, tokens in a micro-batch."""


def a_batch(num_groups: int = 8) -> tuple[Batch, Payload]:
    batch, payload = make_batch(num_groups=num_groups, seed=11)
    return msgspec.structs.replace(batch, copies=[index % 3 for index in range(num_groups)]), payload


def masked_at_rank_1(batch: Batch, payload: Payload) -> Payload:
    """With two ranks, every token of rank 1 lies outside the outlier band, and far from every trust region."""
    at_rank_1 = [rank == 1 for rank in dealt_to_two(batch).deal.ranks]
    masked_R = np.repeat(at_rank_1, lengths_of(batch))
    return Payload(payload.prompt_ids, payload.token_ids, payload.logprobs - 30 * masked_R.astype(np.float32))


def constant_at_rank_1(batch: Batch) -> Batch:
    """With two ranks, rank 1 has nothing to compute: all groups of which it has a part have equal rewards."""
    constant = {piece.place for piece in share_of(dealt_to_two(batch), 1)}
    groups = [with_equal_rewards(group) if index in constant else group for index, group in enumerate(batch.groups)]
    return msgspec.structs.replace(batch, groups=groups)


def dealt_to_two(batch: Batch) -> Batch:
    return msgspec.structs.replace(batch, deal=Dealer(2, NUM_UPDATES).deal(batch.groups))


def lengths_of(batch: Batch) -> list[int]:
    return [completion.num_tokens for group in batch.groups for completion in group.completions]


def train(path: str, case: Case, ranks: Ranks, **config: object) -> Result:
    loss, batch, payload, max_tokens = case
    sizes = {"tokens_per_microbatch": max_tokens, "updates_per_step": NUM_UPDATES, "epochs": 2}
    learner = make_exact_learner(path, loss=loss, ranks=ranks, **sizes, **config)
    gradients = clipped_gradients(learner)
    metrics = train_step(learner, batch, payload)
    return gradients, torch.cat([weight.flatten() for weight in learner.weights().values()]).clone(), metrics


def train_each(ranks: Ranks, meshes: list[int], cases: list[tuple[str, Case]], **config: object) -> list[list[Result]]:
    """Of each mesh, which is a number of shards. Every block is gathered on its own."""
    sharding.GATHERED_BYTES = 0
    return [
        [train(path, case, of_mesh, **config) for path, case in cases]
        for of_mesh in (with_shards(ranks, num_shards) for num_shards in meshes)
    ]


def train_and_drift(ranks: Ranks, path: str) -> None:
    learner = make_learner(path, ranks=ranks, updates_per_step=NUM_UPDATES, checkpoint_every=2)
    for step in (1, 2):
        with torch.no_grad():
            next(iter(learner.weights().values()))[0, 0] += 1e-3 * ranks.rank * (step - 1)
        batch, payload = make_batch(step, num_groups=4)
        train_step(learner, batch, payload)
        learner.check_ranks()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_paths(tmp_path_factory) -> list[str]:
    """Untied Llama, Qwen2.5 with its biases and tied embeddings, and Qwen3 with its norms of queries and keys."""
    shape = {**SHAPE, "attn_implementation": NAME}
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16)),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in models]


def assert_equal(got: Result, expected: Result) -> None:
    assert len(got[0]) == len(expected[0])
    assert any(reference.norm() > 0 for reference in expected[0])
    for gradient, reference in zip(got[0], expected[0], strict=True):
        assert torch.isfinite(gradient).all()
        assert (gradient - reference).norm() <= 1e-6 * reference.norm()
    assert torch.isfinite(got[1]).all()
    assert (got[1] - expected[1]).norm() <= 1e-6 * expected[1].norm()
    for name in expected[2].keys() - MEASURED - CUT:
        assert got[2][name] == pytest.approx(expected[2][name], rel=1e-5, abs=1e-9), name


ONLY_IN_THE_SOAK = ("token-sum", "seq-mean-token-sum", "icepop", "sequence", "geometric", "uncorrected")


@pytest.mark.parametrize(
    "loss", [pytest.param(loss, marks=pytest.mark.soak) if loss in ONLY_IN_THE_SOAK else loss for loss in LOSSES]
)
def test_every_micro_batch_size_gives_the_same_gradient(path, loss):
    batch, payload = a_batch()
    whole = train(path, (LOSSES[loss], batch, payload, LONGEST * NUM_ROWS), ALONE)
    for num_rows in (1, 7):
        assert_equal(train(path, (LOSSES[loss], batch, payload, LONGEST * num_rows), ALONE), whole)


def assert_every_mesh_is_exact(
    num_ranks: int, meshes: list[int], cases: list[tuple[str, Case]], **config: object
) -> None:
    """`config`: of the learners on the meshes, not of the one alone that they are compared with."""
    results = in_processes(num_ranks, partial(train_each, **config), meshes, cases)
    assert not [result for result in results if isinstance(result, Exception)], results
    for number, (path, case) in enumerate(cases):
        expected = train(path, case, ALONE)
        for of_mesh in range(len(meshes)):
            for of_rank in results:
                assert_equal(of_rank[of_mesh][number], expected)
                assert torch.equal(of_rank[of_mesh][number][1], results[0][of_mesh][number][1]), "ranks differ"


def hard_cases(path: str) -> list[tuple[str, Case]]:
    """Every token of a rank masked, fewer groups than ranks have updates, a rank with nothing to compute."""
    batch, payload = a_batch()
    everything, default = LOSSES["token-mean"], LOSSES["default"]
    return [
        (path, (everything, batch, masked_at_rank_1(batch, payload), 4 * LONGEST)),
        (path, (everything, *a_batch(num_groups=3), 4 * LONGEST)),
        (path, (default, constant_at_rank_1(batch), payload, 4 * LONGEST)),
    ]


def test_two_ranks_give_the_same_gradient_as_replicas_and_as_shards(path):
    batch, payload = a_batch()
    of_losses = [(path, (LOSSES[loss], batch, payload, 4 * LONGEST)) for loss in ("prompt-mean", "m2po")]
    assert_every_mesh_is_exact(2, [1, 2], of_losses + hard_cases(path)[1:])


@pytest.mark.soak  # four processes and every model; a default test has two
def test_two_replicas_of_two_shards_give_the_same_gradient_of_every_model(path, other_paths):
    batch, payload = a_batch()
    of_models = [(other, (LOSSES["token-mean"], batch, payload, 6 * LONGEST)) for other in other_paths]
    assert_every_mesh_is_exact(4, [2], of_models + hard_cases(path)[:1])


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_ranks", "meshes"), [(2, [1, 2]), (4, [1, 2, 4])])
def test_every_loss_has_the_same_gradient_on_every_mesh(path, other_paths, num_ranks, meshes):
    batch, payload = a_batch()
    of_losses = [
        (of_model, (loss, batch, payload, num_rows * LONGEST))
        for of_model in (path, *other_paths)
        for loss in LOSSES.values()
        for num_rows in (1, 4)
    ]
    assert_every_mesh_is_exact(num_ranks, meshes, of_losses + hard_cases(path))


@needs_compiler
@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_have_the_same_gradient_on_every_mesh(path, other_paths, checkpointing):
    batch, payload = a_batch()
    of_models = [(of_model, (LOSSES["token-mean"], batch, payload, 4 * LONGEST)) for of_model in (path, *other_paths)]
    assert_every_mesh_is_exact(2, [1, 2], of_models, compile=True, activation_checkpointing=checkpointing)


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if loss.outlier_band])
def test_a_step_whose_tokens_are_all_masked_changes_nothing(path, loss):
    batch, payload = a_batch()
    far = Payload(payload.prompt_ids, payload.token_ids, payload.logprobs - 30)
    gradients, weights, metrics = train(path, (LOSSES[loss], batch, far, 64), ALONE)
    assert gradients == []
    initial = torch.cat([weight.flatten() for weight in make_learner(path).weights().values()])
    assert torch.equal(weights.float(), initial)
    assert metrics["learner/masked_ratio"] == 1.0
    assert metrics["learner/bad_updates"] == 0


def test_ranks_whose_weights_drift_apart_end_the_run_at_the_next_checkpoint(path):
    said = [str(error) for error in in_processes(2, train_and_drift, path)]
    assert said == ["the learner's ranks [1] have other weights after step 2 than rank 0"] * 2
