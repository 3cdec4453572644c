"""Probes: the learner's own log-probs of tokens that an engine has sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncdapo.errors import RunError
from asyncdapo.learner.step.probe import Pair
from tests.learner.tiny import VOCAB_SIZE, make_batch, make_learner, save_tiny_llama, tiny_llama, train

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def pairs(*lengths: tuple[int, int]) -> list[Pair]:
    """Random prompts and responses of these lengths."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, VOCAB_SIZE, num_prompt).tolist(), rng.integers(0, VOCAB_SIZE, num, dtype=np.int32), None)
        for num_prompt, num in lengths
    ]


@torch.inference_mode()
def plain_logprobs(prompt_ids: list[int], token_ids: np.ndarray) -> np.ndarray:
    """By a forward pass of the sequence alone."""
    ids = torch.tensor([*prompt_ids, *token_ids.tolist()])
    logprobs_TV = (tiny_llama()(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
    positions = torch.arange(len(prompt_ids) - 1, len(ids) - 1)
    return logprobs_TV[positions, ids[positions + 1]].numpy()


@pytest.mark.parametrize("max_tokens", [1, 24, 1000], ids=["one by one", "a few together", "all together"])
def test_log_probs_are_those_of_a_plain_forward_pass_in_the_order_that_was_asked(path, max_tokens):
    asked = pairs((3, 5), (1, 1), (8, 14), (2, 9))
    learner = make_learner(path, temperature=TEMPERATURE, tokens_per_microbatch=max_tokens)
    answers = learner.logprobs(0, asked)
    assert len(answers) == len(asked)
    for answer, pair in zip(answers, asked, strict=True):
        np.testing.assert_allclose(answer, plain_logprobs(*pair[:2]), atol=1e-5)


def test_a_run_with_probes_trains_as_one_without(path):
    with_probes, without = make_learner(path), make_learner(path)
    for step in (1, 2):
        with_probes.logprobs(step - 1, pairs((3, 5), (8, 14)))
        for learner in (with_probes, without):
            train(learner, *make_batch(step))
    assert with_probes.digest() == without.digest()
    assert with_probes.digest() != make_learner(path).digest()


def test_a_version_that_the_learner_does_not_have_is_refused(path):
    learner = make_learner(path)
    train(learner, *make_batch(1))
    with pytest.raises(RunError, match=r"version 0 were asked of a learner that has version 1"):
        learner.logprobs(0, pairs((3, 5)))
