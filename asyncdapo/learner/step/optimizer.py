"""AdamW with warm-up, a schedule and gradient clipping, and the budget of updates that may go wrong.

In: sharded parameters with the gradients of a whole update (`model/sharding`). Invariant: an update with a NaN or Inf
in its loss or gradient changes neither weights nor optimizer state; it is counted, and where too many of the last
`BAD_WINDOW` updates were such ones the run ends. Does not own: how the gradient came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asyncdapo.errors import RunError
from asyncdapo.learner.config import LearnerConfig
from asyncdapo.learner.model.sharding import gather
from asyncdapo.learner.step.loss_scale import LossScale
from asyncdapo.learner.storage.checkpoint import AVERAGES

BAD_WINDOW = 100
"""Newest updates of which `max_bad_updates` may be skipped. Over a whole run any number is reached some time; and of
updates in a row, every second one may be skipped for ever."""


def lr_share(update: int, num_updates: int, num_warmup: int, schedule: str) -> float:
    """Learning rate of this update (from 0) over the largest one. It rises linearly in the first `num_warmup`, and
    falls from there to 0, which the update after the last would have."""
    if update < num_warmup:
        return (update + 1) / num_warmup
    if schedule == "constant":
        return 1.0
    left = max(0.0, (num_updates - update) / (num_updates - num_warmup))
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


class Optimizer:
    """One `update` per mini-batch; `num_updates` counts the applied ones of the run, `num_bad` the skipped ones."""

    def __init__(
        self, parameters: Iterable[Tensor], config: LearnerConfig, num_steps: int, *, float16: bool = False
    ) -> None:
        """`num_steps`: train steps of the run, over which the learning rate falls if it is to. `float16`: gradients
        come from passes in that format, of a loss times `scale`."""
        self._config, self._num_planned = config, config.num_updates(num_steps)
        self.scale = LossScale(on=float16)
        self._parameters = list(parameters)
        self._settings = {
            "lr": config.lr,
            "betas": tuple(config.betas),
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }
        self._adamw = torch.optim.AdamW(self._parameters, **self._settings, fused=True)
        self.num_updates = 0
        self.num_bad = 0
        self._bad_places: list[int] = []
        """Of the skipped ones among the newest, by their number among all updates, skipped and applied."""

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        config = self._config
        share = lr_share(self.num_updates, self._num_planned, config.warmup_steps, config.lr_schedule)
        return config.lr * share

    def update(self, loss: float) -> float | None:
        """Apply the accumulated gradient, which is of the loss times `scale`, and clear it. Returns its global norm
        before clipping, None for an update that was skipped. One that only overflowed at this scale isn't counted as
        bad. Raises RunError when more than `max_bad_updates` of the last `BAD_WINDOW` were."""
        if self.scale.value != 1.0:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale.value)
        norm = self._clip()
        good = math.isfinite(loss) and math.isfinite(norm)
        if good:
            for group in self._adamw.param_groups:
                group["lr"] = self.lr
            self._adamw.step()
            self.num_updates += 1
            self.scale.fitted()
        self._adamw.zero_grad(set_to_none=True)
        if not good and not (math.isfinite(loss) and self.scale.overflowed()):
            self._count_bad(loss, norm)
        return norm if good else None

    def state_dict(self) -> dict[str, Any]:
        """All but the averages: counts, and how often each parameter was updated, by its place. The same at every
        rank."""
        return {
            "num_steps": {place: int(states["step"].item()) for place, states in self._states().items()},
            "num_updates": self.num_updates,
            "num_bad": self.num_bad,
            "bad_places": self._bad_places,
            "loss_scale": self.scale.state(),
        }

    def averages(self) -> dict[str, dict[int, Tensor]]:
        """`AVERAGES`, each by the places of the parameters that were ever updated: live, sharded as the parameters.
        Empty before the first update."""
        states = self._states()
        return {which: {place: of_place[which] for place, of_place in states.items()} for which in AVERAGES if states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counts are those of the state; the averages of what was ever updated are there, for the caller to fill.
        Settings stay those of the config: a resumed run may change them."""
        device = self._parameters[0].device
        states = {
            place: {
                "step": torch.tensor(float(num_steps), device=device),
                **{which: torch.zeros_like(self._parameters[place], requires_grad=False) for which in AVERAGES},
            }
            for place, num_steps in state["num_steps"].items()
        }
        self._adamw.load_state_dict({**self._adamw.state_dict(), "state": states})
        for group in self._adamw.param_groups:
            group.update(self._settings)
        self.num_updates = state["num_updates"]
        self.num_bad = state["num_bad"]
        self._bad_places = list(state["bad_places"])
        self.scale.restore(state.get("loss_scale", (1.0, 0)))

    def _states(self) -> dict[int, dict[str, Tensor]]:
        """Of AdamW, by the parameter's place."""
        return self._adamw.state_dict()["state"]

    def _clip(self) -> float:
        """Scales gradients down to `grad_clip`; returns their global norm before, the same at every rank."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._config.grad_clip)
        return gather(norm).item()

    def _count_bad(self, loss: float, norm: float) -> None:
        self.num_bad += 1
        place = self.num_updates + self.num_bad
        self._bad_places = [*(one for one in self._bad_places if one > place - BAD_WINDOW), place]
        if len(self._bad_places) > self._config.max_bad_updates:
            many = f"{len(self._bad_places)} of the last {min(place, BAD_WINDOW)} optimizer updates"
            raise RunError(
                f"{many} had a loss or gradient that is not finite (the last: loss {loss}, gradient norm {norm}); "
                f"learner.max_bad_updates is {self._config.max_bad_updates}"
            )
