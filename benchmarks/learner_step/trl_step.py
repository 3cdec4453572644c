"""TRL's GRPO train step on a batch of ours. Runs in an environment of its own, and imports nothing of asyncdapo.

    PYTHON_WITH_TRL trl_step.py SPEC.json        pip: trl==1.16.0 datasets

TRL's own loop does the work: `GRPOTrainer.train`, of which only `_generate_and_score_completions` is replaced, by one
that waits for its turn and returns the batch in the form that TRL's own makes: prompts padded on the left, completions
on the right. The clock runs from there to the end of the optimizer step, so it holds TRL's shuffle and split, forward,
loss, backward, clipping, AdamW, but neither generation nor padding. SPEC.json: `model`, `batch` (an .npz file),
`micro_batch` (sequences a forward pass), `threads`, `device`, `dtype`, `lr`.

Shapes: N sequences, P tokens of the longest prompt, C of the longest completion.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")

import datasets
import numpy as np
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import Turns  # beside this file, which is where Python looks first


def tensors_of(batch: dict[str, np.ndarray], device: str) -> dict[str, torch.Tensor]:
    """The batch as `_generate_and_score_completions` returns it."""
    lengths_P, lengths_N = batch["num_prompt_K"], batch["num_response_N"]
    group_size = len(lengths_N) // len(lengths_P)
    prompts = np.split(batch["prompt_ids_P"], lengths_P.cumsum()[:-1])
    cuts = lengths_N.cumsum()[:-1]
    responses, logprobs = np.split(batch["response_ids_R"], cuts), np.split(batch["logprobs_R"], cuts)
    prompt_NP = np.zeros((len(lengths_N), lengths_P.max()), np.int64)
    completion_NC = np.zeros((len(lengths_N), lengths_N.max()), np.int64)
    prompt_mask_NP, mask_NC = np.zeros_like(prompt_NP), np.zeros_like(completion_NC)
    logprobs_NC = np.zeros(completion_NC.shape, np.float32)
    for row, (response, logprobs_of_it) in enumerate(zip(responses, logprobs, strict=True)):
        prompt = prompts[row // group_size]
        prompt_NP[row, -len(prompt) :], prompt_mask_NP[row, -len(prompt) :] = prompt, 1
        completion_NC[row, : len(response)], mask_NC[row, : len(response)] = response, 1
        logprobs_NC[row, : len(response)] = logprobs_of_it
    arrays = {
        "prompt_ids": prompt_NP,
        "prompt_mask": prompt_mask_NP,
        "completion_ids": completion_NC,
        "completion_mask": mask_NC,
        "advantages": batch["advantages_N"].astype(np.float32),
        "old_per_token_logps": logprobs_NC,
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return {**tensors, "num_items_in_batch": tensors["completion_mask"].sum()}


class TurnTaker(GRPOTrainer):
    """TRL's trainer with its generation replaced by a wait for the next turn."""

    def serve(self, turns: Turns, batch: dict[str, torch.Tensor]) -> None:
        self._turns, self._batch, self._loss, self._norm = turns, batch, 0.0, 0.0
        self.add_callback(EndOfStep(self))
        self.train()

    def _generate_and_score_completions(self, inputs: list) -> dict[str, torch.Tensor]:
        if not self._turns.wait():
            sys.exit(0)
        self._loss = 0.0
        return dict(self._batch)

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss = self._loss + loss
        return loss

    def _clip_grad_norm(self, model):
        self._norm = super()._clip_grad_norm(model)
        return self._norm

    def report(self) -> None:
        self._turns.done(loss=float(self._loss), grad_norm=float(self._norm))


class EndOfStep(TrainerCallback):
    def __init__(self, trainer: TurnTaker) -> None:
        self._trainer = trainer

    def on_step_end(self, args, state, control, **others):
        self._trainer.report()


def config_of(spec: dict, num_sequences: int, group_size: int, output_dir: str) -> GRPOConfig:
    """DAPO's loss as ours is by default: clip 0.2 and 0.28, token mean, no KL; one update a batch."""
    num_passes = num_sequences // spec["micro_batch"]
    return GRPOConfig(
        output_dir=output_dir,
        use_cpu=spec["device"] == "cpu",
        bf16=spec["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        per_device_train_batch_size=spec["micro_batch"],
        gradient_accumulation_steps=num_passes,
        steps_per_generation=num_passes,
        num_generations=group_size,
        num_iterations=1,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        temperature=1.0,
        scale_rewards="group",
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        max_steps=1_000_000,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        seed=0,
    )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    turns = Turns(torch, on_gpu=spec["device"] == "cuda")
    with np.load(spec["batch"]) as arrays:
        batch = dict(arrays)
    num_sequences, num_groups = len(batch["num_response_N"]), len(batch["num_prompt_K"])
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = TurnTaker(
            model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
            reward_funcs=lambda completions, **others: [0.0] * len(completions),
            args=config_of(spec, num_sequences, num_sequences // num_groups, output_dir),
            train_dataset=datasets.Dataset.from_list([{"prompt": "1"}] * num_groups),
            processing_class=AutoTokenizer.from_pretrained(spec["model"], padding_side="left"),
        )
        tensors = tensors_of(batch, spec["device"])
        turns.ready(versions=f"trl {trl.__version__}, transformers {transformers.__version__}")
        trainer.serve(turns, tensors)


if __name__ == "__main__":
    main()
