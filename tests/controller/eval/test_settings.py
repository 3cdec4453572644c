"""What `asyncdapo eval` is given and what it makes of it: model, data, configuration, directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from asyncdapo.config.config import Config, load_config, to_yaml
from asyncdapo.controller.eval.record import hold_directory
from asyncdapo.controller.eval.settings import Wanted, make_config
from asyncdapo.controller.eval.subject import Subject, find_subject
from asyncdapo.errors import ConfigError, UserError
from tests.controller.runs import START_MODEL
from tests.learner.storage.written import write_checkpoint

QUICKSTART = START_MODEL.parent.parent / "quickstart.yaml"
ROWS = [{"prompt": f"{number}+1", "answer": str(number + 1)} for number in range(20)]


def write_rows(path: Path, rows: list[dict] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the quickstart with checkpoints of steps 0 and 12."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "runs" / "mine"
    for step in (0, 12):
        write_checkpoint(directory, step, 0, lambda to: shutil.copytree(START_MODEL, to, dirs_exist_ok=True))
    keep(directory, "run.name=mine")
    return directory


def keep(run_dir: Path, *overrides: str) -> None:
    """Write the run's config.yaml."""
    config = load_config(QUICKSTART, [f"model.path={START_MODEL}", *overrides])
    (run_dir / "config.yaml").write_text(to_yaml(config))


def config_of(checkpoint: Path | str, *overrides: str, **wanted) -> Config:
    return make_config(find_subject(str(checkpoint)), Wanted(overrides=overrides, **wanted))


# ----------------------------------------------------------------------------------------------------------- checkpoint


def test_a_run_means_its_newest_sound_checkpoint_and_damaged_ones_are_named(run_dir: Path) -> None:
    assert find_subject(str(run_dir)) == Subject(
        model=str(run_dir / "checkpoints" / "step-000012"),
        name="mine-step-000012",
        folder=Path("runs/mine/step-000012"),
        config=run_dir / "config.yaml",
        step=12,
    )
    (run_dir / "checkpoints" / "step-000012" / "config.json").write_text("{}")
    subject = find_subject(str(run_dir))
    assert (subject.step, subject.name) == (0, "mine-step-000000")
    assert len(subject.problems) == 1
    assert subject.problems[0].startswith("step-000012: config.json has 2 bytes")


def test_a_checkpoint_that_is_named_and_damaged_is_refused(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-000012"
    assert find_subject(str(checkpoint)).step == 12
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-000012: is damaged: model.safetensors has 0 bytes"):
        find_subject(str(checkpoint))
    shutil.rmtree(run_dir / "checkpoints" / "step-000000")
    with pytest.raises(UserError, match=r"holds no checkpoint that can be used: step-000012: model.safetensors"):
        find_subject(str(run_dir))


def test_any_other_directory_is_a_model_and_needs_data(run_dir: Path) -> None:
    subject = find_subject(str(START_MODEL))
    assert subject == Subject(model=str(START_MODEL), name="chain_start", folder=Path("chain_start"))
    with pytest.raises(UserError, match=r"has no held-out prompts of its own \(--data FILE, or --config CONFIG\)"):
        make_config(subject, Wanted())
    with pytest.raises(UserError, match=r"nowhere: no such run, checkpoint or model directory"):
        find_subject("runs/nowhere")


def test_two_runs_of_one_name_have_directories_of_their_own(run_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run_dir, tmp_path / "elsewhere" / "mine")
    assert not taken(config_of(run_dir, samples=2))
    assert not taken(config_of(other, samples=4))
    assert sorted(path.parent for path in tmp_path.rglob("eval.json")) == [
        tmp_path / "evals" / "elsewhere" / "mine" / "step-000012",
        tmp_path / "evals" / "runs" / "mine" / "step-000012",
    ]


def test_a_run_whose_config_has_keys_that_are_gone_is_evaluated_and_says_so(run_dir: Path) -> None:
    with (run_dir / "config.yaml").open("a") as file:
        file.write("gone:\n  key: 1\n")
    subject = find_subject(str(run_dir))
    assert subject.problems == (f"{run_dir}/config.yaml: gone: unknown to this version of asyncdapo",)
    assert make_config(subject, Wanted()).run.name == "mine-step-000012"
    with pytest.raises(ConfigError, match="gone: is not a known key"):
        make_config(subject, Wanted(overrides=("gone.key=1",)))
    with pytest.raises(ConfigError, match="gone: is not a known key"):  # of a file that the user names
        make_config(subject, Wanted(config=str(run_dir / "config.yaml")))


# ----------------------------------------------------------------------------------------------------------------- data


def test_without_data_the_runs_own_held_out_prompts_are_asked_as_the_run_asks_them(run_dir: Path) -> None:
    config = config_of(run_dir)
    own = load_config(run_dir / "config.yaml")
    assert config.prompts == own.prompts
    assert config.eval == own.eval
    assert config.rollout.max_response_length == own.rollout.max_response_length
    assert config.run.dir == str(run_dir.parent.parent / "evals" / "runs" / "mine" / "step-000012")


def test_every_row_of_the_data_is_asked_unless_the_command_says_how_many(run_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "questions.jsonl")
    config = config_of(run_dir, data=data, samples=4)
    assert (config.eval.num_prompts, config.eval.num_samples, config.eval.num_greedy_prompts) == (20, 4, 20)
    assert config.prompts.eval_path == str(data)
    assert config.run.dir.endswith("evals/runs/mine/step-000012-questions")
    assert config_of(run_dir, "eval.num_prompts=5", data=data).eval.num_prompts == 5


def test_a_prepared_directory_means_its_test_file_and_its_columns(run_dir: Path, tmp_path: Path) -> None:
    keep(run_dir, "prompts.prompt_column=question")
    prepared = tmp_path / "gsm8k"
    prepared.mkdir()
    (prepared / "manifest.json").write_text("{}")
    for name in ("train", "test"):
        parquet.write_table(
            pyarrow.Table.from_pylist(ROWS[: 10 if name == "test" else 20]), prepared / f"{name}.parquet"
        )
    config = config_of(run_dir, data=prepared)
    assert (config.eval.num_prompts, config.prompts.prompt_column) == (10, "prompt")
    (prepared / "test.parquet").unlink()
    assert config_of(run_dir, data=prepared).eval.num_prompts == 20
    (prepared / "train.parquet").unlink()
    with pytest.raises(UserError, match=r"--data: .*gsm8k has neither test.parquet nor train.parquet"):
        config_of(run_dir, data=prepared)


def test_rows_that_were_held_out_of_the_training_file_stay_the_same_ones(run_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl")
    keep(run_dir, "prompts.task=file", f"prompts.path={path}", "eval.num_prompts=4", "eval.num_greedy_prompts=2")
    config = config_of(run_dir, "eval.num_greedy_prompts=0")
    assert (config.eval.num_prompts, config.eval.num_greedy_prompts) == (4, 0)
    with pytest.raises(ConfigError, match="4 rows are held out of prompts.path, and other numbers hold out other rows"):
        config_of(run_dir, "eval.num_prompts=8")


def test_training_data_that_nothing_is_held_out_of_is_not_read(run_dir: Path, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl")
    keep(run_dir, "prompts.task=file", "prompts.path=gone.jsonl", f"prompts.eval_path={held_out}")
    assert config_of(run_dir).prompts.path == str(held_out)


# -------------------------------------------------------------------------------------------------------- configuration


def test_a_model_without_a_run_has_the_defaults_and_is_decoded_greedily_only_when_that_is_asked_for(
    run_dir: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "questions.jsonl")
    keys = ("rollout.max_response_length=64", "prompts.max_prompt_length=48")
    config = config_of(START_MODEL, *keys, data=data)
    assert (config.eval.num_greedy_prompts, config.eval.temperature, config.reward.verifier) == (0, 1.0, "answer")
    assert config_of(START_MODEL, *keys, "eval.num_greedy_prompts=3", data=data).eval.num_greedy_prompts == 3


def test_nothing_of_training_is_left_that_could_get_in_the_way(run_dir: Path) -> None:
    keep(run_dir, "run.name=mine", "controller.placement=shared", "loss.kl_coef=0.1", f"model.reference={START_MODEL}")
    config = config_of(run_dir)
    assert config.controller.placement == "auto"
    assert config.model.reference is None
    assert not config.filter.enabled
    assert config.metrics.wandb == "disabled"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.path=elsewhere", "model.path: is what CHECKPOINT says"),
        ("run.dir=elsewhere", "run.dir: is what --out says"),
        ("prompts.eval_path=elsewhere", "prompts.eval_path: is what --data says"),
        ("eval.temprature=1", "did you mean eval.temperature?"),
        ("eval.num_prompts=0", "other numbers|leaves nothing to evaluate"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(run_dir: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_of(run_dir, override, "eval.num_greedy_prompts=0")


# ------------------------------------------------------------------------------------------------------------ directory


def taken(config: Config, step: int = 12, answers: str = "{}\n") -> bool:
    """Hold the directory as the command does, and leave answers there. Returns whether it was complete."""
    with hold_directory(config, step) as complete:
        (Path(config.run.dir) / "answers.jsonl").write_text(answers)
    return complete


def test_the_same_command_resumes_and_one_that_asks_for_more_as_well(run_dir: Path) -> None:
    assert not taken(config_of(run_dir, samples=2))
    assert not taken(config_of(run_dir, samples=2))
    (run_dir.parent.parent / "evals" / "runs" / "mine" / "step-000012" / "metrics.json").write_text("{}")
    assert taken(config_of(run_dir, samples=2))
    assert not taken(config_of(run_dir, samples=4))
    assert not taken(config_of(run_dir, samples=4))  # that one was interrupted before it asked for anything
    with pytest.raises(ConfigError, match=r"eval.num_samples \(4 there, 2 here: an evaluation only grows\)"):
        taken(config_of(run_dir, samples=2))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.temperature=0.5", r"eval.temperature \(1.0 there, 0.5 here\)"),
        ("run.seed=3", r"run.seed \(0 there, 3 here\)"),
        ("rollout.max_response_length=100", "rollout.max_response_length"),
        ("reward.verifier=exact", r"reward.verifier \(answer there, exact here\)"),
    ],
)
def test_another_evaluation_is_refused_with_all_that_differs(run_dir: Path, override: str, words: str) -> None:
    taken(config_of(run_dir))
    with pytest.raises(ConfigError, match=words):
        taken(config_of(run_dir, override))
    taken(config_of(run_dir, "rollout.slots=8", "controller.stall_s=300"))


def test_another_model_or_other_data_is_refused(run_dir: Path, tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "questions.jsonl"), tmp_path / "out"
    taken(config_of(run_dir, data=data, out=out))
    write_rows(data, [*ROWS, {"prompt": "1+1", "answer": "2"}])
    with pytest.raises(ConfigError, match=r"prompts.eval_path \(other data\)"):
        taken(config_of(run_dir, data=data, out=out))
    write_rows(data)
    config = (run_dir / "checkpoints" / "step-000012" / "config.json").read_text()
    other = tmp_path / "other"
    shutil.copytree(START_MODEL, other)
    (other / "config.json").write_text(config.replace("{", '{"note": 1, ', 1))
    with pytest.raises(ConfigError, match=r"model.path \(other config.json\)"):
        taken(config_of(other, data=data, out=out, config=str(run_dir / "config.yaml")))


def test_a_directory_without_answers_may_become_any_evaluation(run_dir: Path) -> None:
    taken(config_of(run_dir), answers="")
    taken(config_of(run_dir, "eval.temperature=0.5"))


def test_a_directory_of_something_else_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--out: is in use by something else"):
        taken(config_of(run_dir, out=run_dir))
    assert not (run_dir / "eval.json").exists()


def test_two_commands_never_work_in_one_directory(run_dir: Path) -> None:
    config = config_of(run_dir)
    with (
        hold_directory(config, 12),
        pytest.raises(ConfigError, match="--out: is in use by another launch"),
        hold_directory(config, 12),
    ):
        pass
