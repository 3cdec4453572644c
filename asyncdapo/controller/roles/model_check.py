"""Whether a model's files are whole, the learner can train the model and the engine take what it sends, by the files.

In: the configuration. Raises ConfigError. What isn't on this machine yet is passed over, and checked by the learner
when it is. torch is imported for kinds of models only that no formula is known of: what those name their weights,
Hugging Face has to say.
"""

from __future__ import annotations

from asyncdapo.config.config import Config
from asyncdapo.learner.model.rotation import check_rotation
from asyncdapo.model.location import TOKENIZER, check_hub_id
from asyncdapo.model.shape import MODEL_TYPES


def check_files(config: Config) -> None:
    """Whether weights and tokenizer are whole, as far as they are here, and belong together."""
    for files in (config.model.files, config.model.reference_files):
        if files and files.weights:
            files.check_whole()
    tokenizer = config.model.tokenizer_files
    if tokenizer.here:
        tokenizer.check_vocabulary(config.model.files.vocab_size)
    else:
        check_hub_id(tokenizer.path, tokenizer.key, TOKENIZER)


def check_learnable(config: Config) -> None:
    """Before any process starts."""
    check_rotations(config)
    files = config.model.files
    if files.weights and (files.config or {}).get("model_type") not in MODEL_TYPES:
        from asyncdapo.learner.model.names import check_names_unloaded

        check_names_unloaded(files)


def check_rotations(config: Config) -> None:
    """Of the model, and of the reference if there is one."""
    for files in (config.model.files, config.model.reference_files):
        if files and files.config:
            check_rotation(files.config, config.max_context, files.path, files.key)
