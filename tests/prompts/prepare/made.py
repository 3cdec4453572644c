"""Made data for the tests of `asyncdapo data prepare`: files, a Hugging Face cache, and the command itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from asyncdapo.cli import main

INSTRUCTION = 'Solve this. The last line must be "Answer: X".\n\n'


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """A record that is bytes is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def dapo_row(question: str, answer: str, index: str) -> dict[str, Any]:
    """Of the columns of DAPO-Math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": INSTRUCTION + question, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def cache_data_set(cache: Path, repository: str, revision: str = "main") -> Path:
    """The folder of a snapshot in a Hugging Face cache (HF_HUB_CACHE)."""
    home = cache / f"datasets--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (home / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def prepare(*args: Any) -> int:
    return main(["data", "prepare", *map(str, args)])


def counts(out: Path, split: str = "train") -> dict[str, int]:
    return json.loads((out / "manifest.json").read_text())["counts"][split]


def rows(out: Path, split: str = "train") -> list[dict[str, Any]]:
    return parquet.read_table(out / f"{split}.parquet").to_pylist()


def unusable(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "unusable.jsonl").read_text().splitlines()]
