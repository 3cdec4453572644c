"""Text to token ids and back, for whoever is given one of these callables. Does not import torch.

The tokenizer is the checkpoint's `tokenizer.json`, used directly: one encode or decode takes some 10 µs, several times
less than through the Python layer above it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from asyncdapo.errors import ConfigError


class TextTokenizer:
    """A Hugging Face tokenizer reduced to what a run needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a tokenizer.json may carry settings of the job that saved it
        self._backend.no_padding()

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, with the special tokens that the tokenizer puts around it (usually bos in front)."""
        return self._backend.encode(text).ids

    def encode_chat(self, question: str) -> list[int]:
        """Ids of the question as the user's turn in the chat template, up to where the assistant's turn begins."""
        turns = [{"role": "user", "content": question}]
        return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    def prompt_encoder(self, chat_template: bool) -> Callable[[str], list[int]]:
        """`encode_chat` or `encode`. Raises ConfigError for a chat template that the tokenizer hasn't got."""
        if chat_template and self._tokenizer.chat_template is None:
            raise ConfigError("prompts.chat_template", "the model's tokenizer has none", True, "use prompts.template")
        return self.encode_chat if chat_template else self.encode

    def decode(self, token_ids: np.ndarray) -> str:
        """Text of int token ids [T] without special tokens."""
        return self._backend.decode(token_ids.tolist(), skip_special_tokens=True)


def load_tokenizer(path: str) -> TextTokenizer:
    """The tokenizer of a Hugging Face id or directory. Raises ConfigError when it has no readable `tokenizer.json`."""
    local = Path(path)
    if local.is_dir() and not (local / "tokenizer.json").is_file():
        fix = "save it with AutoTokenizer.from_pretrained(path).save_pretrained(path)"
        raise ConfigError("model.path", "the directory has no tokenizer.json", path, fix)
    try:
        return TextTokenizer(PreTrainedTokenizerFast.from_pretrained(path))
    except (OSError, ValueError) as error:
        what = "its tokenizer" if local.is_dir() else "no such directory, and as a Hugging Face id it"
        raise ConfigError("model.path", f"{what} can't be loaded: {str(error).splitlines()[0]}", path) from error
