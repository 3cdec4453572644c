"""Weights that arrive while vLLM generates: what each part of a publish costs, and that all engines get the same.

    python benchmarks/weights_in_flight.py [--model DIR | --shape 0.5b] [--workers 3] [--publishes 20] [--slots 32]
                                           [--backend auto] [--dtype float32] [--on-update keep]

Each worker is an engine that always has `--slots` requests in flight; the learner is this process. A version is the
model's weights with a little noise; `--shape` makes random ones in the shape of a Qwen2.5. One table: medians and
maxima over publishes and workers of receive (generation continues), pause, load and resume, and tokens sampled per
second with and without versions arriving. It fails unless the weights of all engines are equal after every publish, and
differ from those before.

On a single GPU `--backend nccl` tells NCCL that every process is on a host of its own: this tests the path, not its
speed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Request
from asyncdapo.rollout.vllm_engine.vllm_engine import VllmEngine
from asyncdapo.transport.shared_memory import device_name
from asyncdapo.weights.backend import choose_backend
from asyncdapo.weights.config import WeightsConfig
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receivers import TRANSFER, WORKER_RECEIVER, EngineReceiver
from asyncdapo.weights.sender import WeightSender

QUICKSTART = Path(__file__).parent.parent / "configs" / "models" / "chain_start"
TIMEOUT_S = 60.0
PROMPT_LENGTH, RESPONSE_LENGTH = 16, 128
NOISE = 0.001
QUIET_S = 2.0
"""How long tokens are counted without a publish."""
PARTS = ("receive_s", "pause_s", "load_s", "resume_s")
SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
"""Of Qwen2.5 (its config.json); both have 2 key-value heads, 151,936 words and tied embeddings."""


class Worker:
    """An engine under constant load, and its end."""

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        config = RolloutConfig(
            engine="vllm",
            slots=args.slots,
            max_response_length=RESPONSE_LENGTH,
            dtype=args.dtype,
            on_update=args.on_update,
            memory_fraction=args.memory_fraction,
        )
        self.engine = VllmEngine(
            model,
            config,
            max_prompt_length=PROMPT_LENGTH,
            transfer=TRANSFER,
            worker_extension=WORKER_RECEIVER,
            memory_fraction=args.memory_fraction,
            stop_token_ids=[],
        )
        self.end = EngineReceiver(self.engine.rpc, TIMEOUT_S)
        self._load: list[asyncio.Future] = []

    async def start(self, slots: int) -> None:
        await self.engine.start()
        self._load = [asyncio.ensure_future(self._ask(number)) for number in range(slots)]

    async def _ask(self, number: int) -> None:
        prompt = [1 + (number + place) % 60 for place in range(PROMPT_LENGTH)]
        sampling = Sampling(max_tokens=RESPONSE_LENGTH)
        while True:
            [sample] = await self.engine.generate(Request(prompt_ids=prompt, seeds=[number], sampling=sampling))
            assert len(sample.token_ids) == RESPONSE_LENGTH

    async def receive(self, version: int) -> dict[str, float]:
        began_s = time.perf_counter()
        await self.end.receive(version, 0)
        receive_s = time.perf_counter() - began_s
        return {"receive_s": receive_s, **asdict(await self.engine.load_weights(version, None))}

    async def digest(self) -> list[str]:
        return await self.engine.rpc("weights_digest")

    async def stop(self) -> None:
        for task in self._load:
            task.cancel()
        results = await asyncio.gather(*self._load, return_exceptions=True)
        await self.engine.stop()
        if failed := [result for result in results if not isinstance(result, asyncio.CancelledError)]:
            raise failed[0]


async def connect(workers: list[Worker], manifest: Manifest, device: torch.device, args: argparse.Namespace):
    names = [device_name(device), *[await worker.end.device() for worker in workers]]
    config = WeightsConfig(backend=args.backend)
    backend, reason = choose_backend(config, {f"rank {rank}": name for rank, name in enumerate(names)})
    group = WeightGroup.create_master("127.0.0.1", len(names), backend, TIMEOUT_S, device)
    joins = [
        worker.end.join(group.address, rank, len(names), backend, manifest) for rank, worker in enumerate(workers, 1)
    ]
    await asyncio.gather(asyncio.to_thread(group.connect), *joins)
    print(f"{backend}: {reason}")
    return WeightSender(group, manifest, config.bucket_mb << 20)


def made(shape: str, folder: str) -> str:
    """A model of random weights in this shape."""
    config = Qwen2Config(vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=True, **SHAPES[shape])
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


async def start(workers: list[Worker], args: argparse.Namespace) -> None:
    """On a GPU start them one after the other: vLLM would count what others allocate meanwhile as its own."""
    if args.learner_device == "cpu":
        await asyncio.gather(*(worker.start(args.slots) for worker in workers))
        return
    for number, worker in enumerate(workers):
        _pretend_host(args, f"engine-{number}")
        await worker.start(args.slots)
    _pretend_host(args, "learner")


def _pretend_host(args: argparse.Namespace, name: str) -> None:
    """NCCL refuses two processes on one GPU unless they are on different hosts."""
    if args.backend == "nccl":
        os.environ |= {"NCCL_HOSTID": name, "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}


async def measure(args: argparse.Namespace) -> dict[str, float]:
    """What the table shows: medians in milliseconds, and tokens a second."""
    device = torch.device(args.learner_device)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    manifest = Manifest.of(weights, getattr(torch, args.dtype))
    workers = [Worker(args.model, args) for _ in range(args.workers)]
    try:
        await start(workers, args)
        sender = await connect(workers, manifest, device, args)
        quiet = await rate(workers, asyncio.sleep(QUIET_S))
        parts: list[dict[str, float]] = []
        busy = await rate(workers, publish_all(args.publishes, workers, sender, weights, parts))
    finally:
        await asyncio.gather(*(worker.stop() for worker in workers))
    figures = {"tokens_s": quiet, "tokens_s_publishing": busy, "mib": manifest.num_bytes / 2**20}
    print(f"{args.workers} workers, {args.publishes} publishes of {manifest.num_bytes / 2**20:.1f} MiB, all equal")
    print(f"{'':10}{'median ms':>12}{'largest ms':>12}")
    for part in ("send_s", *PARTS):
        values = [1000 * report[part] for report in parts if part in report]
        figures[part.removesuffix("_s") + "_ms"] = statistics.median(values)
        print(f"{part.removesuffix('_s'):10}{statistics.median(values):12.1f}{max(values):12.1f}")
    print(f"tokens/s without a publish {quiet:,.0f}, with one after the other {busy:,.0f}")
    return {name: round(value, 1) for name, value in figures.items()}


async def publish_all(
    num: int, workers: list[Worker], sender: WeightSender, weights: dict[str, torch.Tensor], parts: list[dict]
) -> None:
    seen: set[str] = set()
    for version in range(1, num + 1):
        for weight in weights.values():
            weight.add_(NOISE * torch.randn_like(weight))
        receiving = [asyncio.ensure_future(worker.receive(version)) for worker in workers]
        report = await asyncio.to_thread(sender.send, version, weights)
        parts += [{"send_s": report.seconds}, *await asyncio.gather(*receiving)]
        digests = [await worker.digest() for worker in workers]
        assert all(digest == digests[0] for digest in digests), f"engines differ after version {version}: {digests}"
        assert digests[0][0] not in seen, f"version {version} changed nothing"
        seen.add(digests[0][0])


async def rate(workers: list[Worker], work) -> float:
    """Tokens a second of all workers during the work."""
    before, began_s = [worker.engine.gauges()["tokens"] for worker in workers], time.perf_counter()
    await work
    after = [worker.engine.gauges()["tokens"] for worker in workers]
    return (sum(after) - sum(before)) / (time.perf_counter() - began_s)


def run(argv: Sequence[str] | None = None) -> dict[str, float]:
    """As the command line says. Returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART))
    parser.add_argument("--shape", choices=SHAPES, help="instead of --model")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--publishes", type=int, default=20)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--backend", choices=["auto", "gloo", "nccl", "ipc"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--on-update", choices=["keep", "recompute"], default="keep")
    parser.add_argument("--memory-fraction", type=float, default=0.25, help="of the GPU, for each engine")
    parser.add_argument("--learner-device", default="cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            args.model = made(args.shape, folder)
        return asyncio.run(measure(args))


if __name__ == "__main__":
    run()
