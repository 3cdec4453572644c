"""Accuracy of a checkpoint on held-out prompts of a quickstart, by Hugging Face `generate` alone.

    python benchmarks/hf_accuracy.py RUN_DIR/checkpoints/… --num 1024 --seed 1234 [--greedy] [--task product]

Prints one JSON line: accuracy, n, standard error, mean turns of an episode. It uses asyncdapo's tasks, verifier and
calculator but not its engine, so that it can confirm what the engine measured. Shapes: B episodes, S tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from asyncdapo.environment.calculator import Calculator
from asyncdapo.prompts.tasks.chain import draw_chain
from asyncdapo.prompts.tasks.product import ProductTask
from asyncdapo.reward.verifiers.answer import verify

BATCH_SIZE = 128
MAX_NEW_TOKENS = 128
MAX_TURNS = 4

Step = Callable[[str], str | tuple[None, float]]
"""Response -> an observation, or (None, reward) at the end."""


@dataclass
class Episode:
    """One prompt, and what was sampled and observed behind it."""

    context: list[int]
    """Token ids."""
    step: Step
    num_turns: int = 0
    reward: float | None = None
    """None until it is over."""


def open_chains(num: int, seed: int) -> Iterator[tuple[str, Step]]:
    """Prompts of the task `chain`; a single response is judged by the verifier."""
    for chain in (draw_chain(seed, row, held_out=True) for row in range(num)):
        yield chain.prompt, partial(judge, chain.answer)


def judge(answer: str, response: str) -> tuple[None, float]:
    return None, verify(response, answer)["acc"]


def open_products(num: int) -> Iterator[tuple[str, Step]]:
    """Prompts of the task `product`, each with a calculator."""
    task = ProductTask()
    for question in (task.eval_question_at(row) for row in range(min(num, task.num_eval_rows))):
        calculator = Calculator()
        calculator.reset({"answer": question.answer})
        yield question.text, calculator.step


@torch.no_grad()
def measure(checkpoint: Path, task: str, num: int, seed: int, greedy: bool) -> dict[str, object]:
    """One episode a prompt in fp32, at temperature 1 or greedily."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    opened = open_chains(num, seed) if task == "chain" else open_products(num)
    episodes = [Episode(tokenizer(prompt)["input_ids"], step) for prompt, step in opened]
    for start in range(0, len(episodes), BATCH_SIZE):
        part = episodes[start : start + BATCH_SIZE]
        for _ in range(MAX_TURNS):
            if under_way := [episode for episode in part if episode.reward is None]:
                take_turn(model, tokenizer, under_way, sampling)
    accuracy = sum(episode.reward or 0.0 for episode in episodes) / len(episodes)
    return {
        "checkpoint": str(checkpoint),
        "accuracy": round(accuracy, 4),
        "n": len(episodes),
        "standard_error": round(math.sqrt(accuracy * (1 - accuracy) / len(episodes)), 4),
        "turns": round(sum(episode.num_turns for episode in episodes) / len(episodes), 3),
        "greedy": greedy,
        "seed": seed,
    }


def take_turn(model: Any, tokenizer: Any, episodes: Sequence[Episode], sampling: dict[str, object]) -> None:
    """A response in each episode, and what its environment says to it."""
    inputs = tokenizer.pad({"input_ids": [episode.context for episode in episodes]}, return_tensors="pt")
    tokens_BS = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
    for episode, line_S in zip(episodes, tokens_BS[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        end = line_S.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in line_S else len(line_S)
        response = line_S[:end]  # behind its end is padding
        said = episode.step(tokenizer.decode(response, skip_special_tokens=True))
        episode.num_turns += 1
        if isinstance(said, tuple):
            _, episode.reward = said
        else:
            episode.context += [*response, *tokenizer(said, add_special_tokens=False)["input_ids"]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on held-out prompts with Hugging Face generate.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", choices=("chain", "product"), default="chain", help="what is asked")
    parser.add_argument("--num", type=int, default=1024, help="held-out prompts; `product` has 470")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the prompts and of the sampling")
    parser.add_argument("--greedy", action="store_true", help="most likely token instead of temperature 1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(arguments.checkpoint, arguments.task, arguments.num, arguments.seed, arguments.greedy)))


if __name__ == "__main__":
    main()
