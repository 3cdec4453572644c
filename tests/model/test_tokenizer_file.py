"""A tokenizer read without transformers makes the ids that transformers makes, or isn't read so."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from asyncdapo.model.tokenizer_file import read_tokenizer

START = Path(__file__).parents[2] / "configs" / "models" / "chain_start"
PLAIN, REFERENCE = read_tokenizer(START), PreTrainedTokenizerFast.from_pretrained(START)
WORDS = st.sampled_from(["<bos>", "<eos>", "<pad>", "Q: ", " mod 10\n", "Answer: ", "1+2", " ", "é", "<", "eos>"])


@given(words=st.lists(WORDS | st.text(max_size=4)), special=st.booleans())
def test_the_ids_are_those_of_transformers(words: list[str], special: bool) -> None:
    assert PLAIN is not None
    text = "".join(words)
    ids = PLAIN.backend_tokenizer.encode(text, add_special_tokens=special).ids
    assert ids == REFERENCE(text, add_special_tokens=special)["input_ids"]
    again = PLAIN.backend_tokenizer.decode(ids, skip_special_tokens=not special)
    assert again == REFERENCE.backend_tokenizer.decode(ids, skip_special_tokens=not special)


def test_what_else_is_asked_of_it_is_as_in_transformers() -> None:
    assert PLAIN is not None
    assert PLAIN.eos_token == REFERENCE.eos_token == "<eos>"
    assert PLAIN.chat_template is REFERENCE.chat_template is None
    assert PLAIN.convert_ids_to_tokens(7) == REFERENCE.convert_ids_to_tokens(7)


def changed(folder: Path, settings: dict[str, object], rest: dict[str, object] | None = None) -> Path:
    """The start model's tokenizer with other settings, and with other content of `tokenizer.json`."""
    for name, new in (("tokenizer_config.json", settings), ("tokenizer.json", rest or {})):
        (folder / name).write_text(json.dumps(json.loads((START / name).read_text()) | new))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"bos_token": "<new>"},
        {"eos_token": {"content": "<eos>", "lstrip": True}},
        {"additional_special_tokens": ["<new>"]},
        {"chat_template": "{{ messages }}"},
        {"a key of a later version": 1},
    ],
)
def test_settings_that_may_change_the_ids_are_left_to_transformers(tmp_path: Path, settings: dict[str, object]) -> None:
    assert read_tokenizer(changed(tmp_path, {})) is not None
    assert read_tokenizer(changed(tmp_path, settings)) is None


def test_a_tokenizer_whose_end_transformers_would_make_is_left_to_it(tmp_path: Path) -> None:
    assert read_tokenizer(changed(tmp_path, {}, {"post_processor": None})) is None


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "tokenizer.model"])
def test_a_folder_with_another_file_of_a_tokenizer_is_left_to_transformers(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(START, tmp_path / "model"))
    (folder / name).write_text("{}")
    assert read_tokenizer(folder) is None
    assert read_tokenizer(tmp_path / "missing") is None
