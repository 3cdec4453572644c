"""Learner: turns batch k into the weights of version k.

    batch k ── staleness check ─▶ rows with advantages ── first pass ─▶ updates of whole groups ─▶ micro-batches
                                                          masks, other      × epochs    │ gradients summed over ranks,
                                                          log-probs                     ▼ one optimizer step each
                               `begin`, until the first optimizer step;           weights of version k
                               `finish`, from there on

The anchor of the ratio is the behaviour policy, whose log-probs μ were recorded, or the policy at the start of the step
(`loss.anchor`). Invariants: no group staler than the bound is trained; batches come in order; the gradient depends
neither on micro-batches nor on ranks; the same batches give the same weights, bit for bit on a CPU; `finish` alone
changes the weights. Each rank holds a share of the weights and runs this code on its share of the rows. Does not own:
what happens inside a step (`train_step`), fetching batches (`feed`), sending weights, when a checkpoint is due, how
ranks talk (`ranks`), how weights are shared (`model/sharding`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Lock
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
from asyncdapo.errors import ConfigError, RunError, StalenessError
from asyncdapo.learner.batches.prepared import Prepared
from asyncdapo.learner.batches.samples import columns, rows_by_update
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.model.model import device_of, load_policy
from asyncdapo.learner.model.packing import Work
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.model.sharding import free_gathered, gather, named_shards
from asyncdapo.learner.step.gradient import Note
from asyncdapo.learner.step.measured import Measured
from asyncdapo.learner.step.optimizer import Optimizer
from asyncdapo.learner.step.probe import Pair, response_logprobs
from asyncdapo.learner.step.ranks import ALONE, Ranks
from asyncdapo.learner.step.train_step import Begun, TrainSteps
from asyncdapo.learner.step.updates import ratio, update_metrics
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
            self._shards = named_shards(self._policy)
            self._optimizer = Optimizer(self._shards.values(), config, num_steps, float16=dtype == torch.float16)
            reference = load(model.reference_files or model.files, trained=False) if loss.kl_coef else None
        self._shape = model.files.shape
        _check_vocabulary(model, reference, self._policy)
        self.version = 0
        self.times = SharedClock(LEARNER_STATES)
        """What the time of the learner's process goes into; a train step enters its own states."""
        self._steps = TrainSteps(
            self._policy, reference, self._optimizer, loss, config, ranks, self.times, max_response_length
        )
        self._begun: Begun | None = None
        self.in_use = Lock()
        """Held by who reads weights or optimizer in another thread, and while they change."""

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
        """One train step: `begin`, then `finish`."""
        self.begin(prepared, note)
        return self.finish()

    def begin(self, prepared: Prepared, note: Note | None = None) -> None:
        """The part of a train step that only reads the weights: meanwhile, and until `finish`, they may be sent and
        copied in another thread (`in_use`). `note` hears of every pass with gradient. Every rank has to call it.

        Raises StalenessError for a group past the bound, RunError for a batch out of order or a rank that is gone."""
        self._check(prepared.batch)
        with self.ranks.together(f"begin train step {prepared.batch.step}"):
            self._begun = self._steps.begin(prepared, note)

    def finish(self) -> dict[str, float]:
        """The rest of the train step: `epochs` times `updates_per_step` optimizer updates on whole groups; afterwards
        `version` is that of the batch's step. Every rank has to call it.

        Returns the `learner/…` metrics, the same at every rank but for its own memory and time; means leave out skipped
        updates and are NaN when all were skipped. Raises RunError for too many bad updates or a rank that is gone.
        """
        assert self._begun is not None, "`begin` comes first"
        begun, self._begun = self._begun, None
        version, batch = self.version, begun.prepared.batch
        with self.ranks.together(f"finish train step {batch.step}"), self.in_use:
            started = time.perf_counter()
            done = self._steps.finish(begun)
            self.version, seconds = batch.step, begun.seconds + time.perf_counter() - started
        work = sum((update.part.work for update in done), start=Work())
        return {
            **update_metrics(done, self._loss),
            **self._masked(begun),
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
        """This rank's shards of the weights (float32), by Hugging Face names, tied ones once: live, and always the same
        tensors. (To ask the policy again would free what a gradient in another thread has gathered.)"""
        return self._shards

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
        free_gathered(self._policy)
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

    def _masked(self, begun: Begun) -> dict[str, float]:
        """Share of the tokens that the first pass masked, where the loss has such masks."""
        num_before, num_left = (int(one.num_tokens_N.sum()) for one in (begun.prepared.columns, begun.counted))
        return {"learner/masked_ratio": ratio(num_before - num_left, num_before)} if self._loss.masks_by_policy else {}

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
