"""The process group of the weights: rank 0 is the learner, ranks 1 … N are the receivers."""

from __future__ import annotations

from asyncdapo.errors import WeightsError
from asyncdapo.transport.process_group import ProcessGroup


class WeightGroup(ProcessGroup):
    """One membership's group; its calls raise WeightsError."""

    purpose = "the weights"
    error = WeightsError
