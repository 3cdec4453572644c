"""What is wrong with a user's config is told all at once: file, line, column, cause, and the right form."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.errors import UserError

MODEL = "model: {path: tiny}\n"


def told(folder: Path, text: str, *overrides: str) -> str:
    """The words, without the name of the folder."""
    path = folder / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("text", "where", "cause", "form"),
    [
        ("run:\n\tsteps: 3\n", "line 2, column 1", "a tab", "two spaces"),
        ("run:\n  name: a\n \tsteps: 3\n", "line 3, column 2", "a tab", "two spaces"),
        ("run:\n  name: a\tb\n", "line 2, column 10", "a tab", "two spaces"),
        ("run:\n  steps: 3\n  steps: 4\n", "line 3, column 3", "run.steps is already at mine.yaml, line 2", "keep one"),
        ("run: {name: a}\nmodel: {path: b}\nrun: {steps: 3}\n", "line 3, column 1", "mine.yaml, line 1", "under one"),
        ("run:\n  - steps: 3\n", "line 1, column 1", "run: is a section, not a list", "write its keys without `- `"),
        ("run:\n" + MODEL, "line 1, column 1", "it holds keys", "write them below it"),
        ("run: 4\n" + MODEL, "line 1, column 1", "it holds keys, got 4", "write them below it"),
        ("run: {steps: 3}\n- model\n", "line 2, column 1", "an entry of a list among keys", "begins without `- `"),
        ("- run\n", "line 1, column 1", "has no sections", "write `run:`"),
        ('run:\n  name: "abc\n  steps: 3\n', "line 2, column 9", "a quote that isn't closed", 'write `name: "abc"`'),
        ('run:\n  name: "abc\n  dir: "x"\n', "line 2, column 9", "a quote that isn't closed", 'write `name: "abc"`'),
        ("run:\n  name: 'abc\n", "line 2, column 9", "a quote that isn't closed", "write `name: 'abc'`"),
        ("run:\n  steps 3\n  name: a\n", "line 2, column 3", "a key without a colon", "write `steps: 3`"),
        ("run:\n  name: a\n  steps 3  # few\n", "line 3, column 3", "a key without a colon", "write `steps: 3`"),
        ("run:\n  steps:3\n  name: a\n", "line 2, column 3", "and a space behind it", "write `steps: 3`"),
        (
            "run:\n  steps:3\n" + MODEL,
            "line 1, column 1",
            "is a section: it holds keys, got 'steps:3'",
            "write `steps: 3`",
        ),
        ("run\n  steps: 3\n", "line 1, column 1", "a key without a colon", "write `run:`"),
        ("prompts:\n  template: Q: {prompt}\n", "line 2", "isn't plain text", "`template: 'Q: {prompt}'`"),
        ("prompts:\n  template: {prompt} mod\n", "line 2", "isn't plain text", "`template: '{prompt} mod'`"),
        ("run:\n  name: @a\n", "line 2, column 9", "a value can't begin with @", "`'@a'`"),
        ("learner:\n  betas: [0.9, 0.95\n  lr: 1\n", "line 2, column 10", "a bracket that isn't closed", "close it"),
        ("run:\n  name: a\n   steps: 3\n", "line 3, column 4", "indented unlike the others", "two spaces"),
    ],
)
def test_a_file_that_isnt_yaml_is_told_with_its_place_and_the_right_form(
    tmp_path: Path, text: str, where: str, cause: str, form: str
) -> None:
    words = told(tmp_path, text)
    assert words.startswith(f"mine.yaml, {where}")
    assert cause in words
    assert form in words
    assert "\n" not in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rollout.slots: 4\n", "line 2, column 1: rollout.slots: is written with a dot in a file (that is for the com"),
        ("rollout.slots: 4\n", "here write `rollout:`, and below it `  slots: …`)"),
        ("rnu:\n  steps: 3\n", "line 2, column 1: rnu: is not a known key (did you mean run?)"),
        ("steps: 3\n", "line 2, column 1: steps: is not a known key (did you mean run.steps?)"),
        ("rollout: {lr: 3}\n", "line 2, column 11: rollout.lr: is not a known key (did you mean learner.lr?)"),
        ("run:\n  steps: many\n", "line 3, column 3: run.steps: expected `int`, got 'many'"),
        ("replay:\n  max_staleness: -1\n", "line 3, column 3: replay.max_staleness: must be at least 0, got -1"),
        ("filter: {enabled: false, mode: replace}\n", "line 2, column 26: filter.mode: does nothing without filter.en"),
        ("prompts: {template: {prompt}}\n", "text in braces stands in quotes: '{prompt}'"),
        ("base: quickstrat\n", "no such config (did you mean quickstart?)"),
        ("run: {dir: '${nowhere}'}\n", "line 2, column 7: run.dir: Interpolation key 'nowhere' not found (`${section"),
        (
            "run: {dir: '${oc.env:ASYNCDAPO_UNSET}'}\n",
            "line 2, column 7: run.dir: the environment variable ASYNCDAPO_UNSET is not set (export ASYNCDAPO_UNSET=…, "
            "or give a default: ${oc.env:ASYNCDAPO_UNSET,…})",
        ),
    ],
)
def test_a_key_of_a_file_is_told_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    assert words in told(tmp_path, MODEL + text)


@pytest.mark.parametrize(
    ("override", "form"),
    [
        ("learner.betas=0.9,0.95", "learner.betas='[0.9, 0.95]'"),
        ("learner.betas=0.9", "learner.betas='[0.9, 0.999]'"),
        ("faults.kill=learner.after_train:3", "faults.kill='[learner.after_train:3]'"),
        ("prompts.path=[a.jsonl,b.jsonl]", "prompts.path='{a.jsonl: 1, b.jsonl: 1}'"),
    ],
)
def test_a_value_that_should_be_a_list_or_a_mapping_comes_with_an_example(
    tmp_path: Path, override: str, form: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MODEL)
    assert f"({form})" in told(tmp_path, MODEL, override)
    load_config(path, ["prompts.task=file", "prompts.path=a.jsonl", form.replace("'", "")])


def test_all_keys_that_are_wrong_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "run: {stepz: 4}\n"
        "replay: {max_stalness: 4, prompts_per_step: 0, run_ahead: -1}\n"
        "rollout: {engine: fast, tensor_parallel: 2}\n"
        "rnu: {steps: 3}\n"
    )
    first, *lines = told(tmp_path, MODEL + text, "run.steps=many", "foo.bar=2").splitlines()
    assert first == "8 keys can't stay as they are"
    assert [line.strip().removeprefix("mine.yaml, ").split(": ")[:2] for line in lines] == [
        ["line 2, column 7", "run.stepz"],
        ["line 3, column 10", "replay.max_stalness"],
        ["line 3, column 27", "replay.prompts_per_step"],
        ["line 3, column 48", "replay.run_ahead"],
        ["line 4, column 11", "rollout.engine"],
        ["line 5, column 1", "rnu"],
        ["run.steps", "expected `int`, got 'many'"],
        ["foo", "is not a known key (known here"],
    ]


def test_what_follows_from_a_key_that_is_wrong_is_not_told_besides(tmp_path: Path) -> None:
    """The default that stands in for it may contradict what is right."""
    words = told(tmp_path, MODEL + "replay: {max_staleness: -1, run_ahead: 3}\nrollout: {engine: fast, slots: 0}\n")
    assert "run_ahead" not in words
    assert words.startswith("3 keys")
    words = told(tmp_path, MODEL + "rollout: {engine: fast, tensor_parallel: 2}\n")
    assert "tensor_parallel" not in words


def test_a_config_that_is_not_a_text_file_is_told_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UserError, match=r"folder.yaml: is a directory \(give a YAML file, or the name of a config\)"):
        load_config(tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes("run:\n  name: é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml, line 2: a character that isn't UTF-8 \(save the file as UTF-8\)"):
        load_config(tmp_path / "latin.yaml")


def test_contradictions_between_sections_are_told_together(tmp_path: Path) -> None:
    text = "filter: {enabled: false, mode: replace}\nreward: {overlong_buffer: 100000}\n"
    first, *lines = told(tmp_path, MODEL + text).splitlines()
    assert first == "2 keys can't stay as they are"
    assert ["filter.mode" in lines[0], "reward.overlong_buffer" in lines[1]] == [True, True]


def test_a_base_is_found_by_its_name_as_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: quickstart\nrun: {steps: 3}\n")
    config = load_config(path)
    assert (config.run.steps, config.replay.prompts_per_step) == (3, 16)
    assert Path(config.model.path, "config.json").is_file()
