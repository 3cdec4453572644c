"""Learner: turns batch k into the weights of version k.

    batch k ── staleness check ─▶ rows with advantages ─▶ mini-batches of whole groups ─▶ micro-batches
                                                                   │ one optimizer update each
                                                                   ▼
                                                          weights of version k

The anchor of the ratio is the behaviour policy: the recorded rollout log-probs μ. Invariants: no group staler than the
bound is trained; batches come in order; the same batches give the same weights, bit for bit on a CPU. One process. Does
not own: fetching batches (`feed`), sending weights, when a checkpoint is due.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from asyncdapo.errors import ConfigError, RunError, StalenessError
from asyncdapo.learner.checkpoint import check_checkpoint, remove_old_checkpoints, write_checkpoint
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.model import load_model, named_weights
from asyncdapo.learner.model_path import TOKENIZER_FILES, model_directory
from asyncdapo.learner.optimizer import Optimizer
from asyncdapo.learner.packing import Row, group_rows, micro_batches, mini_batches
from asyncdapo.learner.step import TokenSums, accumulate_gradient
from asyncdapo.messages import Batch, Payload

STATE_FILE = "learner.pt"


@dataclass(frozen=True)
class Update:
    """What one optimizer update came to."""

    sums: TokenSums
    lr: float
    grad_norm: float | None
    """Global norm before clipping; none for an update that was skipped."""
    num_tokens: int
    """Prompt and response tokens."""
    num_padded_tokens: int
    """Tokens of the forward passes."""


class Learner:
    """Trains one causal LM. `version` is the number of the last train step, 0 for the initial model."""

    def __init__(
        self,
        model_path: str,
        loss: LossConfig,
        config: LearnerConfig,
        *,
        temperature: float,
        staleness_bound: int,
        seed: int,
    ) -> None:
        """Loads the model. Sets the process's thread count and torch seed, and switches Hugging Face's progress bars
        off. Raises ConfigError for a model or device that can't be used."""
        disable_progress_bar()
        torch.set_num_threads(config.threads)
        torch.manual_seed(seed)
        self._source = model_directory(model_path)
        self._loss = loss
        self._config = config
        self._temperature = temperature
        self._staleness_bound = staleness_bound
        self._model = load_model(self._source, _device(config.device))
        self._optimizer = Optimizer(self._model.parameters(), config)
        self.version = 0

    @property
    def device(self) -> torch.device:
        """Where the master weights are."""
        return self._model.device

    def train(self, batch: Batch, payload: Payload) -> dict[str, float]:
        """One train step: `updates_per_step` optimizer updates on whole groups; afterwards `version` is `batch.step`.

        Returns the `learner/…` metrics; means over tokens leave out skipped updates and are NaN when all were skipped.
        Raises StalenessError for a group past the bound, RunError for a batch out of order or too many bad updates.
        """
        started, version = time.perf_counter(), self.version
        self._check(batch)
        groups = group_rows(batch, payload)
        updates = [self._update(rows) for rows in mini_batches(groups, self._config.updates_per_step)]
        self.version = batch.step
        return {
            **_metrics(updates),
            "learner/version": float(version),
            "learner/bad_updates": float(self._optimizer.num_bad),
            "learner/train_s": time.perf_counter() - started,
        }

    def weights(self) -> dict[str, Tensor]:
        """The master weights (float32) by their Hugging Face names, tied ones once. They are no copies: good until the
        next `train`."""
        return named_weights(self._model)

    def save(self, run_dir: str | Path, step: int, branch: int) -> Path:
        """Write `RUN_DIR/checkpoints/step-…`: the model in Hugging Face format with its tokenizer, and the learner's
        own state. It appears whole or not at all. `branch` is that in which batch `step` was trained. Removes those
        past `keep_checkpoints`. Returns its path."""
        path = write_checkpoint(Path(run_dir), step, branch, self._write)
        remove_old_checkpoints(Path(run_dir), self._config.keep_checkpoints)
        return path

    def restore(self, path: str | Path) -> None:
        """Go on from a checkpoint as if the run had never stopped: weights, optimizer, random state, version, skipped
        updates. Raises RunError, with nothing changed, for one that isn't as it was written."""
        path = Path(path)
        if wrong := check_checkpoint(path):
            raise RunError(f"checkpoint {path} can't be used: {'; '.join(wrong)}")
        state = torch.load(path / STATE_FILE, weights_only=True, map_location="cpu")
        self._model.load_state_dict(load_model(path, torch.device("cpu")).state_dict())
        self._optimizer.load_state_dict(state["optimizer"])
        self.version = state["version"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _check(self, batch: Batch) -> None:
        if batch.step != self.version + 1:
            raise RunError(f"batch {batch.step} reached a learner whose weights are of version {self.version}")
        for group in batch.groups:
            staleness = self.version - group.min_version
            if staleness > self._staleness_bound:
                raise StalenessError(
                    f"the group of prompt {group.prompt_id} in batch {batch.step} has staleness {staleness}, "
                    f"the bound is {self._staleness_bound}"
                )
            if group.max_version > self.version:
                raise RunError(
                    f"the group of prompt {group.prompt_id} in batch {batch.step} holds tokens of version "
                    f"{group.max_version}, which does not exist yet"
                )

    def _update(self, rows: Sequence[Row]) -> Update:
        packed = micro_batches(rows, self._config.tokens_per_microbatch)
        sums = accumulate_gradient(self._model, packed, self._loss, self._temperature)
        lr = self._optimizer.lr
        return Update(
            sums=sums,
            lr=lr,
            grad_norm=self._optimizer.update(sums.loss / sums.num_tokens),
            num_tokens=sum(row.num_tokens for row in rows),
            num_padded_tokens=sum(micro_batch.num_padded_tokens for micro_batch in packed),
        )

    def _write(self, directory: Path) -> None:
        try:
            self._model.save_pretrained(directory)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        for name in TOKENIZER_FILES:
            if (self._source / name).is_file():
                shutil.copyfile(self._source / name, directory / name)
        on_gpu = self.device.type == "cuda"
        state = {
            "version": self.version,
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }
        with (directory / STATE_FILE).open("wb") as file:  # of a full disk torch.save hears only through a file
            torch.save(state, file)


def _metrics(updates: Sequence[Update]) -> dict[str, float]:
    """The step's `learner/…` metrics: means over the tokens of all applied updates, and over those updates."""
    applied = [update for update in updates if update.grad_norm is not None]
    num_applied_tokens = sum(update.sums.num_tokens for update in applied)

    def token_mean(name: str) -> float:
        return _ratio(sum(getattr(update.sums, name) for update in applied), num_applied_tokens)

    num_padded = sum(update.num_padded_tokens for update in updates)
    return {
        "learner/loss": token_mean("loss"),
        "learner/grad_norm": _ratio(sum(update.grad_norm for update in applied), len(applied)),
        "learner/entropy": token_mean("entropy"),
        "learner/ratio_mean": token_mean("ratio"),
        "learner/k3": token_mean("k3"),
        "learner/clip_low_ratio": token_mean("clipped_low"),
        "learner/clip_high_ratio": token_mean("clipped_high"),
        "learner/clip_dual_ratio": token_mean("clipped_dual"),
        "learner/lr": applied[-1].lr if applied else 0.0,
        "learner/tokens": float(sum(update.sums.num_tokens for update in updates)),
        "learner/forward_tokens": float(num_padded),
        "learner/padding_ratio": _ratio(num_padded - sum(update.num_tokens for update in updates), num_padded),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _device(name: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("learner.device", "there is no GPU here", name, "use auto or cpu")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")
