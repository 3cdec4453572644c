"""A run that is killed again and again: `python benchmarks/soak.py --minutes 15 [--seed 0] [--dir runs/soak]`.

The quickstart runs for that many minutes. Every 14 to 24 s one of its processes is killed (SIGKILL): worker, scorer,
replay server, learner, or the driver, which is then launched again. At the end the run is stopped by Ctrl-C, and a last
launch trains one more step, up to the final evaluation. Exit code 1 unless

    audit is clean after every kill; no process is left behind after the driver's death or at the end
    at most 60 s pass without a trained batch or an arrived group
    the accuracy reaches the quickstart's marks: 0.90 sampled, 0.95 greedy
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from asyncdapo.controller.process.roster import Entry, read, survivors
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.replay.ledger.audit import audit

ROLES = ("rollout", "replay", "learner", "scorer", "controller")
PAUSE_S = (14.0, 24.0)
MAX_STALL_S = 60.0
MIN_ACCURACY, MIN_GREEDY = 0.90, 0.95


class Soak:
    """One run directory and the launch that works on it now."""

    def __init__(self, run_dir: Path, seed: int) -> None:
        self.run_dir, self.random = run_dir, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.problems: list[str] = []
        self.num_audits = 0
        self.launched_at: list[float] = []
        self.process = self.launch("run.steps=100000")

    def launch(self, *overrides: str) -> subprocess.Popen[bytes]:
        self.launched_at.append(time.time())
        log = (self.run_dir.parent / f"{self.run_dir.name}.out").open("ab")
        keys = (f"run.dir={self.run_dir}", "controller.max_restarts=1000", "learner.checkpoint_every=4")
        command = [sys.executable, "-m", "asyncdapo.cli", "launch", "quickstart", "metrics.wandb=disabled", *keys]
        return subprocess.Popen([*command, *overrides], stdout=log, stderr=subprocess.STDOUT)

    def kill_one(self) -> None:
        """Kill a process of a random role, if there is one, and check the consequences."""
        role = self.random.choice(ROLES)
        entries = [entry for entry in self.roster() if entry.role == role]
        if not entries:
            return
        victim = self.random.choice(entries)
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

    def longest_stall_s(self) -> float:
        """Longest time without a trained batch or an arrived group, undone ones included."""
        tables = ("groups", "undone_groups"), ("batches", "undone_batches")
        at_s = [at for (at,) in self.query(" UNION ".join(f"SELECT arrived_at_s FROM {t}" for t in tables[0]))]
        at_s += [at for (at,) in self.query(" UNION ".join(f"SELECT trained_at_s FROM {t}" for t in tables[1]))]
        at_s.sort()
        return max(after - before for before, after in zip(at_s, at_s[1:], strict=False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    args.dir.parent.mkdir(parents=True, exist_ok=True)
    soak = Soak(args.dir.absolute(), args.seed)
    deadline = time.monotonic() + 60 * args.minutes
    while time.monotonic() < deadline:
        time.sleep(soak.random.uniform(*PAUSE_S))
        if (code := soak.process.poll()) is not None:
            soak.problems.append(f"the run ended by itself with exit code {code}")
            break
        soak.audit("a death")
        soak.kill_one()
    soak.process.send_signal(signal.SIGINT)
    code = soak.process.wait(60)
    soak.audit("Ctrl-C")
    steps = soak.num_steps() + 1
    code = soak.launch(f"run.steps={steps}").wait(300)
    if code != 0:
        soak.problems.append(f"the last launch ended with exit code {code}")
    soak.audit("the end")
    soak.expect_nobody("the end")
    return report(soak, args.minutes)


def report(soak: Soak, minutes: float) -> int:
    last, stall_s = read_metrics(soak.run_dir)[-1], soak.longest_stall_s()
    figures = {
        "minutes": minutes,
        "kills": sum(soak.kills.values()),
        **{f"kills of {role}": soak.kills[role] for role in ROLES},
        "launches": len(soak.launched_at),
        "branches": soak.query("SELECT COUNT(*) FROM branches")[0][0],
        "steps": int(last["step"]),
        "steps undone": soak.query("SELECT COUNT(*) FROM undone_batches")[0][0],
        "audits": soak.num_audits,
        "longest stall s": round(stall_s, 1),
        "accuracy": last.get("eval/accuracy"),
        "greedy accuracy": last.get("eval/greedy_accuracy"),
    }
    print(json.dumps(figures, indent=2))
    if stall_s > MAX_STALL_S:
        soak.problems.append(f"{stall_s:.0f} s without progress")
    if not (last.get("eval/accuracy", 0) >= MIN_ACCURACY and last.get("eval/greedy_accuracy", 0) >= MIN_GREEDY):
        soak.problems.append("the accuracy misses the quickstart's marks")
    for problem in soak.problems:
        print(f"problem: {problem}")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
