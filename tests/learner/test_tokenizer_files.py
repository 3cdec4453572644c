"""Checkpoints of a run bring along all that it takes to use the model: tokenizer, chat template, generation config."""

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.step.learner import Learner
from asyncdapo.model.config import ModelConfig
from asyncdapo.model.files import ModelFiles
from asyncdapo.model.stop_tokens import stop_token_ids
from tests.learner.tiny import save

START = Path(__file__).parents[2] / "configs" / "models" / "chain_start"
TEMPLATE = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}"


def saved(model, run_dir):
    settings = LearnerConfig(device="cpu")
    learner = Learner(
        model,
        LossConfig(),
        settings,
        temperature=1.0,
        staleness_bound=0,
        max_response_length=16,
        num_steps=1,
        seed=0,
    )
    return save(learner, run_dir, 0)


def copy_start(directory, **generation):
    shutil.copytree(START, directory)
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_chat_template_and_generation_config_of_the_model_are_kept(tmp_path):
    model = copy_start(tmp_path / "model", eos_token_id=[2, 5], temperature=0.6, do_sample=True, top_k=20)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    path = saved(ModelConfig(path=str(model)), tmp_path / "run")
    assert AutoTokenizer.from_pretrained(path).chat_template == TEMPLATE
    kept = GenerationConfig.from_pretrained(path)
    assert (kept.eos_token_id, kept.temperature, kept.top_k) == ([2, 5], 0.6, 20)
    files = ModelFiles(str(path))
    assert stop_token_ids(files) == {2, 5}


def test_a_tokenizer_of_its_own_goes_into_the_checkpoint(tmp_path):
    other = tmp_path / "other"
    AutoTokenizer.from_pretrained(START).save_pretrained(other)
    (other / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<pad>"}))
    path = saved(ModelConfig(path=str(copy_start(tmp_path / "model")), tokenizer=str(other)), tmp_path / "run")
    assert AutoTokenizer.from_pretrained(path).chat_template == TEMPLATE
    files = ModelFiles(str(path))
    assert stop_token_ids(files) == {0, 2}
