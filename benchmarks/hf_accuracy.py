"""Accuracy of a checkpoint on fresh held-out prompts of the task `chain`, by Hugging Face `generate` alone.

    python benchmarks/hf_accuracy.py RUN_DIR/checkpoints/… --num 1024 --seed 1234 [--greedy]

Prints one JSON line: accuracy, n, standard error. It uses asyncdapo's task and verifier but not its engine, so that it
can confirm what the engine measured. Shapes: B prompts, S tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from asyncdapo.prompts.tasks.chain import draw_chain
from asyncdapo.reward.verifiers.answer import verify

BATCH_SIZE = 128
MAX_NEW_TOKENS = 128


@torch.no_grad()
def measure(checkpoint: Path, num: int, seed: int, greedy: bool) -> dict[str, object]:
    """Sample one response a prompt in fp32, at temperature 1 or greedily, and verify its text."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    chains = [draw_chain(seed, row, held_out=True) for row in range(num)]
    num_right = 0.0
    for start in range(0, num, BATCH_SIZE):
        part = chains[start : start + BATCH_SIZE]
        inputs = tokenizer([chain.prompt for chain in part], return_tensors="pt", padding=True)
        prompts_BS, mask_BS = inputs["input_ids"], inputs["attention_mask"]
        tokens_BS = model.generate(prompts_BS, attention_mask=mask_BS, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        texts = tokenizer.batch_decode(tokens_BS[:, prompts_BS.shape[1] :], skip_special_tokens=True)
        num_right += sum(verify(text, chain.answer)["acc"] for text, chain in zip(texts, part, strict=True))
    accuracy = num_right / num
    return {
        "checkpoint": str(checkpoint),
        "accuracy": round(accuracy, 4),
        "n": num,
        "standard_error": round(math.sqrt(accuracy * (1 - accuracy) / num), 4),
        "greedy": greedy,
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on held-out chain prompts with Hugging Face generate.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num", type=int, default=1024, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the prompts and of the sampling")
    parser.add_argument("--greedy", action="store_true", help="most likely token instead of temperature 1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(arguments.checkpoint, arguments.num, arguments.seed, arguments.greedy)))


if __name__ == "__main__":
    main()
