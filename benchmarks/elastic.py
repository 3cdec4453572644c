"""Workers that come and go, under a run that trains: `python benchmarks/elastic.py [--minutes 10] [--scenes 1,4,2]`.

With `--minutes` the quickstart runs over two stand-in nodes (raylets on this machine; the launch is on a third), and
something happens to a worker every 4 to 13 s (`--pause`) from the first step on, at random: the run is scaled to
another number, one that lives or is being started is sent SIGTERM, SIGKILL, or SIGSTOP (and SIGCONT after 1 to 40 s).
At a third of the time the node that has only workers loses its power, and another node comes. At the end the run is
stopped by Ctrl-C, and a last launch trains one more step. With `--scenes` it runs without nodes, is scaled to each of
these numbers in turn, a third of its steps each, and trains its 36 steps. It evaluates at both ends alone then, since
an evaluation takes the slots for a while, and the wait for it would count as one for a worker that joins just then.
Each bar below is printed with `pass` or `FAIL` and what is against it; the exit code is 1 if one fails.

Printed, too, are the steps' times: those that waited because for a while nobody could sample, those of the others in
which a worker joined, left or was being started, and the rest (`worker_lives`). Of each: what the learner waited for,
and for how long it had no core: that is no wait for anybody, but is longer the more processes share the cores. At last
the times of the publishes, and the tokens of each class.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from asyncdapo.controller.process.roster import FILE_NAME, Entry, is_running, read, this_host
from asyncdapo.controller.process.wanted_workers import ask_for
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.metrics.verdict.window import FATES
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.weights.config import WeightsConfig
from benchmarks.worker_lives import Span, nobody, parts, train_steps
from tests.controller.nodes import Nodes, node_of, nodes

MOST = 4
"""Workers."""
PAUSE_S = (4.0, 13.0)
PER_MINUTE = 6
"""Things that happen, at least."""
STOPPED_S = (1.0, 40.0)
"""Above 30 s a stopped worker counts as lost."""
MIN_ACCURACY = 0.93
MOST_LONGER = 2
KINDS = {
    "moved": "a step with a join or leave",
    "alone": "a step that waited for nobody alive",
    "quiet": "a step without either",
}
"""Of `worker_lives`."""
CLASSES = (*FATES, "held", "in_flight", "probe")
"""What becomes of sampled tokens."""
NEVER = ("failed", "undone", "surplus")
"""Of these, while neither learner nor replay dies, and no verifier fails."""
NODES = ("node-a", "node-b")
NEW_NODE = "node-c"
ENDED = "the run ends when it is asked to, and the same command resumes it"
AUDIT = "no group is lost, doubled or stale: audit is clean before each thing that happens, and at the end"
LEFT = "no process is left behind"
PUBLISHED = "each version is published within weights.timeout_s, its retries included, and no end is killed in it"
TOKENS = (
    "each sampled token is in one class of replay/tokens_…, none in failed, undone or surplus, and lost or late"
    " ones only after a SIGKILL, a SIGSTOP or the loss of a node"
)
RATE = f"{PER_MINUTE} things or more happen a minute, one node is removed and another one added"
WAITED = "in no step with a join or a leave does the learner wait for longer than a median step takes, whatever for"
LONG = f"no step with a join or a leave takes over {MOST_LONGER} times the median"
NO_LOSS = "no lease is lost, and no version misses a worker"
ACCURACY = f"the sampled accuracy is {MIN_ACCURACY} or more"
BOTH = (ENDED, AUDIT, LEFT, PUBLISHED)
DISTURBED, SCENES = (*BOTH, TOKENS, RATE), (*BOTH, WAITED, LONG, NO_LOSS, ACCURACY)
"""The bars."""
LOST = "SELECT COUNT(*) FROM leases WHERE outcome = 'lost'"
WITHDRAWN = "SELECT reason, COUNT(*) FROM leases WHERE outcome = 'withdrawn' GROUP BY reason"


@dataclass(frozen=True)
class Stop:
    """A worker that was sent SIGSTOP."""

    entry: Entry
    began_s: float
    until_s: float
    """When it is sent SIGCONT, or was, or has ended: `over`."""
    over: bool = False


class ElasticRun:
    """One run directory, the launch that works on it, and what was done to its workers."""

    def __init__(self, run_dir: Path, seed: int, steps: int, cluster: Nodes | None) -> None:
        """`cluster`: the run joins it; None for a Ray of its own."""
        self.run_dir, self.random, self.steps, self.cluster = run_dir, random.Random(seed), steps, cluster
        self.done: Counter[str] = Counter()
        self.against: defaultdict[str, list[str]] = defaultdict(list)
        """By bar."""
        self.stopped: list[Stop] = []
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
        keys.append(f"controller.ray_address={self.cluster.address}" if self.cluster else "eval.every=0")
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
                self.roster()
                time.sleep(0.5)
        self.process.wait(600)

    def disturb(self, minutes: float, pause_s: Sequence[float]) -> None:
        """One thing after the other, for so long; then let the run end."""
        while self.process.poll() is None and not self.num_steps():
            time.sleep(0.5)
        began = due = time.monotonic()
        events = [(20 * minutes, self.lose_a_node), (20 * minutes + 20, self.add_a_node)]
        while (due := due + self.random.uniform(*pause_s)) < began + 60 * minutes and self.process.poll() is None:
            while time.monotonic() < due:
                self.roster()
                self.wake_up()
                time.sleep(0.2)
            if events and due > began + events[0][0]:
                events.pop(0)[1]()
            else:
                self.do_something()
        self.wake_up(everyone=True)
        if self.process.poll() is not None:
            self.against[ENDED].append(f"it ended by itself with exit code {self.process.returncode}")
        if (num := self.done.total()) < PER_MINUTE * minutes or events:
            self.against[RATE].append(f"{num} in {minutes:g} minutes, of the nodes {2 - len(events)} of 2")
        self.check_tokens()
        self.last_step = self.num_steps()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        if (code := self.launch(self.num_steps() + 1).wait(300)) != 0:
            self.against[ENDED].append(f"the last launch ended with exit code {code}")

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
        if not (self.run_dir / FILE_NAME).exists():
            return []
        entries = read(self.run_dir)
        self.seen |= set(entries)
        return entries

    def say(self, what: str, said: str) -> None:
        self.done[what] += 1
        print(f"{time.strftime('%H:%M:%S')}  {said}, after step {self.num_steps()}", flush=True)

    def do_something(self) -> None:
        self.audit()
        what = self.random.choice(("scale", "scale", "SIGTERM", "SIGKILL", "SIGSTOP"))
        workers = [entry for entry in self.roster() if entry.role == "rollout"]
        if what == "scale" or not workers:
            num_workers = self.random.randint(1, MOST)
            ask_for(self.run_dir, num_workers)
            self.say("scale", f"scaled to {num_workers}")
            return
        victim = self.random.choice(workers)
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.Signals[what])
        if what == "SIGSTOP":
            self.stopped.append(Stop(victim, time.time(), time.time() + self.random.uniform(*STOPPED_S)))
        self.say(what, f"{what} to {victim.name}")

    def audit(self) -> None:
        self.against[AUDIT] += audit(self.run_dir)

    def wake_up(self, *, everyone: bool = False) -> None:
        """Those whose time has come."""
        now = time.time()
        for number, stop in enumerate(self.stopped):
            if stop.over:
                continue
            if everyone or stop.until_s <= now:
                with suppress(ProcessLookupError):
                    os.kill(stop.entry.pid, signal.SIGCONT)
            elif is_here(stop.entry):
                continue
            self.stopped[number] = replace(stop, until_s=now, over=True)

    def num_steps(self) -> int:
        return self.query("SELECT COALESCE(MAX(step), 0) FROM batches")[0][0]

    def query(self, sql: str) -> list[tuple]:
        try:
            with closing(sqlite3.connect(self.run_dir / "ledger.db", timeout=20)) as ledger:
                return ledger.execute(sql).fetchall()
        except sqlite3.OperationalError:  # there is none yet
            return [(0,)]

    def check(self, *, disturbed: bool) -> None:
        self.audit()
        time.sleep(5)
        self.against[LEFT] += [str(entry) for entry in self.seen | set(self.roster()) if is_here(entry)]
        deadline_s = WeightsConfig().timeout_s
        late = [line for line in read_metrics(self.run_dir) if line.get("controller/publish_s", 0) > deadline_s]
        self.against[PUBLISHED] += [f"version {line['step']}: {line['controller/publish_s']:.1f} s" for line in late]
        out = (self.run_dir / "run.log").read_text()
        if "gave no answer in" in out:
            self.against[PUBLISHED].append("an end was killed at its deadline")
        if disturbed:
            return
        if lost := self.query(LOST)[0][0]:
            self.against[NO_LOSS].append(f"{lost} leases")
        if "did not arrive" in out:
            self.against[NO_LOSS].append("a version did not arrive")
        accuracy = read_metrics(self.run_dir)[-1].get("eval/accuracy", 0)
        if not accuracy >= MIN_ACCURACY:
            self.against[ACCURACY].append(str(accuracy))
        steps = self.steps_by_part()
        median_s = statistics.median(step["whole"] for step in sum(steps.values(), []))
        for bar, part, times in ((WAITED, "waiting", 1), (LONG, "whole", MOST_LONGER)):
            if (most := max((step[part] for step in steps["moved"]), default=0)) > times * median_s:
                self.against[bar].append(f"{most:.1f} s")

    def check_tokens(self) -> None:
        """Of the newest step: each is in one class."""
        tokens, line, against = self.tokens(), read_metrics(self.run_dir)[-1], self.against[TOKENS]
        if missing := int(line["rollout/tokens"]) - sum(tokens.values()):
            against.append(f"{missing} are in no class")
        against += [f"{tokens[name]} {name}" for name in NEVER if tokens[name]]
        deaths = self.done["SIGKILL"] + self.done["SIGSTOP"] + self.done["a node loses its power"]
        if not deaths:
            against += [f"{tokens[name]} {name} though nobody died" for name in ("lost", "late") if tokens[name]]
        print(f"tokens by class, of {sum(tokens.values()):,}: {json.dumps(tokens)}", flush=True)

    def tokens(self) -> dict[str, int]:
        line = read_metrics(self.run_dir)[-1]
        return {name: int(line[f"replay/tokens_{name}"]) for name in CLASSES}

    def stops(self) -> list[Span]:
        return [Span(stop.entry.index, stop.began_s, stop.until_s) for stop in self.stopped]

    def steps_by_part(self) -> dict[str, list[dict[str, float]]]:
        """Seconds of each step by part, and the steps by kind (see `worker_lives`)."""
        lines = {int(line["step"]): line for line in read_metrics(self.run_dir)}
        with closing(sqlite3.connect(self.run_dir / "ledger.db", timeout=20)) as ledger:
            starts = [(entry.index, entry.started) for entry in self.seen if entry.role == "rollout"]
            steps = train_steps(ledger, starts, self.stops(), self.last_step)
        return {kind: [parts(step, lines) for step in steps if step.kind == kind] for kind in KINDS}

    def empty_seconds(self) -> list[float]:
        """Of each time in which nobody could sample."""
        with closing(sqlite3.connect(self.run_dir / "ledger.db", timeout=20)) as ledger:
            return [gap.ended_s - gap.began_s for gap in nobody(ledger, self.stops(), self.last_step)]

    def figures(self) -> dict[str, object]:
        lines, kinds_of_steps = read_metrics(self.run_dir), self.steps_by_part()
        steps = [line for line in lines if "time/step_s" in line]
        kinds = self.query("SELECT kind, COUNT(*) FROM events WHERE kind LIKE 'worker%' GROUP BY kind")
        return {
            **self.done,
            "things that happened": self.done.total(),
            **{str(kind): count for kind, *[count] in kinds},
            "steps": int(lines[-1]["step"]),
            "s a step": by_part(sum(kinds_of_steps.values(), []))["whole"],
            **{f"s {KINDS[kind]}": by_part(steps) for kind, steps in kinds_of_steps.items()},
            "s in which nobody could sample": spread(self.empty_seconds()),
            "s to publish": spread([line["controller/publish_s"] for line in steps]),
            "leases lost": self.query(LOST)[0][0],
            "leases withdrawn, by reason": dict(self.query(WITHDRAWN)),
            "staleness max": max(line["replay/staleness_max"] for line in steps),
            "accuracy": lines[-1].get("eval/accuracy"),
        }


def is_here(entry: Entry) -> bool:
    """Whether it runs, on whichever stand-in node."""
    return is_running(replace(entry, host=this_host()))


def spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    return f"{len(seconds)}: median {statistics.median(seconds):.2f}, most {max(seconds):.2f}"


def by_part(steps: Sequence[Mapping[str, float]]) -> dict[str, str]:
    return {part: spread([step[part] for step in steps]) for part in (steps[0] if steps else ())}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--scenes", help="numbers of workers, such as 1,4,2, instead of minutes")
    parser.add_argument("--pause", type=float, nargs=2, default=PAUSE_S, help="seconds between two things")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=Path("runs/elastic"))
    args = parser.parse_args()
    if args.dir.exists():
        parser.error(f"--dir {args.dir}: holds a run, whose past would count (delete it, or give another)")
    args.dir.parent.mkdir(parents=True, exist_ok=True)
    scenes = [int(number) for number in args.scenes.split(",")] if args.scenes else []
    with nullcontext() if scenes else nodes(*NODES, head_cpus=0) as cluster:
        run = ElasticRun(args.dir.absolute(), args.seed, 36 if scenes else 100_000, cluster)
        run.play(scenes) if scenes else run.disturb(args.minutes, args.pause)
        run.check(disturbed=not scenes)
    print(json.dumps(run.figures(), indent=2))
    for bar in SCENES if scenes else DISTURBED:
        print("; ".join([f"{'FAIL' if run.against[bar] else 'pass'}  {bar}", *run.against[bar]]))
    return 1 if any(run.against.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
