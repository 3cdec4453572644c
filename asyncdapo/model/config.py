"""Configuration of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

if TYPE_CHECKING:
    from asyncdapo.model.files import ModelFiles, TokenizerFiles  # its libraries would make `--help` slow

ModelPath = Annotated[str, Meta(min_length=1, extra={"fix": "a Hugging Face id or a directory"})]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The causal language model to train."""

    path: ModelPath
    """Hugging Face id, or a directory with safetensors and tokenizer.json. A relative path is looked up in the working
    directory, then beside the config file."""

    tokenizer: Annotated[str, Meta(min_length=1, extra={"fix": "null is the model's own"})] | None = None
    """Hugging Face id or directory of the tokenizer and its chat template. null is the model's own."""

    reference: ModelPath | None = None
    """Reference model of the KL penalty (`loss.kl_coef`), as an id or a directory. null is the initial `model.path`."""

    @cached_property
    def files(self) -> ModelFiles:
        """What the model's files say, read once."""
        from asyncdapo.model.files import ModelFiles

        return ModelFiles(self.path)

    @cached_property
    def reference_files(self) -> ModelFiles | None:
        """The same of `reference`."""
        from asyncdapo.model.files import ModelFiles

        return ModelFiles(self.reference, "model.reference") if self.reference else None

    @cached_property
    def tokenizer_files(self) -> TokenizerFiles:
        """Of the tokenizer, the model's own or another."""
        from asyncdapo.model.files import TokenizerFiles

        return TokenizerFiles(self.tokenizer) if self.tokenizer else TokenizerFiles(self.path, "model.path")
