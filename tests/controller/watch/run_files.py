"""The files of a run of which only the metrics matter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from asyncdapo.config.config import load_config, to_yaml
from asyncdapo.config.found import find_config
from tests.metrics.accounts_of import lines_of, lost_to

LINE = {
    "eval/accuracy": 0.5,
    "filter/kept_ratio": 0.7,
    "learner/entropy": 0.4,
    "learner/tokens_per_s": 1500.0,
    "replay/queued": 12,
    "replay/run_ahead": 1.25,
    "replay/staleness_mean": 1.0,
    "rollout/tokens_per_s": 2000.0,
    "time/wall_s": 60.0,
}


def run_files(run_dir: Path, lines: Iterable[Mapping[str, float]], *overrides: str) -> Path:
    """The directory of a run with these lines."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(_config_text(overrides))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


@cache
def _config_text(overrides: tuple[str, ...]) -> str:
    return to_yaml(load_config(find_config("quickstart"), overrides))


def bound_by_learner(num_steps: int) -> list[dict[str, float]]:
    """Lines of a run whose workers wait for its learner."""
    lines = lines_of(num_steps, loop={"train": 1.0}, workers={"generate": 0.6, "lease": 0.4})
    verdict = lost_to("learner", 0.4)
    return [line | LINE | (verdict if line["step"] > 3 else {}) | {"reward/mean": line["step"] / 9} for line in lines]
