"""Evaluation: held-out prompts through the rollout workers of the run, never trained on.

In: held-out prompts and `eval` settings. Out: `eval/…` metrics. The replay server sends the requests ahead of training
ones, to workers with room, within `eval.max_share` of the slots; the first and the last evaluation have them all.
Requests are not leases: they have a table of their own in the replay server and are issued again when a worker dies.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from statistics import fmean

from asyncdapo.controller.config import EvalConfig
from asyncdapo.controller.sampled import avg_at_k
from asyncdapo.messages import EvalAnswer, EvalRequest, Prompt, Sampling, sample_seed

EVAL_SEED = 0xE7A1
"""Keeps the seeds of evaluation apart from those of training prompts; the same in every evaluation of a run, so that
two points of the curve differ by their weights and by little else."""

Ask = Callable[[list[EvalRequest], float], Awaitable[list[EvalAnswer]]]


class Evaluation:
    """Makes the requests of one evaluation and the metrics of its answers."""

    def __init__(
        self, config: EvalConfig, prompts: Sequence[Prompt], *, chunk: int, max_tokens: int, seed: int, ask: Ask
    ) -> None:
        self.config, self.prompts, self.chunk, self.ask = config, prompts, chunk, ask
        self.max_tokens = max_tokens
        self.seed = sample_seed(seed, EVAL_SEED)
        self.request_ids = itertools.count(1)

    async def run(self, *, greedy: bool, share: float) -> dict[str, float]:
        """Sampled accuracy over `num_prompts`, greedy accuracy over `num_greedy_prompts` when asked for."""
        config = self.config
        sampled = Sampling(
            temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_tokens=self.max_tokens
        )
        requests = self._requests(self.prompts[: config.num_prompts], sampled)
        num_sampled = len(requests)
        if greedy:
            greedily = Sampling(temperature=0.0, max_tokens=self.max_tokens)
            requests += self._requests(self.prompts[: config.num_greedy_prompts], greedily)
        if not requests:
            return {}
        answers = await self.ask(requests, share)
        num_first = sum(len(request.prompts) for request in requests[:num_sampled])
        metrics = summarise(answers[:num_first]) if num_first else {}
        if answers[num_first:]:
            metrics["eval/greedy_accuracy"] = summarise(answers[num_first:])["eval/accuracy"]
        return metrics

    def _requests(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[EvalRequest]:
        chunks = [prompts[at : at + self.chunk] for at in range(0, len(prompts), self.chunk)]
        return [
            EvalRequest(request_id=next(self.request_ids), seed=self.seed, sampling=sampling, prompts=list(chunk))
            for chunk in chunks
        ]


def summarise(answers: Sequence[EvalAnswer]) -> dict[str, float]:
    """Means over the answers, and the versions that produced them."""
    num = len(answers)
    return {
        "eval/accuracy": fmean(avg_at_k([[answer.acc] for answer in answers], k=1)),
        "eval/num_prompts": num,
        "eval/response_tokens_mean": sum(answer.num_tokens for answer in answers) / num,
        "eval/truncated_ratio": sum(answer.finish_reason == "length" for answer in answers) / num,
        "eval/version_min": min(answer.version_min for answer in answers),
        "eval/version_max": max(answer.version_max for answer in answers),
    }
