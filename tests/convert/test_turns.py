"""Episodes of several turns: what of a peer's keys becomes ours, and that what does not is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.convert.command import converted
from asyncdapo.convert.turns import OWN_CLASS

VERL = ["data.train_files=gsm8k/train.parquet", "actor_rollout_ref.model.path=m"]
TURNS, LOOP = "actor_rollout_ref.rollout.multi_turn.", "actor_rollout_ref.rollout.agent."
SKYRL = ["data.train_data=search.parquet", "trainer.policy.model.path=m"]
NEMO = ["policy.model_name=m", "data.train.data_path=puzzles.jsonl"]
SWIFT = "--rlhf_type grpo --model m --dataset d.jsonl --num_generations 8".split()

EPISODES = [
    ("verl", [*VERL, f"{TURNS}enable=True", f"{TURNS}max_assistant_turns=5"], {"max_turns": 5}, 512),
    ("verl", [*VERL, f"{LOOP}default_agent_loop=tool_agent"], {}, 512),
    ("verl", [*VERL, f"{LOOP}agent_loop_config_path=agents.yaml", f"{TURNS}max_assistant_turns=null"], {}, 512),
    ("siirl", [*VERL, f"{TURNS}enable=True", f"{TURNS}max_turns=7"], {"max_turns": 7}, 512),
    (
        "skyrl",
        [
            *SKYRL,
            *("generator.max_turns=4", "environment.env_class=search", "generator.max_input_length=4096"),
            *("generator.sampling_params.max_generate_length=500", "environment.skyrl_gym.max_env_workers=8"),
        ],
        {"max_turns": 4, "max_context": 4596, "concurrency": 8},
        2000,
    ),
    (
        "nemo-rl",
        [
            *NEMO,
            *("grpo.max_rollout_turns=50", "data.train.env_name=sliding_puzzle_game"),
            *("policy.max_total_sequence_length=3072", "policy.generation.max_new_tokens=1024"),
        ],
        {"max_turns": 50, "max_context": 3072},
        1024,
    ),
    (
        "nemo-rl",
        [*NEMO, "env.should_use_nemo_gym=true", "data.max_input_seq_length=200"],
        {"max_context": 512},
        312,
    ),
    (
        "ms-swift",
        [*SWIFT, *"--multi_turn_scheduler mine --max_turns 30 --max_completion_length 128".split()],
        {"max_turns": 30},
        3840,
    ),
    (
        "ms-swift",
        [*SWIFT, *"--use_gym_env true --gym_env game --max_completion_length 900".split()],
        {},
        900,
    ),
    (
        "ms-swift",
        [*SWIFT, *"--multi_turn_scheduler mine --max_turns 3 --completion_length_limit_scope total".split()],
        {"max_turns": 3},
        512,
    ),
]


@pytest.mark.parametrize(("peer", "words", "environment", "length"), EPISODES)
def test_episodes_of_a_peer_become_an_environment_whose_class_the_user_names(
    tmp_path: Path, peer: str, words: list[str], environment: dict[str, object], length: int
) -> None:
    text, made = converted(peer, words)
    found = {key.removeprefix("environment."): value for key, value in made.values.items() if "environment." in key}
    assert found == {"path": OWN_CLASS} | environment
    assert made.values["rollout.max_response_length"] == length
    assert "reward.verifier" not in made.values
    assert any("environment" in line or "IS NOT CARRIED OVER" in line for line in made.loud)
    path = tmp_path / "converted.yaml"
    path.write_text(text)
    overrides = ["model.path=m", "prompts.max_prompt_length=64"]
    assert load_config(path, overrides).environment.path == OWN_CLASS


SINGLE = [
    ("verl", [*VERL, f"{TURNS}enable=False", f"{TURNS}max_assistant_turns=5"]),
    ("verl", [*VERL, f"{LOOP}default_agent_loop=single_turn_agent"]),
    ("skyrl", [*SKYRL, "generator.max_turns=1", "generator.max_input_length=512"]),
    ("skyrl", [*SKYRL, "generator.max_turns=3", "environment.env_class=gsm8k"]),
    ("nemo-rl", [*NEMO, "grpo.max_rollout_turns=999999", "data.train.env_name=math"]),
    ("ms-swift", [*SWIFT, "--max_turns", "3", "--reward_funcs", "accuracy"]),
]


@pytest.mark.parametrize(("peer", "words"), SINGLE)
def test_one_turn_stays_one_turn_and_has_a_verifier(peer: str, words: list[str]) -> None:
    text, made = converted(peer, words)
    assert not any(key.startswith("environment.") for key in made.values)
    assert made.values["reward.verifier"] != OWN_CLASS
    if "turns=" in " ".join(words):
        assert "there is one turn" in text


def test_the_key_of_a_length_that_holds_for_each_turn_is_multiplied_and_says_why() -> None:
    made = converted(*EPISODES[4][:2])[1]
    [line] = [line for line in made.lines if line.ours == "rollout.max_response_length"]
    assert line.why == "max_generate_length bounds each turn there, all turns together here"


def test_without_a_limit_on_turns_the_length_is_said_to_be_of_all_turns() -> None:
    loud = converted(*EPISODES[8][:2])[1].loud
    assert any("max_completion_length bounds each turn there, and all turns together here" in line for line in loud)
