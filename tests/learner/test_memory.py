"""Memory of a whole gradient step at answers of 8,192 tokens: the vocabulary is in weights and gradients only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from asyncdapo.learner.batches.samples import Row
from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.model import logprobs
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.step import gradient
from asyncdapo.learner.step.gradient import accumulate_gradient
from asyncdapo.learner.step.ranks import ALONE
from tests.learner.tiny import make_row, tiny_llama
from tests.model.test_shape import LivingBytes

NUM_TOKENS = 8_192
HIDDEN = 8
SMALL, LARGE = 1 << 10, 1 << 15
CHUNK = 1 << 20
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1}


def peak_bytes(rows: list[Row], vocab_size: int) -> int:
    """Of one gradient step, besides weights and a gradient for each that are there before."""
    policy = Policy(tiny_llama(vocab_size=vocab_size, **SIZES, **HEADS), 0.7)
    for parameter in policy.parameters():
        parameter.grad = parameter.detach().clone()
    with LivingBytes(policy) as made:
        accumulate_gradient(policy, rows, LossConfig(entropy_coef=0.01), max_tokens=1, ranks=ALONE)
    return made.peak


@pytest.fixture(autouse=True)
def whole_weights(monkeypatch) -> None:
    """What sharding adds is `test_held_bytes`'s."""
    monkeypatch.setattr(gradient, "before_backward", lambda *_, **__: None)


def rows_of(num_groups: int, num_tokens: int) -> list[Row]:
    """One token in four bears loss, which is enough to see and quicker."""
    places = np.arange(num_tokens, dtype=np.int32)
    columns = {"token_ids": places % SMALL, "loss_mask": places % 4 == 0}
    return [replace(make_row(1, num_tokens, prompt=group), **columns) for group in range(num_groups)]


@pytest.mark.timeout(300)
def test_memory_of_a_step_is_flat_in_the_vocabulary(monkeypatch) -> None:
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", CHUNK)
    small, large = (peak_bytes(rows_of(1, NUM_TOKENS), size) for size in (SMALL, LARGE))
    gradient = 4 * HIDDEN * (LARGE - SMALL)  # of the output layer
    assert large - small < 1.1 * gradient
    assert large < NUM_TOKENS * LARGE / 10


def test_memory_of_a_step_is_that_of_one_micro_batch() -> None:
    one, three = (peak_bytes(rows_of(num, 500), SMALL) for num in (1, 3))
    assert three < 1.05 * one
