"""Host memory of loading a model on several ranks: the rise of each one's unique bytes, summed, over the model's size.

    .venv/bin/python -m benchmarks.load_memory --mib 1024 --ranks 4

A made model in float32; each rank is a process with one shard. Unique bytes (USS) are sampled every 10 ms during the
load, the check of the model behind it included, which gathers a block at a time. A small model was loaded before, so
that what is imported on the way isn't counted.
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
from asyncdapo.learner.model import sharding
from asyncdapo.learner.model.model import load_policy
from asyncdapo.learner.step.ranks import Ranks
from asyncdapo.model.files import ModelFiles
from tests.learner.ranks import in_processes, with_shards

HIDDEN = 512


def make_model(directory: Path, mib: int, block_mib: int) -> str:
    """Of `mib` MiB in float32: blocks of about `block_mib`, which is 6 at least, a small vocabulary."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=(block_mib * 2**18 - 4 * HIDDEN**2) // (3 * HIDDEN),
        num_hidden_layers=mib // block_mib,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


def load(ranks: Ranks, small: str, path: str) -> tuple[int, int]:
    """Rise of this rank's unique bytes: at its peak, and when all is loaded."""
    sharding.GATHERED_BYTES = 0
    config = LearnerConfig(device="cpu", ranks=ranks.num_ranks, shards=ranks.num_ranks, reshard_after_forward=True)
    cpu, process, samples, done = torch.device("cpu"), psutil.Process(), [], threading.Event()
    mesh = with_shards(ranks, ranks.num_ranks).mesh(cpu)
    like = {"device": cpu, "dtype": torch.float32, "temperature": 1.0, "trained": True}
    load_policy(ModelFiles(small), mesh, config, **like)
    before = process.memory_full_info().uss

    def sample() -> None:
        while not done.is_set():
            samples.append(process.memory_full_info().uss)
            time.sleep(0.01)

    sampler = threading.Thread(target=sample)
    sampler.start()
    policy = load_policy(ModelFiles(path), mesh, config, **like)
    done.set()
    sampler.join()
    assert policy.num_shards == ranks.num_ranks
    return max(samples) - before, process.memory_full_info().uss - before


def measure(mib: int, num_ranks: int, block_mib: int) -> tuple[float, float, float]:
    """MiB of the model, of all peaks, and when loaded."""
    with tempfile.TemporaryDirectory() as folder:
        small = make_model(Path(folder, "small"), block_mib, block_mib)
        path = make_model(Path(folder, "model"), mib, block_mib)
        size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        outcomes = in_processes(num_ranks, load, small, path)
    peak, loaded = (sum(column) for column in zip(*outcomes, strict=True))
    return size / 2**20, peak / 2**20, loaded / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the model")
    parser.add_argument("--ranks", type=int, default=4, help="processes, a shard each")
    parser.add_argument("--block-mib", type=int, default=20, help="size of a block; at least 6")
    options = parser.parse_args()
    size, peak, loaded = measure(options.mib, options.ranks, options.block_mib)
    print(
        f"model {size:.0f} MiB, {options.ranks} ranks: peaks {peak:.0f} MiB ({peak / size:.2f} of the model), ", end=""
    )
    print(f"loaded {loaded:.0f} MiB ({loaded / size:.2f})")


if __name__ == "__main__":
    main()
