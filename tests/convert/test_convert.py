"""The five peers' documented DAPO snippets, every key that they have for it, and what is done with all others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from asyncdapo.cli import main
from asyncdapo.convert.command import PEERS, converted
from asyncdapo.convert.settings import read_settings
from asyncdapo.errors import UserError

HERE = Path(__file__).parent
SNIPPETS = sorted(path for path in (HERE / "snippets").iterdir() if path.stem in PEERS)
ACTOR = "actor_rollout_ref.actor."


def convert(peer: str, *words: str) -> dict[str, Any]:
    """Our keys, dotted, as a run's loader reads them."""
    tree = OmegaConf.to_container(OmegaConf.create(converted(peer, list(words))[0]))
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_a_documented_snippet_becomes_the_expected_config(snippet: Path) -> None:
    expected = yaml.safe_load((HERE / "expected" / f"{snippet.stem}.yaml").read_text())
    made = OmegaConf.to_container(OmegaConf.create(converted(snippet.stem, [str(snippet)])[0]))
    expected = OmegaConf.to_container(OmegaConf.create(expected))
    assert set(made) == set(expected)
    for section, keys in expected.items():
        assert made[section] == keys, section


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_every_key_of_a_snippet_is_named_in_what_comes_out(snippet: Path) -> None:
    text = converted(snippet.stem, [str(snippet)])[0]
    given_keys = read_settings([str(snippet)], flags=PEERS[snippet.stem].flags).table
    assert len(given_keys) > 20
    assert [key for key, value in given_keys.items() if f"{key}=" not in text and not value.inherited] == []


KEYS = {
    peer: sorted({key for rule in PEERS[peer].rules for key in rule.theirs if key and not key.isupper()})
    for peer in PEERS
}


@settings(max_examples=30, deadline=None)
@given(data=st.data(), peer=st.sampled_from(sorted(PEERS)))
def test_no_key_is_dropped_in_silence(data: st.DataObject, peer: str) -> None:
    keys = data.draw(st.lists(st.sampled_from([*KEYS[peer], "made_up", "also.made.up"]), min_size=1, unique=True))
    values = [data.draw(st.sampled_from(["1", "true", "null", "grpo", "0.5"])) for _ in keys]
    flags = PEERS[peer].flags
    keys = [key.replace(".", "_") for key in keys] if flags else keys
    pairs = list(zip(keys, values, strict=True))
    words = [part for key, value in pairs for part in ((f"--{key}", value) if flags else (f"{key}={value}",))]
    try:
        text, _ = converted(peer, words)
    except UserError:  # a value that makes no sense
        return
    assert [key for key in keys if f"{key}=" not in text] == []


def test_a_key_of_the_chat_template_is_named_though_no_data_is() -> None:
    text, _ = converted("siirl", ["data.apply_chat_template_kwargs.enable_thinking=1"])
    assert "data.apply_chat_template_kwargs.enable_thinking=1; they always use it" in " ".join(text.split())


VERL = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4")
"""Without which verl trains a critic on single completions."""


def test_a_key_nobody_knows_is_listed_as_unknown() -> None:
    text, made = converted("verl", [*VERL, "data.train_files=a.parquet", "actor_rollout_ref.made_up=3"])
    assert len(made.left) == 1
    assert "unknown: not in our list of verl's keys" in text
    assert "actor_rollout_ref.made_up=3" in text


def test_a_value_that_needs_a_shell_is_listed_with_the_reason(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text('name="run-$(date +%F)"\npython -m a.b data.train_batch_size=8 trainer.experiment_name=$name\n')
    text, made = converted("verl", [str(script), *VERL, "data.train_files=a.parquet"])
    assert len(made.left) == 1
    assert "no command is run" in text
    assert "replay" in text


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("verl", "trainer.n_gpus_per_node=8 actor_rollout_ref.rollout.tensor_model_parallel_size={}"),
        (
            "skyrl",
            "trainer.placement.policy_num_gpus_per_node=8 generator.inference_engine.num_engines=4 "
            "generator.inference_engine.tensor_parallel_size={}",
        ),
        ("nemo-rl", "cluster.gpus_per_node=8 policy.generation.vllm_cfg.tensor_parallel_size={}"),
        ("ms-swift", "--use_vllm true --vllm_mode colocate --vllm_tensor_parallel_size {} --generation_batch_size 64"),
    ],
)
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_workers_and_ranks_take_no_more_gpus_than_there_are(
    tmp_path: Path, peer: str, words: str, parallel: int
) -> None:
    if PEERS[peer].flags:  # its GPUs stand in front of the command
        script = tmp_path / "train.sh"
        script.write_text(f"NPROC_PER_NODE=8 swift rlhf {words.format(parallel)}\n")
        made = convert(peer, str(script))
    else:
        made = convert(peer, *words.format(parallel).split())
    engines = made["rollout.num_workers"] * parallel
    assert made["controller.placement"] == ("shared" if parallel == 1 else "separate")
    assert max(engines, made["learner.ranks"]) <= 8 if parallel == 1 else engines + made["learner.ranks"] <= 8


def test_what_a_script_exports_counts_as_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "NNODES=9\nexport NPROC_PER_NODE=4\nswift rlhf --rlhf_type grpo --per_device_train_batch_size 4\n"
    )
    assert convert("ms-swift", str(script))["replay.prompts_per_step"] == 2


def test_a_script_that_starts_another_is_refused_with_its_name(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text('bash examples/run.sh trainer.epochs=3 "$@"\n')
    with pytest.raises(UserError, match="it starts examples/run.sh: convert that"):
        converted("skyrl", [str(script)])


def test_arguments_behind_a_script_win_over_it() -> None:
    made = convert("verl", str(HERE / "snippets" / "verl.sh"), "data.max_prompt_length=77")
    assert made["prompts.max_prompt_length"] == 77


def test_a_recipe_is_read_over_the_file_it_builds_on_and_does_without() -> None:
    made = convert("nemo-rl", str(HERE / "snippets" / "nemo-rl.yaml"))
    assert made["run.seed"] == 7
    assert made["rollout.group_size"] == 16


@pytest.mark.parametrize("name", ["a\nrun: {seed: 7}", "1e-6", "yes", "a: b # c", "'", '"', "*x", "é\tx"])
def test_a_text_comes_out_as_it_went_in(name: str) -> None:
    text, _ = converted(
        "verl", [f"trainer.default_local_dir=x{name}", f"data.train_files=[{'d/' + name!r}, b.parquet]"]
    )
    run = yaml.safe_load(text)["run"]
    assert run["dir"] == f"x{name}"
    assert "seed" not in run


def test_a_long_argument_isnt_a_file() -> None:
    assert convert("verl", f"trainer.experiment_name={'x' * 5000}")["run.name"] == "x" * 5000
    assert convert("verl", "trainer.experiment_name=a.yaml")["run.name"] == "a.yaml"


def test_a_value_we_refuse_names_their_key() -> None:
    with pytest.raises(UserError, match=r"loss.clip_low.*got 7.*actor_rollout_ref.actor.clip_ratio_low=7"):
        converted("verl", [f"{ACTOR}clip_ratio_low=7"])
    with pytest.raises(UserError, match=r"data.train_batch_size=many.*replay.prompts_per_step"):
        converted("verl", ["data.train_batch_size=many"])


def test_yaml_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    levels = "\n".join(f"k{level}: &k{level} {{a: *k{level - 1}, b: *k{level - 1}}}" for level in range(1, 18))
    path = tmp_path / "bomb.yaml"
    path.write_text(f"k0: &k0 {{a: 1, b: 2}}\n{levels}\n")
    with pytest.raises(UserError, match="more than|too deeply"):
        converted("nemo-rl", [str(path)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.sh"], "missing.sh: no such file"),
        ([], "nothing to convert"),
        (["[1"], "data.train_batch_size"),
    ],
)
def test_what_cannot_be_read_is_said(words: list[str], said: str) -> None:
    words = words if words != ["[1"] else ["data.train_batch_size=[1"]
    with pytest.raises(UserError, match=re.escape(said)):
        converted("verl", words)


def test_the_command_takes_a_file_or_arguments_and_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = " ".join([*VERL, "data.train_files=a.parquet", "data.train_batch_size=8", "some.thing=1"])
    Path("train.sh").write_text(f"touch run\npython3 -m verl.main {words}\n")
    assert main(["convert", "--from", "verl", "train.sh", "--out", "x.yaml"]) == 0
    assert "1 key without a line" in capsys.readouterr().err
    assert "prompts_per_step: 8" in Path("x.yaml").read_text()
    assert not Path("run").exists()
    assert main("convert --from ms-swift --epsilon 0.2 --epsilon_high 0.28".split()) == 0
    assert "clip_high: 0.28" in capsys.readouterr().out
    assert main("convert --from ms-swift -- --epsilon 0.3".split()) == 0
    assert "clip_low: 0.3" in capsys.readouterr().out
    assert main("convert --from verl --out missing/x.yaml data.train_batch_size=8".split()) == 2
    assert "missing/x.yaml: No such file" in capsys.readouterr().err
    assert main("convert --from verl".split()) == 2


def test_a_key_that_is_given_twice_counts_last_and_the_first_is_noted(tmp_path: Path) -> None:
    text = converted("verl", ["data.train_batch_size=512", "data.train_batch_size=256"])[0]
    assert "data.train_batch_size=512: given again later, not read" in text
    text = converted("ms-swift", ["--beta", "0.1", "--beta", "0.2"])[0]
    assert "beta=0.1: given again later, not read" in text
    path = tmp_path / "two.yaml"
    path.write_text("data:\n  train_batch_size: 512\n  train_batch_size: 256\n")
    text = converted("verl", [str(path)])[0]
    assert "two.yaml, line 2: train_batch_size=512: given again later, not read" in text


def test_of_two_spellings_of_one_key_the_one_that_is_not_taken_is_noted() -> None:
    text = converted("nemo-rl", ["grpo.dapo_batch_multiplier=2", "grpo.batch_multiplier=3"])[0]
    assert "grpo.dapo_batch_multiplier=2: another version's name of grpo.batch_multiplier" in text


def test_hydras_mappings_need_no_blank_behind_a_colon() -> None:
    table = read_settings(["a={b:1,c:{d:x},e:http://host:8/f}"], flags=False).table
    assert {key: setting.value for key, setting in table.items()} == {"a.b": 1, "a.c.d": "x", "a.e": "http://host:8/f"}


def test_the_name_of_a_data_file_stays_in_its_comment(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(r'data: {train_files: "x\nmetrics:\n  wandb: online\n  wandb_project: /a.parquet"}')
    assert not any(key.startswith("metrics.") for key in convert("verl", str(path)))


def test_lists_that_unfold_without_end_are_shown_short(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)))
    assert "a29=[[[" in converted("verl", [str(path)])[0]


def test_arguments_of_other_commands_are_noted(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    lines = [
        "python -m verl.main data.train_batch_size=8 trainer.x=1 \\",
        "    # data.gen_batch_size=16 \\",
        "    trainer.after=1",
        "python -m verl.main trainer.y=1",
    ]
    script.write_text("\n".join(lines))
    text = converted("verl", [str(script)])[0]
    assert "line 3: trainer.after=1: follows the end of a command" in text
    assert "line 4: another command with arguments, not converted" in text


@pytest.mark.parametrize("peer", ["verl", "skyrl", "ms-swift", "siirl"])
def test_without_data_a_placeholder_stands_that_a_launch_refuses(
    peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    word = "--beta=0" if PEERS[peer].flags else "made.up=1"
    assert main(["convert", "--from", peer, "--out", "x.yaml", word]) == 0
    assert "1. prompts.path=path/to/train.parquet: no known data set is named" in capsys.readouterr().err
    model = f"model.path={Path(__file__).parents[2] / 'configs/models/chain_start'}"
    lengths = ("prompts.max_prompt_length=64", "rollout.max_response_length=64", "prompts.chat_template=false")
    others = ("rollout.engine=torch", "rollout.dtype=float32", "prompts.system_prompt=null", "loss.kl_coef=0")
    assert main(["launch", "x.yaml", model, *lengths, *others]) == 2
    refused = capsys.readouterr().err.strip().splitlines()[-1]
    assert "prompts.path: no such file, got " in refused
    assert "path/to/train.parquet" in refused
    assert "name yours: prompts.path=" in refused
    assert not (tmp_path / "runs").exists()


def test_data_whose_name_is_not_known_are_no_toy_task(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "python -m verl.main data.train_files=$DATA data.train_batch_size=$BATCH trainer.project_name=$X\n"
    )
    made = converted("verl", [str(script), *VERL])[1]
    assert made.values["prompts.path"] == "path/to/train.parquet"
    said = " ".join(made.loud)
    assert re.search(r"BATCH; our own default is used for [^;]*replay.prompts_per_step", said)
    assert "metrics.wandb_project" not in said


def test_what_trains_differently_is_ranked_at_the_top_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    words = "actor_rollout_ref.rollout.top_p=0.9 custom_reward_function.path=m.py algorithm.adv_estimator=gae"
    assert main(["convert", "--from", "verl", *words.split(), "data.train_files=dapo-math-17k.parquet"]) == 0
    out, err = capsys.readouterr()
    top = out.partition("\nrun:\n")[0]
    for said in (top.replace("\n#    ", " ").replace("# ", ""), err.replace("asyncdapo: ", "")):
        lines = [line for line in said.splitlines() if re.match(r"\d+\. ", line)]
        assert [line.split(". ")[0] for line in lines] == [str(number) for number in range(1, len(lines) + 1)]
        places = [
            next(at for at, line in enumerate(lines) if what in line)
            for what in ("custom_reward_function.path", "adv_estimator=gae", "top_p=0.9")
        ]
        assert places == sorted(places)
    assert "What trains differently here" in top


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("verl", "data.train_files=a.parquet optim.lr=1e-5"),
        ("skyrl", "num_steps=10 max_length=100"),
        ("nemo-rl", "dpo.max_num_steps=10"),
        ("ms-swift", "--rlhf_type dpo --dataset a/b"),
    ],
)
def test_a_script_of_another_kind_of_training_is_refused(peer: str, words: str) -> None:
    with pytest.raises(UserError, match="only GRPO, PPO and similar ones"):
        converted(peer, words.split())


@pytest.mark.parametrize("word", ["actor_rollout_ref.model.path=", "data.train_files=['']"])
def test_a_name_that_is_left_empty_is_as_good_as_none(word: str) -> None:
    values = converted("verl", [*VERL, word])[1].values
    assert "model.path" not in values
    assert values["prompts.path"] == "path/to/train.parquet"


def test_the_loggers_that_are_sinks_here_are_taken_over_and_the_others_are_named() -> None:
    words = "trainer.logger=[console,tensorboard,mlflow,wandb]"
    assert convert("verl", words)["metrics.sinks"] == ["tensorboard", "wandb"]
    assert "mlflow isn't a sink here" in converted("verl", [words])[0]
    assert convert("nemo-rl", "logger.tensorboard_enabled=true")["metrics.sinks"] == ["tensorboard"]
    assert convert("nemo-rl", "logger.wandb_enabled=false")["metrics.sinks"] == []
