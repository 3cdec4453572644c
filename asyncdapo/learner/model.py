"""The policy: a Hugging Face causal LM in fp32, its log-probs of given tokens, and its weights by name.

Log-probs are taken at the sampling temperature, as the rollout engine took its own, and without dropout. Vocabulary
logits are computed only at positions whose token bears loss. Does not own: gradients, optimizer, files of a checkpoint.

Shapes: B sequences, T tokens, N loss-bearing tokens of all sequences, H hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncdapo.errors import ConfigError
from asyncdapo.learner.model_path import KEY


def load_model(directory: Path, device: torch.device, key: str = KEY) -> PreTrainedModel:
    """The model of a directory in Hugging Face format, fp32, without dropout. Raises ConfigError, for the config's
    `key`, when it can't be trained."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ConfigError(key, f"can't be loaded: {error}", str(directory)) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(key, f"lacks {len(report['missing_keys'])} weights ({missing}…)", str(directory))
    model.eval().to(device)
    if not _logits_come_straight_from_the_head(model):
        problem = "scales or caps its logits after the output layer, which the learner doesn't do"
        raise ConfigError(key, problem, str(directory))
    return model


def token_logprobs(
    model: PreTrainedModel,
    tokens_BT: Tensor,
    mask_BT: Tensor,
    temperature: float,
    *,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token under `mask_BT` given the tokens before it, and the entropy (nats, without gradient unless
    asked for) of the distribution it was drawn from; both [B, T] and 0 outside the mask. `mask_BT[:, 0]` must be false.

    No attention mask: padding stands on the right, where causal attention can't see it from any token that counts.
    """
    hidden_BTH = model.base_model(tokens_BT, use_cache=False).last_hidden_state
    hidden_NH = hidden_BTH[:, :-1][mask_BT[:, 1:]]
    logits_NV = model.get_output_embeddings()(hidden_NH) / temperature
    logprobs_NV = logits_NV.log_softmax(-1)
    logprobs_N = logprobs_NV.gather(-1, tokens_BT[mask_BT][:, None])[:, 0]
    zeros_BT = logprobs_N.new_zeros(mask_BT.shape)
    logp_BT = zeros_BT.masked_scatter(mask_BT, logprobs_N)
    entropy_N = entropy(logprobs_NV if entropy_gradient else logprobs_NV.detach())
    entropy_BT = zeros_BT.masked_scatter(mask_BT, entropy_N)
    return logp_BT, entropy_BT


def entropy(logprobs_NV: Tensor) -> Tensor:
    """Entropy in nats of each row of log-probs, [N]."""
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Detached views of the live weights by their Hugging Face names, tied ones once: what a safetensors file has."""
    seen, weights = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor.detach()
    return weights


@torch.no_grad()
def _logits_come_straight_from_the_head(model: PreTrainedModel) -> bool:
    """Whether the output layer alone turns hidden states into logits, as `token_logprobs` takes it."""
    tokens_BT = torch.arange(8, device=model.device)[None]
    head_BTV = model.get_output_embeddings()(model.base_model(tokens_BT, use_cache=False).last_hidden_state)
    return torch.allclose(head_BTV, model(tokens_BT, use_cache=False).logits, atol=1e-4)
