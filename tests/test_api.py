"""The front door in Python: what it takes and what it says. tests/controller/test_whole_run.py reads a run with it."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import asyncdapo
from asyncdapo.config.config import load_config as load_file
from asyncdapo.config.found import find_config
from asyncdapo.errors import UserError
from asyncdapo.replay.ledger.ledger import read_group
from tests.replay.run_of_episodes import run_of_episodes
from tests.replay.small_run import finished_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def freed(tmp_path: Path) -> asyncdapo.Run:
    """A run of three steps that kept no payload of what it trained on."""
    return asyncdapo.Run(finished_run(tmp_path))


# -------------------------------------------------------------------------------------------------------------- import


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys; before = set(sys.modules); import asyncdapo; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "asyncdapo.api" in loaded
    assert not loaded & {
        "torch",
        "ray",
        "omegaconf",
        "msgspec",
        "numpy",
        "pandas",
        "transformers",
        "importlib.metadata",
    }


def test_the_package_is_typed_and_says_its_names() -> None:
    assert (ROOT / "asyncdapo" / "py.typed").is_file()
    assert set(asyncdapo.__all__) == {"Run", "__version__", "launch", "load_config"}
    assert all(hasattr(asyncdapo, name) for name in asyncdapo.__all__)


# -------------------------------------------------------------------------------------------------------------- config


def test_sections_are_the_overrides_of_the_command_line() -> None:
    overrides = ["run.steps=3", "rollout.slots=32", "learner.lr=1e-05", "run.name='a: b, ünï'"]
    with_sections = dict(rollout={"slots": 32}, learner={"lr": 1e-5}, run={"name": "a: b, ünï"})
    expected = load_file(find_config("quickstart"), overrides)
    config = asyncdapo.load_config("quickstart", "run.steps=3", **with_sections)
    assert dataclasses.replace(config, model=expected.model) == expected
    weights = {"some/a.parquet": 0.25, "b.jsonl": 0.75}
    assert asyncdapo.load_config("quickstart", prompts={"path": weights, "task": "file"}).prompts.path == weights


def test_a_model_beside_the_config_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(asyncdapo.load_config("quickstart").model.path)
    assert path.is_absolute()
    assert (path / "config.json").is_file()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rollout": {"slot": 32}}, "rollout.slot"),
        ({"rollout": {"slots": "many"}}, "rollout.slots"),
        ({"rollout": 3}, "rollout: is a section"),
        ({"roll": {"slots": 3}}, "roll"),
    ],
)
def test_a_wrong_section_key_or_value_is_named(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        asyncdapo.load_config("quickstart", **sections)


# ------------------------------------------------------------------------------------------------------------- reading


def test_there_has_to_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there"):
        asyncdapo.Run(tmp_path)


def test_an_episode_says_of_each_token_whether_it_was_sampled(tmp_path: Path, monkeypatch) -> None:
    """Where it forked, its contexts stand one after the other."""

    class Numbers:
        def spell(self, token_ids: list[int]) -> str:
            return " ".join(map(str, token_ids))

        decode = spell

    monkeypatch.setattr("asyncdapo.model.tokenizer.load_tokenizer", lambda files: Numbers())
    run = asyncdapo.Run(run_of_episodes(tmp_path))
    with (tmp_path / "config.yaml").open("a") as config:
        config.write("model: {path: some/model}\nrun: {steps: 2}\n")
    completions = list(run.completions(step=1))
    assert max(completion.contexts.max() for completion in completions) > 0
    assert max(completion.num_turns for completion in completions) > 1
    for completion in completions:
        group, payload = read_group(run.dir, completion.group_id)
        contexts = [one for one in payload.of_contexts(group) if one.index == completion.sample]
        assert completion.response == " ".join(str(token) for one in contexts for token in one.own_ids)
        is_sampled = completion.sampled == 1
        assert completion.logprobs[is_sampled].tolist() == [value for one in contexts for value in one.logprobs_S]
        assert (completion.versions >= 0).tolist() == is_sampled.tolist()
        assert not completion.loss_mask[~is_sampled].any()
        assert np.bincount(completion.contexts).tolist() == [len(one.own_ids) for one in contexts]


def test_freed_tokens_and_unknown_groups_are_said_at_once(freed: asyncdapo.Run) -> None:
    there = [row for row in freed.groups() if row["segment"] is None]
    with pytest.raises(LookupError, match="replay.keep_payloads=true"):
        freed.completions(group_id=there[0]["group_id"])
    with pytest.raises(LookupError, match="no groups of step 99 "):
        freed.completions(99)
    with pytest.raises(LookupError, match="no groups of group 12345 "):
        freed.completions(group_id=12345)


def test_a_run_that_has_just_begun_is_empty(tmp_path: Path) -> None:
    model = ROOT / "configs" / "models" / "chain_start"
    (tmp_path / "config.yaml").write_text(f"model: {{path: {model}}}\n")
    begun = asyncdapo.Run(tmp_path)
    assert (begun.metrics(), begun.groups(), list(begun.completions())) == ([], [], [])


def test_metrics_are_a_list_and_a_frame_where_pandas_is(
    freed: asyncdapo.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/mean": null}\n{"step": 5, "rew')
    assert math.isnan(freed.metrics()[-1]["reward/mean"])
    pandas = ModuleType("pandas")
    pandas.DataFrame = list  # what stands in for it takes the rows, as the real one does
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert [row["step"] for row in freed.frame()] == [0, 1, 2, 3, 4]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        freed.frame()


def test_a_breach_is_a_sentence(freed: asyncdapo.Run, tmp_path: Path) -> None:
    assert freed.audit() == []
    (tmp_path / "metrics.jsonl").unlink()
    assert freed.audit() == ["metrics.jsonl: missing"]
