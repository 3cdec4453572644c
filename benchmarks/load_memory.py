"""Host memory of loading a model on several ranks: the rise of each one's unique bytes, summed, over the model's size.

    .venv/bin/python -m benchmarks.load_memory --mib 1024 --ranks 4

A made model in float32, of blocks of 20 MiB; each rank is a process with one shard. Unique bytes (USS) are sampled
every 20 ms during the load, without the check of the model behind it, which gathers weights to compute with them.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from asyncdapo.learner.config import LearnerConfig
from asyncdapo.learner.model import model as loading
from asyncdapo.learner.step.ranks import Ranks
from asyncdapo.model.files import ModelFiles
from tests.learner.ranks import in_processes, with_shards

BLOCK_MIB = 20
HIDDEN = 512


def make_model(directory: Path, mib: int) -> None:
    """Of `mib` MiB in float32: blocks of about 20 MiB, a small vocabulary."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=(BLOCK_MIB * 2**18 - 4 * HIDDEN**2) // (3 * HIDDEN),
        num_hidden_layers=mib // BLOCK_MIB,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def load(ranks: Ranks, path: str) -> tuple[int, int]:
    """Rise of this rank's unique bytes: at its peak, and when all is loaded."""
    config = LearnerConfig(device="cpu", ranks=ranks.num_ranks, shards=ranks.num_ranks, reshard_after_forward=True)
    cpu, process, samples, done = torch.device("cpu"), psutil.Process(), [], threading.Event()
    mesh = with_shards(ranks, ranks.num_ranks).mesh(cpu)
    before = process.memory_full_info().uss

    def sample() -> None:
        while not done.is_set():
            samples.append(process.memory_full_info().uss)
            time.sleep(0.02)

    sampler = threading.Thread(target=sample)
    sampler.start()
    loading.check_policy = lambda *_: None  # it gathers a block at a time, which is no part of the load
    policy = loading.load_policy(
        ModelFiles(path), mesh, config, device=cpu, dtype=torch.float32, temperature=1.0, trained=True
    )
    done.set()
    sampler.join()
    assert policy.num_shards == ranks.num_ranks
    return max(samples) - before, process.memory_full_info().uss - before


def measure(mib: int, num_ranks: int) -> tuple[float, float, float]:
    """MiB of the model, of all peaks, and when loaded."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), mib)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        outcomes = in_processes(num_ranks, load, folder)
    peak, loaded = (sum(column) for column in zip(*outcomes, strict=True))
    return size / 2**20, peak / 2**20, loaded / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the model")
    parser.add_argument("--ranks", type=int, default=4, help="processes, a shard each")
    options = parser.parse_args()
    size, peak, loaded = measure(options.mib, options.ranks)
    print(
        f"model {size:.0f} MiB, {options.ranks} ranks: peaks {peak:.0f} MiB ({peak / size:.2f} of the model), ", end=""
    )
    print(f"loaded {loaded:.0f} MiB ({loaded / size:.2f})")


if __name__ == "__main__":
    main()
