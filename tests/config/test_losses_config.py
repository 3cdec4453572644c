"""What the keys of a loss, an advantage or a schedule need from others, and which it has."""

from __future__ import annotations

from typing import Any

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.config.found import find_config
from asyncdapo.errors import ConfigError

QUICKSTART = find_config("quickstart")


def test_a_group_of_one_is_compared_with_the_batch() -> None:
    alone = ["rollout.group_size=1", "filter.enabled=false", "loss.advantage=reinforce_pp"]
    assert load_config(QUICKSTART, alone).loss.advantage == "reinforce_pp"


def test_an_advantage_that_divides_by_the_mean_reward_wants_no_negative_one() -> None:
    with pytest.raises(ConfigError, match="loss.advantage: divides by the mean reward.*reward.incorrect=0"):
        load_config(QUICKSTART, ["loss.advantage=maxrl"])
    assert load_config(QUICKSTART, ["loss.advantage=maxrl", "reward.incorrect=0"]).reward.incorrect == 0


def test_a_loss_has_its_own_numbers_and_no_others() -> None:
    def loss_of(*overrides: str) -> dict[str, Any]:
        return load_config(QUICKSTART, overrides).loss.numbers

    assert loss_of("loss.variant=gmpo") == {"clip_low": 0.4, "clip_high": 0.4}
    assert loss_of("loss.variant=dppo_kl", "loss.clip_low=0.1") == {
        "clip_low": 0.1,
        "clip_high": 0.05,
        "dppo_ratio_cap": 20.0,
    }
    assert loss_of("loss.variant=vespo", "loss.vespo_k=[1,2]") == {"vespo_k": (1, 2), "vespo_lambda": (3, 2)}
    assert loss_of("loss.variant=m2po") == {}
    for variant, key in (("sapo", "clip_low=0.2"), ("m2po", "dual_clip=3"), ("vespo", "m2po_threshold=1")):
        with pytest.raises(ConfigError, match=f"has no meaning for loss.variant {variant}"):
            loss_of(f"loss.variant={variant}", f"loss.{key}")


def test_a_trust_region_about_what_sampled_has_no_other_anchor() -> None:
    for variant in ("m2po", "vespo"):
        with pytest.raises(ConfigError, match=f"loss.anchor: has no meaning for loss.variant {variant}"):
            load_config(QUICKSTART, [f"loss.variant={variant}", "loss.anchor=proximal"])
    for override in ("loss.correction_mode=mask", "loss.outlier_band=[0.1,10]"):
        with pytest.raises(ConfigError, match="needs the forward pass that loss.anchor loglinear saves"):
            load_config(QUICKSTART, ["loss.anchor=loglinear", override])


def test_a_learning_rate_that_falls_needs_the_length_of_the_run() -> None:
    falling = "learner.lr_schedule=cosine"
    with pytest.raises(ConfigError, match=r"learner.lr_schedule: falls over run.steps, but .* \(prompts.epochs=0 and"):
        load_config(QUICKSTART, [falling, "prompts.epochs=2"])
    with pytest.raises(ConfigError, match="has nothing to fall over: of 4 updates in run.steps, learner.warmup_steps"):
        load_config(QUICKSTART, [falling, "run.steps=4", "learner.warmup_steps=4"])
    assert load_config(QUICKSTART, ["learner.lr_schedule=constant", "prompts.epochs=2"]).prompts.epochs == 2
