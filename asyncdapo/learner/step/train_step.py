"""One train step in two parts: what only reads the weights, and what changes them.

    begin     first pass ─▶ gradient of the first update        weights and optimizer are as after step k − 1
    finish    optimizer ─▶ gradients of further updates, each with the optimizer behind it

In: a prepared batch. Out: what each update came to. Invariants: until `finish` nothing has changed that a send or a
checkpoint of version k − 1 reads, so either may run meanwhile, in another thread; every denominator of a step is known
before its first backward pass. Does not own: whether the batch may be trained on, and the version (`learner`).

Shapes: N completions of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from asyncdapo.accounting.clock import SharedClock
from asyncdapo.algorithm.averages import aggregation_weights
from asyncdapo.learner.batches.prepared import Prepared
from asyncdapo.learner.batches.samples import Columns, Row, weighted
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.model.packing import Work
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.model.sharding import free_gathered
from asyncdapo.learner.step.diagnostics import Sums
from asyncdapo.learner.step.frozen_logprobs import FirstPass, second_moment_masked
from asyncdapo.learner.step.gradient import Note, Part, accumulate_gradient
from asyncdapo.learner.step.optimizer import Optimizer
from asyncdapo.learner.step.ranks import Ranks
from asyncdapo.learner.step.updates import Update


@dataclass(frozen=True)
class Begun:
    """A train step whose first gradient is in `.grad`."""

    prepared: Prepared
    updates: Sequence[Sequence[Row]]
    """This rank's rows with what is fixed before the first backward pass, for each optimizer update."""
    counted: Columns
    """Counts the masks made before the first backward pass, by any rank."""
    first: Part
    note: Note | None
    seconds: float


class TrainSteps:
    """Makes the train steps of one rank, one after the other. Every rank has to make the same calls."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        optimizer: Optimizer,
        loss: LossConfig,
        config: LearnerConfig,
        ranks: Ranks,
        times: SharedClock,
        max_response_length: int,
    ) -> None:
        """`times`: what the time of the learner's process goes into."""
        self._policy, self._optimizer, self._loss, self._config = policy, optimizer, loss, config
        self._ranks, self._times, self._max_response_length = ranks, times, max_response_length
        self._first_pass = FirstPass(policy, reference, loss, config.tokens_per_microbatch, ranks)

    def begin(self, prepared: Prepared, note: Note | None) -> Begun:
        """All work on a batch up to its first optimizer update. `note` hears of every pass with gradient, those of
        `finish` too."""
        began_s = time.perf_counter()
        with self._times.on("first_pass"):
            updates, counted = self._pass_before(prepared.rows, prepared.columns)
        first = self._gradient(updates[0], counted.of_update(0), counted, note)
        return Begun(prepared, updates, counted, first, note, time.perf_counter() - began_s)

    def finish(self, begun: Begun) -> list[Update]:
        """`epochs` times `updates_per_step` optimizer updates on whole groups."""
        numbers = [number for _ in range(self._config.epochs) for number in range(len(begun.updates))]
        done = [self._apply(begun.first, begun.counted, numbers[0])]
        for number in numbers[1:]:
            indices_N = begun.counted.of_update(number)
            part = self._gradient(begun.updates[number], indices_N, begun.counted, begun.note)
            done.append(self._apply(part, begun.counted, number))
        return done

    def _pass_before(
        self, updates: Sequence[Sequence[Row]], counted: Columns
    ) -> tuple[Sequence[Sequence[Row]], Columns]:
        """The rows with what is fixed before the first backward pass, and the columns that count the masks made there
        by any rank."""
        rows = self._first_pass([row for rows in updates for row in rows], len(updates) * self._config.epochs)
        found = {(row.index, row.context): row for row in rows}
        passed = [[found[row.index, row.context] for row in rows] for rows in updates]
        with self._times.on("sum"):
            if self._loss.masks_by_policy:
                num_tokens_N = torch.zeros_like(counted.num_tokens_N)
                for row in rows:
                    num_tokens_N[row.index] += row.num_loss_tokens
                counted = replace(counted, num_tokens_N=self._ranks.sum(num_tokens_N))
            if self._loss.m2po_threshold is not None:
                mask = partial(second_moment_masked, threshold=self._loss.m2po_threshold, ranks=self._ranks)
                passed = [mask(rows, counted.of_update(number), counted) for number, rows in enumerate(passed)]
        return passed, counted

    def _gradient(self, rows: Sequence[Row], indices_N: Tensor, counted: Columns, note: Note | None) -> Part:
        """Of one optimizer update on the completions `indices_N`, of which this rank computes `rows`; summed over
        ranks."""
        num_tokens_N = counted.num_tokens_N[indices_N]
        if not num_tokens_N.sum():
            return Part(0.0, Sums.zeros(), Work())
        weights_N = aggregation_weights(
            self._loss.agg,
            num_tokens_N,
            counted.group_N[indices_N],
            counted.copies_N[indices_N],
            max_response_length=self._max_response_length,
        )
        with self._times.on("gradient"):
            part = accumulate_gradient(
                self._policy,
                weighted(rows, indices_N, weights_N),
                self._loss,
                max_tokens=self._config.tokens_per_microbatch,
                ranks=self._ranks,
                scale=self._optimizer.scale.value,
                note=note,
            )
        with self._times.on("sum"):
            return part.summed(self._ranks)

    def _apply(self, part: Part, counted: Columns, number: int) -> Update:
        """Change the weights by the gradient that is there."""
        num_tokens = int(counted.num_tokens_N[counted.of_update(number)].sum())
        if not num_tokens:  # its gradient is zero: averages of the optimizer and the warm-up stay as they are
            return Update(part, num_tokens, lr=0.0, grad_norm=None)
        lr = self._optimizer.lr
        with self._times.on("optimizer"):
            free_gathered(self._policy)
            grad_norm = self._optimizer.update(part.loss)
            if self._policy.device.type == "cuda":
                # Else the next update, or the publish, would be charged with it; and who reads the weights in another
                # stream could be early.
                torch.cuda.synchronize(self._policy.device)
        return Update(part, num_tokens, lr, grad_norm)
