"""Their data files as ours: what `data prepare` makes of them, how often they repeat a row, how many rows they have.

In: the values of their keys that name files. Out: paths of prepared files with the commands that make them, and counts
by which our clock makes up for repetitions. Does not own: what a row holds (`prompts/prepare/`).
"""

from __future__ import annotations

import re
from typing import Any

from asyncdapo.convert.rules import Differs, Left, Made, Rank, Rule, chat_template, whole

DATA_FILES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
SAME_SPLITS = ("train", "test", "validation", "val")
UNREPEATED = (
    "asyncdapo data prepare leaves repeated rows out: if yours repeat on purpose, multiply prompts.epochs and "
    "eval.num_samples by how often."
)
REPEATS = {"dapo-math-17k": 100, "aime-2024": 32, "gsm8k": 1}
"""How often the published files repeat each row: 1,791,700 rows are 17,917 x 100, and 960 are 30 x 32."""
ROWS = {"aime-2024": 30, "gsm8k": 1319}
"""Evaluation rows of the published files."""
WHOLE_FILES = Differs(
    "It evaluates every row of its files; here eval.num_prompts of them, 512 by default",
    Rank.EVAL,
    lambda made: "prompts.eval_path" in made and "eval.num_prompts" not in made,
)


def rules(train: str, held_out_key: str, template_arguments: str) -> tuple[Rule, ...]:
    """Rules for the keys that name files, and for the arguments of their chat template."""
    return (
        Rule("prompts.task", (train,), lambda files: "file"),
        Rule("prompts.path", (train,), train_data),
        Rule("prompts.eval_path", (held_out_key,), held_out),
        Rule("prompts.chat_template", (train, f"{template_arguments}.enable_thinking"), chat_template),
        Rule("eval.num_greedy_prompts", (held_out_key,), lambda files: Made(0, "they have one evaluation, not two")),
    )


def epochs(passes: Any, *train: Any) -> Any:
    """Epochs over data without the repeated rows."""
    if passes is None:
        return None
    named = [files for files in train if files]
    return repeated(whole(passes), (repeats(named[0]) if named else None) or 1)


def repeated(count: int, times: int) -> Any:
    """The count, multiplied to make up for removed repetitions."""
    why = f"{count} x {times}: their file holds every row {times} times, and data prepare removes repetitions"
    return Made(count * times, why) if times > 1 else count


def repeats(files: Any) -> int | None:
    """How often a published file repeats each row; None for other files, several files, or a part of one."""
    return REPEATS.get(_place(files)[1])


def _place(files: Any) -> tuple[str, str]:
    """Folder and name, without the ending, of a single file."""
    files = files if isinstance(files, list) else [files]
    folder, _, name = str(files[0]).rpartition("/") if len(files) == 1 else ("", "", "")
    return folder.rpartition("/")[2].lower(), re.sub(r"\.(parquet|jsonl?)$", "", name).lower()


def all_rows(files: Any) -> Any:
    """Number of rows of the first file, if it is a published one."""
    folder, name = _place(files[:1] if isinstance(files, list) else files)
    rows = ROWS.get(folder if name in SAME_SPLITS else name)
    return None if rows is None else Made(rows, "all of its rows, as there")


def samples(count: Any, files: Any) -> Any:
    """Completions of each held-out prompt, instead of its repetitions. Only the first file is held out."""
    times = (repeats(files[:1] if isinstance(files, list) else files) if files else None) or 1
    if count is None and times == 1:
        return None
    return repeated(1 if count is None else whole(count), times)


def train_data(files: Any) -> Any:
    """The prepared files of their files or data sets; several become a mixture."""
    files = _named(files)
    if not files:
        return Left("it names no file")
    if len(files) == 1:
        return _prepared(files[0], "train")
    made = [_prepared(file, "train") for file in files]
    why = "drawn from equally here, row after row there: set the weights to the numbers of rows"
    before = tuple(command for one in made for command in one.before)
    return Made({one.value: 1 for one in made}, why, before, UNREPEATED, Rank.TASK)


def held_out(files: Any) -> Any:
    """As `train_data`; only one file can be held out."""
    files = _named(files)
    if not files:
        return None
    made = _prepared(files[0], "test")
    if len(files) == 1:
        return made
    more = f"the first of {len(files)}: asyncdapo eval takes others with --data"
    return Made(made.value, more, made.before, made.note, Rank.EVAL)


def _named(files: Any) -> list[str]:
    """The files that a value names, a list or a single one."""
    named = [file for file in (files if isinstance(files, list) else [files]) if file not in (None, "")]
    if not all(isinstance(file, str) for file in named):
        raise ValueError("it takes a file or a list of files")
    return named


def _prepared(source: str, split: str) -> Made:
    """The file that `data prepare` makes of a source: a hub id, a file or a published data set."""
    note = "" if repeats(source) else UNREPEATED
    is_file = source.endswith(DATA_FILES) or source.startswith(("/", "~", "."))
    stem = re.sub(r"\.(parquet|jsonl?|csv|arrow)$", "", source.rpartition("/")[2])
    if is_file and stem in SAME_SPLITS:
        stem = source.rstrip("/").split("/")[-2] if source.count("/") > 1 else "data"
        stem += "-test" if split == "test" else ""
    stem = re.sub(r"[^\w.-]", "-", stem) or "data"
    quoted = source if re.fullmatch(r"[\w@%+=:,./~-]+", source) else "'" + source.replace("'", "'\\''") + "'"
    other = " --split test" if split == "test" and is_file else ""
    command = f"asyncdapo data prepare {quoted} --out data/{stem}{other}"
    return Made(f"data/{stem}/{split}.parquet", "", (command,), note)
