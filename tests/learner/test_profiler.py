"""torch's profiler over some train steps: a trace that has their operations, and no others'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from asyncdapo.errors import ConfigError
from asyncdapo.learner.config import LearnerConfig
from asyncdapo.learner.storage.profiler import FOLDER, StepProfiler


def traced(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob(f"{FOLDER}/*"))


@pytest.mark.soak
def test_the_trace_holds_what_the_steps_computed(tmp_path: Path) -> None:
    profiler = StepProfiler((2, 3), tmp_path, "learner-1")
    works = {1: torch.sin, 2: torch.cos, 3: torch.tanh, 4: torch.exp}
    for step, work in works.items():
        with profiler.on(step):
            work(torch.ones(8))
        assert traced(tmp_path) == (["learner-1-steps-2-3.json"] if step >= 3 else [])
    trace = json.loads((tmp_path / FOLDER / "learner-1-steps-2-3.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::cos", "aten::tanh"} <= names
    assert not {"aten::sin", "aten::exp"} & names


def test_without_steps_nothing_is_traced(tmp_path: Path) -> None:
    with StepProfiler(None, tmp_path, "learner").on(1):
        pass
    assert traced(tmp_path) == []


def test_steps_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"learner.profile_steps: must be the first and the last step, got \[5, 3\]"):
        LearnerConfig(profile_steps=(5, 3))
