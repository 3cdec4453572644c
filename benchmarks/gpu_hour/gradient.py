"""The learner's gradient against float64: grouped heads, shared prompts, several micro-batches, and the kernels of the
device, which on a GPU in bfloat16 are those for segments of variable length.

The reference is plain Hugging Face in float64, a completion at a time. In float32 the learner has to be within 1e-4 of
it; in bfloat16 within twice the distance of a plain padded step under autocast, since both round.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from asyncdapo.algorithm.dapo import group_advantage
from benchmarks.gpu_hour.check import Figures, hold, main
from benchmarks.gpu_hour.models import SMALL, made
from benchmarks.learner_step import batch
from benchmarks.learner_step.lengths import draw_lengths
from benchmarks.learner_step.padded import CLIP_HIGH, CLIP_LOW, PaddedStep
from benchmarks.learner_step.shapes import SHAPES
from benchmarks.learner_step.worker import our_gradient

MIDDLE = SHAPES["qwen2.5-0.5b"] | {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
"""Heads of 64 numbers, four of them to one key and value head, as in Qwen2.5."""
FLOAT32_APART, BFLOAT16_FACTOR, BFLOAT16_LEAST = 1e-4, 2.0, 0.01
NOISE = 0.05
"""Standard deviation of the log ratios."""

Gradients = dict[str, torch.Tensor]


def measure(figures: Figures, args: Namespace) -> None:
    device = "cpu" if args.cpu else "cuda"
    shape, lengths, max_tokens = (SMALL, "mixed:64", 256) if args.cpu else (MIDDLE, "mixed:512", 2048)
    with tempfile.TemporaryDirectory() as folder:
        path = str(made(shape, Path(folder) / "model"))
        file = batch.make(draw_lengths(lengths, 4, 4, seed=0), shape["vocab_size"], seed=0)
        common = {"device": device, "lr": 1e-6, "tokens_per_microbatch": max_tokens}
        sampled = PaddedStep(path, file, dtype="float32", **common).logprobs()
        noise_R = NOISE * torch.randn(len(sampled), generator=torch.Generator().manual_seed(0)).numpy()
        rewards = torch.from_numpy(file.rewards_N).view(-1, file.group_size)
        advantages_N = torch.cat([group_advantage(rewards_G) for rewards_G in rewards]).numpy()
        file = file.sampled_by(sampled - noise_R, advantages_N)

        reference = _reference(path, file, device)
        padded = PaddedStep(path, file, dtype="bfloat16", **common)
        padded.accumulate()
        figures.add(padded_bfloat16=_apart({n: p.grad for n, p in padded.model.named_parameters()}, reference))
        spec = {"model": path, "threads": 1, "checkpointing": "none", **common}
        for dtype, compiled in (("float32", False), ("bfloat16", False), *([] if args.cpu else [("bfloat16", True)])):
            found = our_gradient({**spec, "dtype": dtype, "compile": compiled}, file)
            name = f"ours_{dtype}" + "_compiled" * compiled
            figures.add(**{name: _apart(dict(zip(reference, found, strict=True)), reference)})
    _judge(figures)


def _judge(figures: Figures) -> None:
    found = figures.found
    apart = {name: found[name]["all"] for name in found}
    figures.add(summary=", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    hold(apart["ours_float32"] <= FLOAT32_APART, f"float32 is {apart['ours_float32']:.1e} from float64")
    most = max(BFLOAT16_LEAST, BFLOAT16_FACTOR * apart["padded_bfloat16"])
    for name, value in apart.items():
        hold("float32" in name or value <= most, f"{name} is {value:.1e} from float64, at most {most:.1e} was expected")


def _reference(path: str, file: batch.BatchFile, device: str) -> Gradients:
    """The clipped loss as a token mean, written down once more."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").to(device)
    starts = [0, *file.num_response_N.cumsum()]
    for row, (prompt, response) in enumerate(file.sequences()):
        tokens_T = torch.tensor([*prompt, *response], device=device, dtype=torch.int64)
        logits_TV = model(tokens_T[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp_T = logits_TV.log_softmax(-1).gather(-1, tokens_T[len(prompt) :, None])[:, 0]
        sampled_T = torch.from_numpy(file.logprobs_R[starts[row] : starts[row + 1]]).to(logp_T)
        ratio_T, advantage = (logp_T - sampled_T).exp(), file.advantages_N[row]
        gain_T = torch.minimum(ratio_T * advantage, ratio_T.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
        (-gain_T.sum() / int(file.num_response_N.sum())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _apart(found: Gradients, reference: Gradients) -> dict[str, object]:
    """Norm of the difference over the norm of the reference: of all parameters, and of the worst one."""
    differences = {name: (found[name].double() - reference[name]).norm() for name in reference}
    norms = {name: gradient.norm() for name, gradient in reference.items()}
    whole = (_norm(differences) / _norm(norms)).item()
    each = {name: (differences[name] / norms[name].clamp(min=1e-30)).item() for name in reference}
    worst = max(each, key=each.__getitem__)
    return {"all": whole, "worst": each[worst], "worst_name": worst}


def _norm(parts: Gradients) -> torch.Tensor:
    return torch.stack(list(parts.values())).norm()


if __name__ == "__main__":
    main(measure)
