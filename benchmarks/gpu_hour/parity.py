"""vLLM and the learner compute the same: before an update, after it, and token by token while it lands.

One engine and two learners, of two versions of one shape. Requests are in flight when version 1 arrives. The engine's
log-prob of each token has to equal that of the learner with the token's labelled version, and differ from the other's.
This shows that labels are right, that CUDA graphs use new weights, and that keys and values are computed again.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from asyncdapo.eval_messages import Sampling
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.step.learner import Learner
from asyncdapo.model.config import ModelConfig
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Request, Sample
from asyncdapo.rollout.vllm_engine.vllm_engine import VllmEngine
from asyncdapo.transport.shared_memory import device_name
from asyncdapo.weights.backend import choose_backend
from asyncdapo.weights.config import WeightsConfig
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receivers import TRANSFER, WORKER_RECEIVER, EngineReceiver
from asyncdapo.weights.sender import WeightSender
from benchmarks.gpu_hour.check import Figures, hold, main
from benchmarks.gpu_hour.models import SMALL, made
from benchmarks.learner_step.shapes import SHAPES

TIMEOUT_S = 60.0
NUM_PROMPT = 32
MEMORY_FRACTION = 0.4
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Most mean |engine - learner| in nats for the version on the label."""
RIGHT = 0.98
"""Least share of tokens that are nearer to the version on their label than to the other one."""
NEAR = 4
"""Tokens on each side of a change of version that are looked at apart."""

Pair = tuple[list[int], Sample]


def measure(figures: Figures, args: Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_compare(figures, args.cpu, Path(folder)))


async def _compare(figures: Figures, cpu: bool, folder: Path) -> None:
    shape, dtype = (SMALL, "float32") if cpu else (SHAPES["qwen2.5-0.5b"], "bfloat16")
    slots, num_tokens = (8, 200) if cpu else (64, 512)
    paths = [str(made(shape, folder / str(version), seed=version)) for version in (0, 1)]
    config = RolloutConfig(
        engine="vllm", slots=slots, max_response_length=num_tokens, dtype=dtype, on_update="recompute"
    )
    engine = VllmEngine(
        paths[0],
        config,
        max_prompt_length=NUM_PROMPT,
        transfer=TRANSFER,
        worker_extension=WORKER_RECEIVER,
        memory_fraction=MEMORY_FRACTION,
        stop_token_ids=[],
    )
    began_s = time.monotonic()
    await engine.start()
    figures.add(start_s=round(time.monotonic() - began_s, 1), dtype=dtype)
    try:
        learners = [_learner(path, cpu, dtype, num_tokens) for path in paths]
        prompts = np.random.default_rng(0).integers(1, shape["vocab_size"], (slots, NUM_PROMPT)).tolist()
        figures.add(before=_judged(await _sampled(engine, prompts, num_tokens // 4), learners))
        sender, end = await _connected(engine, learners[1], dtype)
        running = asyncio.ensure_future(_sampled(engine, prompts, num_tokens))
        already = engine.gauges()["tokens"]
        while engine.gauges()["tokens"] < already + slots * num_tokens / 4:
            await asyncio.sleep(0.005)
            hold(not running.done(), "all requests ended before the update")
        receiving = asyncio.ensure_future(end.receive(1, 0))
        report = await asyncio.to_thread(sender.send, 1, learners[1].weights())
        await receiving
        times = await engine.load_weights(1, None)
        figures.add(send_s=report.seconds, pause_s=times.pause_s, load_s=times.load_s, resume_s=times.resume_s)
        figures.add(during=_judged(await running, learners))
        figures.add(after=_judged(await _sampled(engine, prompts, num_tokens // 4), learners))
    finally:
        await engine.stop()
    _judge(figures, dtype)


def _learner(path: str, cpu: bool, dtype: str, num_tokens: int) -> Learner:
    device = "cpu" if cpu else "cuda"
    config = LearnerConfig(device=device, dtype=dtype, compile=False, tokens_per_microbatch=8192, threads=1)
    common = {"temperature": 1.0, "staleness_bound": 1, "max_response_length": num_tokens, "num_steps": 1, "seed": 0}
    return Learner(ModelConfig(path=path), LossConfig(), config, **common)


async def _sampled(engine: VllmEngine, prompts: list[list[int]], num_tokens: int) -> list[Pair]:
    """A completion of each prompt."""
    sampling = Sampling(max_tokens=num_tokens)
    requests = [Request(prompt_ids=prompt, seeds=[0], sampling=sampling) for prompt in prompts]
    answers = await asyncio.gather(*map(engine.generate, requests))
    return [(prompt, sample) for prompt, [sample] in zip(prompts, answers, strict=True)]


async def _connected(engine: VllmEngine, learner: Learner, dtype: str) -> tuple[WeightSender, EngineReceiver]:
    end = EngineReceiver(engine.rpc, TIMEOUT_S)
    names = [device_name(learner.device), await end.device()]
    config = WeightsConfig()
    backend, _ = choose_backend(config, {f"rank {rank}": name for rank, name in enumerate(names)})
    manifest = Manifest.of(learner.weights(), getattr(torch, dtype))
    group = WeightGroup.create_master("127.0.0.1", len(names), backend, TIMEOUT_S, learner.device)
    joining = end.join(group.address, 1, len(names), backend, manifest)
    await asyncio.gather(asyncio.to_thread(group.connect), joining)
    return WeightSender(group, manifest, config.bucket_mb << 20), end


def _judged(pairs: list[Pair], learners: list[Learner]) -> dict[str, float]:
    """Of all tokens together: how far they are from the version on their labels, and from the other one."""
    sequences = [(prompt, sample.token_ids) for prompt, sample in pairs]
    by_version = [np.concatenate(learner.logprobs(0, sequences)) for learner in learners]
    engine_T = np.concatenate([sample.logprobs for _, sample in pairs])
    labels_T = np.concatenate([np.repeat(*zip(*sample.versions, strict=True)) for _, sample in pairs])
    apart_VT = np.abs(engine_T - np.stack(by_version))
    places = np.arange(len(labels_T))
    own_T, other_T = apart_VT[labels_T, places], apart_VT[1 - labels_T, places]
    starts = np.cumsum([0, *(len(sample.token_ids) for _, sample in pairs)])
    changes = np.setdiff1d(np.flatnonzero(np.diff(labels_T)) + 1, starts)
    near = np.unique([change + step for change in changes for step in range(-NEAR, NEAR)]).astype(int)
    found = {
        "mean": own_T.mean(),
        "p99": np.quantile(own_T, 0.99),
        "max": own_T.max(),
        "other_mean": other_T.mean(),
        "right": (own_T < other_T).mean(),
        "num_changes": len(changes),
        "right_near_changes": (own_T < other_T)[near].mean() if len(near) else 1.0,
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _judge(figures: Figures, dtype: str) -> None:
    parts = {name: figures.found[name] for name in ("before", "during", "after")}
    means = ", ".join(f"{name} {part['mean']} (p99 {part['p99']})" for name, part in parts.items())
    during = parts["during"]
    figures.add(
        summary=f"vLLM up in {figures.found['start_s']} s; |engine - learner| {means} nats; "
        f"{during['num_changes']:.0f} in flight, labels right {during['right']:.1%}"
    )
    hold(during["num_changes"] > 0, "no request was in flight over the update")
    for name, part in parts.items():
        hold(part["mean"] <= TOLERANCE[dtype], f"{name}: {part['mean']} nats from the learner of the label: {part}")
        hold(part["other_mean"] > 3 * part["mean"], f"{name}: the other version is as near: {part}")
        for share in ("right", "right_near_changes"):
            hold(part[share] >= RIGHT - 0.1 * (dtype == "bfloat16"), f"{name}: labels are wrong ({share}): {part}")


if __name__ == "__main__":
    main(measure)
