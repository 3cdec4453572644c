"""A tokenizer from its `tokenizer.json` alone, without transformers, whose import takes a second of every process.

In: a folder. Out: what `TextTokenizer` needs; None where transformers might make another tokenizer of the folder: where
there is a chat template, where `tokenizer_config.json` has a key that isn't known here to leave the ids as they are,
or where it names a special token that `tokenizer.json` lacks. Invariant: the ids are those that transformers makes,
which a property test compares.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

SETTINGS = "tokenizer_config.json"
FILES = {"tokenizer.json", SETTINGS}
PREFIXES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "additional_chat_templates")
"""Of the names of files that transformers reads for a tokenizer."""
NAMED_TOKENS = {"bos_token", "eos_token", "pad_token", "unk_token"}
WITHOUT_EFFECT = {"backend", "clean_up_tokenization_spaces", "model_max_length", "padding_side", "tokenizer_class"}
"""Keys of `tokenizer_config.json` on which the ids don't depend."""
LARGE = 100_000
"""Beyond so many tokens transformers repairs those of certain models."""


@dataclass(frozen=True)
class FileTokenizer:
    """The part of `PreTrainedTokenizerFast` that needs no chat template."""

    backend_tokenizer: Tokenizer
    eos_token: str | None
    chat_template: None = None

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        return self.backend_tokenizer.id_to_token(token_id)


def read_tokenizer(folder: Path) -> FileTokenizer | None:
    """None also if there is no such folder. Raises the library's error for a broken `tokenizer.json`, ValueError for a
    broken `tokenizer_config.json`."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names or any(name.startswith(PREFIXES) for name in names - FILES):
        return None
    settings = json.loads((folder / SETTINGS).read_text()) if SETTINGS in names else {}
    if settings.keys() - NAMED_TOKENS - WITHOUT_EFFECT:
        return None
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    named = [settings[key] for key in NAMED_TOKENS & settings.keys()]
    if any(token not in special for token in named) or backend.post_processor is None:
        return None
    if backend.get_vocab_size() > LARGE:
        return None
    return FileTokenizer(backend, settings.get("eos_token"))
