"""The learner's memory and operations: said by formula before the first step, measured in it, and put side by side.

In: the configuration, where the learner is placed, the metrics of a step. Out: lines for whoever watches the run. Says
nothing of a kind of model that has no formula. Does not own: the formulas (`memory`), the measurement
(`learner/step/measured`).
"""

from __future__ import annotations

from collections.abc import Mapping

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.memory import learner_bytes, learner_forecast, learner_measured
from asyncdapo.controller.fleet.placement import Placement


class Forecast:
    """Of one launch."""

    def __init__(self, config: Config, placement: Placement) -> None:
        self._shape = config.model.files.shape
        self._config, self._on_gpu = config, placement.on_gpus("learner")
        self._compared = False

    def lines(self) -> list[str]:
        """Before the first step."""
        return learner_forecast(self._shape, self._config, on_gpu=self._on_gpu) if self._shape else []

    def compare(self, metrics: Mapping[str, float]) -> list[str]:
        """With the metrics of the first step after which it is asked; nothing after that."""
        if self._compared or self._shape is None:
            return []
        self._compared = True
        return [learner_measured(sum(learner_bytes(self._shape, self._config, on_gpu=self._on_gpu).values()), metrics)]
