"""`asyncdapo data prepare` on rows with every defect: where each stays, that it is counted once, and what is said."""

from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from asyncdapo.prompts.prepare.rows import RawRow
from asyncdapo.prompts.prepare.shape import Shape
from asyncdapo.prompts.prepare.sieve import Sieve, SystemPrompt

from .made import counts, dapo_row, prepare, rows, unusable, write_jsonl, write_parquet

GOOD = [{"question": f"{i} + 1 = ?", "answer": i + 1} for i in range(4)]
BROKEN = [
    (b'{"question": "a", "answer": ', "isn't JSON: Expecting value"),
    (b'{"question": "\xff", "answer": 1}', "isn't UTF-8: invalid start byte at byte 14"),
    (b"[" * 100_000, "isn't JSON"),
    (b'["question", 1]', "must be a JSON object, it is a list"),
    ({"question": "no answer"}, "has no column 'answer'"),
    ({"answer": 3}, "has no column 'question'"),
    ({"question": "null", "answer": None}, "'answer' is null"),
    ({"question": None, "answer": 1}, "'question' is null"),
    ({"question": "empty", "answer": " "}, "the answer 'answer' is empty"),
    ({"question": " ", "answer": 1}, "'question' is empty"),
    ({"question": "list", "answer": [1]}, r"the answer 'answer' must be text or a number, it is [1]"),
    ({"question": "yes?", "answer": True}, "the answer 'answer' must be text or a number, it is True"),
    ({"question": "object", "answer": {"value": 1}}, "must be text or a number, it is {'value': 1}"),
    (b'{"question": "nan", "answer": NaN}', "the answer 'answer' isn't a finite number: nan"),
    ({"question": 7, "answer": 1}, "the prompt 'question' must be text or messages, it is 7"),
    ({"question": ["a"], "answer": 1}, "the prompt 'question' must be text or messages, it is ['a']"),
    ({"question": [], "answer": 1}, "the prompt 'question' isn't a user's message: none"),
    ({"question": [{"role": "assistant", "content": "a"}], "answer": 1}, "isn't a user's message: assistant"),
    (
        {"question": [{"role": role, "content": "a"} for role in ("user", "assistant", "user")], "answer": 1},
        "has several turns: user, assistant, user",
    ),
    ({"question": [{"role": "user", "content": ["a"]}], "answer": 1}, "'question' (user) must be text, it is ['a']"),
    (b'{"question": "\\ud83d", "answer": 1}', "'question' holds half of a surrogate pair"),
    (b'{"question": "long", "answer": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    (b'{"question": [{"role": "\\ud83d", "content": "a"}], "answer": 1}', "isn't a user's message: \ud83d"),
]


def test_every_defect_is_counted_and_listed_with_its_row_and_reason(tmp_path, capsys):
    mixed = [*GOOD, GOOD[0], {"question": "0 + 1 = ?", "answer": 1.0}, {"question": "1 + 1 = ?", "answer": "2", "x": 0}]
    source = write_jsonl(tmp_path / "a.jsonl", [*mixed, *(record for record, _ in BROKEN), BROKEN[0][0]])
    assert prepare(source, "--out", tmp_path / "out") == 0
    assert counts(tmp_path / "out") == {
        "read": 7 + len(BROKEN) + 1,
        "repeated": 2,
        "unusable": len(BROKEN),
        "same_prompt": 1,
        "other_answer": 1,
        "too_long": 0,
        "kept": 4,
    }
    listed = unusable(tmp_path / "out")
    assert listed[0] == {
        "split": "train",
        "row": 5,
        "file": "a.jsonl",
        "place": "line 6",
        "reason": "the prompt of row 0 with another answer: '1.0'",
        "value": "{'question': '0 + 1 = ?', 'answer': 1.0}",
    }
    for entry, (row, (_, reason)) in zip(listed[1:], enumerate(BROKEN, 7), strict=True):
        assert (entry["row"], entry["place"]) == (row, f"line {row + 1}")
        assert reason in entry["reason"], entry
        assert 0 < len(entry["value"]) <= 60
    assert [row["row"] for row in rows(tmp_path / "out")] == [0, 1, 2, 3]
    assert f"unusable{len(BROKEN):18}" in capsys.readouterr().out


def test_a_row_of_parquet_that_is_not_utf8_is_listed_and_the_others_are_kept(tmp_path):
    text = pyarrow.array([b"a", b"\xff\xfe", b"c"]).cast(pyarrow.binary()).view(pyarrow.string())
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.table({"prompt": text, "answer": ["1", "2", "3"]}), tmp_path / "in" / "a.parquet")
    assert prepare(tmp_path / "in" / "a.parquet", "--out", tmp_path / "out", "--template", "{prompt}") == 0
    assert [row["prompt"] for row in rows(tmp_path / "out")] == ["a", "c"]
    assert [(entry["place"], entry["reason"][:11]) for entry in unusable(tmp_path / "out")] == [
        ("row 1", "isn't UTF-8")
    ]


def test_times_that_python_has_no_equal_for_cost_no_row_unless_they_are_the_answer(tmp_path):
    table = pyarrow.table(
        {
            "prompt": ["a", "b"],
            "answer": ["1", "2"],
            "made_at": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
            "due": pyarrow.array([2**40, 1], pyarrow.timestamp("s")),
        }
    )
    (tmp_path / "in").mkdir()
    parquet.write_table(table, tmp_path / "in" / "a.parquet")
    assert prepare(tmp_path / "in" / "a.parquet", "--out", tmp_path / "out") == 0
    assert [row["answer"] for row in rows(tmp_path / "out")] == ["1", "2"]
    assert prepare(tmp_path / "in" / "a.parquet", "--out", tmp_path / "other", "--answer-column", "due") == 2


def test_data_of_the_published_shape_keep_one_row_of_each_prompt(tmp_path):
    distinct = [dapo_row(f"What is {i}?", str(i), f"id {i}") for i in range(20)]
    again = [dapo_row("What is 3?", "3", "another id"), dapo_row("What is 4?", "5", "a third id")]
    source = write_parquet(tmp_path / "dapo.parquet", [*distinct, *again] * 10)
    assert prepare(source, "--out", tmp_path / "out") == 0
    assert counts(tmp_path / "out") == {
        "read": 220,
        "repeated": 198,
        "unusable": 0,
        "same_prompt": 1,
        "other_answer": 1,
        "too_long": 0,
        "kept": 20,
    }
    assert {row["source"] for row in rows(tmp_path / "out")} == {"math_dapo"}
    assert rows(tmp_path / "out")[3]["prompt"].endswith('"Answer: X".\n\nWhat is 3?'), "messages stay as they are"


@given(numbers=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 2)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_the_counts_add_up_to_the_rows_that_were_read(numbers):
    """Prompt, answer (3 is unusable) and a column that tells equal rows apart."""
    records = [{"p": "x" * (1 + prompt), "a": answer if answer < 3 else None, "n": n} for prompt, answer, n in numbers]
    raw = [RawRow(f"row {i}", repr(record).encode(), lambda record=record: record) for i, record in enumerate(records)]
    sieve = Sieve(
        shape=Shape(prompt="p", answer="a", source=None),
        name="made",
        template=lambda from_messages: "{prompt}",
        system=SystemPrompt(),
        fits=lambda prompt: len(prompt) < 6,
    )
    listed = []
    kept = list(sieve.keep(Path("made"), raw, listed.append))
    read = sieve.counts.pop("read")
    assert sum(sieve.counts.values()) == read == len(records)
    assert sieve.counts["repeated"] == len(records) - len({tuple(record) for record in numbers})
    assert len(kept) == sieve.counts["kept"] == len({row.prompt for row in kept})
    assert len(listed) == sieve.counts["unusable"] + sieve.counts["other_answer"]
    assert all(records[row.row]["p"] == row.prompt and str(records[row.row]["a"]) == row.answer for row in kept)


SYSTEM = {"role": "system", "content": "Be brief."}


def chat(question, *before):
    return {"prompt": [*before, {"role": "user", "content": question}], "answer": 1}


def test_a_system_prompt_of_all_rows_becomes_a_key_and_a_row_with_another_is_listed(tmp_path, capsys):
    other = {"role": "system", "content": "Be long."}
    source = write_jsonl(tmp_path / "a.jsonl", [chat("a", SYSTEM), chat("b", SYSTEM), chat("c", other), chat("d")])
    assert prepare(source, "--out", tmp_path / "out") == 0
    assert [row["prompt"] for row in rows(tmp_path / "out")] == ["a", "b"]
    assert [entry["reason"] for entry in unusable(tmp_path / "out")] == [
        "its system prompt is 'Be long.', that of the first row is 'Be brief.'",
        "its system prompt is none, that of the first row is 'Be brief.'",
    ]
    assert "prompts.chat_template=true 'prompts.system_prompt=\"Be brief.\"'" in capsys.readouterr().out


def test_a_system_prompt_that_is_given_is_that_of_rows_without_one(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [chat("a"), chat("b", SYSTEM)])
    options = ("--chat-template", "--system-prompt", "Be kind.")
    assert prepare(source, "--out", tmp_path / "out", *options) == 0
    assert [row["prompt"] for row in rows(tmp_path / "out")] == ["a"]
    assert "'Be brief.', --system-prompt is 'Be kind.'" in unusable(tmp_path / "out")[0]["reason"]


@pytest.mark.parametrize(
    ("records", "options", "words"),
    [
        ([], (), "holds no record"),
        (['{"prompt": "a", "answer": 1}'.encode("utf-16")], (), "no row of it can be read (first line 1: isn't UTF-8"),
        (GOOD, ("--split", "../../train"), "--split '../../train': must be a name"),
        (
            [{"text": "a", "label": 1}],
            (),
            "which column is the prompt? It has text, label (name one by --prompt-column)",
        ),
        ([{"prompt": "a", "label": 1}], (), "which column is the answer? It has prompt, label (name one by"),
        (
            GOOD,
            ("--answer-column", "answr"),
            "no such column in a.jsonl, which has question, answer (did you mean answer?)",
        ),
        (
            [{"prompt": "", "answer": 1}] * 3,
            (),
            "of 3 rows of train none can be used (first line 1: 'prompt' is empty)",
        ),
        (GOOD, ("--template", "no place"), "--template 'no place': must contain {prompt}"),
        (
            GOOD,
            ("--template", r"It's {prompt}\n"),
            r"holds a backslash and an n, which isn't a line break here (--template $'It\'s {prompt}\n' has one)",
        ),
        (GOOD, ("--prompt-column", "text"), "which has question, answer (did you mean question?)"),
        (GOOD, ("--max-prompt-length", "5"), "tokens can be counted only with --model"),
        (GOOD, ("--system-prompt", "Be kind."), "--system-prompt: needs words, and --chat-template"),
    ],
)
def test_what_is_wrong_with_all_rows_ends_the_job_with_what_to_do(tmp_path, capsys, records, options, words):
    source = write_jsonl(tmp_path / "a.jsonl", records)
    assert prepare(source, "--out", tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
