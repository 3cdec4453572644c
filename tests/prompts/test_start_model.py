"""What the two start models have in common: their format, and how they are trained."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = Path(__file__).parents[2] / "configs" / "models"


@pytest.fixture(scope="module")
def start_model():
    """The module as the scripts import it; it lies outside the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MODELS)
        yield importlib.import_module("start_model")


def test_the_loss_is_taken_on_what_the_model_writes_alone(start_model):
    torch.manual_seed(0)
    tokenizer = start_model.make_tokenizer()
    model = start_model.make_model(tokenizer).eval()
    given, written = start_model.NOT_IN_LOSS, [8, 9, 2]
    examples = [([1, 5, 8, 9, 2, 7, 6, 2], [given, given, *written, given, 6, 2]), ([1, 5, 2], [given, given, 2])]
    with torch.no_grad():
        expected = [
            -model(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(-1)[token]
            for ids, labels in examples
            for place, token in enumerate(labels)
            if token != given
        ]
        loss = start_model.written_loss(model, examples).item()
    assert loss == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)


def test_a_piece_that_is_written_ends_in_eos_and_a_given_one_does_not(start_model):
    tokenizer = start_model.make_tokenizer()
    ids, labels = start_model.encode([("Q: 1\n", False), ("2", True), ("3\n", False), ("4", True)], tokenizer)
    assert tokenizer.decode(ids) == "<bos>Q: 1\n2<eos>3\n4<eos>"
    assert tokenizer.decode([label for label in labels if label >= 0]) == "2<eos>4<eos>"


@pytest.mark.parametrize("name", ["chain_start", "tool_start"])
def test_a_start_model_is_small_and_in_hugging_face_format(start_model, name):
    directory = MODELS / name
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 3.5e6
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert model.num_parameters() == 800_768
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == model.config.vocab_size == 103
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.get_vocab() == start_model.make_tokenizer().get_vocab()
