"""A small model in several versions, and an engine for it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.vllm_engine.vllm_engine import VllmEngine

from ..torch_engine.models import random_model, saved

NUM_VERSIONS = 4
STOP_TOKEN_IDS = [3, 8]
MAX_PROMPT_LENGTH, MAX_RESPONSE_LENGTH = 300, 400
TRANSFER, WEIGHTS_VARIABLE = "files", "TEST_WEIGHTS"
WORKER_EXTENSION = "tests.rollout.vllm_engine.transfers.Worker"


def model_of(version: int) -> PreTrainedModel:
    """Qwen2's shape, with heads of a size that vLLM knows on CPU."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return random_model("qwen2.5", seed=version, tie_word_embeddings=False, **sizes)


def save_versions(directory: Path) -> str:
    """A checkpoint of version 0, and the later versions where `transfers.py` looks for them; the checkpoint's path."""
    for version in range(1, NUM_VERSIONS):
        save_file(model_of(version).state_dict(), directory / f"{version}.safetensors")
    os.environ[WEIGHTS_VARIABLE] = str(directory)
    return saved(model_of(0), directory / "checkpoint")


def vllm_engine(path: str, *, stop: list[int] | None = None, **config) -> VllmEngine:
    settings = {"slots": 8, "group_size": 4, "max_response_length": MAX_RESPONSE_LENGTH} | config
    return VllmEngine(
        path,
        RolloutConfig(engine="vllm", **settings),
        max_prompt_length=MAX_PROMPT_LENGTH,
        transfer=TRANSFER,
        worker_extension=WORKER_EXTENSION,
        stop_token_ids=[] if stop is None else stop,
    )


def differences(token_ids, logprobs, versions, prompt_ids, labels) -> dict[int, float]:
    """Largest |engine − Hugging Face| over the tokens of each version; `labels` says whose weights to compare with."""
    ids = torch.tensor([[*prompt_ids, *token_ids]])
    got = torch.tensor(logprobs)
    sampled = torch.tensor(token_ids)[:, None]
    found: dict[int, float] = {}
    at = 0
    for version, num_tokens in versions:
        with torch.no_grad():
            logits = labels[version](ids).logits[0, len(prompt_ids) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, sampled)[:, 0]
        span = slice(at, at + num_tokens)
        found[version] = max(found.get(version, 0.0), (wanted[span] - got[span]).abs().max().item())
        at += num_tokens
    return found
