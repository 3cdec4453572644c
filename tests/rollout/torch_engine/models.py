"""Small random Hugging Face models with sharp predictions, and what they say of a sampled sequence."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Limits, Request, Sample
from asyncdapo.rollout.torch_engine.checkpoint import read_checkpoint
from asyncdapo.rollout.torch_engine.compiled.compiled_model import fastest_model
from asyncdapo.rollout.torch_engine.runner import Runner
from asyncdapo.rollout.torch_engine.scheduler import Job
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine

VOCAB_SIZE = 61
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SHAPES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 24},
    "qwen2.5": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": ROPE | {"rope_theta": 1e6}},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1},
    "linear rope": {"model_type": "llama", "rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {
        "model_type": "llama",
        "rope_parameters": ROPE
        | {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn rope": {
        "model_type": "qwen2",
        "rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
}


def random_model(shape: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """Weights scaled until the next token depends on far tokens and its mean entropy is below half of log V."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rope_parameters": ROPE,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(**(sizes | SHAPES[shape] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.5)
            else:
                weight.normal_(0, 0.5 if "embed" in name or "lm_head" in name else 0.3)
    return model


def saved(model: PreTrainedModel, directory: Path, **options) -> str:
    model.save_pretrained(directory, **options)
    return str(directory)


def engine_for(
    path: str, *, slots: int = 4, max_response_length: int = 48, max_prompt_length: int = 32, stop=(), **config
) -> TorchEngine:
    settings = RolloutConfig(slots=slots, max_response_length=max_response_length, device="cpu", **config)
    return TorchEngine(path, settings, max_prompt_length=max_prompt_length, stop_token_ids=stop)


def request(length: int, seeds, prompt_seed: int = 0, **sampling) -> Request:
    """A random prompt of this length."""
    generator = torch.Generator().manual_seed(1000 * length + prompt_seed)
    prompt = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
    return Request(prompt_ids=prompt, seeds=list(seeds), sampling=Sampling(**({"max_tokens": 24} | sampling)))


@torch.no_grad()
def logprobs_of(
    model: PreTrainedModel, asked: Request, sample: Sample, response_shift: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [T] of a response by a whole forward pass, and the entropies [T] behind them.

    `response_shift` moves the response's positions away from the prompt's. (Moving all positions changes nothing in a
    rotary model.)
    """
    ids = torch.tensor([[*asked.prompt_ids, *sample.token_ids.tolist()]])
    positions = torch.arange(ids.shape[1])[None]
    positions[:, len(asked.prompt_ids) :] += response_shift
    logits = model(ids, position_ids=positions).logits[0, len(asked.prompt_ids) - 1 : -1].float()
    logprobs = (logits / (asked.sampling.temperature or 1.0)).log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, torch.tensor(sample.token_ids, dtype=torch.int64)[:, None])[:, 0], entropies


def largest_difference(model: PreTrainedModel, asked: Request, sample: Sample, response_shift: int = 0) -> float:
    reference, _ = logprobs_of(model, asked, sample, response_shift)
    return (reference - torch.from_numpy(sample.logprobs)).abs().max().item()


def generate_through_updates(models, directory, requests, **config) -> list[list[Sample]]:
    """Samples of the requests, token by token in this thread. The first model's weights are version 0; the others'
    come between two tokens, after equal shares of all tokens."""
    length = max(asked.sampling.max_tokens for asked in requests)
    settings = RolloutConfig(max_response_length=length, device="cpu", **config)
    checkpoint = read_checkpoint(saved(models[0], directory))
    longest = settings.max_response_length
    limits = Limits(
        max_prompt_length=32,
        max_response_length=longest,
        max_context=32 + longest,
        vocab_size=checkpoint.shape.vocab_size,
    )
    model = fastest_model(checkpoint, settings.slots, limits.max_context, torch.float32, torch.device("cpu"), 1)
    weights = [model.new_weights() for _ in models]
    for each, source in zip(weights, models, strict=True):
        each.fill(source.state_dict())
    runner = Runner(model, settings, limits, frozenset(), weights[0])
    jobs = [Job(asked) for asked in requests]
    total = sum(asked.sampling.max_tokens * len(asked.seeds) for asked in requests)
    with torch.inference_mode():
        for job in jobs:
            runner.add(job)
        while runner.has_work:
            runner.step()
            version = runner.version + 1
            if version < len(models) and runner.counters.tokens >= total * version / len(models):
                assert runner.swap(version, weights[version]) is weights[version - 1]
    return [job.samples for job in jobs]
