"""Whether a model's files are whole, the learner can train the model and the engine take what it sends, by the files.

In: the configuration. Raises ConfigError. What isn't on this machine yet is passed over, and checked by the learner
when it is. torch is imported for kinds of models only that no formula is known of: what those name their weights,
Hugging Face has to say.
"""

from __future__ import annotations

from pathlib import Path

from asyncdapo.config.config import Config
from asyncdapo.learner.model.rotation import check_rotation
from asyncdapo.model.files import (
    KEY,
    check_vocabulary,
    checked_hub_id,
    local_directory,
    local_tokenizer,
    model_config,
    vocab_size,
)
from asyncdapo.model.shape import MODEL_TYPES
from asyncdapo.model.tensor_names import check_whole


def check_files(config: Config) -> None:
    """Whether weights and tokenizer are whole, as far as they are here, and belong together."""
    for key, path in ((KEY, config.model.path), ("model.reference", config.model.reference)):
        if path and (directory := local_directory(path)):
            check_whole(directory, key, may_lack_files=not Path(path).is_dir())
    key, path = config.model.tokenizer_key, config.model.tokenizer_path
    if directory := local_tokenizer(path):
        check_vocabulary(directory, key, vocab_size(config.model.path))
    else:
        checked_hub_id(path, key, "tokenizer.json")


def check_learnable(config: Config) -> None:
    """Before any process starts."""
    check_rotations(config)
    model = model_config(config.model.path)
    if model is None or model.get("model_type") in MODEL_TYPES:
        return
    if directory := local_directory(config.model.path):
        from asyncdapo.learner.model.names import check_names_unloaded

        check_names_unloaded(directory)


def check_rotations(config: Config) -> None:
    """Of the model, and of the reference if there is one."""
    num_positions = config.prompts.max_prompt_length + config.rollout.max_response_length
    for key, path in ((KEY, config.model.path), ("model.reference", config.model.reference)):
        if path and (model := model_config(path)):
            check_rotation(model, num_positions, path, key)
