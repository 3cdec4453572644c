"""The user's own task, loss and engine: the examples run, and what can't work is refused before anything starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.checks.identity import IDENTITY_FILE
from asyncdapo.errors import ConfigError
from asyncdapo.metrics.jsonl import read_metrics
from tests.controller.runs import launch, prepare
from tests.learner.tiny import make_batch, make_learner, save_tiny_llama, train

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LOSS = (
    f"prompts.task={EXAMPLES}/task.py:Sums",
    f"loss.variant={EXAMPLES}/loss.py:soft_gate",
    f"loss.agg={EXAMPLES}/loss.py:root_length",
    f"loss.advantage={EXAMPLES}/advantage.py:hard_prompts",
)
ENGINE = f"rollout.engine={EXAMPLES}/engine.py:LateEngine"
BAD_VARIANT = "def f(logp_BT, old_logp_BT, advantages_BT, mask_BT, *, clip_low, clip_high):\n    return "


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("loss.variant", None, "no such file (/"),
        ("loss.variant", "def g(): ...", "has no function f"),
        ("loss.variant", "def f(logp): ...", "can't be called as (logp_BT, old_logp_BT, advantages_BT, mask_BT, *,"),
        ("loss.variant", BAD_VARIANT + "logp_BT.sum()", "must return a tensor [2, 3] on a trial of two rows"),
        ("loss.variant", BAD_VARIANT + "logp_BT / 0", "returned a NaN or Inf on a trial of two rows"),
        ("loss.variant", BAD_VARIANT + "logp_BT - logp_BT.mean()", "returned a row that depends on other rows"),
        ("loss.variant", BAD_VARIANT + "logp_BT.detach()", "returned a loss without a gradient"),
        (
            "loss.variant",
            BAD_VARIANT + "1 / 0",
            "raised on a trial of two rows: ZeroDivisionError: division by z",
        ),
        ("loss.advantage", "def f(a, b): ...", "can't be called as (rewards_G): missing a required argument: 'b'"),
        ("loss.advantage", "def f(rewards): return rewards / rewards.std(correction=0)", "returned a NaN or Inf"),
        (
            "loss.advantage",
            "def f(rewards): return [1, 2]",
            "must return a tensor [2] on a trial of two rows",
        ),
        ("loss.agg", "def f(counts): return counts.num_tokens_N.sum()", "must return a tensor [2]"),
        ("loss.agg", "def f(counts): return -1.0 - counts.num_tokens_N", "returned a weight below 0"),
        ("prompts.task", "def f(config): ...", "can't be called as (config, num_eval, seed)"),
        ("prompts.task", "def f(config, num_eval, seed): ...", "raised on a trial of two rows: AttributeError"),
        ("rollout.engine", "class f: ...", "can't be called as (model_path, config, *, max_prompt_length, max_c"),
        ("rollout.engine", "class f:\n    def __init__(self, *a, **k): ...", "has no device, num_slots, num_outsta"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, key, text, words):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        prepare(tmp_path / "run", f"{key}={file}:f")
    said = str(caught.value)
    assert said.startswith(f"{key}: ")
    assert words in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["asyncdapo_absent.loss:f", "json:f"])
def test_a_module_is_looked_for_too(tmp_path, name):
    with pytest.raises(ConfigError, match=r"^loss\.agg: (no module asyncdapo_absent|json has no function f)"):
        prepare(tmp_path / "run", f"loss.agg={name}")


@pytest.mark.parametrize("override", [*LOSS, ENGINE])
def test_a_resume_with_a_changed_function_is_refused_by_name_and_its_file_may_move(tmp_path, override):
    key, _, place = override.partition("=")
    where, _, name = place.rpartition(":")
    file = tmp_path / "before" / Path(where).name
    file.parent.mkdir()
    file.write_text(Path(where).read_text())
    prepare(tmp_path / "run", f"{key}={file}:{name}")
    moved = file.rename(tmp_path / file.name)
    prepare(tmp_path / "run", f"{key}={moved}:{name}")
    moved.write_text(moved.read_text() + "# changed\n")
    with pytest.raises(ConfigError, match=re.escape(f"differs in {key} (other source)")):
        prepare(tmp_path / "run", f"{key}={moved}:{name}")


def test_an_identity_of_before_extensions_still_loads(tmp_path):
    prepare(tmp_path / "run")
    file = tmp_path / "run" / IDENTITY_FILE
    known = json.loads(file.read_bytes())
    assert known.pop("extensions") == {}
    file.write_text(json.dumps(known))
    prepare(tmp_path / "run")


def test_a_learner_trains_with_the_example_loss_and_advantage(tmp_path):
    loss = load_config(find_config("quickstart"), list(LOSS)).loss
    learner = make_learner(save_tiny_llama(tmp_path), loss=loss)
    assert train(learner, *make_batch())["learner/grad_norm"] > 0


@pytest.mark.soak  # half a minute
def test_the_example_task_and_loss_train(tmp_path):
    run = launch(tmp_path, *LOSS, "run.steps=3")
    assert run.exit_code == 0, run.output
    lines = read_metrics(tmp_path)
    assert lines[-1]["step"] >= 1
    assert all(line["learner/grad_norm"] > 0 for line in lines if line["step"] > 0)


@pytest.mark.soak  # half a minute
def test_the_example_engine_samples_and_takes_new_weights(tmp_path):
    run = launch(tmp_path, ENGINE, "run.steps=3")
    assert run.exit_code == 0, run.output
    assert read_metrics(tmp_path)[-1]["step"] >= 1


def test_the_page_shows_the_examples_as_they_are():
    page = (ROOT / "docs" / "extending.md").read_text()
    for name in ("task", "advantage", "loss", "engine"):
        assert f"```python\n{(EXAMPLES / f'{name}.py').read_text()}```" in page
