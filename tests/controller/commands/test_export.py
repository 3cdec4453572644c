"""A checkpoint's model leaves its run as a directory that Hugging Face reads, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncdapo.cli import main
from asyncdapo.config.config import load_config, to_yaml
from tests.learner.tiny import make_batch, make_learner, save, save_tiny_llama, train
from tests.test_configs import FOLDER


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.yaml").write_text(to_yaml(load_config(FOLDER / "quickstart.yaml")))
    return directory


@pytest.fixture(scope="module")
def weights(tmp_path_factory, run_dir) -> dict[str, torch.Tensor]:
    """Of step 1; that of step 2 is damaged."""
    learner = make_learner(save_tiny_llama(tmp_path_factory.mktemp("model")))
    train(learner, *make_batch())
    save(learner, run_dir, 1)
    trained = {name: weight.clone() for name, weight in learner.weights().items()}
    train(learner, *make_batch(2))
    (save(learner, run_dir, 2) / "model.safetensors").write_bytes(b"torn")
    return trained


@pytest.mark.parametrize("which", ["", "checkpoints/step-000001"])
def test_what_is_exported_are_the_trained_weights_bit_for_bit(run_dir, weights, tmp_path, capsys, which) -> None:
    out = tmp_path / "model"
    assert main(["export", str(run_dir / which), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "step-000001, 0.1 MiB" in printed
    named = "not used: step-000002: model.safetensors has 4 bytes" in printed
    assert named == (which == "")
    exported = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in weights.items())
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_what_cannot_be_exported_is_said_in_one_line(run_dir, weights, tmp_path, capsys) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    damaged = run_dir / "checkpoints/step-000002"
    for source, out, words in (
        (run_dir, "used", "is in use (give a new directory)"),
        (damaged, "new", "is damaged: model.safetensors has 4 bytes"),
        (tmp_path / "nothing", "new", "no such run, checkpoint or model directory"),
        (save_tiny_llama(tmp_path / "model"), "new", "is neither a run nor a checkpoint of one"),
    ):
        assert main(["export", str(source), "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()
