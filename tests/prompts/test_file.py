"""The task `file`: the user's data, and every way in which it can be wrong."""

import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from asyncdapo.cli import main
from asyncdapo.errors import ConfigError
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.task import Question
from asyncdapo.prompts.tasks.file import hold_out

PAIRS = [{"prompt": f"{i}+1=?", "answer": i + 1} for i in range(20)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_parquet(path, records):
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def open_file(path, num_eval=0, **keys):
    return open_task(PromptsConfig(task="file", path=path, **keys), num_eval=num_eval, seed=0)


def questions(task):
    return [task.question_at(row) for part in task.parts for row in part.rows]


def eval_questions(task):
    return [task.eval_question_at(row) for row in range(task.num_eval_rows)]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_questions_come_in_the_order_of_the_file_with_answers_as_text(tmp_path, write):
    path = write(tmp_path / f"train.{'jsonl' if write is write_jsonl else 'parquet'}", PAIRS)
    read = questions(open_file(path))
    assert [(q.text, q.answer, q.row) for q in read] == [(f"{i}+1=?", str(i + 1), i) for i in range(20)]
    assert {q.source for q in read} == {"train.jsonl" if write is write_jsonl else "train.parquet"}


def test_columns_and_template_are_the_users(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "{x}: ½ of 6?", "a": " 3 ", "other": [1]}])
    task = open_file(path, prompt_column="q", answer_column="a", template="Q: {prompt}\nEnd with `Answer: X`.\n")
    assert task.question_at(0).text == "Q: {x}: ½ of 6?\nEnd with `Answer: X`.\n"
    assert task.question_at(0).answer == " 3 "


def test_the_template_makes_the_users_message_of_a_chat_template_too(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    assert open_file(path, chat_template=True, template="Q {prompt}").question_at(0).text == "Q 0+1=?"


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_column_source_says_where_a_question_is_from(tmp_path, write):
    records = [{"prompt": "a", "answer": 1, "source": "algebra"}, {"prompt": "b", "answer": 2, "source": None}]
    path = write(tmp_path / f"train.{'jsonl' if write is write_jsonl else 'parquet'}", records)
    assert [(q.source, q.row) for q in questions(open_file(path))] == [("algebra", 0), (path.split("/")[-1], 1)]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\n\n  \r\n{"prompt": "b", "answer": 2}')
    assert [(q.text, q.row) for q in questions(open_file(str(path)))] == [("a", 0), ("b", 1)]


def test_held_out_questions_are_the_wanted_number_and_never_trained_on(tmp_path):
    task = open_file(write_jsonl(tmp_path / "a.jsonl", PAIRS), num_eval=5)
    held_out, training = {q.text for q in eval_questions(task)}, {q.text for q in questions(task)}
    assert len(held_out) == 5
    assert len(training) == 15
    assert not held_out & training


@given(texts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40), num_eval=st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_every_repetition_of_a_held_out_question_leaves_training(texts, num_eval):
    asked = [Question(text=text, answer="1", source="s", row=row) for row, text in enumerate(texts)]
    distinct = set(texts)
    if num_eval >= len(distinct):
        with pytest.raises(ConfigError, match="eval.num_prompts"):
            hold_out([asked], num_eval, "p")
        return
    [training], held_out = hold_out([asked], num_eval, "p")
    held_texts = [q.text for q in held_out]
    assert len(set(held_texts)) == len(held_texts) == num_eval
    assert [q for q in asked if q.text not in held_texts] == training
    assert training


def test_the_held_out_choice_is_the_same_at_every_opening(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    assert eval_questions(open_file(path, num_eval=5)) == eval_questions(open_file(path, num_eval=5))


def test_an_evaluation_file_leaves_the_training_file_whole(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    eval_path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "9+9=?", "answer": 18}])
    task = open_file(path, num_eval=300, eval_path=eval_path)
    assert len(questions(task)) == 20
    assert [q.answer for q in eval_questions(task)] == ["18"]


def test_holding_out_everything_is_refused_with_a_number_that_works(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    words = r"20 distinct questions.*got 512 \(eval.num_prompts=2 eval.num_greedy_prompts=2, or prompts.eval_path"
    with pytest.raises(ConfigError, match=words):
        open_file(path, num_eval=512)


BROKEN_JSONL = {
    "not JSON": (b'{"prompt": "a", "answer": 1}\n{"prompt": \n', r"line 2 isn't JSON: Expecting value"),
    "not UTF-8": (b'{"prompt": "a", "answer": 1}\n\n{"prompt": "\xff"}\n', r"line 3 isn't UTF-8: .* at byte 12"),
    "not an object": (b'["a", 1]\n', r"line 1 must be a JSON object, it is a list"),
    "deeply nested": (b"[" * 100_000 + b"\n", r"line 1 isn't JSON"),
    "empty": (b"\n \n", r"prompts.path: holds no record"),
    "no prompt text": (b'{"prompt": ["a"], "answer": 1}\n', r"the prompt in line 1 must be text, it is \['a'\]"),
    "empty prompt": (b'{"prompt": "", "answer": 1}\n', r"the prompt in line 1 must be text, it is ''"),
    "a list as answer": (
        b'{"prompt": "a", "answer": [1]}\n',
        r"the answer in line 1 must be text or a number, it is \[1\]",
    ),
    "null as answer": (b'{"prompt": "a", "answer": null}\n', r"the answer in line 1 .* it is missing"),
    "a boolean as answer": (b'{"prompt": "a", "answer": true}\n', r"the answer in line 1 .* it is True"),
    "a number without end": (b'{"prompt": "a", "answer": NaN}\n', r"the answer in line 1 isn't a finite number: nan"),
    "a number too long": (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}\n", r"line 1 isn't JSON: Exceeds"),
    "half a character": (b'{"prompt": "\\ud83d", "answer": 1}\n', r"the prompt in line 1 holds half of a surrogate"),
    "a blank answer": (b'{"prompt": "a", "answer": " "}\n', r"the answer in line 1 .* it is ' '"),
    "column gone later": (
        b'{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n',
        r"prompts.path: line 2 has no 'answer', got .*a.jsonl' \(`asyncdapo data prepare` leaves such rows out\)",
    ),
}


@pytest.mark.parametrize("what", BROKEN_JSONL)
def test_broken_data_is_refused_with_its_place(tmp_path, what):
    content, message = BROKEN_JSONL[what]
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_file(str(path))


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_missing_column_is_refused_with_those_present_and_the_nearest(tmp_path, write):
    path = write(tmp_path / f"a.{'jsonl' if write is write_jsonl else 'parquet'}", [{"question": "a", "answers": 1}])
    with pytest.raises(ConfigError) as caught:
        open_file(path, prompt_column="question")
    assert caught.value.key == "prompts.answer_column"
    assert "which has question, answers, got 'answer' (prompts.answer_column=answers)" in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "keys", "fix"),
    [
        (("question", "answer"), {}, "prompts.prompt_column=question"),
        (("Problem", "answer"), {}, "prompts.prompt_column=Problem"),
        (("text", "answer"), {}, ""),
        (("answer",), {}, ""),
        (("prompt", "solution"), {}, "prompts.answer_column=solution"),
        (("prompt", "label"), {}, ""),
        (("prompt",), {}, ""),
        (("promt", "answer"), {}, "prompts.prompt_column=promt"),
        (("question", "answer"), {"prompt_column": "answr"}, "prompts.prompt_column=question"),
        (("prompt", "answer"), {"answer_column": "promt"}, "prompts.answer_column=answer"),
    ],
)
def test_a_column_is_suggested_only_if_it_is_likely_and_not_the_other_one(tmp_path, columns, keys, fix):
    path = write_jsonl(tmp_path / "a.jsonl", [dict.fromkeys(columns, "1")])
    with pytest.raises(ConfigError, match="no such column") as caught:
        open_file(path, **keys)
    assert caught.value.fix == fix


NESTED = [{"extra": {"question": f"{i}+1", "meta": {"gold": i + 1}}, "label": i} for i in range(3)]


@pytest.mark.parametrize(("write", "name"), [(write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")])
def test_columns_inside_of_others_are_suggested_and_read(tmp_path, write, name):
    path = write(tmp_path / name, NESTED)
    for keys, fix in (
        ({"prompt_column": "question"}, "prompts.prompt_column=extra.question"),
        ({}, "prompts.prompt_column=extra.question"),
        ({"prompt_column": "extra.question", "answer_column": "gold"}, "prompts.answer_column=extra.meta.gold"),
    ):
        with pytest.raises(ConfigError, match=r"which has extra, extra.question, extra.meta, extra.meta.gold, label"):
            open_file(path, **keys)
        with pytest.raises(ConfigError) as caught:
            open_file(path, **keys)
        assert caught.value.fix == fix
    read = questions(open_file(path, prompt_column="extra.question", answer_column="extra.meta.gold"))
    assert [(question.text, question.answer) for question in read] == [("0+1", "1"), ("1+1", "2"), ("2+1", "3")]


def test_messages_are_refused_with_the_command_and_the_key_that_use_them(tmp_path, capsys):
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1=?"}], "answer": i + 1} for i in range(20)]
    path = write_parquet(tmp_path / "chat.parquet", rows)
    with pytest.raises(ConfigError, match="the prompt in row 0 is a list of messages") as caught:
        open_file(path)
    command = f"asyncdapo data prepare {path} --out data/chat"
    assert caught.value.fix == f"make it text: `{command}`, whose keys go with prompts.chat_template=true"
    assert main(["data", "prepare", path, "--out", str(tmp_path / "out")]) == 0
    assert "prompts.chat_template=true" in capsys.readouterr().out
    made = open_file(str(tmp_path / "out" / "train.parquet"), chat_template=True)
    assert [question.text for question in questions(made)] == [f"{i}+1=?" for i in range(20)]


@pytest.mark.parametrize("line", [b"not JSON", b"[1]", b'{"prompt": "b"}', b'{"prompt": "", "answer": 1}', b'"\xff"'])
def test_a_row_that_cannot_be_used_is_refused_with_the_command_that_leaves_it_out(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": 1}\n' + line + b"\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        open_file(str(path))
    assert caught.value.fix == "`asyncdapo data prepare` leaves such rows out"
    assert main(["data", "prepare", str(path), "--out", str(tmp_path / "out")]) == 0
    assert len(questions(open_file(str(tmp_path / "out" / "train.parquet")))) == 1


def test_files_that_cannot_be_read_are_refused(tmp_path):
    not_parquet = tmp_path / "a.parquet"
    not_parquet.write_text("hello")
    directory = tmp_path / "b.jsonl"
    directory.mkdir()
    for path, message in (
        (str(tmp_path / "missing.jsonl"), "prompts.path: no such file, got '.*missing.jsonl'"),
        (str(tmp_path / "missing.parquet"), "prompts.path: no such file"),
        (str(tmp_path / "a.csv"), "must end in .jsonl or .parquet"),
        (str(not_parquet), "can't be read: .*[Pp]arquet"),
        (str(directory), "can't be read: .*directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_file(path)


def test_a_broken_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"prompt": "a" * 50, "answer": "1"}] * 50)
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"\xff" * 40 + content[60:])
    with pytest.raises(ConfigError, match="prompts.path: can't be read"):
        open_file(str(path))


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    text = pyarrow.array([b"\xff\xfe"]).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": text, "answer": ["1"]}), path)
    with pytest.raises(ConfigError, match="prompts.path: can't be read"):
        open_file(str(path))


def test_an_error_of_the_evaluation_file_names_its_own_key(tmp_path):
    with pytest.raises(ConfigError, match="prompts.eval_path: no such file"):
        open_file(write_jsonl(tmp_path / "a.jsonl", PAIRS), eval_path=str(tmp_path / "none.jsonl"))


# ------------------------------------------------------------------------------------------------------------- mixtures


def two_files(tmp_path):
    """Two files of the same name, that have some questions in common."""
    folders = [tmp_path / name for name in ("easy", "hard")]
    for folder in folders:
        folder.mkdir()
    first = write_jsonl(folders[0] / "train.jsonl", PAIRS)
    second = write_jsonl(folders[1] / "train.jsonl", [{"prompt": f"{i}+1=?", "answer": i + 1} for i in range(15, 30)])
    return first, second


def test_a_mixture_reads_each_file_into_a_part_with_its_weight(tmp_path):
    first, second = two_files(tmp_path)
    task = open_file({first: 3, second: 1})
    assert [(part.name, len(part.rows), part.weight) for part in task.parts] == [
        ("easy/train.jsonl", 20, 3),
        ("hard/train.jsonl", 15, 1),
    ]
    assert [(q.source, q.row) for q in questions(task)][19:21] == [("easy/train.jsonl", 19), ("hard/train.jsonl", 0)]


def test_what_is_held_out_of_a_mixture_is_trained_on_from_no_file(tmp_path):
    first, second = two_files(tmp_path)
    task = open_file({first: 1, second: 1}, num_eval=12)
    held_out = {question.text for question in eval_questions(task)}
    assert len(held_out) == 12
    assert not held_out & {question.text for question in questions(task)}
    assert {question.source for question in eval_questions(task)} == {"easy/train.jsonl", "hard/train.jsonl"}


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", PAIRS[:1])
    many = write_jsonl(tmp_path / "many.jsonl", PAIRS)
    with pytest.raises(ConfigError, match="prompts.path: every question of few.jsonl is held out for evaluation"):
        open_file({few: 1, many: 1}, num_eval=19)


def test_an_error_in_a_file_of_a_mixture_names_that_file(tmp_path):
    first, _ = two_files(tmp_path)
    with pytest.raises(ConfigError, match=r"prompts.path: no such file, got '.*/none.jsonl'"):
        open_file({first: 1, str(tmp_path / "none.jsonl"): 1})
