"""Parts of the loss that are the user's: what each is given and returns, and a trial of each on two rows.

In: the values of `loss.variant`, `loss.advantage` and `loss.agg` that name a file or a module. Raises ConfigError
before a run starts: a wrong signature, a wrong shape, a NaN, a loss that reduces over rows or tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from asyncdapo.algorithm.averages import UpdateCounts
from asyncdapo.algorithm.policy_loss import policy_loss
from asyncdapo.algorithm.variants import PolicyLoss
from asyncdapo.errors import ConfigError
from asyncdapo.plugins import broken, cached_plugin, check_call


class LossVariant(Protocol):
    """Loss of each token, [B, T]. A row is a whole response, or a context of an episode, so it may depend on all of its
    own tokens. It must not depend on other rows, and nothing is reduced: the update's row weights (`loss.agg`) do that.
    Tokens outside the mask may hold any finite value. `advantages_BT` is [B, 1] or [B, T]."""

    def __call__(
        self,
        logp_BT: Tensor,
        old_logp_BT: Tensor,
        advantages_BT: Tensor,
        mask_BT: Tensor,
        *,
        clip_low: float,
        clip_high: float,
    ) -> Tensor | PolicyLoss:
        """A tensor, or a PolicyLoss, which also says what was clipped."""
        ...


class Advantage(Protocol):
    """Rewards of one prompt's completions -> their advantages, both [G]."""

    def __call__(self, rewards_G: Tensor) -> Tensor: ...


class Aggregation(Protocol):
    """What a token of one copy of each completion weighs in the loss, [N], from counts of the whole update alone."""

    def __call__(self, counts: UpdateCounts) -> Tensor: ...


def try_variant(name: str) -> None:
    """Two responses of three and two tokens."""
    key, function = "loss.variant", cached_plugin("loss.variant", name)
    logp_BT = torch.tensor([[-0.5, -1.0, -2.0], [-1.5, -0.2, -0.7]], requires_grad=True)
    old_BT = torch.tensor([[-0.6, -0.8, -2.1], [-1.0, -0.4, -0.7]])
    advantages_B1, mask_BT = torch.tensor([[1.0], [-1.0]]), torch.tensor([[True, True, True], [True, True, False]])
    clips = {"clip_low": 0.2, "clip_high": 0.28}
    form = "(logp_BT, old_logp_BT, advantages_BT, mask_BT, *, clip_low, clip_high)"
    check_call(key, name, function, form, logp_BT, old_BT, advantages_B1, mask_BT, **clips)

    def loss_of(rows: slice) -> Tensor:
        given = (logp_BT[rows], old_BT[rows], advantages_B1[rows], mask_BT[rows])
        raw = _called(key, name, function, *given, **clips)
        _check_tensor(key, name, raw.loss_BT if isinstance(raw, PolicyLoss) else raw, given[0].shape)
        return policy_loss(name, *given, **clips).loss_BT

    loss_BT = loss_of(slice(None))
    if not loss_BT.requires_grad:
        raise ConfigError(key, "returned a loss without a gradient", name, "compute it from logp_BT")
    if not torch.allclose(loss_BT, torch.cat([loss_of(slice(0, 1)), loss_of(slice(1, 2))]), atol=1e-5):
        raise ConfigError(key, "returned a row that depends on other rows", name, "reduce nothing: loss.agg does")
    torch.autograd.backward(loss_BT.sum())
    if logp_BT.grad is None or not logp_BT.grad.isfinite().all():
        raise ConfigError(key, "has a gradient with a NaN or Inf on a trial of two rows", name)


def try_advantage(name: str) -> None:
    """Two groups of two: one right, and both right."""
    key, function = "loss.advantage", cached_plugin("loss.advantage", name)
    for rewards_G in (torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])):
        check_call(key, name, function, "(rewards_G)", rewards_G)
        _check_tensor(key, name, _called(key, name, function, rewards_G), rewards_G.shape)


def try_aggregation(name: str) -> None:
    """Two completions of one prompt, one of them fully masked."""
    key, function = "loss.agg", cached_plugin("loss.agg", name)
    counts = UpdateCounts(torch.tensor([3, 0]), torch.tensor([0, 0]), torch.tensor([1, 1]), 4)
    check_call(key, name, function, "(counts)", counts)
    weights_N = _called(key, name, function, counts)
    _check_tensor(key, name, weights_N, torch.Size([2]))
    if (weights_N < 0).any():
        raise ConfigError(key, "returned a weight below 0 on a trial of two rows", name)


def _called(key: str, name: str, function: Callable[..., Any], *given: object, **named: object) -> Any:
    try:
        return function(*given, **named)
    except Exception as error:  # noqa: BLE001 (the user's function may raise anything)
        raise broken(key, name, error, "raised on a trial of two rows") from error


def _check_tensor(key: str, name: str, value: object, shape: torch.Size) -> None:
    if not isinstance(value, Tensor) or value.shape != shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(key, f"must return a tensor {list(shape)} on a trial of two rows, returned {got}", name)
    if not value.isfinite().all():
        raise ConfigError(key, "returned a NaN or Inf on a trial of two rows", name)
