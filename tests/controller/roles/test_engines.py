"""Which engine a worker makes, and with which bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.roles.engines import make_engine
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine

CALCULATOR = "environment.path=asyncdapo.environment.calculator:Calculator"


class OwnEngine(TorchEngine):
    def __init__(self, model_path, config, **bounds):
        super().__init__(model_path, config, **bounds)
        self.bounds = bounds


@pytest.mark.parametrize(
    ("keys", "bounds"),
    [
        ([], {"max_prompt_length": 48, "max_context": 176, "stop_token_ids": None}),
        ([CALCULATOR, "environment.max_context=200"], {"max_prompt_length": 199, "max_context": 200}),
    ],
)
def test_an_engine_of_the_users_has_the_bounds_that_ours_have(keys: list[str], bounds: dict[str, object]) -> None:
    config = load_config(find_config("quickstart"), [f"rollout.engine={Path(__file__)}:OwnEngine", *keys])
    made = make_engine(config, memory_fraction=0.9).engine
    assert made.bounds.items() >= bounds.items()
