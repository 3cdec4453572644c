"""Samples batches as a run does, with weights of any version, in this process.

In: weights, and where in the stream of prompts to begin. Out: groups that the filter has kept, with their payloads; the
accuracy on held-out prompts. All that is used is the product's: the torch engine, the verifier, the filter.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from asyncdapo.config.config import Config, load_config
from asyncdapo.messages import Group, Lease, Prompt
from asyncdapo.model.tokenizer import load_tokenizer
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.replay.core.filter import judge
from asyncdapo.reward.judge import read_verdict
from asyncdapo.reward.registry import make_verifier
from asyncdapo.reward.scorer import Scale
from asyncdapo.reward.wire import Verdict
from asyncdapo.rollout.engine import Request, Sample
from asyncdapo.rollout.episodes import Episode, SampledContext, turn_of
from asyncdapo.rollout.groups import build_group
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine
from asyncdapo.seeds import eval_seed, sample_seed
from asyncdapo.transport.payload import Payload
from benchmarks.staleness_study.long_chains import LongChains

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def quickstart_config(overrides: Sequence[str]) -> Config:
    """The quickstart's, for a process that is no run."""
    return load_config(CONFIGS / "quickstart.yaml", [f"model.path={CONFIGS / 'models' / 'chain_start'}", *overrides])


@dataclass(frozen=True)
class Sampled:
    """The kept groups of one batch, of one version."""

    groups: list[Group]
    payloads: list[Payload]
    next_prompt: int
    """Where the stream goes on: prompts of surplus groups are used up."""
    seconds: float
    kept_ratio: float


class Sampler:
    """Samples and judges with weights of any version. Of version 0 it remembers what it has sampled."""

    def __init__(self, task: str, seed: int, num_eval: int) -> None:
        self.config = quickstart_config([f"run.seed={seed}", "rollout.device=cpu"])
        config, files = self.config, self.config.model.files
        tokenizer = load_tokenizer(config.model.tokenizer_files)
        table = LongChains(seed) if task == "long" else open_task(config.prompts, num_eval=num_eval, seed=seed)
        self._stream = PromptStream(config.prompts, table, tokenizer.prompt_encoder(False), seed)
        self._decode, self._verify = tokenizer.decode, make_verifier(config.reward.verifier)
        self._scale = Scale(config.reward, config.rollout.max_response_length)
        self._loop = asyncio.new_event_loop()
        max_prompt_length = config.prompts.max_prompt_length
        self._engine = TorchEngine(str(files.fetch()), config.rollout, max_prompt_length=max_prompt_length)
        self._loop.run_until_complete(self._engine.start())
        self._of_version_0: list[Sampled] = []
        self._accuracy_of_version_0: float | None = None

    def load(self, version: int, weights: dict[str, torch.Tensor]) -> None:
        self._loop.run_until_complete(self._engine.load_weights(version, weights))

    def stop(self) -> None:
        self._loop.run_until_complete(self._engine.stop())
        self._loop.close()

    def batch(self, number: int, first_prompt: int, version: int) -> Sampled:
        """Batch `number` of a run, from 1, with the weights of `version`, which are loaded."""
        if version:
            return self._sample(first_prompt)
        if len(self._of_version_0) < number:
            self._of_version_0.append(self._sample(first_prompt))
        return self._of_version_0[number - 1]

    def accuracy(self, version: int, num_prompts: int) -> float:
        """On held-out prompts, one completion each, at temperature 1."""
        if version == 0 and self._accuracy_of_version_0 is not None:
            return self._accuracy_of_version_0
        prompts = self._stream.eval_prompts(num_prompts)
        found = self._generate([(prompt, [eval_seed(self.config.run.seed, prompt.prompt_id, 0)]) for prompt in prompts])
        rates = [self._verdicts(prompt, samples)[0].value for prompt, samples in zip(prompts, found, strict=True)]
        if version == 0:
            self._accuracy_of_version_0 = mean(rates)
        return mean(rates)

    def _sample(self, first_prompt: int) -> Sampled:
        """In the order of the stream until there are enough groups that the filter keeps."""
        began_s, wanted = time.process_time(), self.config.replay.prompts_per_step
        kept: list[tuple[Group, Payload]] = []
        next_prompt = first_prompt
        while len(kept) < wanted:
            few = math.ceil(1.5 * (wanted - len(kept)))
            prompts = [self._stream.prompt_at(next_prompt + place) for place in range(few)]
            next_prompt += few
            kept += [one for one in self._groups([prompt for prompt in prompts if prompt]) if self._keeps(one[0])]
        kept_ratio = len(kept) / (next_prompt - first_prompt)
        groups, payloads = zip(*kept[:wanted], strict=True)
        seconds = time.process_time() - began_s
        return Sampled(list(groups), list(payloads), next_prompt, seconds, kept_ratio)

    def _groups(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Group, Payload]]:
        size, run_seed = self.config.rollout.group_size, self.config.run.seed
        leases = [
            Lease(
                lease_id=prompt.prompt_id,
                branch=0,
                attempt=0,
                group_size=size,
                seed=sample_seed(run_seed, prompt.prompt_id),
                prompt=prompt,
            )
            for prompt in prompts
        ]
        wanted = [(lease.prompt, [sample_seed(lease.seed, number) for number in range(size)]) for lease in leases]
        for lease, samples in zip(leases, self._generate(wanted), strict=True):
            verdicts = self._verdicts(lease.prompt, samples)
            scores = self._scale.scores(verdicts, [len(one.token_ids) for one in samples], lease.seed)
            episodes = [
                Episode(
                    contexts=[SampledContext(turns=[turn_of(lease.prompt.token_ids, sample, 0)])],
                    finish_reason=sample.finish_reason,
                )
                for sample in samples
            ]
            yield build_group(lease, 0, episodes, scores, 0.0)

    def _keeps(self, group: Group) -> bool:
        metrics = {"acc": [completion.metrics["acc"] for completion in group.completions]}
        return judge(self.config.filter, metrics, group.num_loss_tokens) == "kept"

    def _verdicts(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        said = [read_verdict(self._verify(self._decode(one.token_ids), prompt.answer)) for one in samples]
        return [verdict for verdict in said if isinstance(verdict, Verdict)]

    def _generate(self, wanted: Sequence[tuple[Prompt, list[int]]]) -> list[list[Sample]]:
        sampling = self.config.rollout.sampling(self.config.rollout.max_response_length)
        requests = [Request(prompt_ids=prompt.token_ids, seeds=seeds, sampling=sampling) for prompt, seeds in wanted]
        return self._loop.run_until_complete(self._all(requests))

    async def _all(self, requests: Sequence[Request]) -> list[list[Sample]]:
        return await asyncio.gather(*map(self._engine.generate, requests))
