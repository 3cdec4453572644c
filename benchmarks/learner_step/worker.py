"""A process of the bench: loads one variant and takes a step at each turn, or prepares what all share.

    python -m benchmarks.learner_step.worker SPEC.json       SPEC: `task`, and what that task needs

    prepare   a model directory with random weights, where a shape is asked for; μ and advantages for the batch; our
              gradient against the padded step's, in float32
    ours      a step of the learner, from Batch and Payloads on: Learner.prepare and Learner.train
    padded    a plain padded step

Does not own: who takes turns (`bench`), TRL's process (`trl_step`).
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from asyncdapo.algorithm.dapo import group_advantage
from asyncdapo.errors import RunError
from asyncdapo.learner.batches.prepared import Prepared
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.model.sharding import gather
from asyncdapo.learner.step.learner import Learner
from asyncdapo.model.config import ModelConfig
from asyncdapo.model.files import TOKENIZER_FILES
from benchmarks.learner_step.batch import BatchFile, messages_of
from benchmarks.learner_step.padded import PaddedStep
from benchmarks.learner_step.turns import Turns

NO_CLIP = 1e30
CHECK_TOKENS = 4096
"""Of a forward pass of the check: in float32, with full logits, on a GPU that has room for bfloat16."""
RATIO_NOISE = 0.05
"""Standard deviation of log ratios at the first step: a policy a step or two older."""


class OurStep:
    """The learner of a run and a batch that it trains on again and again."""

    def __init__(self, spec: dict, file: BatchFile, **changes: object) -> None:
        config = {
            "lr": spec["lr"],
            "threads": spec["threads"],
            "device": spec["device"],
            "dtype": spec["dtype"],
            "compile": spec["compile"],
            "activation_checkpointing": spec["checkpointing"],
            "tokens_per_microbatch": spec["tokens_per_microbatch"],
        }
        self._shared = spec["shared"]
        self._batch, self._payloads = messages_of(file)
        self._learner = Learner(
            ModelConfig(path=spec["model"]),
            LossConfig(),
            LearnerConfig(**{**config, **changes}),
            temperature=1.0,
            staleness_bound=sys.maxsize,
            max_response_length=int(file.num_response_N.max()),
            num_steps=1,
            seed=0,
        )

    def __call__(self) -> dict[str, float]:
        batch = structs.replace(self._batch, step=self._learner.version + 1)
        prepared = self._learner.prepare(batch, self._payloads)
        metrics = self._learner.train(prepared if self._shared else _unshared(prepared))
        return {"loss": metrics["learner/loss"], "grad_norm": metrics["learner/grad_norm"]}


def prepare(spec: dict) -> dict[str, float]:
    """Complete the batch file; returns how far our gradient is from the padded step's, relative to its largest entry,
    over the worst parameter, and the loss and gradient norm that all variants should have."""
    if spec["config"]:
        build(spec["config"], Path(spec["model"]), Path(spec["tokenizer"]), seed=spec["seed"], device=spec["device"])
    spec = {**spec, **{key: min(spec[key], CHECK_TOKENS) for key in ("tokens_per_microbatch", "padded_tokens")}}
    file = BatchFile.load(spec["batch"])
    padded = _padded(spec, file)
    noise_R = np.random.default_rng(spec["seed"]).normal(0.0, RATIO_NOISE, len(file.response_ids_R))
    rewards = torch.from_numpy(file.rewards_N).view(-1, file.group_size)
    advantages_N = torch.cat([group_advantage(rewards_G) for rewards_G in rewards]).numpy()
    file = file.sampled_by(padded.logprobs() - noise_R, advantages_N)
    file.save(Path(spec["batch"]))

    padded = _padded(spec, file)
    loss = padded.accumulate()
    expected = {name: parameter.grad for name, parameter in padded.model.named_parameters()}
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
    del padded
    found = our_gradient({**spec, "dtype": "float32"}, file)
    if [grad.shape for grad in found] != [grad.shape for grad in expected.values()]:
        raise RunError("the learner's optimizer has other parameters than the model")
    apart = {
        name: ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()
        for ours, (name, theirs) in zip(found, expected.items(), strict=True)
    }
    worst = max(apart, key=apart.get)
    return {"gradient_apart": apart[worst], "worst": worst, "loss": loss, "grad_norm": norm}


def build(config: dict, folder: Path, tokenizer: Path, *, seed: int, device: str) -> None:
    """Save a model of this config.json with random weights, in bfloat16, with any tokenizer (TRL wants one)."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def our_gradient(spec: dict, file: BatchFile) -> list[torch.Tensor]:
    """What the real learner hands its optimizer, parameter by parameter."""
    found: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found.extend(
            gather(parameter.grad).clone() for group in optimizer.param_groups for parameter in group["params"]
        )

    step = OurStep({**spec, "shared": True}, file, grad_clip=NO_CLIP)
    hook = register_optimizer_step_pre_hook(keep)
    step()
    hook.remove()
    return found


def _unshared(prepared: Prepared) -> Prepared:
    """Every row a group of its own behind its advantage, so that each response has its prompt computed. No key does
    this, since sharing always pays: it is for the table that shows it."""
    return replace(prepared, rows=[[replace(row, prompt=row.index) for row in rows] for rows in prepared.rows])


def _padded(spec: dict, file: BatchFile) -> PaddedStep:
    return PaddedStep(
        spec["model"],
        file,
        device=spec["device"],
        dtype=spec["dtype"] if spec["task"] == "padded" else "float32",
        tokens_per_microbatch=spec["padded_tokens"],
        lr=spec["lr"],
    )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    turns = Turns(torch, on_gpu=spec["device"] == "cuda")
    if spec["task"] == "prepare":
        turns.ready(**prepare(spec))
        return
    file = BatchFile.load(spec["batch"])
    step = OurStep(spec, file) if spec["task"] == "ours" else _padded(spec, file)
    turns.ready(versions=f"torch {torch.__version__}")
    while turns.wait():
        turns.done(**step())


if __name__ == "__main__":
    main()
