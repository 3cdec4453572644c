"""The policy: a Hugging Face causal LM, as it is loaded, and its log-probs of given tokens.

Log-probs are taken at the sampling temperature, as the rollout engine took its own, and without dropout. Vocabulary
logits are computed only for tokens that bear loss, a part of them at a time (`logprobs`). Attention is our own
(`attention`), and whether a model does with it what it did before is checked when it is loaded. Does not own:
gradients, optimizer, files of a checkpoint.

Shapes: B completions, T tokens of the longest response, S computed tokens, n loss-bearing ones, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncdapo.errors import ConfigError
from asyncdapo.learner.model.attention import CHECKED, NAME, gather_rows
from asyncdapo.learner.model.attention_layout import Layout
from asyncdapo.learner.model.logprobs import linear_logprobs
from asyncdapo.learner.model.packing import MicroBatch
from asyncdapo.model.location import KEY

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Of outputs, relative: what kernels may differ by, TF32 included. A wrong layout is off by about 1."""


def load_model(directory: Path, device: torch.device, key: str = KEY) -> PreTrainedModel:
    """The model of a directory in Hugging Face format, fp32, without dropout. Raises ConfigError, for the config's
    `key`, when it can't be trained."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=NAME, output_loading_info=True
        )
        model, report = loaded
    except (OSError, ValueError) as error:
        raise ConfigError(key, f"can't be loaded: {error}", str(directory)) from error
    except KeyError as error:
        raise ConfigError(key, f"can't be trained packed: it knows no attention {error}", str(directory)) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(key, f"lacks {len(report['missing_keys'])} weights ({missing}…)", str(directory))
    model.eval().to(device)
    check_packing(model, key)
    if not _logits_come_straight_from_the_head(model):
        problem = "scales or caps its logits after the output layer, which the learner doesn't do"
        raise ConfigError(key, problem, str(directory))
    return model


def token_logprobs(
    model: PreTrainedModel, micro_batch: MicroBatch, temperature: float, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-prob of each loss-bearing response token given the tokens before it, and the entropy (nats, without gradient
    unless asked for) of the distribution it was drawn from; both [B, T] and 0 outside the mask."""
    hidden_SH = outputs(model, micro_batch.tokens_S, micro_batch.positions_S, micro_batch.layout)
    head = output_layer(model)
    logp_n, entropy_n = linear_logprobs(
        gather_rows(hidden_SH, micro_batch.sources_n),
        head.weight,
        micro_batch.targets_n,
        temperature=temperature,
        bias_V=head.bias,
        entropy_gradient=entropy_gradient,
    )
    return micro_batch.rectangle(logp_n), micro_batch.rectangle(entropy_n)


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """What makes logits of hidden states; `weight` [V, H]."""
    return cast(nn.Linear, model.get_output_embeddings())


def outputs(model: PreTrainedModel, tokens_S: Tensor, positions_S: Tensor, layout: Layout) -> Tensor:
    """The last block's outputs for packed tokens, normalised as the head takes them, [S, H]."""
    known = model.config._attn_implementation in (NAME, CHECKED)
    assert known, "the model's own attention would pass over the layout"
    packed = model.base_model(tokens_S[None], position_ids=positions_S[None], use_cache=False, layout=layout)
    return packed.last_hidden_state[0]


@torch.no_grad()
def check_packing(model: PreTrainedModel, key: str = KEY) -> None:
    """Compares the outputs for packed tokens with those that the model's own attention has for each sequence alone, in
    the dtype and on the device that the model has now. Raises ConfigError for the config's `key` where they differ, or
    can't be had: a model that mixes tokens in other ways than by attention, or by attention that can't be replaced.
    The sequences are short: of windows it compares what mask and attention are told (`checked_attention`)."""
    prompt_starts, num_prompt = np.array([0, 0, 8]), np.array([3, 3, 4])
    starts, num_behind = np.array([3, 6, 12]), np.array([3, 2, 1])
    layout = Layout(prompt_starts, num_prompt, starts, num_behind, model.device)
    tokens_S = torch.arange(layout.num_tokens, device=model.device) % len(
        cast(nn.Embedding, model.get_input_embeddings()).weight
    )
    try:
        with _attention(model, CHECKED):
            packed_SH = outputs(model, tokens_S, torch.from_numpy(layout.positions()).to(model.device), layout)
    except ConfigError as error:
        raise ConfigError(key, error.problem, model.name_or_path) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"can't be trained packed: {type(error).__name__}: {error}"
        raise ConfigError(key, problem, model.name_or_path) from error
    for row in range(len(starts)):
        places = np.r_[prompt_starts[row] + np.arange(num_prompt[row]), starts[row] + np.arange(num_behind[row])]
        places = torch.from_numpy(places).to(model.device)
        with _attention(model, "eager"):
            alone_TH = model.base_model(tokens_S[places][None], use_cache=False).last_hidden_state[0]
        difference = ((packed_SH[places] - alone_TH).norm() / alone_TH.norm()).item()
        if not difference < TOLERANCE[model.dtype]:
            problem = f"can't be trained packed: outputs differ by {difference:.1g} from those of single sequences"
            raise ConfigError(key, problem, model.name_or_path)


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Hugging Face's of this name; `eager` is as the model's authors wrote it."""
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


@torch.no_grad()
def _logits_come_straight_from_the_head(model: PreTrainedModel) -> bool:
    """Whether the output layer alone turns hidden states into logits, as `token_logprobs` takes it."""
    tokens_BT = torch.arange(8, device=model.device)[None]
    head_BTV = output_layer(model)(model.base_model(tokens_BT, use_cache=False).last_hidden_state)
    return torch.allclose(head_BTV, model(tokens_BT, use_cache=False).logits, atol=1e-4)
