"""A run that is killed again and again: `python benchmarks/soak.py [--minutes 15] [--config quickstart_tools]`.

The quickstart, or the one with an environment, runs for that many minutes. Every 14 to 24 s (`--pause`) one of its
processes is killed (SIGKILL): worker, scorer or host, replay server, learner, or the driver, which is then launched
again. At the end the run is stopped by Ctrl-C, and a last launch trains one more step, up to the final evaluation. Exit
code 1 unless

    audit is clean after every kill; no process is left behind after the driver's death or at the end
    at most 60 s pass without a trained batch or an arrived group
    with tools, every recorded episode has the observations and the reward that the calculator gives
    without them, the accuracy reaches the quickstart's marks: 0.90 sampled, 0.95 greedy
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from asyncdapo.config.config import load_config
from asyncdapo.controller.process.roster import Entry, read, survivors
from asyncdapo.environment.calculator import Calculator
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.model.tokenizer import load_tokenizer
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.ledger.ledger import read_group

ROLES = {
    "quickstart": ("rollout", "replay", "learner", "scorer", "controller"),
    "quickstart_tools": ("rollout", "replay", "learner", "host", "controller"),
}
KEYS = {
    "quickstart": (),
    "quickstart_tools": ("replay.keep_payloads=true", "learner.lr=1e-6"),
}
"""With tools the model learns nearly nothing, so that right and wrong episodes are there up to the end."""
PAUSE_S = (14.0, 24.0)
MAX_STALL_S = 60.0
MIN_ACCURACY, MIN_GREEDY = 0.90, 0.95


class Soak:
    """One run directory and the launch that works on it now."""

    def __init__(self, run_dir: Path, config: str, seed: int) -> None:
        self.run_dir, self.config, self.random = run_dir, config, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.problems: list[str] = []
        self.num_audits = 0
        self.launched_at: list[float] = []
        self.process = self.launch("run.steps=100000")

    def launch(self, *overrides: str) -> subprocess.Popen[bytes]:
        self.launched_at.append(time.time())
        log = (self.run_dir.parent / f"{self.run_dir.name}.out").open("ab")
        keys = (f"run.dir={self.run_dir}", "controller.max_restarts=1000", "learner.checkpoint_every=4")
        command = [sys.executable, "-m", "asyncdapo.cli", "launch", self.config, "metrics.wandb=disabled", *keys]
        return subprocess.Popen([*command, *KEYS[self.config], *overrides], stdout=log, stderr=subprocess.STDOUT)

    def run(self, minutes: float, pause_s: Sequence[float]) -> None:
        """Kill for so long, and then let the run end."""
        deadline = time.monotonic() + 60 * minutes
        while time.monotonic() < deadline:
            time.sleep(self.random.uniform(*pause_s))
            if (code := self.process.poll()) is not None:
                self.problems.append(f"the run ended by itself with exit code {code}")
                break
            self.audit("a death")
            self.kill_one()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        self.audit("Ctrl-C")
        code = self.launch(f"run.steps={self.num_steps() + 1}").wait(300)
        if code != 0:
            self.problems.append(f"the last launch ended with exit code {code}")
        self.audit("the end")
        self.expect_nobody("the end")

    def kill_one(self) -> None:
        """Kill a process of a random role, if there is one, and check the consequences. The driver is spared until its
        launch has made progress: a run whose driver dies in every start has none."""
        spared = "" if self.last_progress_s() > self.launched_at[-1] else "controller"
        entries = [one for one in self.roster() if one.role in ROLES[self.config] and one.role != spared]
        if not entries:
            return
        role = self.random.choice(sorted({entry.role for entry in entries}))
        victim = self.random.choice([entry for entry in entries if entry.role == role])
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.kills[role] += 1
        print(f"{time.strftime('%H:%M:%S')}  killed {victim.name} after step {self.num_steps()}", flush=True)
        if role == "controller":
            self.process.wait()
            self.expect_nobody("the driver was killed")
            self.audit("the driver was killed")
            self.process = self.launch("run.steps=100000")

    def roster(self) -> list[Entry]:
        path = self.run_dir / "processes.json"
        return read(self.run_dir) if path.exists() else []

    def expect_nobody(self, when: str) -> None:
        deadline = time.monotonic() + 10
        while left := survivors(self.run_dir):
            if time.monotonic() > deadline:
                self.problems.append(f"left behind 10 s after {when}: {left}")
                return
            time.sleep(0.2)

    def audit(self, when: str) -> None:
        if self.num_steps():  # before the first batch there is nothing to audit
            self.num_audits += 1
            self.problems += [f"audit, after {when}: {breach}" for breach in audit(self.run_dir)]

    def num_steps(self) -> int:
        return self.query("SELECT COALESCE(MAX(step), 0) FROM batches")[0][0]

    def query(self, sql: str) -> list[tuple]:
        try:
            with closing(sqlite3.connect(self.run_dir / "ledger.db", timeout=20)) as ledger:
                return ledger.execute(sql).fetchall()
        except sqlite3.OperationalError:
            return [(0,)]

    def last_progress_s(self) -> float:
        return max(self.progress_s(), default=0.0)

    def longest_stall_s(self) -> float:
        """Longest time without progress."""
        at_s = sorted(self.progress_s())
        return max(after - before for before, after in zip(at_s, at_s[1:], strict=False))

    def progress_s(self) -> list[float]:
        """When a group arrived or a batch was trained, undone ones included; in seconds since 1970."""
        tables = ("groups", "undone_groups"), ("batches", "undone_batches")
        at_s = [at for (at,) in self.query(" UNION ".join(f"SELECT arrived_at_s FROM {t}" for t in tables[0]))]
        return at_s + [at for (at,) in self.query(" UNION ".join(f"SELECT trained_at_s FROM {t}" for t in tables[1]))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--config", choices=ROLES, default="quickstart")
    parser.add_argument(
        "--pause", type=float, nargs=2, default=PAUSE_S, help="seconds between kills, at least and at most"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    args.dir.parent.mkdir(parents=True, exist_ok=True)
    soak = Soak(args.dir.absolute(), args.config, args.seed)
    soak.run(args.minutes, args.pause)
    return report(soak, args.minutes)


def false_episodes(run_dir: Path) -> Iterator[str]:
    """Recorded episodes that the calculator would have answered, or rewarded, in another way. So an episode whose
    environment died is none that counts as wrong."""
    decode = load_tokenizer(load_config(run_dir / "config.yaml").model.tokenizer_files).decode
    with closing(sqlite3.connect(run_dir / "ledger.db")) as ledger:
        group_ids = [
            group_id for (group_id,) in ledger.execute("SELECT group_id FROM groups WHERE segment IS NOT NULL")
        ]
    for group_id in group_ids:
        group, payload = read_group(run_dir, group_id)
        for one in payload.of_contexts(group):
            completion = group.completions[one.index]
            ends = np.cumsum([count for _, count in one.header.sampled])
            texts = [decode(part) for part in np.split(one.own_ids, ends[:-1])]
            observed, reward = played(decode(one.prompt_ids), texts[::2])
            recorded = texts[1::2], completion.metrics["acc"]
            if recorded != (observed[: len(recorded[0])], reward) or completion.finish_reason == "time":
                yield f"group {group_id}: {completion.finish_reason}, {texts} has reward {recorded[1]}"


def played(question: str, responses: Sequence[str]) -> tuple[list[str], float]:
    """What the calculator answers to the responses, and the reward."""
    left, right = re.findall(r"\d+", question)
    calculator, observed = Calculator(), []
    calculator.reset({"answer": str(int(left) * int(right))})
    for response in responses:
        said = calculator.step(response)
        if isinstance(said, tuple):
            return observed, said[1]
        observed.append(said)
    return observed, 0.0


def report(soak: Soak, minutes: float) -> int:
    last, stall_s = read_metrics(soak.run_dir)[-1], soak.longest_stall_s()
    figures = {
        "minutes": minutes,
        "kills": sum(soak.kills.values()),
        **{f"kills of {role}": soak.kills[role] for role in ROLES[soak.config]},
        "launches": len(soak.launched_at),
        "branches": soak.query("SELECT COUNT(*) FROM branches")[0][0],
        "steps": int(last["step"]),
        "steps undone": soak.query("SELECT COUNT(*) FROM undone_batches")[0][0],
        "audits": soak.num_audits,
        "groups": soak.query("SELECT COUNT(*) FROM groups")[0][0],
        "prompts failed": soak.query("SELECT COUNT(*) FROM prompts WHERE state = 'failed'")[0][0],
        "longest stall s": round(stall_s, 1),
        "accuracy": last.get("eval/accuracy"),
        "greedy accuracy": last.get("eval/greedy_accuracy"),
    }
    print(json.dumps(figures, indent=2))
    if stall_s > MAX_STALL_S:
        soak.problems.append(f"{stall_s:.0f} s without progress")
    if soak.config == "quickstart_tools":
        soak.problems += false_episodes(soak.run_dir)
    elif not (last.get("eval/accuracy", 0) >= MIN_ACCURACY and last.get("eval/greedy_accuracy", 0) >= MIN_GREEDY):
        soak.problems.append("the accuracy misses the quickstart's marks")
    for problem in soak.problems:
        print(f"problem: {problem}")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
