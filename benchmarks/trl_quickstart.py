"""The quickstart by TRL's `GRPOTrainer`: its model, prompts, rewards, batch and learning rate.

    PYTHONPATH=. PYTHON_WITH_TRL benchmarks/trl_quickstart.py --seed 0 --threads 2      pip: trl==1.16.0 datasets

TRL generates and trains in turn, in one process. It has DAPO's loss and clipping here, and no dynamic sampling. The
clock holds its train steps alone: neither the start nor the evaluations, which come every four steps, on held-out
prompts, sampled at temperature 1. It ends at the first evaluation of .9 or above. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")

import datasets
import torch
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from asyncdapo.prompts.tasks.chain import ChainTask
from asyncdapo.reward.verifiers.answer import verify

MODEL = Path(__file__).parents[1] / "configs/models/chain_start"
PROMPTS_PER_STEP, GROUP_SIZE, MICRO_BATCH, MAX_TOKENS = 16, 16, 64, 128
EVAL_EVERY, EVAL_PROMPTS, ENOUGH = 4, 512, 0.9


def rewards(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for a right answer, -1 for another one."""
    return [2 * float(verify(text, right)["acc"] or 0) - 1 for text, right in zip(completions, answer, strict=True)]


class Evaluations(TrainerCallback):
    """Measures accuracy beside the clock, and ends the training when it is enough."""

    def __init__(self, task: ChainTask, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._questions = [task.eval_question_at(row) for row in range(EVAL_PROMPTS)]
        self.accuracy: list[float] = []
        self.train_s, self._began_s = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        self.train_s += time.perf_counter() - self._began_s
        if state.global_step % EVAL_EVERY == 0:
            self.accuracy.append(round(self._measure(trained["model"]), 3))
            control.should_training_stop = self.accuracy[-1] >= ENOUGH

    @torch.no_grad()
    def _measure(self, model: Any) -> float:
        batch = self._tokenizer([question.text for question in self._questions], return_tensors="pt", padding=True)
        was_training, _ = model.training, model.eval()
        ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_TOKENS)
        model.train(was_training)
        texts = self._tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [verify(text, question.answer)["acc"] for text, question in zip(texts, self._questions, strict=True)]
        return sum(map(float, right)) / len(right)


def train(seed: int, steps: int) -> dict[str, Any]:
    task, tokenizer = ChainTask(seed), AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    questions = [task.question_at(row) for row in range(steps * PROMPTS_PER_STEP)]
    rows = [{"prompt": question.text, "answer": question.answer} for question in questions]
    evaluations = Evaluations(task, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            seed=seed,
            max_steps=steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=PROMPTS_PER_STEP * GROUP_SIZE // MICRO_BATCH,
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_TOKENS,
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            beta=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=str(MODEL),
            reward_funcs=rewards,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[evaluations],
        )
        trainer.train()
    reached = bool(evaluations.accuracy) and evaluations.accuracy[-1] >= ENOUGH
    return {
        "mode": "trl",
        "seed": seed,
        "accuracy": evaluations.accuracy,
        "steps": trainer.state.global_step,
        "to_90_s": round(evaluations.train_s, 1) if reached else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="at most")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(train(args.seed, args.steps)), flush=True)


if __name__ == "__main__":
    main()
