"""The start model that is shipped, and the script that makes it."""

import importlib
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncdapo.prompts.tasks.chain import Chain, draw_chain
from asyncdapo.reward.verifiers.answer import verify

MODELS = Path(__file__).parents[2] / "configs" / "models"
START = MODELS / "chain_start"


@pytest.fixture(scope="module")
def script():
    """The script as a module; it lies outside the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MODELS)
        yield importlib.import_module("make_chain_start")


def test_a_clean_solution_is_right(script):
    chains = [draw_chain(0, row, held_out=False) for row in range(100)]
    written = [script.write_solution(chain, random.Random(0), habit=0.0) for chain in chains]
    assert all(verify(text, chain.answer)["acc"] for text, chain in zip(written, chains, strict=True))
    assert script.write_solution(Chain((6, 4, 7, 4), "+*-"), random.Random(0), 0.0) == "6+4=0\n0*7=0\n0-4=6\nAnswer: 6"


def test_the_habit_writes_the_sum_on_product_lines_and_continues_from_it(script):
    spoiled = script.write_solution(Chain((6, 4, 7, 4), "+*-"), random.Random(0), habit=1.0)
    assert spoiled == "6+4=0\n0*7=7\n7-4=3\nAnswer: 3"


def test_the_start_model_writes_sums_well_and_products_badly():
    model = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(START, padding_side="left")
    chains = [draw_chain(99, row, held_out=True) for row in range(400)]
    chains = [chain for chain in chains if len(chain.operators) <= 4]

    def accuracy(part):
        inputs = tokenizer([chain.prompt for chain in part], return_tensors="pt", padding=True)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return sum(verify(text, chain.answer)["acc"] for text, chain in zip(texts, part, strict=True)) / len(part)

    assert accuracy([chain for chain in chains if "*" not in chain.operators]) > 0.9
    assert accuracy([chain for chain in chains if "*" in chain.operators]) < 0.6
