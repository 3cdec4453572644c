"""A model of a few thousand random weights that reads bytes and chats in the template of Qwen2.5."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.learner.tiny import tiny_llama

TEMPLATE = """
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
MAX_CONTEXT = 2000


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Without a model."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(MARKS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[2])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_chat_model(directory: Path) -> str:
    """Its folder."""
    tokenizer = save_tokenizer(directory)
    eos = tokenizer.eos_token_id
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=MAX_CONTEXT, eos_token_id=eos)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(directory)
    return str(directory)


def keys(model: str) -> list[str]:
    """Of a short run with it."""
    return [
        f"model.path={model}",
        "prompts.chat_template=true",
        "prompts.task=product",
        "prompts.max_prompt_length=200",
        "rollout.max_response_length=64",
        f"environment.max_context={MAX_CONTEXT}",
        "environment.max_turns=3",
        "filter.enabled=false",
        "run.steps=3",
    ]
