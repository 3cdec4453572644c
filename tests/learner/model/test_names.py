"""What the learner sends has the names that the model's files have, or the model is refused."""

import asyncio
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from asyncdapo.errors import ConfigError
from asyncdapo.eval_messages import Sampling
from asyncdapo.learner.model.names import check_names_unloaded
from asyncdapo.learner.step.learner import Learner
from asyncdapo.model.files import ModelFiles
from asyncdapo.rollout.engine import Request, Sample
from tests.learner.tiny import SHAPE, make_batch, make_learner, train
from tests.rollout.torch_engine.models import engine_for

EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES = {
    "mixtral": {"num_local_experts": 2},
    "phimoe": {"num_local_experts": 2, "sliding_window": None},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
}


def save_random(directory, kind, **changes) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **changes}), dtype=torch.float32)
    model.save_pretrained(directory)
    return str(directory)


def save_with_head(directory, head_of) -> str:
    """A tied model whose file holds a tensor for the output layer, too."""
    path = save_random(directory, "qwen3", head_dim=8, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in tensors
    head = {"lm_head.weight": head_of(tensors["model.embed_tokens.weight"])}
    save_file(tensors | head, directory / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_whose_experts_are_joined_when_it_is_loaded_is_refused_before_and_after(tmp_path, kind):
    path = save_random(tmp_path, kind, **MIXTURES[kind])
    one_line = re.compile(
        r"model\.path: can't be sent to an engine: the learner has model\.layers\.0\.mlp\.experts\.down_proj and \d+ "
        r"more, the files have model\.layers\.0\.\S+\.experts\.0\.\S+\.weight and \d+ more instead, got '\S+' "
        r"\(a model .*\)"
    )
    for refuse in (lambda: check_names_unloaded(ModelFiles(str(tmp_path))), lambda: make_learner(path)):
        with pytest.raises(ConfigError) as refusal:
            refuse()
        assert one_line.fullmatch(str(refusal.value))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "olmo2", "phi3", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_model_keeps_its_names_and_is_trained(tmp_path, kind, tied):
    path = save_random(tmp_path, kind, tie_word_embeddings=tied, pad_token_id=0)
    check_names_unloaded(ModelFiles(str(tmp_path)))
    assert isinstance(make_learner(path), Learner)


def test_a_tied_model_sends_its_embedding_once_whatever_its_file_holds(tmp_path):
    path = save_with_head(tmp_path, torch.clone)
    sent = make_learner(path).weights()
    assert sent.keys() == load_file(tmp_path / "model.safetensors").keys() - {"lm_head.weight"}
    check_names_unloaded(ModelFiles(str(tmp_path)))


def test_an_engine_takes_from_such_a_file_and_such_a_learner_the_same_weights(tmp_path):
    path = save_with_head(tmp_path, torch.clone)
    learner = make_learner(path)
    train(learner, *make_batch())

    async def sample() -> Sample:
        engine = engine_for(path)
        await engine.start()
        await engine.load_weights(1, learner.weights())
        asked = Request(prompt_ids=[1, 2, 3], seeds=[0], sampling=Sampling(max_tokens=24))
        [sampled] = await engine.generate(asked)
        await engine.stop()
        return sampled

    sampled = asyncio.run(sample())
    assert sampled.versions == [(1, 24)]
    [logprobs] = learner.logprobs(1, [(np.array([1, 2, 3]), sampled.token_ids, None)])
    np.testing.assert_allclose(sampled.logprobs, logprobs, atol=1e-4)


def test_a_tied_model_whose_file_holds_another_output_layer_is_refused(tmp_path):
    """Hugging Face would train the two, and every engine would sample with one."""
    path = save_with_head(tmp_path, torch.zeros_like)
    with pytest.raises(
        ConfigError, match=r"ties its output layer to the embedding, and its files hold a lm_head\.weight"
    ):
        make_learner(path)
