"""The directory of a run: what a launch writes there, who may work in it, and what makes it another run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.controller.checks import preflight
from asyncdapo.controller.checks.resume import Resume
from asyncdapo.controller.process.roster import Roster, entry_of
from asyncdapo.errors import ConfigError
from tests.controller.runs import copy_start_model, prepare

DATA = '{"prompt": "1+1", "answer": "2"}\n{"prompt": "2+3", "answer": "5"}\n{"prompt": "4+5", "answer": "9"}\n'
OWN_DATA = ("prompts.task=file", "eval.num_prompts=1", "eval.num_greedy_prompts=1")


def refused(run_dir: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(run_dir, *overrides)
    return str(caught.value)


def test_a_new_run_has_its_directory_to_itself_with_what_it_is_made_of(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o755)
    config, resume = prepare(run_dir)
    assert resume == Resume(new=True)
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert load_config(run_dir / "config.yaml") == config
    assert set(json.loads((run_dir / "identity.json").read_text())["model"]) == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }


def test_a_launch_killed_before_it_took_the_directory_leaves_it_for_the_next(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    prepare(run_dir)
    (run_dir / "config.yaml").rename(run_dir / ".config.yaml.new")
    _, resume = prepare(run_dir, "rollout.group_size=8")
    assert resume.new


def test_a_directory_with_a_config_but_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: gpt2}\n")
    assert "run.dir: holds a run that can't be resumed" in refused(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "model: {path: gpt2}\n"


def test_values_of_former_launches_are_kept(tmp_path: Path) -> None:
    for steps in (10, 20, 20, 30):
        prepare(tmp_path / "run", f"run.steps={steps}")
    names = sorted(path.name for path in (tmp_path / "run").glob("config*.yaml"))
    assert names == ["config.1.yaml", "config.2.yaml", "config.yaml"]
    assert [load_config(tmp_path / "run" / name).run.steps for name in names] == [10, 20, 30]


def test_a_run_whose_config_has_keys_that_are_gone_resumes_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    prepare(run_dir)
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("replay:\n", "replay:\n  gone_key: 3\n"))
    _, resume = prepare(run_dir)
    assert not resume.new
    said = f"not used: {run_dir}/config.yaml: replay.gone_key: unknown to this version of asyncdapo\n"
    assert capsys.readouterr().out == said


HOLDER = """
import sys, time
from asyncdapo.controller.checks.preflight import prepare_run

with prepare_run("quickstart", [f"run.dir={sys.argv[1]}", "metrics.wandb=disabled"]):
    print("holds it", flush=True)
    time.sleep(60)
"""


def test_two_launches_never_share_a_directory_and_a_killed_one_lets_go_of_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "holds it\n"
        message = refused(run_dir)
        assert f"run.dir: is in use by another launch that is running, process {holder.pid}" in message
        assert str(run_dir) in message
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    _, resume = prepare(run_dir)
    assert not resume.new


def test_processes_that_outlive_their_driver_are_ended_before_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "FORMER_LAUNCH_S", 0.2)
    prepare(tmp_path / "run")
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        Roster(tmp_path / "run").set("learner", [entry_of("learner", 0, orphan.pid)])
        prepare(tmp_path / "run")
        assert orphan.wait(timeout=5) == -signal.SIGKILL
    finally:
        orphan.kill()
        orphan.wait()


# ------------------------------------------------------------------------------------------------------- the same run


def test_everything_that_makes_it_another_run_is_listed_with_both_values(tmp_path: Path) -> None:
    run_dir, model = tmp_path / "run", copy_start_model(tmp_path / "model")
    prepare(run_dir, f"model.path={model}")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    message = refused(
        run_dir,
        f"model.path={model}",
        "run.seed=1",
        "rollout.group_size=8",
        "rollout.temperature=0.5",
        "rollout.max_response_length=64",
        "replay.prompts_per_step=8",
        "replay.run_ahead=0",
        "reward.incorrect=0",
        "loss.clip_low=0.1",
        "filter.on_limit=partial",
        "prompts.max_prompt_length=40",
    )
    for words in (
        "model.path (other model.safetensors)",
        "run.seed (0 in the run, 1 here)",
        "rollout.group_size (16 in the run, 8 here)",
        "rollout.temperature (1.0 in the run, 0.5 here)",
        "rollout.max_response_length (128 in the run, 64 here)",
        "replay.prompts_per_step (16 in the run, 8 here)",
        "replay.max_staleness (2 in the run, 0 here)",
        "reward.incorrect (-1.0 in the run, 0.0 here)",
        "loss.clip_low (0.2 in the run, 0.1 here)",
        "filter.on_limit (raise in the run, partial here)",
        "prompts.max_prompt_length (48 in the run, 40 here)",
    ):
        assert words in message, words
    assert message.count(" here)") == 10
    assert not (run_dir / "config.1.yaml").exists()


def test_what_only_says_how_fast_how_long_and_where_may_change(tmp_path: Path) -> None:
    prepare(tmp_path / "run")
    config, resume = prepare(
        tmp_path / "run",
        "run.steps=100",
        "run.name=other",
        "rollout.num_workers=2",
        "rollout.slots=8",
        "replay.run_ahead=0.5",
        "learner.lr=1e-5",
        "learner.checkpoint_every=3",
        "reward.processes=2",
        "reward.timeout_s=3",
        "reward.max_failure_ratio=1",
        "eval.every=0",
        "eval.num_prompts=8",
        "eval.num_samples=4",
        "eval.keep_answers=false",
    )
    assert not resume.new
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_model_data_and_run_may_move(tmp_path: Path) -> None:
    model, data = copy_start_model(tmp_path / "model"), tmp_path / "data.jsonl"
    data.write_text(DATA)
    prepare(tmp_path / "run", f"model.path={model}", f"prompts.path={data}", *OWN_DATA)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (model, data, tmp_path / "run"):
        path.rename(elsewhere / path.name)
    moved = (f"model.path={elsewhere / 'model'}", f"prompts.path={elsewhere / 'data.jsonl'}")
    config, resume = prepare(elsewhere / "run", *moved, *OWN_DATA)
    assert not resume.new
    assert load_config(elsewhere / "run" / "config.yaml") == config


def test_other_data_and_another_share_of_it_held_out_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(DATA)
    keys = (f"prompts.path={data}", *OWN_DATA)
    prepare(tmp_path / "run", *keys)
    prepare(tmp_path / "run", *keys, "prompts.epochs=2")
    held_out = "the larger of eval.num_prompts and eval.num_greedy_prompts (1 in the run, 2 here)"
    assert held_out in refused(tmp_path / "run", *keys, "eval.num_prompts=2")
    data.write_text(DATA.replace("4+5", "5+4"))
    assert "prompts.path (other data)" in refused(tmp_path / "run", *keys)
    data.write_text(DATA)
    assert "prompts.eval_path (other data)" in refused(tmp_path / "run", *keys, f"prompts.eval_path={data}")
