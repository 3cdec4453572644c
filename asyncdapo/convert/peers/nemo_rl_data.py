"""NeMo RL's names of data sets, and what follows from them: prepared files, templates, numbers of prompts."""

from __future__ import annotations

from math import ceil
from typing import Any

from asyncdapo.convert import data_files
from asyncdapo.convert.rules import Left, Made, Rank, whole

KNOWN_DATA = {"DAPOMath17K": "dapo-math-17k", "DAPOMathAIME2024": "aime-2024", "AIME2024": "aime-2024"}
DATA_SETS = KNOWN_DATA | {
    "gsm8k": "gsm8k --verifier math_verify",
    "GSM8K": "gsm8k --verifier math_verify",
    "OpenMathInstruct-2": "nvidia/OpenMathInstruct-2 --split train_1M --answer-column expected_answer "
    "--verifier math_verify",
    "DeepScaler": "agentica-org/DeepScaleR-Preview-Dataset --verifier math_verify",
    "NuminaMath-1.5": "AI-MO/NuminaMath-1.5 --verifier math_verify",
    "OpenR1-Math-220k": "open-r1/OpenR1-Math-220k --verifier math_verify",
}
"""Their name of a data set -> the arguments of `asyncdapo data prepare`."""


def train_data(name: Any, *templates: Any) -> Any:
    if name in DATA_SETS:
        return _prepared(DATA_SETS[name], "train", templates)
    return Left("their name of a data set: give asyncdapo data prepare its id on the hub", always=True)


def eval_data(name: Any, *templates: Any) -> Any:
    if name in DATA_SETS:
        return _prepared(DATA_SETS[name], "test", templates)
    why = "their name of a data set: give asyncdapo data prepare its id on the hub"
    return Left(why, loud=Rank.EVAL) if name else None


def _prepared(source: str, split: str, templates: tuple[Any, ...]) -> Made:
    """The prepared file. If they have a template, the run applies it, so `data prepare` must not add one."""
    folder = f"data/{source.split()[0].rpartition('/')[2]}"
    bare = " --template '{prompt}'" if any(templates) else ""
    split = source.partition("--split ")[2].partition(" ")[0] or split
    return Made(f"{folder}/{split}.parquet", before=(f"asyncdapo data prepare {source}{bare} --out {folder}",))


def template(own: Any, default: Any) -> Any:
    """Our template from theirs, where `{}` marks the question."""
    text = own or default
    if not text:
        return None
    made = text.format("{prompt}")
    return made if "{prompt}" in made else Left("a template without a place for the question", loud=Rank.TASK)


def epochs(passes: Any, name: Any, path: Any) -> Any:
    """Epochs; -1 there means no limit."""
    return data_files.epochs(passes if passes is None else max(0, whole(passes)), KNOWN_DATA.get(name), path)


def eval_prompts(most: Any, name: Any) -> Any:
    """Evaluation prompts, without repeated rows."""
    known = KNOWN_DATA.get(name)
    times = data_files.REPEATS[known] if known and name != "AIME2024" else 1
    if most is None or times == 1:
        return most
    return Made(ceil(whole(most) / times), f"{most} rows there, each of them {times} times")


def eval_samples(count: Any, name: Any, repeat: Any, path: Any) -> Any:
    """Completions of an evaluation prompt. Their AIME2024 has 30 rows, repeated if a key says so."""
    if name == "AIME2024":
        times = whole(repeat or 1)
        return None if count is None and times == 1 else data_files.repeated(whole(count or 1), times)
    return data_files.samples(count, KNOWN_DATA.get(name) or path)
