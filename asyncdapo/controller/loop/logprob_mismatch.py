"""Parity: whether the engines sample from the policy that the learner trains.

                 probe prompts                       token ids
    rollout[N] ◀────────────── Parity ──────────────────────────────▶ learner, its ranks
               ──────────────▶        ◀──────────────────────────────
                 token ids, log-probs, versions      log-probs of the same tokens

In: a version that the workers have loaded and the learner still has. Out: `rollout/parity_…`, each the highest of any
worker. Each worker completes the same prompts with the same seeds, ahead of its leases, at the temperature of training;
the learner computes the log-probs that its own weights give those tokens. A mean difference above `rollout.parity_warn`
is said once, until it is below again; one above `rollout.parity_stop` ends the run.

Invariant: only completions sampled by that version alone are compared, so that a difference never comes of weights that
are rightly older. A worker without any (it or its engine dies, it takes too long) is left out, and that is said; one
that isn't up is left out in silence.
Does not own: when versions are compared, and that the learner keeps its weights meanwhile (`run`).

Shape: T sampled tokens of one worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asyncdapo.controller.fleet.process import Process, ProcessDied
from asyncdapo.controller.fleet.ranks import LearnerRanks
from asyncdapo.controller.fleet.weights.publishing import Publishing
from asyncdapo.errors import EngineError, RunError
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Sample
from asyncdapo.seeds import sample_seed

if TYPE_CHECKING:
    from asyncdapo.controller.roles.rollout import RolloutProcess

MAX_TOKENS = 64
"""Of one completion; a few hundred tokens tell a wrong layer, temperature or version from rounding."""
SAMPLE_S = 120.0
"""Time for a worker's completions, which wait for the first slots that come free. The learner may wait for them."""
PARITY_SEED = 0xA1D
"""Keeps these seeds apart from those of training prompts."""

log = logging.getLogger("rollout")


@dataclass(frozen=True)
class Differences:
    """|engine − learner| of the log-probs of one worker's tokens, in nats."""

    mean: float
    p99: float
    max: float
    num_tokens: int

    @classmethod
    def of(cls, engine_T: np.ndarray, learner_T: np.ndarray) -> Differences:
        """NaN on either side makes all of them NaN."""
        apart_T = np.abs(engine_T.astype(np.float64) - learner_T)
        return cls(float(apart_T.mean()), float(np.quantile(apart_T, 0.99)), float(apart_T.max()), len(apart_T))

    def above(self, mean: float) -> bool:
        """NaN is above everything."""
        return not self.mean <= mean

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, p99 {self.p99:.2g}, max {self.max:.2g} nats over {self.num_tokens} tokens"


class LogprobMismatch:
    """The comparisons of one run."""

    def __init__(
        self,
        config: RolloutConfig,
        learners: LearnerRanks,
        publishing: Publishing,
        prompts: Sequence[list[int]],
        seed: int,
    ) -> None:
        """`prompts`: token ids of each probe prompt; `seed`: the run's."""
        self._config, self._learners, self._publishing = config, learners, publishing
        self._prompts = list(prompts)
        self._seeds = [sample_seed(seed, PARITY_SEED, index) for index in range(len(prompts))]
        max_tokens = min(MAX_TOKENS, config.max_response_length)
        self._sampling = config.sampling(max_tokens)
        self._warned: set[str] = set()
        """Workers above `parity_warn` in the comparison before."""

    async def compare(self, version: int) -> dict[str, float]:
        """The metrics of it; none when every worker is left out. The learner must keep its weights until this ends.

        Raises RunError for a worker above `rollout.parity_stop`, ProcessDied for the learner.
        """
        workers = self._publishing.reachable()
        answers = await asyncio.gather(*(self._sample(worker, version) for worker in workers))
        sampled = {worker.name: samples for worker, samples in zip(workers, answers, strict=True) if samples}
        if not sampled:
            return {}
        probed = [one for samples in sampled.values() for one in samples]
        pairs = [(self._prompts[at], sample.token_ids, sample.support) for at, sample in probed]
        async with self._publishing.turn:
            logprobs = iter(await self._learners.call_all(lambda learner: learner.probe, version, pairs))
        found = {
            name: Differences.of(
                np.concatenate([sample.logprobs for _, sample in samples]),
                np.concatenate([next(logprobs) for _ in samples]),
            )
            for name, samples in sampled.items()
        }
        self._judge(version, found)
        return {
            f"rollout/parity_{of}": float(np.max([getattr(one, of) for one in found.values()]))
            for of in ("mean", "p99", "max")
        }

    async def _sample(self, worker: Process[RolloutProcess], version: int) -> list[tuple[int, Sample]]:
        """This worker's completions that are of `version` alone, each with the place of its prompt; none when it is
        left out."""
        try:
            async with asyncio.timeout(SAMPLE_S):
                samples = await worker.call(lambda worker: worker.probe, self._prompts, self._seeds, self._sampling)
        except TimeoutError:
            return _left_out(worker, version, f"{worker.name} has not sampled them in {SAMPLE_S:g} s")
        except (ProcessDied, EngineError) as error:
            return _left_out(worker, version, str(error))
        chosen = [(at, one) for at, one in enumerate(samples) if one.versions == [(version, len(one.token_ids))]]
        return chosen or _left_out(worker, version, f"{worker.name} sampled with other versions")

    def _judge(self, version: int, found: Mapping[str, Differences]) -> None:
        """Say what was found of each worker. Raises RunError for the first one above `parity_stop`."""
        warn, stop = self._config.parity_warn, self._config.parity_stop
        assert warn is not None, "RolloutConfig settles it"
        assert stop is not None, "RolloutConfig settles it"
        for name, differences in found.items():
            said = f"log-probs of version {version}, {name} against the learner: {differences}"
            if differences.above(stop):
                raise RunError(f"{said}; the mean is above rollout.parity_stop {stop:g}: {self._advice()}")
            if not differences.above(warn):
                self._warned.discard(name)
                log.info("%s", said)
            elif name not in self._warned:
                self._warned.add(name)
                log.warning("%s; the mean is above rollout.parity_warn %g: %s", said, warn, self._advice())

    def _advice(self) -> str:
        """What it means, and what to look at."""
        config = self._config
        looks = [
            "rollout.dtype=float32 rounds less" if config.dtype != "float32" else "",
            f"leave out rollout.engine_args ({', '.join(sorted(config.engine_args))})" if config.engine_args else "",
            "see whether rollout.engine=torch agrees" if config.engine != "torch" else "",
            "check that the engine computes the model of model.path at rollout.temperature",
        ]
        return "what it samples is not the policy that is trained; " + ", ".join(filter(None, looks))


def _left_out(worker: Process[RolloutProcess], version: int, reason: str) -> list[tuple[int, Sample]]:
    log.warning("%s is left out of the comparison of log-probs of version %d: %s", worker.name, version, reason)
    return []
