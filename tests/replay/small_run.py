"""A run of a few groups without sockets: the real core, journal and accounts, driven by hand.

`finished_run` leaves a run directory that audit finds sound and that holds every kind of row; that of `resumed_run` has
four branches.
"""

import json
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from asyncdapo.messages import Completion, Context, Group, Hello, Lease, Prompt
from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.recovery import Recovered
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.ledger import open_ledger
from asyncdapo.replay.server.arrivals import arrival
from asyncdapo.replay.server.dispatch import Dispatch
from asyncdapo.replay.server.sessions import Sessions
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.shares import CutWanted
from asyncdapo.transport.payload import PartialCompletion, PartialGroup, Payload, checksum, partial_checksum

GROUP_SIZE = 2
CONFIG = """
replay: {prompts_per_step: 2, run_ahead: 1.0, max_staleness: 1}
rollout: {group_size: 2}
prompts: {max_attempts: 3}
filter: {mode: MODE, on_limit: raise}
"""


def prompt_at(prompt_id):
    return Prompt(
        prompt_id=prompt_id,
        epoch=prompt_id // 100,
        source="train",
        row=prompt_id % 100,
        token_ids=[5, 6, 7],
        answer="8",
    )


def make_partial(lease_id, completions, *, handed_back=False):
    """Header and frames. `completions`: (versions, finish reason) of each; tokens are numbered, log-probs are -0.25."""
    completions = [PartialCompletion(*completion) for completion in completions]
    num_tokens = sum(completion.num_tokens for completion in completions)
    frames = np.arange(num_tokens, dtype="<i4").tobytes(), np.full(num_tokens, -0.25, "<f4").tobytes()
    taken = partial_checksum(completions, frames)
    return PartialGroup(lease_id=lease_id, completions=completions, checksum=taken, handed_back=handed_back), frames


def make_group(
    lease: Lease, *, worker=0, accs=(1.0, 0.0), versions=((0, 4),), finish="stop", loss=1, **own
) -> tuple[Group, Payload]:
    """A sound answer to a lease: each completion has these versions, its reward is ±1. `loss`: whether its tokens bear
    any. `own`: further metrics, a number for each completion."""
    num_tokens = sum(count for _, count in versions)
    total = num_tokens * len(accs)
    token_ids = np.arange(total, dtype=np.int32) + lease.lease_id % 1000

    def crc(index: int) -> int:
        return checksum([*lease.prompt.token_ids, *token_ids[index * num_tokens :][:num_tokens]], 0)

    completions = [
        Completion(
            contexts=[Context.of_turn([tuple(run) for run in versions], [(loss, num_tokens)], crc(index))],
            finish_reason=finish,
            reward=2 * acc - 1,
            metrics={"acc": acc, "score": 2 * acc - 1, "seq_reward": 2 * acc - 1}
            | {name: numbers[index] for name, numbers in own.items()},
        )
        for index, acc in enumerate(accs)
    ]
    group = Group(
        prompt_id=lease.prompt.prompt_id,
        lease_id=lease.lease_id,
        branch=lease.branch,
        attempt=lease.attempt,
        worker=worker,
        num_prompt_tokens=len(lease.prompt.token_ids),
        completions=completions,
        generate_s=0.5,
    )
    payload = Payload(
        np.array(lease.prompt.token_ids, np.int32),
        token_ids,
        np.linspace(-2, -0.5, total, dtype=np.float32),
    )
    return group, payload


def _make_state(recovered: Recovered, *, journal: Journal, solved, **settings) -> ReplayState:
    """`solved`: makes an empty record of solved rows, which knows the journal's groups then."""
    rows = solved() if solved else None
    for prompt_id, right in journal.solved_shares() if rows else ():
        rows.note(prompt_id, right)
    return ReplayState(recovered=recovered, solved=rows, **settings)


class SmallRun:
    """The dispatch with a hand on every event."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_payloads=False,
        segment_bytes=1 << 20,
        filter=None,
        make_journal=Journal,
        solved=None,
        **replay,
    ):
        settings = {"prompts_per_step": 2, "run_ahead": 1.0, "max_staleness": 1} | replay
        self.config = ReplayConfig(**settings)
        self.journal = make_journal(run_dir, keep_payloads=keep_payloads, segment_bytes=segment_bytes)
        self.make_state = partial(
            _make_state,
            journal=self.journal,
            solved=solved,
            config=self.config,
            filter=filter or FilterConfig(),
            max_attempts=3,
            num_prompts=None,
        )
        self.sessions = Sessions(stall_ticks=10)
        server_settings = ServerSettings(replay=self.config, group_size=GROUP_SIZE, seed=1)
        self.dispatch = Dispatch(server_settings, self.make_state, self.journal, self.sessions, prompt_at)
        self.leases: dict[int, Lease] = {}
        self.lines: list[dict] = []

    @property
    def state(self):
        return self.dispatch.state

    def join(self, worker, session="first", version=0):
        hello = Hello(
            schema=2,
            worker=worker,
            session=session,
            loaded_version=version,
            branch=self.dispatch.branch,
            granted=0,
        )
        self.sessions.begin(f"peer-{worker}-{session}".encode(), hello)
        self.dispatch.apply(core.WorkerJoined(worker=worker, loaded_version=version), detail=session)

    def roll_back(self, step):
        """Back to the checkpoint of `step`, the lines of metrics too; worker 0 is there again with its weights."""
        self.dispatch.roll_back(step, "the learner died")
        self.lines = self.lines[:step]
        self.messages()
        self.join(0, session=f"branch {self.dispatch.branch}", version=step)

    def ready(self, worker, credits):
        """The leases that come of it."""
        before = set(self.leases)
        self.dispatch.apply(core.Ready(worker=worker, credits=credits))
        return [lease_id for lease_id in self.messages() if lease_id not in before]

    def messages(self):
        """Take what is to be sent; returns the ids of all leases seen so far."""
        while not self.dispatch.outgoing.empty():
            message = self.dispatch.outgoing.get_nowait().message
            if isinstance(message, Lease):
                self.leases[message.lease_id] = message
        return list(self.leases)

    def answers(self):
        """What the learner is told, made as it is sent."""
        return [self.dispatch.answers.get_nowait().make() for _ in range(self.dispatch.answers.qsize())]

    def answer(self, lease_id, **group):
        lease = self.sessions.leases.get(lease_id)
        arrived = make_group(self.leases[lease_id], worker=lease.worker if lease else 0, **group)
        self.dispatch.apply(arrival(arrived[0]), arrived=arrived)
        self.messages()

    def fill(self, worker, **group):
        """Answer the worker's leases, oldest first, until a batch is full."""
        self.ready(worker, 4)
        while self.state.next_batch.num_ready < 2:
            self.answer(self.running(worker)[0], **group)
            self.ready(worker, 4)

    def advance(self, worker, *steps):
        """Fill and train the batches of these steps, each of groups of the newest weights."""
        for step in steps:
            self.fill(worker, versions=((step - 1, 4),))
            self.train(step)

    def running(self, worker):
        """The worker's leases, oldest first."""
        return sorted(lease_id for lease_id, lease in self.sessions.leases.items() if lease.worker == worker)

    def train(self, step):
        self.dispatch.want_batch(b"learner", CutWanted(step=step))
        self.answers()
        metrics = self.dispatch.trained(step, {"learner/loss": 0.25})
        self.dispatch.apply(core.Published(version=step))
        for worker in self.state.leases.workers:
            self.dispatch.apply(core.WeightsLoaded(worker=worker, version=step))
        self.messages()
        self.lines.append({"step": step, **metrics})


def rows(run_dir: Path, query: str) -> list[dict]:
    """What the ledger answers."""
    with closing(open_ledger(run_dir)) as ledger:
        return [dict(row) for row in ledger.execute(query)]


def segments(run_dir: Path) -> list[int]:
    """The numbers of the payload segments that are there."""
    return sorted(int(path.stem) for path in (run_dir / "payloads").iterdir())


def write_files(run_dir: Path, lines, *, mode="filter"):
    (run_dir / "config.yaml").write_text(CONFIG.replace("MODE", mode))
    records = [{"step": 0, "eval/accuracy": 0.4}, *lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def trained_run(run_dir: Path, steps: int, **settings) -> SmallRun:
    """`steps` batches trained by worker 0, each on groups of the newest weights; the run continues."""
    run = SmallRun(run_dir, **settings)
    run.join(0)
    run.advance(0, *range(1, steps + 1))
    return run


def finished_run(run_dir: Path) -> Path:
    """Three steps, with a filtered, a stale, a late, a lost, a rejected and a failed group, and second attempts."""
    run = SmallRun(run_dir)
    for worker in range(3):
        run.join(worker)
    first, _ = run.ready(0, 2)
    [slow] = run.ready(2, 1)
    broken, *rest = run.ready(1, 3)
    run.dispatch.apply(core.SamplingBegan(lease_id=slow, version=0))
    run.dispatch.apply(core.LeaseLost(lease_id=broken, reason="rejected"), detail="broken")
    run.ready(1, 3)
    run.answer(first)
    run.answer(run.running(1)[0], accs=(1.0, 1.0))
    run.fill(0)
    run.train(1)
    run.dispatch.apply(core.LeaseFailed(lease_id=run.running(0)[0]), detail="ValueError")
    run.dispatch.apply(core.WorkerLost(worker=1))
    run.fill(0, versions=((0, 2), (1, 2)))
    run.train(2)
    run.answer(slow)
    run.fill(0, versions=((2, 4),))
    run.train(3)
    run.ready(0, 4)
    return end(run, run_dir)


def resumed_run(run_dir: Path) -> Path:
    """Four steps in four branches: from step 2 back to 1, later from step 3 back to 2, and at once once more."""
    run = SmallRun(run_dir)
    run.join(0)
    run.advance(0, 1, 2)
    run.ready(0, 4)
    run.answer(run.running(0)[0], versions=((2, 4),))
    run.roll_back(1)
    run.train(2)
    run.fill(0, versions=((2, 4),))
    run.train(3)
    run.roll_back(2)
    run.roll_back(2)
    run.train(3)
    run.fill(0, versions=((3, 4),))
    run.train(4)
    return end(run, run_dir)


def replaced_run(run_dir: Path) -> Path:
    """Three steps under `filter.mode: replace`: a batch of two kept groups, one of a kept group and its copy; then back
    to step 1, where the second is restored, and a third of a kept group and its copy."""
    run = SmallRun(run_dir, filter=FilterConfig(mode="replace"))
    run.join(0)
    run.fill(0)
    run.train(1)
    for step in (2, 3):
        run.ready(0, 4)
        kept, solved = run.running(0)[:2]
        run.answer(solved, accs=(1.0, 1.0), versions=((step - 1, 4),))
        run.answer(kept, versions=((step - 1, 4),))
        run.train(step)
        if step == 2:
            run.roll_back(1)
            run.train(2)
    return end(run, run_dir, mode="replace")


def end(run: SmallRun, run_dir: Path, *, mode="filter") -> Path:
    run.dispatch.apply(core.RunEnded())
    run.journal.close()
    write_files(run_dir, run.lines, mode=mode)
    return run_dir
