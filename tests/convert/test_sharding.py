"""How the peers divide a model over GPUs, and what becomes of it here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncdapo.convert.command import converted
from tests.convert.test_convert import VERL, convert

ACTOR = "actor_rollout_ref.actor."
FSDP = f"{ACTOR}fsdp_config."
POLICY = "trainer.policy."
VERL_8 = ("trainer.n_gpus_per_node=8", "rollout.n_gpus_per_node=8", "data.train_batch_size=512", *VERL)
"""Eight GPUs for the learner, eight for engines."""
SKYRL_8 = ("trainer.placement.policy_num_gpus_per_node=8", "trainer.placement.colocate_all=false")


def sharding(made: dict[str, Any]) -> dict[str, Any]:
    keys = ("learner.shards", "learner.reshard_after_forward", "learner.offload")
    return {key.removeprefix("learner."): made[key] for key in keys if key in made}


@pytest.mark.parametrize(
    ("peer", "words", "expected"),
    [
        ("verl", (*VERL_8, f"{FSDP}fsdp_size=-1"), {"shards": 8}),
        ("verl", (*VERL_8, f"{FSDP}fsdp_size=4"), {"shards": 4}),
        ("verl", (*VERL_8, f"{FSDP}fsdp_size=12"), {"shards": 4}),
        ("verl", (*VERL, f"{FSDP}fsdp_size=8"), {}),
        ("verl", (*VERL_8, f"{FSDP}reshard_after_forward=False"), {"reshard_after_forward": False}),
        ("verl", (*VERL_8, f"{FSDP}offload_policy=True"), {"offload": "optimizer"}),
        ("verl", (*VERL_8, f"{FSDP}param_offload=True", f"{FSDP}optimizer_offload=True"), {}),
        ("siirl", (*VERL_8, f"{FSDP}fsdp_size=-1"), {"shards": 8}),
        ("skyrl", (*SKYRL_8, f"{POLICY}fsdp_config.fsdp_size=-1"), {"shards": 8}),
        (
            "skyrl",
            (*SKYRL_8, f"{POLICY}fsdp_config.cpu_offload=true", f"{POLICY}fsdp_config.reshard_after_forward=4"),
            {"offload": "optimizer", "reshard_after_forward": True},
        ),
        (
            "nemo-rl",
            ("policy.dtensor_cfg.enabled=true", "policy.dtensor_cfg.cpu_offload=true"),
            {"offload": "optimizer"},
        ),
        (
            "nemo-rl",
            ("policy.megatron_cfg.enabled=true", "policy.megatron_cfg.optimizer.optimizer_cpu_offload=true"),
            {"offload": "optimizer"},
        ),
        (
            "nemo-rl",
            ("policy.megatron_cfg.enabled=false", "policy.megatron_cfg.optimizer.optimizer_cpu_offload=true"),
            {},
        ),
    ],
)
def test_what_divides_a_model_there_divides_it_here(
    peer: str, words: tuple[str, ...], expected: dict[str, Any]
) -> None:
    assert sharding(convert(peer, *words)) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--deepspeed zero3", {"shards": 8, "reshard_after_forward": True, "offload": "none"}),
        ("--deepspeed zero3_offload", {"shards": 8, "reshard_after_forward": True, "offload": "optimizer"}),
        ("--deepspeed zero2", {"shards": 8, "reshard_after_forward": False, "offload": "none"}),
        (
            "--deepspeed zero3 --zero_hpz_partition_size 4",
            {"shards": 4, "reshard_after_forward": True, "offload": "none"},
        ),
        ("--deepspeed zero0", {"shards": 1, "offload": "none"}),
        ("--deepspeed ds.json", {}),
        ("--fsdp fsdp2", {"shards": 8}),
        ("--fsdp 'shard_grad_op auto_wrap'", {"shards": 8, "reshard_after_forward": False}),
    ],
)
def test_stages_of_zero_become_shards(tmp_path: Path, arguments: str, expected: dict[str, Any]) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "NPROC_PER_NODE=8 swift rlhf --rlhf_type grpo --use_vllm true --vllm_mode server "
        f"--per_device_train_batch_size 8 --num_generations 8 {arguments}\n"
    )
    assert sharding(convert("ms-swift", str(script))) == expected


@pytest.mark.parametrize(
    ("peer", "word", "reason"),
    [
        ("verl", f"{ACTOR}megatron.tensor_model_parallel_size=4", "learner.shards divides weights"),
        ("verl", f"{ACTOR}megatron.pipeline_model_parallel_size=2", "learner.shards divides weights"),
        ("verl", f"{ACTOR}ulysses_sequence_parallel_size=8", "computes whole sequences here"),
        ("verl", f"{FSDP}optimizer_offload=True", "learner.offload=optimizer keeps"),
        ("nemo-rl", "policy.dtensor_cfg.tensor_parallel_size=4", "learner.shards divides weights"),
        ("nemo-rl", "policy.megatron_cfg.pipeline_model_parallel_size=2", "learner.shards divides weights"),
        ("nemo-rl", "policy.megatron_cfg.context_parallel_size=2", "computes whole sequences here"),
        ("skyrl", f"{POLICY}megatron_config.tensor_model_parallel_size=4", "learner.shards divides weights"),
        ("skyrl", f"{POLICY}sequence_parallel_size=4", "computes whole sequences here"),
        ("ms-swift", "--tensor_model_parallel_size=4", "learner.shards divides weights"),
        ("ms-swift", "--sequence_parallel_size=4", "computes whole sequences here"),
        ("ms-swift", "--offload_optimizer=true", "learner.offload=optimizer keeps"),
        ("ms-swift", "--deepspeed=ds.json", "learner.shards is auto"),
    ],
)
def test_what_has_no_counterpart_is_listed_with_what_replaces_it(peer: str, word: str, reason: str) -> None:
    key = word.removeprefix("--").partition("=")[0]
    [why] = [why for shown, why in converted(peer, [word])[1].left if shown.startswith(f"{key}=")]
    assert reason in why
