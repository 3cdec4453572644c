"""Policy: a causal LM and its log-probs of given tokens, in one module whose forward pass is all that anybody computes.

In: packed micro-batches. Out: log-prob and entropy of each loss-bearing token, at the sampling temperature and over
what it was drawn from, as the rollout engine took its own, and without dropout. Vocabulary logits are computed only for
those tokens, a part of them at a time (`logprobs`).

Invariant: trunk and output layer run inside this module's `forward`, or a method in `ENTRIES`. Sharded weights are
whole only there (`sharding`): a part that is called from outside would compute with shards, or leave its gradient where
the optimizer doesn't look. Attention is our own (`attention`); `check_policy` compares it with the model's. Does not
own: gradients, how weights are sharded, files.

Shapes: B completions, T tokens of the longest response, S computed tokens, n loss-bearing ones, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncdapo.errors import ConfigError
from asyncdapo.learner.attention.attention import CHECKED, NAME, gather_rows
from asyncdapo.learner.attention.attention_layout import Layout
from asyncdapo.learner.model.logprobs import linear_logprobs
from asyncdapo.learner.model.packing import MicroBatch
from asyncdapo.model.location import KEY

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Of outputs, relative: what kernels may differ by, TF32 included. A wrong layout is off by about 1."""
ENTRIES = ("packed_outputs", "outputs_alone", "scores")
"""Methods beside `forward` that compute with the weights."""


class Policy(nn.Module):
    """One causal LM at one temperature."""

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, device: torch.device | None = None) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.device = device or model.device
        """Where it computes; its weights may be in host memory (`sharding`)."""
        self.num_shards = 1

    @property
    def vocabulary(self) -> int:
        """Number of tokens that it knows."""
        return _output_layer(self.model).weight.shape[0]

    def forward(self, micro_batch: MicroBatch, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-prob of each loss-bearing response token given the tokens before it, and the entropy (nats, without
        gradient unless asked for) of the distribution it was drawn from; both [B, T] and 0 outside the mask."""
        hidden_SH = _packed_outputs(self.model, micro_batch.tokens_S, micro_batch.positions_S, micro_batch.layout)
        head = _output_layer(self.model)
        logp_n, entropy_n = linear_logprobs(
            gather_rows(hidden_SH, micro_batch.sources_n),
            head.weight,
            micro_batch.targets_n,
            temperature=self.temperature,
            bias_V=head.bias,
            entropy_gradient=entropy_gradient,
            drawn_from=micro_batch.drawn_from,
        )
        return micro_batch.rectangle(logp_n), micro_batch.rectangle(entropy_n)

    def packed_outputs(self, tokens_S: Tensor, positions_S: Tensor, layout: Layout) -> Tensor:
        """The last block's outputs for packed tokens, normalised as the head takes them, [S, H]."""
        return _packed_outputs(self.model, tokens_S, positions_S, layout)

    def outputs_alone(self, tokens_S: Tensor) -> Tensor:
        """The same for the tokens of one sequence, with the attention that is set, [S, H]."""
        return _outputs_alone(self.model, tokens_S)

    def scores(self, tokens_S: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [S, V] as the output layer alone gives them, and as the model does."""
        of_head_SV = _output_layer(self.model)(_outputs_alone(self.model, tokens_S))
        return of_head_SV, self.model(tokens_S[None], use_cache=False).logits[0]


@torch.no_grad()
def check_policy(policy: Policy, key: str = KEY) -> None:
    """Compares the outputs for packed tokens with those that the model's own attention has for each sequence alone, and
    the output layer's scores with the model's logits, in the dtype and on the device that it computes on now. Raises
    ConfigError for the config's `key` where they differ, or can't be had: a model that mixes tokens in other ways than
    by attention, or by attention that can't be replaced, or that scales its logits. The sequences are short: of windows
    it compares what mask and attention are told (`checked_attention`)."""
    model = policy.model
    prompt_starts, num_prompt = np.array([0, 0, 8]), np.array([3, 3, 4])
    starts, num_behind = np.array([3, 6, 12]), np.array([3, 2, 1])
    layout = Layout(prompt_starts, num_prompt, starts, num_behind, policy.device)
    tokens_S = torch.arange(layout.num_tokens, device=policy.device) % policy.vocabulary
    try:
        with _attention(model, CHECKED):
            packed_SH = policy.packed_outputs(tokens_S, torch.from_numpy(layout.positions()).to(policy.device), layout)
    except ConfigError as error:
        raise ConfigError(key, error.problem, model.name_or_path) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"can't be trained packed: {type(error).__name__}: {error}"
        raise ConfigError(key, problem, model.name_or_path) from error
    for row in range(len(starts)):
        places = np.r_[prompt_starts[row] + np.arange(num_prompt[row]), starts[row] + np.arange(num_behind[row])]
        places = torch.from_numpy(places).to(policy.device)
        with _attention(model, "eager"):
            alone_TH = policy.outputs_alone(tokens_S[places])
        difference = ((packed_SH[places] - alone_TH).norm() / alone_TH.norm()).item()
        if not difference < TOLERANCE[packed_SH.dtype]:
            problem = f"can't be trained packed: outputs differ by {difference:.1g} from those of single sequences"
            raise ConfigError(key, problem, model.name_or_path)
    of_head_SV, of_model_SV = policy.scores(tokens_S[:8])
    if not torch.allclose(of_head_SV, of_model_SV, atol=1e-4):
        problem = "scales or caps its logits after the output layer, which the learner doesn't do"
        raise ConfigError(key, problem, model.name_or_path)


# Methods of a sharded policy gather weights and free them, so they don't call each other.


def _packed_outputs(model: PreTrainedModel, tokens_S: Tensor, positions_S: Tensor, layout: Layout) -> Tensor:
    known = model.config._attn_implementation in (NAME, CHECKED)
    assert known, "the model's own attention would pass over the layout"
    packed = model.base_model(tokens_S[None], position_ids=positions_S[None], use_cache=False, layout=layout)
    return packed.last_hidden_state[0]


def _output_layer(model: PreTrainedModel) -> nn.Linear:
    """What makes logits of hidden states; `weight` [V, H]."""
    return cast(nn.Linear, model.get_output_embeddings())


def _outputs_alone(model: PreTrainedModel, tokens_S: Tensor) -> Tensor:
    return model.base_model(tokens_S[None], use_cache=False).last_hidden_state[0]


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Hugging Face's of this name; `eager` is as the model's authors wrote it."""
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
