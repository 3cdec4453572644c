"""Models that checks build: random weights in a known shape, with a tokenizer that has a word for every id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.learner_step.options import quickstart_model
from benchmarks.learner_step.shapes import SHAPES
from benchmarks.learner_step.worker import build

SMALL: dict[str, Any] = SHAPES["qwen2.5-0.5b"] | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
"""Replaces `SHAPES["qwen2.5-0.5b"]` without a GPU."""
SPREAD = 0.04
"""Standard deviation of random weights: twice the usual, so that two models differ by much more than rounding."""


def made(shape: dict[str, Any], folder: Path, seed: int = 0) -> Path:
    """A model's directory. Its first words are those of the quickstart, so that its task can be read."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    build(shape | {"initializer_range": SPREAD}, folder, quickstart_model(), seed=seed, device=device)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"<w{number}>": number for number in range(len(words), shape["vocab_size"])}
    file.write_text(json.dumps(tokenizer))
    return folder
