"""An engine that writes what a function of the text tells it, letter by letter, and a tokenizer that would write the
same text with fewer tokens: text that is tokenised again shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncdapo.model.tokenizer import TextTokenizer
from asyncdapo.rollout.engine import Request, Sample
from tests.rollout.fakes import FakeEngine

SPECIAL = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
MERGES = [("a", "n"), ("1", "2"), ("t", "h")]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools|tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function|tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> TextTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*letters, *(a + b for a, b in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    return TextTokenizer(fast)


class Writer(FakeEngine):
    """`write`: what the model says to a text; an answer without a stop token is as long as it may be."""

    def __init__(self, tokenizer: TextTokenizer, write: Callable[[str], str]) -> None:
        super().__init__(num_slots=64)
        self._tokenizer, self._write = tokenizer, write

    async def generate(self, request: Request) -> list[Sample]:
        self.requests.append(request)
        await self.gate.wait()
        await asyncio.sleep(0)
        ids = self.letters(self._write(self._tokenizer.spell(request.prompt_ids)))[: request.sampling.max_tokens]
        request.num_sampled += len(ids)
        sample = Sample(
            token_ids=np.array(ids, np.int32),
            logprobs=np.linspace(-0.1, -1.0, len(ids), dtype=np.float32),
            versions=[(self.loaded_version, len(ids))],
            finish_reason="stop" if ids[-1:] == self.letters("<|im_end|>") else "length",
        )
        return [sample]

    def letters(self, text: str) -> list[int]:
        """Never the tokenizer's own merges."""
        for token in SPECIAL:
            text = text.replace(token, f"\0{token}\0")
        pieces = [piece if piece in SPECIAL else list(piece) for piece in text.split("\0")]
        return [
            token for piece in pieces for part in ([piece] if piece in SPECIAL else piece) for token in self._of(part)
        ]

    def _of(self, part: str) -> list[int]:
        return self._tokenizer.encode_more(part)
