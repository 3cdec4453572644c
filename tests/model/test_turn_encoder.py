"""Observations as tokens: behind a response stands what the chat template writes there, whatever was said before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from asyncdapo.errors import ConfigError, EpisodeError
from asyncdapo.model.tokenizer import TextTokenizer
from asyncdapo.model.tool_calls import ToolCall
from asyncdapo.model.turn_encoder import ChatTurns, turn_encoder

START = str(Path(__file__).parents[2] / "configs" / "models" / "chain_start")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>\n{% endfor %}assistant: "
NO_TOOLS = "{% for m in messages if m.role != 'tool' or raise_exception('no tools') %}{{ m.content }}{% endfor %}"
COUNTS_WORDS = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}{{ messages[0].content|length }}: "
LEAVES_OUT = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
THINKS = """
{%- set asked = namespace(at=0) %}
{%- for m in messages if m.role == 'user' %}{% set asked.at = messages.index(m) %}{% endfor %}
{%- for m in messages %}
{%- set forgotten = m.role == 'assistant' and loop.index0 < asked.at and not keep_thoughts %}
{{- m.role }}: {{ m.content.split('</think>')[-1].lstrip('\\n') if forgotten else m.content }}<eos>{{ '\\n' }}
{%- endfor %}assistant: {% if think is false %}<think></think>{% endif %}"""
"""As Qwen3's does, it leaves thoughts out of all that stands before the last question."""
TOOL = [{"role": "tool", "content": "42"}]


def tokenizer_of(template: str | None, **arguments: object) -> TextTokenizer:
    reference = PreTrainedTokenizerFast.from_pretrained(START)
    reference.chat_template = template
    return TextTokenizer(reference, arguments)


def test_without_a_chat_template_an_observation_is_its_text_alone() -> None:
    tokenizer = tokenizer_of(None)
    turns = turn_encoder(tokenizer, chat_template=False, system_prompt=None)
    assert tokenizer.spell(turns.observe("42\n")) == "42\n"
    assert turns.begin("Q: 6*7\n") == tokenizer.encode("Q: 6*7\n")
    with pytest.raises(EpisodeError, match=r"messages need prompts\.chat_template"):
        turns.observe(TOOL)


@pytest.mark.parametrize(("said", "role"), [("42", "user"), (TOOL, "tool")])
def test_a_sampled_response_and_the_observation_behind_it_read_as_the_template_writes_them(said, role) -> None:
    tokenizer = tokenizer_of(CHAT)
    turns = turn_encoder(tokenizer, chat_template=True, system_prompt="Be brief.")
    sampled = tokenizer.encode_more("6*7<eos>")
    whole = tokenizer.spell([*turns.begin("Q"), *sampled, *turns.observe(said)])
    assert whole == f"system: Be brief.<eos>\nuser: Q<eos>\nassistant: 6*7<eos>\n{role}: 42<eos>\nassistant: "


def test_messages_may_have_a_system_prompt_of_their_own() -> None:
    tokenizer = tokenizer_of(CHAT)
    turns = ChatTurns(tokenizer, "Be brief.")
    begun = turns.begin([{"role": "system", "content": "Be wordy."}, {"role": "user", "content": "Q"}])
    assert tokenizer.spell(begun) == "system: Be wordy.<eos>\nuser: Q<eos>\nassistant: "


def test_a_template_whose_turns_depend_on_what_was_said_before_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompts\.chat_template: .*writes an observation differently"):
        turn_encoder(tokenizer_of(COUNTS_WORDS), chat_template=True, system_prompt=None)


def test_what_a_template_can_not_write_is_told() -> None:
    with pytest.raises(EpisodeError, match=r"refuses messages of user, assistant, tool: no tools"):
        ChatTurns(tokenizer_of(NO_TOOLS), None).observe(TOOL)
    with pytest.raises(EpisodeError, match="leaves out what the assistant said"):
        ChatTurns(tokenizer_of(LEAVES_OUT), None).observe("42")


WITH_TOOLS = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + CHAT
MULTIPLY = [{"type": "function", "function": {"name": "multiply", "parameters": {"properties": {}}}}]


def test_tools_stand_in_the_beginning_as_the_template_writes_them_and_calls_are_found_in_the_tokens() -> None:
    tokenizer = tokenizer_of(WITH_TOOLS)
    turns = ChatTurns(tokenizer, None)
    assert tokenizer.spell(turns.begin("Q", MULTIPLY)) == "multiply user: Q<eos>\nassistant: "
    response = np.array(tokenizer.encode_more('<tool_call>{"name": "multiply"}</tool_call><eos>'), np.int32)
    assert turns.tool_calls(response, MULTIPLY) == [ToolCall("multiply")]
    assert turns.tool_calls(response, []) == []


def test_a_template_that_leaves_the_tools_out_and_a_text_without_template_can_not_show_them() -> None:
    with pytest.raises(EpisodeError, match=r"chat template leaves out the tools \(multiply\)"):
        ChatTurns(tokenizer_of(CHAT), None).begin("Q", MULTIPLY)
    with pytest.raises(EpisodeError, match=r"its tools need prompts\.chat_template"):
        turn_encoder(tokenizer_of(None), chat_template=False, system_prompt=None).begin("Q", MULTIPLY)


def test_a_template_that_forgets_thoughts_is_named_and_what_was_thought_stays_in_the_episode() -> None:
    tokenizer = tokenizer_of(THINKS)
    turns = turn_encoder(tokenizer, chat_template=True, system_prompt=None)
    sampled = "<think>6 times 7</think>\n42<eos>"
    read = tokenizer.spell([*turns.begin("Q"), *tokenizer.encode_more(sampled), *turns.observe("no")])
    assert read == f"user: Q<eos>\nassistant: {sampled}\nuser: no<eos>\nassistant: "
    told = [("user", "Q"), ("assistant", sampled.removesuffix("<eos>")), ("user", "no")]
    anew = tokenizer.render([{"role": role, "content": content} for role, content in told])
    assert anew == "user: Q<eos>\nassistant: 42<eos>\nuser: no<eos>\nassistant: "
    assert "leaves thoughts out of earlier turns" in turns.warning()
    assert "prompts.chat_template={NAME: VALUE}" in turns.warning()
    assert turns.warning("tool") == "", (
        "thoughts before the last question are forgotten, not those before a tool's answer"
    )


@pytest.mark.parametrize(
    ("template", "arguments", "is_kept"),
    [
        (CHAT, {}, True),
        (THINKS, {}, False),
        (THINKS, {"keep_thoughts": True}, True),
        # What it writes for a model that doesn't think isn't in earlier turns either.
        (THINKS, {"keep_thoughts": True, "think": False}, False),
    ],
)
def test_an_argument_of_the_template_may_keep_earlier_turns_as_they_were(template, arguments, is_kept) -> None:
    turns = turn_encoder(tokenizer_of(template, **arguments), chat_template=True, system_prompt=None)
    assert (turns.warning() == "") == is_kept
    assert turn_encoder(tokenizer_of(template), chat_template=False, system_prompt=None).warning() == ""
