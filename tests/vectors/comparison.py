"""A vector against the code: which check computes it, and where the result differs from what is expected.

A check takes `Inputs` and returns what it computed under the names of `expected`. Numbers that are measured are floats
there and may be off by the tolerance; counts, masks, verdicts, names and what is `None` have to be equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tests.vectors.dynamic_sampling import check_dynamic_sampling
from tests.vectors.file import Inputs, MisunderstoodError
from tests.vectors.groups import check_eval, check_filter, check_overlong, check_reward_scaling, check_verifier
from tests.vectors.loss import (
    check_advantage,
    check_agg,
    check_entropy,
    check_kl,
    check_policy_loss,
    check_tis,
)
from tests.vectors.off_policy import ADVANTAGE_CHECKS, LOSS_CHECKS

CHECKS = {
    "policy_loss": check_policy_loss,
    "agg": check_agg,
    "advantage": check_advantage,
    "overlong": check_overlong,
    "reward_scaling": check_reward_scaling,
    "filter": check_filter,
    "dynamic_sampling": check_dynamic_sampling,
    "kl": check_kl,
    "tis": check_tis,
    "entropy": check_entropy,
    "eval": check_eval,
    "verifier": check_verifier,
    **LOSS_CHECKS,
    **ADVANTAGE_CHECKS,
}
"""By the vector's group: Inputs -> what `expected` should be."""

TOP = "expected"


def compute(vector: dict[str, Any]) -> dict[str, Any]:
    """What our code makes of the inputs. Raises MisunderstoodError when something about them is unknown."""
    if vector["group"] not in CHECKS:
        raise MisunderstoodError(f"unknown group {vector['group']!r}, known are {', '.join(CHECKS)}")
    inputs = Inputs(vector["inputs"])
    computed = CHECKS[vector["group"]](inputs)
    inputs.finish()
    return {name: _plain(value) for name, value in computed.items()}


def differences(computed: Any, expected: Any, tolerance: float, at: str = TOP) -> Iterator[str]:
    """Where the two differ, leaf by leaf; every leaf of `expected` is looked at. At the top it may leave out what is
    computed, but not everything; below it has to have every entry of a record."""
    if isinstance(expected, dict):
        if at == TOP and not expected:
            yield f"{at}: nothing is expected"
        if at != TOP and isinstance(computed, dict):
            yield from (f"{at}.{name}: nothing is expected" for name in computed if name not in expected)
        for name, value in expected.items():
            if not isinstance(computed, dict) or name not in computed:
                yield f"{at}.{name}: nothing computes it"
            else:
                yield from differences(computed[name], value, tolerance, f"{at}.{name}")
    elif isinstance(expected, list):
        if not isinstance(computed, list) or len(computed) != len(expected):
            yield f"{at}: got {computed}, expected {expected}"
        else:
            for index, (got, value) in enumerate(zip(computed, expected, strict=True)):
                yield from differences(got, value, tolerance, f"{at}[{index}]")
    elif not _agree(computed, expected, tolerance):
        yield f"{at}: got {computed!r}, expected {expected!r}"


def _agree(got: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(got, float):
        is_number = isinstance(expected, int | float) and not isinstance(expected, bool)
        return is_number and abs(got - expected) <= tolerance * max(1.0, abs(expected))
    return got == expected and isinstance(got, bool) == isinstance(expected, bool)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
