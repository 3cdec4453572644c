"""Evaluation: completions of held-out prompts through the rollout workers, never trained on.

In: held-out prompts and `eval` settings, answers that are known already. Out: every answer as it arrives, and `eval/…`
metrics (`sampled`) of them all. The replay server sends the requests to workers with room: in turn with leases, as
`eval.max_share` says, and wherever there is no lease. Requests are not leases: they have a table of their own in the
replay server and are issued again when a worker dies.

An evaluation is asked for in portions, `MAX_CALLS` at a time: so answers can be kept as they come, and the server holds
no more responses than those of the portions under way, which together are more than the slots can take.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from asyncdapo.config.config import Config
from asyncdapo.config.run import EvalConfig
from asyncdapo.controller.eval.sampled import summarise
from asyncdapo.eval_messages import EvalAnswer, EvalRequest, Sampling
from asyncdapo.messages import Prompt
from asyncdapo.seeds import sample_seed

log = logging.getLogger("eval")

EVAL_SEED = 0xE7A1
"""Keeps the seeds of evaluation apart from those of training prompts; the same in every evaluation of a run, so that
two points of the curve differ by their weights and by little else."""

MAX_CALLS = 16
"""Portions under way. An actor serves 64 calls at once, and those of an evaluation that was given up may linger."""
SLOTS_ASKED = 2
"""Completions under way, as a multiple of the slots: a portion is only over with its slowest completion."""

Ask = Callable[[list[EvalRequest]], Awaitable[list[EvalAnswer]]]


@dataclass(frozen=True)
class Answered:
    """One completion of an evaluation, and whether it was decoded greedily."""

    answer: EvalAnswer
    greedy: bool

    @property
    def key(self) -> tuple[int, int, bool]:
        """Prompt, sample, greedy: each is asked for once."""
        return self.answer.prompt_id, self.answer.sample, self.greedy


OnAnswers = Callable[[Sequence[Answered]], None]


class Evaluation:
    """Makes the requests of evaluations and the metrics of their answers."""

    def __init__(
        self,
        config: EvalConfig,
        prompts: Sequence[Prompt],
        *,
        chunk: int,
        total_slots: int,
        max_tokens: int,
        seed: int,
        ask: Ask,
    ) -> None:
        """`chunk`: completions of a request at most; `total_slots`: of all workers; `seed`: the run's."""
        self._config, self._prompts, self._chunk, self._ask = config, prompts, chunk, ask
        self._portion = max(1, math.ceil(SLOTS_ASKED * total_slots / chunk / MAX_CALLS))
        """Requests of one call."""
        self._max_tokens = max_tokens
        self._seed = sample_seed(seed, EVAL_SEED)
        self._request_ids = itertools.count(1)

    @classmethod
    def of(cls, config: Config, prompts: Sequence[Prompt], ask: Ask) -> Evaluation:
        """That of these workers, lengths and seed."""
        rollout = config.rollout
        return cls(
            config.eval,
            prompts,
            chunk=rollout.group_size,
            total_slots=rollout.max_workers * rollout.slots,
            max_tokens=rollout.max_response_length,
            seed=config.run.seed,
            ask=ask,
        )

    def total(self, *, greedy: bool) -> int:
        """Completions of an evaluation."""
        config, num_prompts = self._config, len(self._prompts)
        num_greedy = min(config.num_greedy_prompts, num_prompts) if greedy else 0
        return min(config.num_prompts, num_prompts) * config.num_samples + num_greedy

    async def run(
        self,
        *,
        greedy: bool,
        known: Collection[Answered] = (),
        on_answers: OnAnswers = lambda _: None,
    ) -> dict[str, float]:
        """`num_samples` of each of `num_prompts`, and `num_greedy_prompts` decoded greedily when asked for. Returns the
        metrics of all answers, those included that are `known` and so not asked for. `on_answers` gets the others,
        portion by portion, as they arrive. Without prompts there are no metrics."""
        answered = {one.key: _bare(one.answer) for one in known}
        portions = self._portions(greedy, frozenset(answered))

        async def work_off() -> None:
            for requests, is_greedy in portions:
                portion = [Answered(answer, is_greedy) for answer in await self._ask(requests)]
                answered.update({one.key: _bare(one.answer) for one in portion})
                on_answers(portion)

        callers = [asyncio.ensure_future(work_off()) for _ in range(MAX_CALLS)]
        try:
            await asyncio.gather(*callers)
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
        sampled = [answer for (*_, is_greedy), answer in answered.items() if not is_greedy]
        greedily = [answer for (*_, is_greedy), answer in answered.items() if is_greedy]
        metrics = summarise(sampled) if sampled else {}
        if greedily:
            metrics["eval/greedy_accuracy"] = summarise(greedily)["eval/accuracy"]
            metrics["eval/failed_answers"] = sum(answer.failed for answer in [*sampled, *greedily])
        if words := unjudged([*sampled, *greedily]):
            log.warning("%s; they count as wrong", words)
        return metrics

    # ------------------------------------------------------------------------------------------------------ requests

    def _portions(
        self, greedy: bool, known: Collection[tuple[int, int, bool]]
    ) -> Iterator[tuple[list[EvalRequest], bool]]:
        """Requests of one call each, and whether they are greedy."""
        config, longest = self._config, self._max_tokens
        sampled = Sampling(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_tokens=longest)
        parts = [(self._prompts[: config.num_prompts], config.num_samples, sampled, False)]
        if greedy:
            greedily = Sampling(temperature=0.0, max_tokens=longest)
            parts.append((self._prompts[: config.num_greedy_prompts], 1, greedily, True))
        for prompts, num_samples, sampling, is_greedy in parts:
            missing = [
                [sample for sample in range(num_samples) if (prompt.prompt_id, sample, is_greedy) not in known]
                for prompt in prompts
            ]
            requests = self._requests(prompts, missing, sampling)
            while portion := list(itertools.islice(requests, self._portion)):
                yield portion, is_greedy

    def _requests(
        self, prompts: Sequence[Prompt], missing: Sequence[list[int]], sampling: Sampling
    ) -> Iterator[EvalRequest]:
        """Neighbours of which the same samples are missing go together, as many as a request may hold."""
        for samples, run in itertools.groupby(zip(prompts, missing, strict=True), key=lambda pair: pair[1]):
            same = [prompt for prompt, _ in run]
            for some in _cut(samples, self._chunk):
                for held in _cut(same, self._chunk // len(some)):
                    yield EvalRequest(
                        request_id=next(self._request_ids),
                        seed=self._seed,
                        sampling=sampling,
                        prompts=list(held),
                        samples=list(some),
                    )


def unjudged(answers: Collection[EvalAnswer]) -> str:
    """How many of them have no verdict, and why the first has none; empty where all have."""
    failures = [answer.failure for answer in answers if answer.failed]
    return f"{len(failures):,} of {len(answers):,} answers weren't judged: {failures[0]}" if failures else ""


def _bare(answer: EvalAnswer) -> EvalAnswer:
    """Without its response, which is much larger than the rest and says nothing to the metrics."""
    return replace(answer, response="")


def _cut(items: Sequence, size: int) -> list[Sequence]:
    """Pieces of at most `size`, in order."""
    return [items[at : at + size] for at in range(0, len(items), size)]
