"""Learner: turns batch k into the weights of version k.

    batch k ── staleness check ─▶ rows with advantages ── first pass ─▶ updates of whole groups ─▶ micro-batches
                                                          masks, other      × epochs    │ gradients summed over ranks,
                                                          log-probs                     ▼ one optimizer step each
                                                                                  weights of version k

The anchor of the ratio is the behaviour policy, whose log-probs μ were recorded, or the policy at the start of the step
(`loss.anchor`). Invariants: no group staler than the bound is trained; batches come in order; every denominator of a
step is known before its first backward pass, so the gradient depends neither on micro-batches nor on ranks; the same
batches give the same weights, bit for bit on a CPU. Each rank holds a share of the weights and runs this code on its
share of the rows. Does not own: fetching batches (`feed`), sending weights, when a checkpoint is due, how ranks talk
(`ranks`), how weights are shared (`model/sharding`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar

from asyncdapo.accounting.clock import SharedClock
from asyncdapo.accounting.names import LEARNER_STATES
from asyncdapo.accounting.quantiles import quantiles
from asyncdapo.algorithm.advantages import batch_advantages
from asyncdapo.algorithm.averages import aggregation_weights
from asyncdapo.errors import ConfigError, RunError, StalenessError
from asyncdapo.learner.batches.prepared import Prepared
from asyncdapo.learner.batches.samples import Columns, Row, columns, rows_by_update, weighted
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.model.model import device_of, load_policy
from asyncdapo.learner.model.packing import Work
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.model.sharding import gather, named_shards
from asyncdapo.learner.step.diagnostics import Sums
from asyncdapo.learner.step.frozen_logprobs import FirstPass, second_moment_masked
from asyncdapo.learner.step.gradient import Note, Part, accumulate_gradient
from asyncdapo.learner.step.measured import Measured
from asyncdapo.learner.step.optimizer import Optimizer
from asyncdapo.learner.step.probe import Pair, response_logprobs
from asyncdapo.learner.step.ranks import ALONE, Ranks
from asyncdapo.learner.step.updates import Update, ratio, update_metrics
from asyncdapo.learner.storage.checkpoint import STATE_FILE, check_checkpoint
from asyncdapo.learner.storage.host_copy import HostCopy
from asyncdapo.learner.storage.slices import read_slices
from asyncdapo.model.config import ModelConfig
from asyncdapo.model.files import TOKENIZER_FILES, ModelFiles
from asyncdapo.model.shape import settled_dtype
from asyncdapo.shares import NOBODY, Batch
from asyncdapo.transport.payload import Payload

DIGEST_ELEMENTS = 1 << 20
"""A sum in int64 copies what it adds: so many elements at a time."""


class Learner:
    """Trains one causal LM. `version` is the number of the last train step, 0 for the initial model."""

    def __init__(
        self,
        model: ModelConfig,
        loss: LossConfig,
        config: LearnerConfig,
        *,
        temperature: float,
        staleness_bound: int,
        max_response_length: int,
        num_steps: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        """Loads the model, and the reference model if the loss has a KL penalty. Sets the process's thread count and
        torch seed, and switches Hugging Face's progress bars off. Raises ConfigError for a model or device that can't
        be used."""
        disable_progress_bar()
        torch.set_num_threads(config.threads)
        torch.manual_seed(seed)
        device = device_of(config)
        source = model.files.fetch()
        self._tokenizer_source = model.tokenizer_files.fetch() if model.tokenizer else source
        self._loss, self._config, self.ranks = loss, config, ranks
        self._staleness_bound = staleness_bound
        self._max_response_length = max_response_length
        self._measured = Measured(device)
        dtype = getattr(torch, settled_dtype(config.dtype, on_gpu=device.type == "cuda"))
        with ranks.together("load the model"):
            mesh = ranks.mesh(device)
            load = partial(load_policy, mesh=mesh, config=config, device=device, dtype=dtype, temperature=temperature)
            self._policy = load(model.files, trained=True)
            self._optimizer = Optimizer(self.shards().values(), config, num_steps, float16=dtype == torch.float16)
            reference = load(model.reference_files or model.files, trained=False) if loss.kl_coef else None
        self._shape = model.files.shape
        _check_vocabulary(model, reference, self._policy)
        self._first_pass = FirstPass(self._policy, reference, loss, config.tokens_per_microbatch, ranks)
        self.version = 0
        self.times = SharedClock(LEARNER_STATES)
        """What the time of the learner's process goes into; a train step enters its own states."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._policy.device

    def prepare(self, batch: Batch, payloads: Sequence[Payload]) -> Prepared:
        """All work on a batch that needs no weights; `payloads` are of the pieces of this rank's share. May
        be called in any thread, while another batch is trained."""
        rows = rows_by_update(
            batch,
            payloads,
            self.ranks.rank,
            batch_advantages(self._loss.advantage),
            with_zeros=self._loss.needs_all_completions,
            with_token_staleness=self._loss.anchor == "loglinear",
        )
        return Prepared(batch, rows, columns(batch))

    def train(self, prepared: Prepared, note: Note | None = None) -> dict[str, float]:
        """One train step: `epochs` times `updates_per_step` optimizer updates on whole groups; afterwards `version` is
        that of the batch's step. Every rank has to call it. `note` hears of every pass with gradient.

        Returns the `learner/…` metrics, the same at every rank but for its own memory and time; means leave out skipped
        updates and are NaN when all were skipped. Raises StalenessError for a group past the bound, RunError for a
        batch out of order, too many bad updates, or a rank that is gone.
        """
        started, version = time.perf_counter(), self.version
        batch, before = prepared.batch, prepared.columns
        self._check(batch)
        with self.ranks.together(f"train step {batch.step}"):
            with self.times.on("first_pass"):
                updates, counted = self._pass_before(prepared.rows, before)
            done = [
                self._update(rows, counted.of_update(number), counted, note)
                for _ in range(self._config.epochs)
                for number, rows in enumerate(updates)
            ]
        self.version, seconds = batch.step, time.perf_counter() - started
        work = sum((update.part.work for update in done), start=Work())
        return {
            **update_metrics(done, self._loss),
            **self._masked(before, counted),
            **self._measured.metrics(self._shape, work, seconds, self.ranks.num_ranks),
            **{f"learner/response_tokens_{name}": float(n) for name, n in quantiles(_lengths(batch)).items()},
            "learner/version": float(version),
            "learner/bad_updates": float(self._optimizer.num_bad),
            **({"learner/loss_scale": self._optimizer.scale.value} if self._optimizer.scale.on else {}),
            "learner/forward_tokens": float(work.num_computed_tokens),
            "learner/shared_ratio": ratio(work.num_tokens - work.num_computed_tokens, work.num_tokens),
            "learner/train_s": seconds,
        }

    def check_ranks(self) -> None:
        """Raises RunError at every rank unless all replicas have the same weights. Every rank has to call it."""
        if self.ranks.num_ranks > 1:
            self.ranks.check_same(self.digest(), f"weights after step {self.version}")

    def logprobs(self, version: int, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """Log-prob of each response token under the weights, as `train` computes it: float32 [R] for each
        (prompt, response). Changes nothing. Where weights are sharded every rank has to call it, with the same pairs.
        Raises RunError unless the weights are of `version`."""
        if version != self.version:
            raise RunError(f"log-probs of version {version} were asked of a learner that has version {self.version}")
        with self.ranks.together("compute log-probs"):
            return response_logprobs(self._policy, pairs, self._config.tokens_per_microbatch)

    def shards(self) -> dict[str, DTensor]:
        """This rank's shards of the weights (float32), by Hugging Face names, tied ones once: live."""
        return named_shards(self._policy)

    def weights(self) -> dict[str, Tensor]:
        """The weights, gathered. Where they are sharded every rank has to call it; elsewhere they are no copies: good
        until the next `train`."""
        with self.ranks.together("gather weights"):
            return {name: gather(shard) for name, shard in self.shards().items()}

    def digest(self) -> bytes:
        """Of this rank's shards: the same at its replicas if they are equal bit for bit, almost never otherwise."""
        locals_ = (shard.to_local().detach() for shard in self.shards().values())
        pieces = (piece for local in locals_ for piece in local.flatten().split(DIGEST_ELEMENTS))
        sums = [piece.view(torch.int32).sum(dtype=torch.int64) for piece in pieces]
        return torch.stack(sums).cpu().numpy().tobytes()

    def copy(self) -> HostCopy:
        """This rank's part of a checkpoint, in host memory: training may continue while it is written. Every rank makes
        one after the same step."""
        copied = HostCopy(self.ranks.rank == 0, partial(self._write_others, self._own_state()))
        for folder, shards in {"": self.shards(), **self._averages()}.items():
            copied.add(folder, shards)
        return copied

    def restore(self, path: str | Path) -> None:
        """Resume from a checkpoint, of any numbers of ranks and shards, as if the run had never stopped. Every rank has
        to call it. Raises RunError, with the weights as they were, for one that is damaged or of another model."""
        path = Path(path)
        wrong = check_checkpoint(path, self.ranks.rank, self.ranks.num_ranks)
        if self.ranks.largest(len(wrong)):
            raise RunError(f"checkpoint {path} can't be used: {'; '.join(wrong) or 'another rank has found damage'}")
        state = torch.load(path / STATE_FILE, weights_only=True, map_location="cpu")
        try:
            read_slices(self.shards(), ModelFiles(str(path)))
            self._optimizer.load_state_dict(state["optimizer"])
            for folder, averages in self._averages().items():
                read_slices(averages, ModelFiles(str(path / folder)))
        except ConfigError as error:
            raise RunError(f"checkpoint {path} can't be used: {error.problem}") from error
        self.version = state["version"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _averages(self) -> dict[str, dict[str, DTensor]]:
        """The optimizer's, by their folders in a checkpoint, under the weights' names; live. None before the first
        update."""
        names = list(self.shards())
        return {
            which: {names[place]: cast(DTensor, average) for place, average in averages.items()}
            for which, averages in self._optimizer.averages().items()
        }

    def _check(self, batch: Batch) -> None:
        if batch.step != self.version + 1:
            raise RunError(f"batch {batch.step} reached a learner whose weights are of version {self.version}")
        if max(batch.deal.ranks, default=NOBODY) >= self.ranks.num_ranks:
            raise RunError(f"batch {batch.step} is dealt to more ranks than the learner's {self.ranks.num_ranks}")
        for group in batch.groups:
            staleness = group.staleness(batch.step)
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

    def _pass_before(
        self, updates: Sequence[Sequence[Row]], counted: Columns
    ) -> tuple[Sequence[Sequence[Row]], Columns]:
        """The rows with what is fixed before the first backward pass, and the columns that count the masks made there
        by any rank."""
        rows = self._first_pass([row for rows in updates for row in rows], len(updates) * self._config.epochs)
        found = {(row.index, row.context): row for row in rows}
        passed = [[found[row.index, row.context] for row in rows] for rows in updates]
        with self.times.on("sum"):
            if self._loss.masks_by_policy:
                num_tokens_N = torch.zeros_like(counted.num_tokens_N)
                for row in rows:
                    num_tokens_N[row.index] += row.num_loss_tokens
                counted = replace(counted, num_tokens_N=self.ranks.sum(num_tokens_N))
            if self._loss.m2po_threshold is not None:
                mask = partial(second_moment_masked, threshold=self._loss.m2po_threshold, ranks=self.ranks)
                passed = [mask(rows, counted.of_update(number), counted) for number, rows in enumerate(passed)]
        return passed, counted

    def _masked(self, before: Columns, counted: Columns) -> dict[str, float]:
        """Share of the tokens that the first pass masked, where the loss has such masks."""
        num_before, num_left = (int(one.num_tokens_N.sum()) for one in (before, counted))
        return {"learner/masked_ratio": ratio(num_before - num_left, num_before)} if self._loss.masks_by_policy else {}

    def _update(self, rows: Sequence[Row], indices_N: Tensor, counted: Columns, note: Note | None) -> Update:
        """One optimizer update on the completions `indices_N`, of which this rank computes `rows`."""
        num_tokens_N = counted.num_tokens_N[indices_N]
        num_tokens = int(num_tokens_N.sum())
        if not num_tokens:  # its gradient is zero: averages of the optimizer and the warm-up stay as they are
            return Update(Part(0.0, Sums.zeros(), Work()), num_tokens, lr=0.0, grad_norm=None)
        weights_N = aggregation_weights(
            self._loss.agg,
            num_tokens_N,
            counted.group_N[indices_N],
            counted.copies_N[indices_N],
            max_response_length=self._max_response_length,
        )
        with self.times.on("gradient"):
            part = accumulate_gradient(
                self._policy,
                weighted(rows, indices_N, weights_N),
                self._loss,
                max_tokens=self._config.tokens_per_microbatch,
                ranks=self.ranks,
                scale=self._optimizer.scale.value,
                note=note,
            )
        with self.times.on("sum"):
            part = part.summed(self.ranks)
        lr = self._optimizer.lr
        with self.times.on("optimizer"):
            grad_norm = self._optimizer.update(part.loss)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # else the next update, or the publish, would be charged with it
        return Update(part, num_tokens, lr, grad_norm)

    def _own_state(self) -> dict[str, Any]:
        """What `STATE_FILE` holds; no part of it is live."""
        return {
            "version": self.version,
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _write_others(self, state: dict[str, Any], directory: Path) -> None:
        """All files of a checkpoint that hold no shards."""
        model = self._policy.model
        for config in (model.config, model.generation_config):
            if config is not None:
                config.save_pretrained(directory)
        for name in TOKENIZER_FILES:
            if (self._tokenizer_source / name).is_file():
                shutil.copyfile(self._tokenizer_source / name, directory / name)
        with (directory / STATE_FILE).open("wb") as file:  # of a full disk torch.save hears only through a file
            torch.save(state, file)


def _lengths(batch: Batch) -> list[int]:
    """Sampled tokens of each completion."""
    return [completion.num_sampled_tokens for group in batch.groups for completion in group.completions]


def _check_vocabulary(config: ModelConfig, reference: Policy | None, policy: Policy) -> None:
    if reference is not None and reference.vocabulary < policy.vocabulary:
        problem = f"has a vocabulary of {reference.vocabulary}, the model one of {policy.vocabulary}"
        raise ConfigError("model.reference", problem, config.reference)
