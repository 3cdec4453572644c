"""Whether the learner can train the model and the engine take what it sends, by what the model's files say.

In: the configuration. Raises ConfigError. What isn't on this machine yet is passed over, and checked by the learner
when it is. torch is imported for kinds of models only that no formula is known of: what those name their weights,
Hugging Face has to say.
"""

from __future__ import annotations

from asyncdapo.config import Config
from asyncdapo.learner.model_path import KEY, local_directory, model_config
from asyncdapo.learner.rotation import check_rotation
from asyncdapo.shape import MODEL_TYPES
from asyncdapo.tensor_names import read_shapes


def check_learnable(config: Config) -> None:
    """Before any process starts."""
    check_rotations(config)
    model = model_config(config.model.path)
    directory = local_directory(config.model.path) if model else None
    if not directory:
        return
    read_shapes(directory)
    if model.get("model_type") not in MODEL_TYPES:
        from asyncdapo.learner.names import check_names_unloaded

        check_names_unloaded(directory)


def check_rotations(config: Config) -> None:
    """Of the model, and of the reference if there is one."""
    num_positions = config.prompts.max_prompt_length + config.rollout.max_response_length
    for key, path in ((KEY, config.model.path), ("model.reference", config.model.reference)):
        if path and (model := model_config(path)):
            check_rotation(model, num_positions, path, key)
