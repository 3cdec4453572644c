"""The quickstart by TRL's `GRPOTrainer`: its model, prompts, rewards, batch and learning rate. For `triples.py`.

    PYTHONPATH=. PYTHON_WITH_TRL benchmarks/trl_quickstart.py RUN_DIR --seed 0       pip: trl==1.16.0 datasets msgspec

TRL generates and trains in turn, in one process. It has DAPO's loss and clipping here, and no dynamic sampling. Leaves
a directory like that of a run: the model of every second step, from step 0 on, and a line of metrics a step with the
clock. The clock holds train steps alone, with sampling and rewards: neither the start nor the saving.
"""

from __future__ import annotations

import argparse
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

from asyncdapo.learner.storage.checkpoint import checkpoint_dir
from asyncdapo.metrics.jsonl import MetricsFile
from asyncdapo.prompts.tasks.chain import ChainTask
from asyncdapo.reward.verifiers.answer import verify

MODEL = Path(__file__).parents[1] / "configs/models/chain_start"
PROMPTS_PER_STEP, GROUP_SIZE, MICRO_BATCH, MAX_TOKENS = 16, 16, 64, 128


def rewards(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for a right answer, -1 for another one."""
    return [2 * float(verify(text, right)["acc"] or 0) - 1 for text, right in zip(completions, answer, strict=True)]


class Checkpoints(TrainerCallback):
    """Saves the model every few steps, beside a clock that stands still meanwhile."""

    def __init__(self, run_dir: Path, every: int) -> None:
        self._run_dir, self._every, self._metrics = run_dir, every, MetricsFile(run_dir)
        self._train_s, self._began_s = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        self._note(0, trained["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        self._train_s += time.perf_counter() - self._began_s
        self._note(state.global_step, trained["model"])

    def _note(self, step: int, model: Any) -> None:
        self._metrics.log({"step": step, "time/wall_s": self._train_s})
        if step % self._every == 0:
            model.save_pretrained(checkpoint_dir(self._run_dir, step))


def train(run_dir: Path, seed: int, steps: int, save_every: int) -> None:
    task, tokenizer = ChainTask(seed), AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    questions = [task.question_at(row) for row in range(steps * PROMPTS_PER_STEP)]
    rows = [{"prompt": question.text, "answer": question.answer} for question in questions]
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
            callbacks=[Checkpoints(run_dir, save_every)],
        )
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--save-every", type=int, default=2, metavar="STEPS")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run_dir.mkdir(parents=True)
    train(args.run_dir, args.seed, args.steps, args.save_every)


if __name__ == "__main__":
    main()
