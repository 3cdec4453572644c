"""Text to tokens and back, with the start model's tokenizer and one that has a chat template."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import TokenizerFiles
from asyncdapo.model.tokenizer import TextTokenizer, load_tokenizer
from asyncdapo.prompts.tasks.chain import draw_chain

START = str(Path(__file__).parents[2] / "configs" / "models" / "chain_start")


def test_a_prompt_opens_with_bos_and_spends_one_token_on_a_phrase():
    tokenizer = load_tokenizer(TokenizerFiles(START))
    token_ids = tokenizer.encode("Q: 6+4 mod 10\n")
    assert len(token_ids) == len(["<bos>", "Q: ", "6", "+", "4", " mod 10\n"])


def test_every_printable_text_comes_back():
    tokenizer = load_tokenizer(TokenizerFiles(START))
    text = "".join(map(chr, range(32, 127))) + "\nQ: 1*2 mod 10\n1*2=2\nAnswer: 2"
    assert tokenizer.decode(np.array(tokenizer.encode(text), np.int32)) == text


def test_special_tokens_are_not_decoded():
    tokenizer = load_tokenizer(TokenizerFiles(START))
    token_ids = np.array(tokenizer.encode("1+1=2\nAnswer: 2<eos>"), np.int32)
    assert tokenizer.decode(token_ids) == "1+1=2\nAnswer: 2"
    assert tokenizer.decode(np.zeros(0, np.int32)) == ""


def test_both_ways_agree_with_hugging_face():
    tokenizer, reference = load_tokenizer(TokenizerFiles(START)), PreTrainedTokenizerFast.from_pretrained(START)
    for row in range(50):
        prompt = draw_chain(0, row, held_out=False).prompt
        token_ids = tokenizer.encode(prompt)
        assert token_ids == reference(prompt)["input_ids"]
        assert 8 <= len(token_ids) <= 40
        assert tokenizer.decode(np.array(token_ids)) == reference.decode(token_ids, skip_special_tokens=True) == prompt


def test_a_chat_template_wraps_the_question_once():
    reference = PreTrainedTokenizerFast.from_pretrained(START)
    reference.chat_template = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}A: "
    tokenizer = TextTokenizer(reference)
    encode = tokenizer.prompt_encoder(chat_template=True)
    assert reference.decode(encode("1+1?")) == "<bos>user: 1+1?<eos>A: "
    assert tokenizer.prompt_encoder(chat_template=False)("1+1?") == tokenizer.encode("1+1?")


def test_arguments_of_the_chat_template_reach_it_and_one_that_it_has_no_use_for_is_refused():
    reference = PreTrainedTokenizerFast.from_pretrained(START)
    reference.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %} at once{% endif %}: "
    encode = TextTokenizer(reference, {"enable_thinking": False}).prompt_encoder(chat_template=True)
    assert reference.decode(encode("1+1?")) == "1+1? at once: "
    problem = (
        r"prompts.chat_template: the model's chat template knows no thinking, got {'thinking': False} \(remove it\)"
    )
    with pytest.raises(ConfigError, match=problem):
        TextTokenizer(reference, {"thinking": False}).prompt_encoder(chat_template=True)


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored(tmp_path):
    reference = PreTrainedTokenizerFast.from_pretrained(START)
    reference.backend_tokenizer.enable_truncation(4)
    reference.backend_tokenizer.enable_padding(length=64)
    reference.save_pretrained(tmp_path)
    assert load_tokenizer(TokenizerFiles(str(tmp_path))).encode("1+2+3+4+5") == load_tokenizer(
        TokenizerFiles(START)
    ).encode("1+2+3+4+5")


def test_a_chat_template_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="prompts.chat_template: the model's tokenizer has none"):
        load_tokenizer(TokenizerFiles(START)).prompt_encoder(chat_template=True)


def chat_tokenizer(template):
    reference = PreTrainedTokenizerFast.from_pretrained(START)
    reference.chat_template = template
    return reference


WITH_SYSTEM = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}A: "


def test_a_system_prompt_stands_in_front_of_the_question():
    reference = chat_tokenizer(WITH_SYSTEM)
    encode = TextTokenizer(reference).prompt_encoder(chat_template=True, system_prompt="Be brief.")
    assert reference.decode(encode("1+1?")) == "<bos>system: Be brief.<eos><bos>user: 1+1?<eos>A: "


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves it out, got 'Be brief.'"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
            r"refuses it \(no system role\), got 'Be brief.' \(put its words into prompts.template\)",
        ),
    ],
)
def test_a_chat_template_without_a_place_for_the_system_prompt_is_refused(template, words):
    tokenizer = TextTokenizer(chat_tokenizer(template))
    with pytest.raises(ConfigError, match=f"prompts.system_prompt: the model's chat template {words}"):
        tokenizer.prompt_encoder(chat_template=True, system_prompt="Be brief.")


def test_a_chat_template_that_fails_is_refused():
    tokenizer = TextTokenizer(chat_tokenizer("{{ messages[0].content.nothing.nowhere }}"))
    with pytest.raises(ConfigError, match="prompts.chat_template: the model's chat template refuses it"):
        tokenizer.prompt_encoder(chat_template=True)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_is_read_from_either_file(tmp_path, place):
    chat_tokenizer(None).save_pretrained(tmp_path)
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(WITH_SYSTEM)
    else:
        settings = json.loads((tmp_path / place).read_text())
        (tmp_path / place).write_text(json.dumps(settings | {"chat_template": WITH_SYSTEM}))
    tokenizer = load_tokenizer(TokenizerFiles(str(tmp_path)))
    assert tokenizer.spell(tokenizer.prompt_encoder(True)("1+1?")) == "<bos>user: 1+1?<eos>A: "


def test_a_prompt_with_a_token_that_the_model_lacks_is_refused():
    reference = chat_tokenizer("<|new|>{{ messages[0].content }}")
    reference.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer, words = TextTokenizer(reference), r"holds the token '<\|new\|>', whose id 103 is outside .* of 103"
    assert tokenizer.prompt_encoder(True, vocab_size=104)("1+1?")[0] == 103
    with pytest.raises(ConfigError, match=f"model.tokenizer: a prompt {words}"):
        tokenizer.prompt_encoder(True, vocab_size=103)
    encode = tokenizer.prompt_encoder(False, vocab_size=103)
    assert encode("1+1?")
    with pytest.raises(ConfigError, match=f"model.tokenizer: a prompt {words}"):
        encode("what is <|new|>?")


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model.tokenizer: the directory has no tokenizer.json"):
        load_tokenizer(TokenizerFiles(str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match="model.tokenizer: its tokenizer can't be loaded"):
        load_tokenizer(TokenizerFiles(str(tmp_path)))
    with pytest.raises(ConfigError, match="model.tokenizer: no such directory"):
        load_tokenizer(TokenizerFiles(str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match="model.path: no such directory"):
        load_tokenizer(TokenizerFiles(str(tmp_path / "missing"), "model.path"))


@pytest.mark.parametrize("content", ["", "{}", '{"model":'])
def test_a_broken_tokenizer_names_its_key(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="model.tokenizer: its tokenizer can't be loaded"):
        load_tokenizer(TokenizerFiles(str(tmp_path)))


def test_the_tokenizer_is_loaded_without_torch_and_a_plain_one_without_transformers():
    load, heavy = f"t.load_tokenizer(t.TokenizerFiles({START!r}))", "{'torch', 'transformers'} & sys.modules.keys()"
    code = f"import sys, asyncdapo.model.tokenizer as t; {load}; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
