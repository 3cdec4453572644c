"""What must not be lost in silence: repetitions, the user's own reward, a critic, edits; and results that plan."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from asyncdapo.cli import main
from asyncdapo.controller.commands.plan import plan
from asyncdapo.convert.command import PEERS, converted
from tests.convert.test_convert import ACTOR, HERE, SNIPPETS, VERL, convert


@pytest.mark.parametrize(
    ("peer", "words", "epochs", "samples"),
    [
        ("verl", "data.train_files=/x/dapo-math-17k.parquet trainer.total_epochs=1", 100, None),
        ("verl", "data.train_files=/x/other.parquet trainer.total_epochs=2", 2, None),
        ("verl", "data.train_files=[dapo-math-17k.parquet,b.parquet] trainer.total_epochs=2", 2, None),
        (
            "verl",
            "data.train_files=a.parquet data.val_files=[/x/aime-2024.parquet] trainer.total_epochs=1 "
            "actor_rollout_ref.rollout.val_kwargs.n=2 actor_rollout_ref.rollout.val_kwargs.do_sample=True "
            "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",
            1,
            64,
        ),
        ("verl", "data.train_files=a.parquet data.val_files=aime-2024.parquet trainer.total_epochs=1", 1, None),
        (
            "skyrl",
            "data.train_data=BytedTsinghua-SIA/DAPO-Math-17k data.val_data=BytedTsinghua-SIA/AIME-2024 "
            "trainer.epochs=1 generator.eval_sampling_params.temperature=1",
            100,
            32,
        ),
        (
            "nemo-rl",
            "data.train.dataset_name=DAPOMath17K data.validation.dataset_name=AIME2024 data.validation.repeat=16",
            100,
            16,
        ),
        (
            "ms-swift",
            "--dataset BytedTsinghua-SIA/DAPO-Math-17k --val_dataset BytedTsinghua-SIA/AIME-2024 --num_train_epochs 2",
            200,
            32,
        ),
        ("ms-swift", "--dataset BytedTsinghua-SIA/DAPO-Math-17k#5000 --num_train_epochs 2", 2, None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_repetitions_that_data_prepare_takes_out_are_made_up_for(
    peer: str, words: str, epochs: int, samples: int | None
) -> None:
    made = convert(peer, *words.split())
    assert made["prompts.epochs"] == epochs
    assert made.get("eval.num_samples") == samples


@pytest.mark.parametrize(("file", "noted"), [("dapo-math-17k.parquet", False), ("mine.parquet", True)])
def test_rows_that_may_repeat_on_purpose_are_noted_at_the_top(file: str, noted: bool) -> None:
    text, _ = converted("verl", [*VERL, f"data.train_files={file}"])
    top = " ".join(text.partition("Run first")[0].replace("#", "").split())
    assert ("multiply prompts.epochs and eval.num_samples" in top) == noted


DOCUMENT = (HERE.parents[1] / "docs" / "coming_from.md").read_text()
DOCUMENTED = [
    shlex.split(words.replace("\\\n", " "))
    for words in re.findall(r"^asyncdapo convert --from (.*?[^\\])$", DOCUMENT, flags=re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize("words", DOCUMENTED, ids=lambda words: words[0])
def test_a_documented_command_makes_a_config_that_plans(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(DOCUMENTED) == len(PEERS)
    monkeypatch.chdir(tmp_path)
    Path("train.sh").write_text(re.findall(r"<<'EOF_SCRIPT'\n(.*?)EOF_SCRIPT", DOCUMENT, flags=re.DOTALL)[0])
    out = [] if "--out" in words else ["--out", "dapo.yaml"]
    assert main(["convert", "--from", *words, *out]) == 0
    assert "train.parquet, which isn't here yet" in plan("dapo.yaml", ["model.path=Qwen/Qwen2.5-7B"]).replace("_1M", "")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_a_documented_snippet_plans_before_its_data_are_here(
    snippet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dapo.yaml").write_text(converted(snippet.stem, [str(snippet)])[0])
    assert "train.parquet, which isn't here yet" in plan("dapo.yaml", ["model.path=Qwen/Qwen2.5-32B"])


@pytest.mark.parametrize(
    ("peer", "words", "said"),
    [
        (
            "verl",
            "custom_reward_function.path=/x/mine.py custom_reward_function.name=score",
            "YOUR REWARD FUNCTION /x/mine.py:score IS NOT CARRIED OVER",
        ),
        ("verl", "reward.custom_reward_function.path=m.py", "YOUR REWARD FUNCTION m.py IS NOT CARRIED OVER"),
        ("verl", "reward_model.enable=True", "YOUR REWARD MODEL IS NOT CARRIED OVER"),
        ("siirl", "custom_reward_function.path=m.py", "YOUR REWARD FUNCTION m.py IS NOT CARRIED OVER"),
        ("skyrl", "environment.env_class=mine", "YOUR ENVIRONMENT mine IS NOT CARRIED OVER"),
        ("nemo-rl", "data.default.env_name=code", "YOUR ENVIRONMENT code IS NOT CARRIED OVER"),
        ("ms-swift", "--reward_funcs mine --external_plugins m.py", "YOUR REWARD FUNCTION mine IS NOT CARRIED OVER"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_reward_of_the_users_own_is_said_aloud_and_never_replaced(
    peer: str, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"skyrl": "data.train_data=a.parquet", "ms-swift": "--dataset a.parquet"}
    files |= {"nemo-rl": "data.train.data_path=a.parquet"}
    given_words = [*files.get(peer, "data.train_files=dapo-math-17k.parquet").split(), *words.split()]
    assert convert(peer, *given_words)["reward.verifier"] == "path/to/file.py:function"
    assert main(["convert", "--from", peer, "--", *given_words]) == 0
    out, err = capsys.readouterr()
    assert said in err
    assert said in " ".join(out.partition("Run first")[0].replace("#", "").split())


@pytest.mark.parametrize("peer", ["verl", "siirl"])
def test_a_critic_is_said_aloud_also_where_it_is_their_default(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--from", peer, "actor_rollout_ref.rollout.n=4"]) == 0
    assert f"adv_estimator=gae ({PEERS[peer].title}'s default): IS NOT CARRIED OVER" in capsys.readouterr().err
    assert main(["convert", "--from", peer, *VERL]) == 0
    assert "NOT CARRIED OVER" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("skyrl", "trainer.algorithm.advantage_estimator=gae"),
        ("nemo-rl", "grpo.adv_estimator.name=gdpo"),
        ("ms-swift", "--advantage_estimator=reinforce_plus_plus"),
    ],
)
def test_an_advantage_that_another_stands_in_for_is_said_aloud(peer: str, words: str) -> None:
    text, made = converted(peer, [words])
    assert any("IS NOT CARRIED OVER" in line for line in made.loud)
    assert "advantage:" not in text


@pytest.mark.parametrize(
    ("peer", "word", "kept"),
    [("verl", VERL[0], 0), ("siirl", VERL[0], 100), ("skyrl", "trainer.epochs=1", 0), ("ms-swift", "--beta=0", 0)],
)
def test_checkpoints_are_kept_as_they_are_by_default_there(peer: str, word: str, kept: int) -> None:
    assert convert(peer, word)["learner.keep_checkpoints"] == kept


def test_a_comment_names_the_keys_that_decide_the_value() -> None:
    _, made = converted("verl", [str(HERE / "snippets" / "verl.sh")])
    shown = {line.ours: [text.partition("=")[0] for text in line.shown] for line in made.lines}
    assert shown["replay.prompts_per_step"] == ["data.train_batch_size", "algorithm.filter_groups.enable"]
    assert shown["learner.ranks"] == ["trainer.nnodes", "trainer.n_gpus_per_node"]
    assert shown["loss.kl_coef"] == [f"{ACTOR}kl_loss_coef", f"{ACTOR}use_kl_loss"]


def test_a_file_that_says_something_else_is_replaced_only_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["convert", "--from", "ms-swift", "--out", "mine.yaml", "--epsilon", "0.2"]
    assert main(command) == 0
    assert main(command) == 0
    Path("mine.yaml").write_text("edited by hand\n")
    assert main(command) == 2
    assert "mine.yaml: exists with other content; --force" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "edited by hand\n"
    assert main([*command, "--force"]) == 0
    assert "clip_low: 0.2" in Path("mine.yaml").read_text()
