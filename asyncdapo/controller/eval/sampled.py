"""What several samples of each problem say about a model: avg@k, pass@k, maj@k.

In: verdicts (0..1, usually 0 or 1) and predictions of the samples of each problem; or the answers of an evaluation.
Out: one number for each problem, of which the value of the evaluation is the mean; or all the means by name. For pass@k
a sample is right when its verdict is 1. Does not own: sampling, verdicts.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from asyncdapo.eval_messages import EvalAnswer


def avg_at_k(correct: Sequence[Sequence[float]], k: int) -> list[float]:
    """Mean verdict of the first k samples of each problem (avg@32 of DAPO, §4.1). With k = 1 it is accuracy."""
    return [math.fsum(_first(verdicts, k)) / k for verdicts in correct]


def pass_at_k(num_samples: Sequence[int], num_correct: Sequence[int], k: int) -> list[float]:
    """Chance that at least one of k samples of each problem is right: `1 − C(n − c, k) / C(n, k)`, the unbiased
    estimate from n samples with c right ones (Chen et al., 2021, arXiv 2107.03374, eq. 1).

    In whole numbers up to the one division, so exact to the last digit for any n. Raises ValueError for k > n.
    """
    chances = []
    for n, c in zip(num_samples, num_correct, strict=True):
        if not (1 <= k <= n and 0 <= c <= n):
            raise ValueError(f"pass@{k} of {n} samples with {c} right ones")
        choices = math.comb(n, k)
        chances.append((choices - math.comb(n - c, k)) / choices)
    return chances


def maj_at_k(
    predictions: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[float]], k: int
) -> list[float]:
    """Verdict of the most frequent prediction among the first k samples of each problem (self-consistency, Wang et al.,
    2022, arXiv 2203.11171): that of its first sample. Of equally frequent ones the first that was seen is taken. A
    sample without a prediction, None, has no vote; a problem without votes is not solved."""
    verdicts = []
    for predicted, right in zip(predictions, correct, strict=True):
        votes = Counter(vote for vote in _first(predicted, k) if vote is not None)
        winner = max(votes, key=votes.__getitem__, default=None)
        verdicts.append(0.0 if winner is None else float(right[predicted.index(winner)]))
    return verdicts


def _first(samples: Sequence, k: int) -> Sequence:
    """Raises ValueError when there are fewer than k, or k is not positive."""
    if not 1 <= k <= len(samples):
        raise ValueError(f"{k} of {len(samples)} samples")
    return samples[:k]


# ----------------------------------------------------------------------------------------- the answers of an evaluation


@dataclass(frozen=True, kw_only=True)
class AtK:
    """What k samples of each prompt come to: means over the prompts."""

    k: int
    avg: float
    avg_stderr: float
    """Standard error of `avg`, from the spread between prompts: how far other prompts of this kind would move it. NaN
    for a single one."""
    pass_: float
    maj: float | None
    """None when no sample has a prediction."""


def at_k(answers: Iterable[EvalAnswer], k: int) -> AtK:
    """avg@k and maj@k of each prompt's first k samples, pass@k from all of them. Raises ValueError when a prompt has
    fewer than k, or there is none."""
    prompts = _by_prompt(answers)
    verdicts = [[answer.acc for answer in samples] for samples in prompts]
    predictions = [[answer.pred for answer in samples] for samples in prompts]
    has_any = any(pred is not None for samples in predictions for pred in samples)
    averages = avg_at_k(verdicts, k)
    num_right = [sum(acc == 1 for acc in samples) for samples in verdicts]
    return AtK(
        k=k,
        avg=fmean(averages),
        avg_stderr=stdev(averages) / math.sqrt(len(averages)) if len(averages) > 1 else math.nan,
        pass_=fmean(pass_at_k(list(map(len, verdicts)), num_right, k)),
        maj=fmean(maj_at_k(predictions, verdicts, k)) if has_any else None,
    )


def table(answers: Sequence[EvalAnswer]) -> list[AtK]:
    """For k = 1, 2, 4, … and as many as every prompt has samples. Without answers there are no rows."""
    most = _num_samples(answers)
    return [at_k(answers, k) for k in sorted({most, *(1 << power for power in range(most.bit_length()))} - {0})]


def summarise(answers: Sequence[EvalAnswer]) -> dict[str, float]:
    """The metrics of an evaluation: accuracy over all samples and the same with several of each prompt, environments'
    own numbers, lengths, and the versions that sampled them. Prompts with more samples than others weigh no more.
    Raises ValueError for none."""
    k = _num_samples(answers)
    at = at_k(answers, k)
    metrics = {"eval/accuracy": at.avg, "eval/accuracy_stderr": at.avg_stderr}
    if k > 1:
        metrics[f"eval/pass@{k}"] = at.pass_
        if at.maj is not None:
            metrics[f"eval/maj@{k}"] = at.maj
    if any(answer.sampled for answer in answers):
        metrics["eval/turns_mean"] = fmean(answer.num_turns for answer in answers)
    for name in sorted({name for answer in answers for name in answer.metrics}):
        metrics[f"eval/metrics/{name}"] = fmean(one.metrics[name] for one in answers if name in one.metrics)
    return metrics | {
        "eval/num_prompts": len({answer.prompt_id for answer in answers}),
        "eval/response_tokens_mean": fmean(answer.num_tokens for answer in answers),
        "eval/response_tokens_max": max(answer.num_tokens for answer in answers),
        "eval/failed_answers": sum(answer.failed for answer in answers),
        "eval/truncated_ratio": fmean(answer.finish_reason == "length" for answer in answers),
        "eval/version_min": min(answer.version_min for answer in answers),
        "eval/version_max": max(answer.version_max for answer in answers),
    }


def _by_prompt(answers: Iterable[EvalAnswer]) -> list[list[EvalAnswer]]:
    """The samples of each prompt, both in their order."""
    prompts: dict[int, list[EvalAnswer]] = defaultdict(list)
    for answer in sorted(answers, key=lambda answer: (answer.prompt_id, answer.sample)):
        prompts[answer.prompt_id].append(answer)
    return list(prompts.values())


def _num_samples(answers: Iterable[EvalAnswer]) -> int:
    """That every prompt has."""
    return min(map(len, _by_prompt(answers)), default=0)
