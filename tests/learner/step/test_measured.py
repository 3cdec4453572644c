"""Speed and peak memory of a rank, as the metrics have them."""

from __future__ import annotations

import pytest
import torch

from asyncdapo.learner.model.packing import Work
from asyncdapo.learner.step import measured
from asyncdapo.learner.step.measured import Measured
from asyncdapo.model.shape import PEAK_FLOPS, read_shape

CPU = torch.device("cpu")
SHAPE = read_shape(
    {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "vocab_size": 500,
    }
)
WORK = Work(num_tokens=1000, num_computed_tokens=700, num_loss_tokens=500, num_pairs=40_000)


def test_the_speed_counts_computed_tokens_once_and_logits_where_they_are_made() -> None:
    metrics = Measured(CPU).metrics(SHAPE, WORK, seconds=2.0)
    assert metrics["learner/tflops"] == pytest.approx(SHAPE.train_flops(700, 500, 40_000) / 2e12)
    assert "learner/mfu" not in metrics  # a CPU's peak isn't known


def test_a_model_without_a_formula_has_its_memory_measured_all_the_same() -> None:
    assert set(Measured(CPU).metrics(None, WORK, seconds=2.0)) == {"learner/peak_gib"}


def test_the_share_of_the_peak_is_that_of_all_gpus_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    watched = Measured(torch.device("cuda", 0))
    seconds = SHAPE.train_flops(700, 500, 40_000) / PEAK_FLOPS["H200"]
    assert watched.metrics(SHAPE, WORK, seconds)["learner/mfu"] == pytest.approx(1)
    assert watched.metrics(SHAPE, WORK, 2 * seconds, num_ranks=4)["learner/mfu"] == pytest.approx(1 / 8)
    assert watched.metrics(SHAPE, WORK, seconds)["learner/peak_gib"] == 3


def test_on_a_cpu_the_peak_rises_with_what_is_held_and_does_not_fall_again() -> None:
    watched = Measured(CPU)
    missing = measured.resource.getrusage(measured.resource.RUSAGE_SELF).ru_maxrss * measured.RESIDENT_UNIT
    held = torch.ones(
        missing + (64 << 20), dtype=torch.uint8
    )  # more than the process has had so far, whatever that was
    risen = watched.peak_bytes()
    assert risen >= 64 << 20
    del held
    assert watched.peak_bytes() == risen
