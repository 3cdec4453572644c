"""A directory in which a page's commands run: the repository's files, made data, a made Hugging Face cache, stand-ins.

In: an empty directory, the page. Out: what each block printed, and its exit code. Nothing here reaches the network.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from tests.docs.blocks import ROOT, Block
from tests.docs.stand_ins import NOT_RUN
from tests.environment.chat_model import save_tokenizer

SHIMS = sorted({start.split()[0] for start in NOT_RUN} | {"asyncdapo", "python", "python3"})
PAIRS = [(f"{a}+{b}*{c}", (a + b * c) % 10) for a in range(5) for b in range(1, 5) for c in range(2, 6)]
"""80 questions that the quickstart's model can read, with answers."""
SCRIPT = """\
n_resp_per_prompt=16
python3 -m recipe.dapo.main_dapo data.train_batch_size=512 actor_rollout_ref.rollout.n=${n_resp_per_prompt} \\
    actor_rollout_ref.model.path=Qwen/Qwen2.5-7B actor_rollout_ref.actor.clip_ratio_high=0.28
"""
"""A script of another framework's, for pages that convert one."""


def make(folder: Path, page: str) -> Path:
    """Fill it. Returns the directory in which the page's commands start."""
    start = folder / "asyncdapo"
    start.mkdir()
    for name in ("configs", "launchers", "docs", "benchmarks", "examples", "pyproject.toml"):
        (start / name).symlink_to(ROOT / name)
    for bin_dir in (folder / "bin", start / ".venv" / "bin"):
        bin_dir.mkdir(parents=True)
        for name in SHIMS:
            shim = bin_dir / name
            shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.docs.stand_ins {name} "$@"\n')
            shim.chmod(0o755)
    (start / ".venv" / "bin" / "activate").write_text("")
    _write_data(start, page)
    _write_hub(folder / "huggingface" / "hub")
    return start


class Judge(http.server.BaseHTTPRequestHandler):
    """The judge of docs/reward.md: right is what holds the answer."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        said = {"correct": asked["answer"] in asked["response"], "confidence": 0.5}
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, *parts: object) -> None:
        pass


@contextmanager
def judge() -> Iterator[str]:
    """Its address, while it listens."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(
    block: Block, start: Path, *, runs: str, timeout_s: float, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`runs`: see `stand_ins`. `variables` of the environment, besides those that every reader has."""
    environment = {
        **os.environ,
        "PATH": f"{start.parent / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DOCS_RUNS": runs,
        "HF_HOME": str(start.parent / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        **variables,
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=start,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout_s,
    )


def _write_data(start: Path, page: str) -> None:
    """The reader's own files: every data file that a command names and nothing makes, and the examples of the page."""
    text = (ROOT / page).read_text()
    rows = "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in PAIRS)
    for name in ("questions.jsonl", "train.jsonl", "test.jsonl", "mine.jsonl", "extra.jsonl"):
        (start / name).write_text(rows)
    (start / "run_dapo.sh").write_text(SCRIPT)
    for name, code in re.findall(r"<!-- (?:example|file): (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL):
        path = start / {"sync": "closeness.py", "async": "judge.py"}.get(name, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)


def _write_hub(hub: Path) -> None:
    """The cache of a machine that has the three published data sets, in their own columns, with few rows, and a
    tokenizer with a chat template in the place of a published one."""
    messages = [[{"role": "user", "content": f"Q: {question} mod 10\n"}] for question, _ in PAIRS]
    of_dapo = {
        "data_source": ["math_dapo"] * len(PAIRS),
        "prompt": messages,
        "ability": ["MATH"] * len(PAIRS),
        "reward_model": [{"ground_truth": str(answer), "style": "rule"} for _, answer in PAIRS],
        "extra_info": [{"index": str(index)} for index in range(len(PAIRS))],
    }
    of_gsm8k = {
        "question": [question for question, _ in PAIRS],
        "answer": [f"It is so.\n#### {answer}" for _, answer in PAIRS],
    }
    files = {
        "BytedTsinghua-SIA/DAPO-Math-17k": {"data/dapo-math-17k.parquet": of_dapo},
        "BytedTsinghua-SIA/AIME-2024": {"data/aime-2024.parquet": of_dapo},
        "openai/gsm8k": {
            "main/train-00000-of-00001.parquet": of_gsm8k,
            "main/test-00000-of-00001.parquet": of_gsm8k,
        },
    }
    commit = "0" * 40
    model = hub / "models--Qwen--Qwen2.5-0.5B-Instruct"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    save_tokenizer(model / "snapshots" / commit)
    for repository, tables in files.items():
        folder = hub / f"datasets--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        for name, columns in tables.items():
            path = folder / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pa.table(columns), path)
