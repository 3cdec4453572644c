"""What `asyncdapo data prepare` takes: files, directories, published data sets, any repository on the hub."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from transformers import PreTrainedTokenizerFast

from asyncdapo.prompts.prepare.inputs import find_inputs
from asyncdapo.prompts.prepare.published import TEMPLATES

from .made import (
    INSTRUCTION,
    cache_data_set,
    counts,
    dapo_row,
    prepare,
    rows,
    unusable,
    write_jsonl,
    write_parquet,
)

START = Path(__file__).parents[3] / "configs" / "models" / "chain_start"
PAIR = {"question": "1 + 1 = ?", "answer": 2}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hugging Face cache of its own, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_gsm8k_comes_from_the_cache_with_both_splits_and_the_numbers_as_answers(tmp_path, cache, capsys):
    snapshot = cache_data_set(cache, "openai/gsm8k")
    solved = [{"question": f"{i} hens?", "answer": f"She has {i}.\n#### 1,{i:03}"} for i in range(5)]
    write_parquet(snapshot / "main/train-00000-of-00001.parquet", [*solved, {"question": "?", "answer": "none"}])
    write_parquet(snapshot / "main/test-00000-of-00001.parquet", solved[:2])
    write_parquet(snapshot / "socratic/train-00000-of-00001.parquet", solved)
    assert prepare("gsm8k", "--out", tmp_path / "out") == 0
    assert counts(tmp_path / "out")["kept"] == 5
    assert counts(tmp_path / "out", "test")["kept"] == 2
    assert rows(tmp_path / "out")[1] == {
        "prompt": TEMPLATES["gsm8k"].replace("{prompt}", "1 hens?"),
        "answer": "1001",
        "source": "gsm8k",
        "row": 1,
    }
    assert [entry["reason"] for entry in unusable(tmp_path / "out")] == ["the answer has no number after ####: 'none'"]
    out = tmp_path / "out"
    paths = f"prompts.path={out}/train.parquet prompts.eval_path={out}/test.parquet"
    assert capsys.readouterr().out.endswith(f"  prompts.task=file {paths} reward.verifier=gsm8k\n")


def test_aime_is_a_test_split_of_one_row_a_problem(tmp_path, cache, capsys):
    snapshot = cache_data_set(cache, "BytedTsinghua-SIA/AIME-2024")
    problems = [dapo_row(f"Problem {i}", str(i), str(repeat)) for repeat in range(4) for i in range(3)]
    write_parquet(snapshot / "data/aime-2024.parquet", problems)
    assert prepare("aime-2024", "--out", tmp_path / "out") == 0
    assert counts(tmp_path / "out", "test") == {
        "read": 12,
        "repeated": 0,
        "unusable": 0,
        "same_prompt": 9,
        "other_answer": 0,
        "too_long": 0,
        "kept": 3,
    }
    assert not (tmp_path / "out" / "train.parquet").exists()
    assert [row["prompt"] for row in rows(tmp_path / "out", "test")] == [f"{INSTRUCTION}Problem {i}" for i in range(3)]


def test_another_repository_is_read_by_the_names_of_its_files(tmp_path, cache, capsys):
    snapshot = cache_data_set(cache, "some/maths")
    write_jsonl(snapshot / "easy/train.jsonl", [PAIR])
    write_jsonl(snapshot / "hard/train.jsonl", [PAIR | {"answer": 3}])
    assert prepare("some/maths", "--out", tmp_path / "out") == 2
    assert "some/maths: has several subsets (choose one of --subset easy, hard)" in capsys.readouterr().err
    assert prepare("some/maths", "--subset", "hard", "--out", tmp_path / "out") == 0
    assert rows(tmp_path / "out")[0]["answer"] == "3"
    assert prepare("some/other", "--out", tmp_path / "out") == 2
    assert "some/other: the hub can't be reached (HF_HUB_OFFLINE is set)" in capsys.readouterr().err


def test_a_repository_in_another_format_is_read_as_the_hub_converted_it(tmp_path, cache):
    cache_data_set(cache, "some/csv")
    converted = cache / "datasets--some--csv"
    (converted / "refs/refs/convert").mkdir(parents=True)
    (converted / "refs/refs/convert/parquet").write_text("f" * 40)
    write_parquet(converted / "snapshots" / ("f" * 40) / "default/train/0000.parquet", [PAIR])
    assert prepare("some/csv", "--out", tmp_path / "out") == 0
    assert counts(tmp_path / "out")["kept"] == 1


@pytest.mark.parametrize(
    ("names", "options", "splits"),
    [
        (["b.jsonl", "a.parquet"], {}, {"train": ["a.parquet", "b.jsonl"]}),
        (["b.jsonl"], {"split": "test"}, {"test": ["b.jsonl"]}),
        (["train-0.jsonl", "train-1.jsonl", "test.jsonl"], {}, {"train": ["train-0.jsonl", "train-1.jsonl"], "test": ["test.jsonl"]}),  # noqa: E501
        (["data/train/0.parquet", "data/val/0.parquet"], {}, {"validation": ["data/val/0.parquet"], "train": ["data/train/0.parquet"]}),  # noqa: E501
        (["train.jsonl", "dev.jsonl"], {"split": "validation"}, {"validation": ["dev.jsonl"]}),
        (["latest.jsonl", "trained.jsonl"], {}, {"train": ["latest.jsonl", "trained.jsonl"]}),
        (["easy/train.jsonl", "hard/train.jsonl"], {"subset": "hard"}, {"train": ["hard/train.jsonl"]}),
    ],
)  # fmt: skip
def test_files_of_a_directory_are_of_the_splits_that_their_names_tell(tmp_path, names, options, splits):
    for name in names:
        write = write_parquet if name.endswith("parquet") else write_jsonl
        write(tmp_path / name, [PAIR])
    found = find_inputs(str(tmp_path), **{"split": None, "subset": None} | options)
    assert {of: [str(path.relative_to(tmp_path)) for path in paths] for of, paths in found.splits.items()} == splits


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["train.jsonl"], ("--split", "test"), "--split test: .* has train"),
        (["train.jsonl", "more.jsonl"], (), "the name of more.jsonl tells no split"),
        (["a.csv"], (), "has no .jsonl or .parquet file"),
        ([], (), "has no .jsonl or .parquet file"),
    ],
)
def test_a_directory_whose_files_are_not_clear_is_refused(tmp_path, capsys, names, options, words):
    (tmp_path / "in").mkdir()
    for name in names:
        write_jsonl(tmp_path / "in" / name, [PAIR])
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", *options) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_source_that_is_nothing_is_refused_with_the_nearest_name(tmp_path, capsys):
    for source, words in (
        ("gsm8", "gsm8: no such file or directory (did you mean gsm8k?)"),
        ("./none.jsonl", "./none.jsonl: no such file or directory (known by name: dapo-math-17k, aime-2024, gsm8k)"),
        (write_jsonl(tmp_path / "a.csv", [PAIR]), "must end in .jsonl or .parquet"),
    ):
        assert prepare(source, "--out", tmp_path / "out") == 2
        assert words in capsys.readouterr().err


def ask_hub(tmp_path, source, **variables):
    """What the command says with an empty cache; of a process, since the library reads its variables once."""
    words = ["-m", "asyncdapo.cli", "data", "prepare", source, "--out", str(tmp_path / "out")]
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", **variables}
    done = subprocess.run(  # noqa: S603
        [sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=15
    )
    assert done.returncode == 2
    return done.stderr


@pytest.mark.parametrize("source", ["gsm8k", "some/data"])
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "[Errno 111] Connection refused"),
    ],
    ids=["offline", "refused"],
)
def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path, source, variables, reason):
    repository = "openai/gsm8k" if source == "gsm8k" else source
    assert ask_hub(tmp_path, source, **variables) == (
        f"asyncdapo: {repository}: the hub can't be reached ({reason}), and it isn't in the cache, HF_HOME "
        "(download it where there is a network, and give its directory)\n"
    )


class NoSuchDataSet(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *parts):
        pass


def test_a_data_set_that_the_hub_does_not_have_is_said_to_be_none(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoSuchDataSet) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        said = ask_hub(tmp_path, "some/data", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
        hub.shutdown()
    assert "some/data: neither a file here nor a data set in the Hugging Face cache or on the hub (404" in said


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"question": "q", "answer": 7}, "q", "7"),
        ({"problem": "q", "answer": "7", "solution": "long"}, "q", "7"),
        ({"Problem": "q", "Solution": "so 7"}, "q", "so 7"),
        ({"prompt": "q", "reward_model": {"ground_truth": "7"}, "answer": "8"}, "q", "7"),
        ({"prompt": [{"role": "user", "content": "q"}], "ground_truth": 7.5}, "q", "7.5"),
    ],
)
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_the_usual_shapes_are_recognised(tmp_path, write, record, prompt, answer):
    source = write(tmp_path / ("a.parquet" if write is write_parquet else "a.jsonl"), [record])
    assert prepare(source, "--out", tmp_path / "out") == 0
    [row] = rows(tmp_path / "out")
    assert (row["prompt"].split("\n")[0], row["answer"], row["source"]) == (prompt, answer, source.name)


def test_what_the_user_says_of_columns_template_and_verifier_wins(tmp_path, capsys):
    record = {"prompt": "wrong", "answer": "wrong", "task": {"text": {"en": "q"}}, "a.b": 7}
    source = write_jsonl(tmp_path / "a.jsonl", [record])
    columns = ("--prompt-column", "task.text.en", "--answer-column", "a.b")
    assert prepare(source, "--out", tmp_path / "out", *columns, "--template", "Q: {prompt}", "--verifier", "exact") == 0
    assert rows(tmp_path / "out") == [{"prompt": "Q: q", "answer": "7", "source": "a.jsonl", "row": 0}]
    assert "reward.verifier=exact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verifier", "words"),
    [("answer", "`Answer: `"), ("dapo", "`Answer: `"), ("gsm8k", "`#### `"), ("math_verify", r"\boxed{}")],
)
def test_a_bare_question_is_given_words_that_ask_for_what_the_verifier_looks_for(tmp_path, verifier, words):
    source = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    prepare(source, "--out", tmp_path / "out", "--verifier", verifier)
    assert rows(tmp_path / "out")[0]["prompt"].startswith("1 + 1 = ?\n\nReason step by step")
    assert words in rows(tmp_path / "out")[0]["prompt"]


def test_prompts_that_are_too_long_are_counted_by_the_encoder_of_the_run(tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(START)
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}Answer: "
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1" * length, "answer": 1} for length in range(1, 11)])
    model = ("--model", tmp_path / "tokenizer", "--template", "{prompt}", "--max-prompt-length", 8)
    for options, longest in (((), 7), (("--chat-template",), 6), (("--chat-template", "--system-prompt", "12"), 3)):
        out = tmp_path / f"out {longest}"
        assert prepare(source, "--out", out, *model, *options) == 0
        assert max(len(row["prompt"]) for row in rows(out)) == longest
        assert counts(out)["too_long"] == 10 - longest
        assert counts(out)["kept"] == longest
        assert json.loads((out / "manifest.json").read_text())["use"]["chat_template"] == bool(options)
