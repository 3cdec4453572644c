"""What belongs together: seats, hosts, the endpoint."""

from __future__ import annotations

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.roles.judging import make_judging
from asyncdapo.environment.hosts import Hosts
from asyncdapo.model.tokenizer import load_tokenizer
from tests.docs.blocks import ROOT
from tests.rollout.fakes import FakeEngine

AGENT = f"environment.path=agent:{ROOT}/examples/agent.py:run"


@pytest.mark.parametrize(
    ("overrides", "concurrency"),
    [
        ([], 16),
        ([AGENT], 64),
        ([AGENT, "environment.oversubscribe=1.5", "environment.processes=2"], 48),
        ([AGENT, "environment.concurrency=5"], 5),
    ],
)
def test_a_host_has_a_place_for_each_episode_of_programs_that_call_the_model(
    overrides: list[str], concurrency: int
) -> None:
    model = f"model.path={ROOT}/configs/models/tool_start"
    config = load_config(find_config("quickstart_tools"), [model, *overrides])
    judging = make_judging(config, FakeEngine(), load_tokenizer(config.model.tokenizer_files))
    assert isinstance(judging.processes, Hosts)
    assert judging.processes._setup.concurrency == concurrency
    assert (judging.endpoint is not None) == (AGENT in overrides)
