"""Every loss, advantage and anchor goes through a train step, and says in its metrics what it has."""

import math

import pytest
import torch

from asyncdapo.learner.config import ADVANTAGES, VARIANTS, LossConfig
from tests.learner.tiny import make_batch, make_learner, save_tiny_llama, train

GIVEN = {"gspo": {"clip_low": 0.2, "clip_high": 0.28}, "estr": {"estr_threshold": 0.5}}
LOSSES = {
    **{variant: LossConfig(variant=variant, **GIVEN.get(variant, {})) for variant in VARIANTS},
    **{advantage: LossConfig(advantage=advantage) for advantage in ADVANTAGES},
    "loglinear": LossConfig(anchor="loglinear"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", LOSSES)
def test_a_train_step_has_a_gradient_and_the_metrics_of_its_loss(path, name):
    learner = make_learner(path, loss=LOSSES[name])
    before = torch.cat([weight.flatten() for weight in learner.weights().values()]).clone()
    metrics = train(learner, *make_batch())
    assert not torch.equal(torch.cat([weight.flatten() for weight in learner.weights().values()]), before)
    assert math.isfinite(metrics["learner/loss"])
    assert metrics["learner/bad_updates"] == 0
    assert metrics["learner/second_moment"] > 0
    assert ("learner/untrusted_ratio" in metrics) == (name in ("m2po", "estr"))
    assert ("learner/gate_mean" in metrics) == (name in ("sapo", "vespo"))
    if name == "m2po":
        assert 0 < metrics["learner/untrusted_ratio"] < 1
