"""Workers that come and go, under a run that trains: `python benchmarks/elastic.py [--minutes 10] [--scenes 1,4,2]`.

With `--minutes` the quickstart runs over two stand-in nodes (raylets on this machine; the launch is on a third), and
something happens to a worker every 4 to 12 s (`--pause`), at random: the run is scaled to another number, one is sent
SIGTERM, SIGKILL, or SIGSTOP (and SIGCONT after 1 to 40 s). At a third of the time the node that has only workers loses
its power, and another node comes. At the end the run is stopped by Ctrl-C, and a last launch trains one more step. With
`--scenes` it runs without nodes, is scaled to each of these numbers in turn, a third of its steps each, and trains its
36 steps. Exit code 1 unless

    audit is clean while it runs and at the end; no process is left behind
    every version is published within `weights.timeout_s`, its retries included, and no end is killed for silence in it
    every sampled token is in one class of `replay/tokens_…`, and none is failed, undone or surplus; lost ones only
    after a SIGKILL, a SIGSTOP or the loss of a node
    with `--scenes`: nothing is lost, no version misses its deadline, the sampled accuracy reaches 0.93

Printed are the steps' times, those in which a worker joined or left beside the others (a start of a process takes its
share of the cores), those of the publishes, and the tokens of each class.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from asyncdapo.controller.process.roster import Entry, is_running, read, this_host
from asyncdapo.controller.process.wanted_workers import ask_for
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.metrics.verdict.window import FATES
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.weights.config import WeightsConfig
from tests.controller.nodes import Nodes, node_of, nodes

MOST = 4
"""Workers."""
PAUSE_S = (4.0, 12.0)
"""With what each thing takes, some 60 in 10 minutes."""
STOPPED_S = (1.0, 40.0)
"""Above 30 s a stopped worker counts as lost."""
MIN_ACCURACY = 0.93
CLASSES = (*FATES, "held", "in_flight", "probe")
"""What becomes of sampled tokens."""
NEVER = ("failed", "undone", "surplus")
"""Of these, while neither learner nor replay dies, and no verifier fails."""
NODES = ("node-a", "node-b")
NEW_NODE = "node-c"
LIFE = "SELECT at_s FROM events WHERE kind IN ('worker_joined', 'worker_drained', 'worker_lost') ORDER BY at_s"
LOST = "SELECT COUNT(*) FROM leases WHERE outcome = 'lost'"
DRAINED = "SELECT COUNT(*) FROM leases WHERE outcome = 'withdrawn' AND reason = 'drained'"


class ElasticRun:
    """One run directory, the launch that works on it, and what was done to its workers."""

    def __init__(self, run_dir: Path, seed: int, steps: int, cluster: Nodes | None) -> None:
        """`cluster`: the run joins it; None for a Ray of its own."""
        self.run_dir, self.random, self.steps, self.cluster = run_dir, random.Random(seed), steps, cluster
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self.wake: list[tuple[float, Entry]] = []
        """When a stopped worker goes on."""
        self.seen: set[Entry] = set()
        """Every process that the run ever had."""
        self.last_step = 1_000_000
        """Before the last launch."""
        self.process = self.launch(steps)

    def launch(self, steps: int) -> subprocess.Popen[bytes]:
        log = (self.run_dir.parent / f"{self.run_dir.name}.out").open("ab")
        keys = [
            f"run.dir={self.run_dir}",
            f"run.steps={steps}",
            f"rollout.num_workers={{min: 1, max: {MOST}}}",
            "controller.max_restarts=1000",
            "metrics.wandb=disabled",
        ]
        if self.cluster:
            keys.append(f"controller.ray_address={self.cluster.address}")
        command = [sys.executable, "-m", "asyncdapo.cli", "launch", "quickstart", *keys]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def play(self, scenes: Sequence[int]) -> None:
        """Scale to each number in turn, to the first one before any worker is up."""
        while not (self.run_dir / "config.yaml").exists():
            time.sleep(0.05)
        for number, num_workers in enumerate(scenes):
            ask_for(self.run_dir, num_workers)
            self.done[f"scaled to {num_workers}"] += 1
            while self.process.poll() is None and self.num_steps() < self.steps * (number + 1) // len(scenes):
                time.sleep(0.5)
        self.process.wait(600)

    def disturb(self, minutes: float, pause_s: Sequence[float]) -> None:
        """One thing after the other, for so long; then let the run end."""
        began = time.monotonic()
        events = iter([(20 * minutes, self.lose_a_node), (20 * minutes + 20, self.add_a_node)])
        at, event = next(events)
        while time.monotonic() < began + 60 * minutes and self.process.poll() is None:
            next_at = time.monotonic() + self.random.uniform(*pause_s)
            while time.monotonic() < next_at:
                self.wake_up()
                time.sleep(0.2)
            if not self.num_steps():
                continue
            if time.monotonic() > began + at:
                event()
                at, event = next(events, (math.inf, self.add_a_node))
            else:
                self.do_something()
        self.wake_up(everyone=True)
        if self.process.poll() is not None:
            self.problems.append(f"the run ended by itself with exit code {self.process.returncode}")
        self.check_tokens()
        self.last_step = self.num_steps()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        if (code := self.launch(self.num_steps() + 1).wait(300)) != 0:
            self.problems.append(f"the last launch ended with exit code {code}")

    def lose_a_node(self) -> None:
        """The one that has only workers."""
        assert self.cluster is not None
        [main] = {node_of(entry.host) for entry in self.roster() if entry.role in ("replay", "learner")}
        [other] = {*NODES} - {main}
        self.say("a node loses its power", f"{other} loses its power, with {self.workers_on(other)} workers")
        self.cluster.cut_power(other)

    def add_a_node(self) -> None:
        assert self.cluster is not None
        self.say("a node comes", f"{NEW_NODE} comes")
        self.cluster.add(NEW_NODE)

    def workers_on(self, node: str) -> int:
        return sum(entry.role == "rollout" and node_of(entry.host) == node for entry in self.roster())

    def roster(self) -> list[Entry]:
        entries = read(self.run_dir)
        self.seen |= set(entries)
        return entries

    def say(self, what: str, said: str) -> None:
        self.done[what] += 1
        print(f"{time.strftime('%H:%M:%S')}  {said}, after step {self.num_steps()}", flush=True)

    def do_something(self) -> None:
        self.problems += [f"audit: {breach}" for breach in audit(self.run_dir)]
        what = self.random.choice(("scale", "scale", "SIGTERM", "SIGKILL", "SIGSTOP"))
        workers = [entry for entry in self.roster() if entry.role == "rollout"]
        if what == "scale":
            num_workers = self.random.randint(1, MOST)
            ask_for(self.run_dir, num_workers)
            said = f"scaled to {num_workers}"
        elif workers:
            victim = self.random.choice(workers)
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.Signals[what])
            said = f"{what} to {victim.name}"
            if what == "SIGSTOP":
                self.wake.append((time.monotonic() + self.random.uniform(*STOPPED_S), victim))
        else:
            return
        self.say(what, said)

    def wake_up(self, *, everyone: bool = False) -> None:
        for entry in [(at, entry) for at, entry in self.wake if everyone or at <= time.monotonic()]:
            self.wake.remove(entry)
            with suppress(ProcessLookupError):
                os.kill(entry[1].pid, signal.SIGCONT)

    def num_steps(self) -> int:
        return self.query("SELECT COALESCE(MAX(step), 0) FROM batches")[0][0]

    def query(self, sql: str) -> list[tuple]:
        try:
            with closing(sqlite3.connect(self.run_dir / "ledger.db", timeout=20)) as ledger:
                return ledger.execute(sql).fetchall()
        except sqlite3.OperationalError:  # there is none yet
            return [(0,)]

    def step_times(self) -> tuple[list[float], list[float]]:
        """Of the steps in which a worker joined or left, and of the others; without the first two, in which PyTorch
        warms up."""
        ends = self.query(f"SELECT trained_at_s FROM batches WHERE step <= {self.last_step} ORDER BY step")
        lives = [at for (at,) in self.query(LIFE)]
        busy, quiet = [], []
        for (began,), (ended,) in list(zip(ends, ends[1:], strict=False))[1:]:
            (busy if any(began - 1 <= at <= ended for at in lives) else quiet).append(ended - began)
        return busy, quiet

    def check(self, *, disturbed: bool) -> None:
        self.problems += [f"audit: {breach}" for breach in audit(self.run_dir)]
        time.sleep(5)
        if left := [entry for entry in self.seen | set(self.roster()) if is_running(replace(entry, host=this_host()))]:
            self.problems.append(f"left behind: {left}")
        out = (self.run_dir / "run.log").read_text()
        deadline_s = WeightsConfig().timeout_s
        late = [line for line in read_metrics(self.run_dir) if line.get("controller/publish_s", 0) > deadline_s]
        self.problems += [f"version {line['step']} took {line['controller/publish_s']:.1f} s" for line in late]
        if "gave no answer in" in out:
            self.problems.append("an end was killed at the deadline of a transfer")
        if not disturbed:
            if self.query(LOST)[0][0]:
                self.problems.append("leases are lost though nobody died")
            if "did not arrive" in out:
                self.problems.append("a version did not arrive though nobody died")
            if not read_metrics(self.run_dir)[-1].get("eval/accuracy", 0) >= MIN_ACCURACY:
                self.problems.append(f"the accuracy is below {MIN_ACCURACY}")

    def check_tokens(self) -> None:
        """Of the newest step: each is in one class."""
        tokens, line = self.tokens(), read_metrics(self.run_dir)[-1]
        if missing := int(line["rollout/tokens"]) - sum(tokens.values()):
            self.problems.append(f"{missing} sampled tokens are in no class: {tokens}")
        if wrong := {name: tokens[name] for name in NEVER if tokens[name]}:
            self.problems.append(f"tokens that nothing explains: {wrong}")
        deaths = self.done["SIGKILL"] + self.done["SIGSTOP"] + self.done["a node loses its power"]
        if tokens["lost"] and not deaths:
            self.problems.append(f"{tokens['lost']} tokens are lost though nobody died")
        print(f"tokens by class, of {sum(tokens.values()):,}: {json.dumps(tokens)}", flush=True)

    def tokens(self) -> dict[str, int]:
        line = read_metrics(self.run_dir)[-1]
        return {name: int(line[f"replay/tokens_{name}"]) for name in CLASSES}

    def figures(self) -> dict[str, object]:
        lines, (busy, quiet) = read_metrics(self.run_dir), self.step_times()
        steps = [line for line in lines if "time/step_s" in line]
        kinds = self.query("SELECT kind, COUNT(*) FROM events WHERE kind LIKE 'worker%' GROUP BY kind")
        return {
            **self.done,
            **{str(kind): count for kind, *[count] in kinds},
            "steps": int(lines[-1]["step"]),
            "s a step, median": round(statistics.median(busy + quiet), 2),
            "s a step with a join or leave, median and max": [round(of(busy), 2) for of in (statistics.median, max)]
            if busy
            else [],
            "s a step without, median and max": [round(of(quiet), 2) for of in (statistics.median, max)]
            if quiet
            else [],
            "s to publish, median and max": [
                round(of([line["controller/publish_s"] for line in steps]), 2) for of in (statistics.median, max)
            ],
            "leases lost": self.query(LOST)[0][0],
            "leases handed back": self.query(DRAINED)[0][0],
            "staleness max": max(line["replay/staleness_max"] for line in steps),
            "accuracy": lines[-1].get("eval/accuracy"),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--scenes", help="numbers of workers, such as 1,4,2, instead of minutes")
    parser.add_argument("--pause", type=float, nargs=2, default=PAUSE_S, help="seconds between two things")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=Path("runs/elastic"))
    args = parser.parse_args()
    args.dir.parent.mkdir(parents=True, exist_ok=True)
    scenes = [int(number) for number in args.scenes.split(",")] if args.scenes else []
    with nullcontext() if scenes else nodes(*NODES, head_cpus=0) as cluster:
        run = ElasticRun(args.dir.absolute(), args.seed, 36 if scenes else 100_000, cluster)
        run.play(scenes) if scenes else run.disturb(args.minutes, args.pause)
        run.check(disturbed=not scenes)
    print(json.dumps(run.figures(), indent=2))
    for problem in run.problems:
        print(f"problem: {problem}")
    return 1 if run.problems else 0


if __name__ == "__main__":
    sys.exit(main())
