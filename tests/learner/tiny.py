"""A causal LM of a few thousand parameters and random batches for it."""

import os
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from asyncdapo.learner.attention.attention import NAME
from asyncdapo.learner.batches.samples import Row
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.model import model
from asyncdapo.learner.model.compiler import COMPILERS
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.model.sharding import gather, named_shards, shard
from asyncdapo.learner.step.learner import Learner
from asyncdapo.learner.step.ranks import ALONE, Ranks
from asyncdapo.learner.storage.checkpoint import begin_checkpoint, commit_checkpoint, remove_old_checkpoints
from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group
from asyncdapo.model.config import ModelConfig
from asyncdapo.records.record import PAYLOAD_FOLDER
from asyncdapo.replay.ledger.payloads import Segments
from asyncdapo.shares import Batch, Dealer, share_of
from asyncdapo.transport.payload import Payload
from tests.payloads import joined, split

VOCAB_SIZE = 29
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", COMPILERS["cpu"][1][0])), reason="needs a C++ compiler"
)
needs_c_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="needs a C compiler")
MEASURED = {"learner/train_s", "learner/tflops", "learner/mfu", "learner/peak_gib"}
"""Metrics that no two runs of the same step have alike."""
CUT = {"learner/forward_tokens", "learner/shared_ratio"}
"""Metrics that depend on how an update is cut into micro-batches and ranks."""
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(**{**SHAPE, "tie_word_embeddings": True, "attn_implementation": NAME, **changes})
    ).eval()


def save_tiny_llama(directory: Path, **changes) -> str:
    tiny_llama(**changes).save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"made": "for a test"}')
    return str(directory)


def sharded(whole: PreTrainedModel, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> Policy:
    """On a mesh of one; blocks and all else each on its own where `GATHERED_BYTES` is 0."""
    policy = Policy(whole, temperature)
    shard(policy, ALONE.mesh(policy.device), dtype=dtype)
    return policy


def gradient_of(policy: Policy) -> torch.Tensor:
    return torch.cat([gather(shard.grad).flatten() for shard in named_shards(policy).values()])


def make_learner(
    path: str,
    *,
    loss: LossConfig | None = None,
    reference: str | None = None,
    temperature: float = 1.0,
    staleness_bound: int = 0,
    num_steps: int = 4,
    ranks: Ranks = ALONE,
    **config,
) -> Learner:
    return Learner(
        ModelConfig(path=path, reference=reference),
        loss or LossConfig(),
        LearnerConfig(**{"lr": 1e-3, "device": "cpu", "ranks": ranks.num_ranks, "shards": ranks.num_shards, **config}),
        temperature=temperature,
        staleness_bound=staleness_bound,
        max_response_length=16,
        num_steps=num_steps,
        seed=0,
        ranks=ranks,
    )


def make_exact_learner(path: str, **config) -> Learner:
    """Its weights, and what it computes, are float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "WEIGHTS_DTYPE", torch.float64)
        return make_learner(path, **config)


def clipped_gradients(learner: Learner) -> list[torch.Tensor]:
    """Of each update to come, whole; every rank has to ask for it."""
    gradients: list[torch.Tensor] = []
    keep = partial(gradient_of, learner._policy)
    learner._optimizer._adamw.register_step_pre_hook(lambda *_: gradients.append(keep().clone()))
    return gradients


def make_batch(
    step: int = 1, *, seed: int = 0, num_groups: int = 4, group_size: int = 3, version: int | None = None
) -> tuple[Batch, Payload]:
    """Random prompts, responses, rewards and rollout log-probs; sampled with the newest weights unless told."""
    rng = np.random.default_rng(seed)
    version = step - 1 if version is None else version
    groups, payloads = [], []
    for prompt_id in range(num_groups):
        lengths = rng.integers(1, 15, group_size).tolist()
        num_prompt_tokens, num_tokens = int(rng.integers(2, 9)), sum(lengths)
        groups.append(make_group(prompt_id, num_prompt_tokens, lengths, rng.normal(size=group_size).tolist(), version))
        payloads.append(
            Payload(
                prompt_ids=rng.integers(0, VOCAB_SIZE, num_prompt_tokens, dtype=np.int32),
                token_ids=rng.integers(0, VOCAB_SIZE, num_tokens, dtype=np.int32),
                logprobs=rng.normal(-np.log(VOCAB_SIZE), 0.5, num_tokens).astype(np.float32),
            )
        )
    return batch_of(groups, step), joined(payloads)


def batch_of(groups: list[Group], step: int = 1, **dealer) -> Batch:
    """Dealt to one rank and one update unless told."""
    return Batch(step=step, branch=0, max_staleness=0, groups=groups, deal=Dealer(**dealer).deal(groups))


def dealt_to(learner: Learner, batch: Batch) -> Batch:
    """The batch as the replay server would deal it to this learner's ranks and updates."""
    dealer = Dealer(learner.ranks.num_ranks, learner._config.updates_per_step)
    return msgspec.structs.replace(batch, deal=dealer.deal(batch.groups))


def payloads_of(batch: Batch, payload: Payload, rank: int = 0) -> list[Payload]:
    """Of the pieces of this rank's share of the batch whose whole payload is given."""
    parts = split(payload, batch.groups)
    return [parts[one.place].of_completions(batch.groups[one.place], one.indices) for one in share_of(batch, rank)]


def stored(run_dir: Path, batch: Batch, payload: Payload) -> Batch:
    """The batch as the replay server sends it: its tokens are in a segment of the run."""
    with closing(Segments(run_dir / PAYLOAD_FOLDER)) as segments:
        places = [segments.append(*one) for one in zip(batch.groups, split(payload, batch.groups), strict=True)]
        segments.sync()
    return msgspec.structs.replace(batch, places=places)


def make_group(
    prompt_id: int,
    num_prompt_tokens: int,
    lengths: list[int],
    rewards: list[float],
    version: int = 0,
    loss_masks: list[list[tuple[int, int]]] | None = None,
) -> Group:
    loss_masks = loss_masks or [[(1, length)] for length in lengths]
    completions = [
        Completion(
            contexts=[Context.of_turn([(version, length)], loss_mask, NO_CHECKSUM)],
            finish_reason="stop",
            reward=reward,
            metrics={},
        )
        for length, reward, loss_mask in zip(lengths, rewards, loss_masks, strict=True)
    ]
    return Group(
        prompt_id=prompt_id,
        lease_id=prompt_id,
        branch=0,
        attempt=0,
        worker=0,
        num_prompt_tokens=num_prompt_tokens,
        completions=completions,
        generate_s=0.1,
    )


def with_equal_rewards(group: Group) -> Group:
    """No completion of it has an advantage."""
    completions = [msgspec.structs.replace(completion, reward=1.0) for completion in group.completions]
    return msgspec.structs.replace(group, completions=completions)


def train(learner: Learner, batch: Batch, payload: Payload) -> dict[str, float]:
    """One train step on a batch that nobody dealt or prepared before; every rank is given the whole payload."""
    batch = dealt_to(learner, batch)
    return learner.train(learner.prepare(batch, payloads_of(batch, payload, learner.ranks.rank)))


def save(learner: Learner, run_dir: Path, step: int, branch: int = 0) -> Path:
    """Write a checkpoint in one go, as a learner of one rank does it in three commands."""
    begin_checkpoint(Path(run_dir), step)
    path = commit_checkpoint(Path(run_dir), step, branch, learner.copy().write(Path(run_dir), step))
    remove_old_checkpoints(Path(run_dir), learner._config.keep_checkpoints)
    return path


def make_row(num_prompt_tokens: int, num_tokens: int, advantage: float = 1.0, *, prompt: int = 0, **columns) -> Row:
    """Tokens are numbered within prompt and response."""
    return Row(
        index=0,
        prompt=prompt,
        prompt_ids=np.arange(num_prompt_tokens, dtype=np.int32),
        token_ids=np.arange(num_tokens, dtype=np.int32),
        rollout_logprobs=-np.ones(num_tokens, dtype=np.float32),
        advantage=advantage,
        staleness=0,
        **{"loss_mask": np.ones(num_tokens, dtype=bool), **columns},
    )
