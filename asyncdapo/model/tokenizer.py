"""Text to token ids and back. Does not import torch.

The model's `tokenizer.json` is used directly: one encode or decode takes some 10 µs, several times less than through
the Python layer above it. That layer, which is slow to import, is only loaded where it may change something.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import TokenizerFiles
from asyncdapo.model.tokenizer_file import FileTokenizer, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextTokenizer:
    """A Hugging Face tokenizer reduced to what a run needs."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | FileTokenizer,
        template_arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`template_arguments`: for the chat template, wherever it is used."""
        self._tokenizer, self._arguments = tokenizer, template_arguments
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a tokenizer.json may carry settings of the job that saved it
        self._backend.no_padding()

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, with the special tokens that the tokenizer puts around it (usually bos in front)."""
        return self._backend.encode(text).ids

    def encode_more(self, text: str) -> list[int]:
        """Ids of a text that follows others: without special tokens around it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The messages in the chat template, up to where the assistant writes. `tools`: their JSON schemas."""
        text = self._with_template.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=True,
            tokenize=False,
            **self._arguments,
        )
        return cast(str, text)

    @property
    def _with_template(self) -> PreTrainedTokenizerFast:
        assert not isinstance(self._tokenizer, FileTokenizer), "a chat template is there"
        return self._tokenizer

    @property
    def end_of_turn(self) -> str:
        """The stop token's text."""
        return cast(str, self._tokenizer.eos_token or "")

    @property
    def unknown_id(self) -> int | None:
        """The token for text outside the vocabulary. None for a tokenizer that knows every text."""
        token = getattr(self._backend.model, "unk_token", None)
        return self._backend.token_to_id(token) if token else None

    def encode_chat(self, question: str, system_prompt: str | None = None) -> list[int]:
        """Ids of the question as the user's turn in the chat template, after the system prompt if there is one. They
        end where the assistant's turn begins."""
        return self.encode_more(self.render(_turns(question, system_prompt)))

    def prompt_encoder(
        self, chat_template: bool, system_prompt: str | None = None, vocab_size: int | None = None
    ) -> Callable[[str], list[int]]:
        """`encode_chat` or `encode`. Raises ConfigError if the tokenizer has no chat template, or its template leaves
        the system prompt out. The function returned raises it for a token outside the model's vocabulary."""
        if chat_template:
            self._check_chat(system_prompt)

        def encode(text: str) -> list[int]:
            token_ids = self.encode_chat(text, system_prompt) if chat_template else self.encode(text)
            if vocab_size is not None and token_ids and max(token_ids) >= vocab_size:
                raise self._unknown_token(max(token_ids), vocab_size)
            return token_ids

        encode("1 + 1 = ?")
        return encode

    def _check_chat(self, system_prompt: str | None) -> None:
        if self._tokenizer.chat_template is None:
            raise ConfigError("prompts.chat_template", "the model's tokenizer has none", True, "use prompts.template")
        self._check_arguments()
        key, value = ("prompts.system_prompt", system_prompt) if system_prompt else ("prompts.chat_template", True)
        fix = "put its words into prompts.template" if system_prompt else "use prompts.template"
        try:
            text = self.render(_turns("1 + 1 = ?", system_prompt))
        except Exception as error:  # noqa: BLE001 - a template is code, which may raise anything
            raise ConfigError(key, f"the model's chat template refuses it ({error})", value, fix) from error
        if system_prompt and system_prompt.strip() not in text:
            raise ConfigError(key, "the model's chat template leaves it out", value, fix)

    def _check_arguments(self) -> None:
        """A template doesn't say that it has no use for one."""
        for name, value in self._arguments.items():
            if not re.search(rf"\b{re.escape(name)}\b", self._with_template.get_chat_template()):
                problem = f"the model's chat template knows no {name}"
                raise ConfigError("prompts.chat_template", problem, {name: value}, "remove it")

    def _unknown_token(self, token_id: int, vocab_size: int) -> ConfigError:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        problem = (
            f"a prompt holds the token {token!r}, whose id {token_id} is outside the model's vocabulary of {vocab_size}"
        )
        return ConfigError("model.tokenizer", problem, None, "take the tokenizer that the model was trained with")

    def decode(self, token_ids: np.ndarray) -> str:
        """Text of int token ids [T] without special tokens."""
        return self._backend.decode(token_ids.tolist(), skip_special_tokens=True)

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text of token ids as the model reads them, special tokens written out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)


def load_tokenizer(
    files: TokenizerFiles, template_arguments: Mapping[str, Any] = MappingProxyType({})
) -> TextTokenizer:
    """The tokenizer of a Hugging Face id or directory. Raises ConfigError, for the files' key, when it has no
    readable `tokenizer.json`."""
    path, key, local = files.path, files.key, Path(files.path)
    if local.is_dir() and not (local / "tokenizer.json").is_file():
        fix = "save it with AutoTokenizer.from_pretrained(path).save_pretrained(path)"
        raise ConfigError(key, "the directory has no tokenizer.json", path, fix)
    try:
        return TextTokenizer(read_tokenizer(local) or _by_transformers(path), template_arguments)
    except Exception as error:  # noqa: BLE001 - of a broken tokenizer.json the library raises KeyError, or its own
        what = "its tokenizer" if local.is_dir() else "no such directory, and as a Hugging Face id it"
        raise ConfigError(key, f"{what} can't be loaded: {(str(error).splitlines() or [''])[0]}", path) from error


def _by_transformers(path: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path)


def _turns(question: str, system_prompt: str | None) -> list[dict[str, str]]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]
