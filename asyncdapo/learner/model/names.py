"""Whether what the learner sends has the names that the model's files have, by which the engines load it.

Hugging Face renames and joins tensors while it loads some models (the experts of most mixtures); such a model trains,
and its first publish fails. The names follow from the config alone, so a launch asks before it has loaded anything.
Does not own: which tensors of a file are weights (`tensor_names`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import ModelFiles
from asyncdapo.model.tensor_names import TIED_HEAD, weight_names


def once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the further names of tied tensors: what is sent, and what safetensors hold."""
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: state[name] for name in state if first[id(state[name])] == name}


def check_names(model: PreTrainedModel, files: ModelFiles) -> None:
    """Raises ConfigError where the model's weights have other names than in its files. Weights in another format than
    safetensors are left to the engine."""
    in_files = weight_names(files.tensors, tied=model.config.get_text_config().tie_word_embeddings)
    sent = set(once(model.state_dict(keep_vars=True)))
    if sent == in_files or not files.tensors:
        return
    more, fewer = sorted(sent - in_files), sorted(in_files - sent)
    if not fewer and files.tensors.keys() >= sent:
        problem = f"ties its output layer to the embedding, and its files hold a {TIED_HEAD} of other values"
        fix = "remove it from the files, or set tie_word_embeddings to false in config.json"
    else:
        problem = f"can't be sent to an engine: the learner has {_some(more)}, the files have {_some(fewer)} instead"
        fix = "a model whose tensors keep their names when Hugging Face loads it, such as a dense one"
    raise ConfigError(files.key, problem, files.path, fix)


def check_names_unloaded(files: ModelFiles) -> None:
    """As `check_names`, by config.json and the headers of the files. A model that can't be made of its config is left
    to `load_model`, which says why."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.directory))
    except (OSError, ValueError, KeyError):
        return
    check_names(model, files)


def _some(names: list[str]) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "nothing"
