"""Rotations whose angles depend on how long a sequence is, which the learner doesn't compute. No torch here.

Hugging Face takes the longest sequence of a forward pass for all of them. In a packed micro-batch the log-probs of one
would depend on its neighbours, and differ from those of the engine, where it has others.

    dynamic    the angles follow from the length beyond `max_position_embeddings`; vLLM has one set for any length
    longrope   two sets of angles, up to `original_max_position_embeddings` and beyond it: as long as no sequence of a
               run can be longer, learner and engines have the first one everywhere, and the model can be trained
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from asyncdapo.errors import ConfigError
from asyncdapo.model.location import KEY

FORMER_NAMES = {"su": "longrope"}
ORIGINAL = "original_max_position_embeddings"


def check_rotation(config: Mapping[str, Any], num_positions: int, path: str, key: str = KEY) -> None:
    """`config`: what config.json says; `num_positions`: of the longest prompt and response together. Raises
    ConfigError, for the config's `key`, where the angles of a token could depend on the length of a sequence."""
    text = config.get("text_config") or config
    for rope in _rotations(text):
        kind = rope.get("rope_type", rope.get("type"))
        kind = FORMER_NAMES.get(kind, kind)
        if kind == "yarn" and text.get("model_type") == "phi3":
            kind = "longrope"  # so Hugging Face reads it
        known = [part[ORIGINAL] for part in (text, rope) if part.get(ORIGINAL)]
        if kind not in ("dynamic", "longrope") or (kind == "longrope" and known and num_positions <= min(known)):
            continue
        fix = "a model of another rope_type"
        if kind == "longrope" and known:
            fix = f"up to {ORIGINAL}, {min(known)}, they don't: lower prompts.max_prompt_length or "
            fix += f"rollout.max_response_length, {num_positions} together"
        problem = f"can't be trained: its rope_type is {kind}, whose angles depend on the longest sequence of a batch"
        raise ConfigError(key, problem, path, fix)


def _rotations(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """One, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        yield from [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
