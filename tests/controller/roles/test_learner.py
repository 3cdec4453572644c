"""The process of the learner, with a real learner and a real socket: the next batch comes while one is trained."""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from asyncdapo.accounting.clock import SharedClock
from asyncdapo.accounting.names import LEARNER_STATES
from asyncdapo.config.config import load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.roles.base import ProcessSpec
from asyncdapo.controller.roles.learner import LearnerProcess, load_learner
from asyncdapo.errors import ConfigError, WeightsError
from asyncdapo.learner.batches import feed as feed_module
from asyncdapo.learner.batches.feed import read_share
from asyncdapo.learner.step import learner as learner_module
from asyncdapo.learner.step.ranks import ALONE, Ranks
from asyncdapo.replay.ledger.kept import learned_logprobs
from asyncdapo.shares import CutWanted, NoBatch
from asyncdapo.transport.sockets import Server
from tests.learner.tiny import make_batch, save_tiny_llama, stored

NUM_STEPS = 3
PATIENCE_S = 20


@asynccontextmanager
async def learner(path: str, run_dir: Path, questions: list[int], last: int = NUM_STEPS):
    """A process whose replay server has batches up to `last`, and then no more data."""
    devices = ["learner.device=cpu", "rollout.dtype=float32"]
    keys = [f"run.dir={run_dir}", f"run.steps={NUM_STEPS}", f"model.path={path}", *devices]
    config = load_config(find_config("quickstart"), keys)
    server = Server(CutWanted)
    batches = {step: stored(run_dir, *make_batch(step, seed=step)) for step in range(1, last + 1)}

    async def serve() -> None:
        while True:
            peer, wanted, _ = await server.receive()
            questions.append(wanted.step)
            if wanted.step > last:
                await server.send(peer, NoBatch(step=wanted.step, reason="the data is used up"))
            else:
                await server.send(peer, batches[wanted.step])

    spec = ProcessSpec(role="learner", config=config, keys=SimpleNamespace(client=None))
    process = await LearnerProcess.start(spec, server.address)
    await process.load(None)
    serving = asyncio.create_task(serve())
    try:
        yield process
    finally:
        serving.cancel()
        await process.batches.close()
        server.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def test_the_next_batch_is_prepared_before_the_train_step_ends_and_none_is_asked_for_past_the_last(path, tmp_path):
    questions: list[int] = []

    async def run() -> None:
        async with learner(path, tmp_path, questions) as process:
            finish, prepare = process.learner.finish, process.learner.prepare
            prepared: dict[int, threading.Event] = {step: threading.Event() for step in range(1, NUM_STEPS + 1)}

            def note(batch, payload):
                made = prepare(batch, payload)
                prepared[batch.step].set()
                return made

            def finish_when_the_next_one_is_there():
                step = process.learner.version + 1
                assert step == NUM_STEPS or prepared[step + 1].wait(PATIENCE_S), f"batch {step + 1} doesn't come"
                return finish()

            process.learner.prepare, process.learner.finish = note, finish_when_the_next_one_is_there
            for step in range(1, NUM_STEPS + 1):
                assert await process.take_batch(step) == ""
                if step > 1:
                    assert questions == list(range(1, step + 1)), "it was here already"
                await process.train_step()
            assert process.learner.version == NUM_STEPS

    asyncio.run(run())
    assert questions == [1, 2, 3]


def test_while_it_trains_it_waits_for_nobody_and_then_for_its_batch(path, tmp_path):
    async def run() -> None:
        questions: list[int] = []
        async with learner(path, tmp_path, questions) as process:
            waits: list[list[tuple[str, str]]] = []
            finish = process.learner.finish

            def look():
                waits.append([(wait.whom, wait.what) for wait in process.waits.open()])
                return finish()

            process.learner.finish = look
            await process.take_batch(1)
            await process.train_step()
            assert waits == [[("", "trains step 1")]]

    asyncio.run(run())


def test_who_reads_from_slow_storage_waits_for_nobody_and_has_its_batch(path, tmp_path, monkeypatch):
    """Nobody else could bring it: the replay server waits for this learner."""
    waits: list[list[tuple[str, str]]] = []

    async def run() -> None:
        async with learner(path, tmp_path, []) as process:

            def slow(*args):
                until = time.monotonic() + PATIENCE_S
                while [wait.whom for wait in process.waits.open()] != [""] and time.monotonic() < until:
                    time.sleep(0.001)
                waits.append([(wait.whom, wait.what) for wait in process.waits.open()])
                return read_share(*args)

            monkeypatch.setattr(feed_module, "read_share", slow)
            await process.take_batch(1)

    asyncio.run(run())
    assert waits == [[("", "reads and prepares batch 1")]]


def test_the_end_of_the_data_is_said_when_the_batch_is_wanted(path, tmp_path):
    async def run() -> None:
        questions: list[int] = []
        async with learner(path, tmp_path, questions, last=1) as process:
            assert await process.take_batch(1) == ""
            await process.train_step()
            assert await process.take_batch(2) == "the data is used up"
            assert questions == [1, 2]

    asyncio.run(run())


def test_the_next_gradient_is_computed_before_it_is_wanted_unless_other_ranks_have_to_keep_step(path, tmp_path):
    """Several ranks gather weights for a send and for a gradient: in one order, in one thread."""

    async def run(num_ranks: int) -> bool:
        async with learner(path, tmp_path, []) as process:
            process.ranks = Ranks(0, num_ranks)
            begin, begun = process.learner.begin, threading.Event()

            def note(one, note):
                begin(one, note)
                if one.batch.step == 2:
                    begun.set()

            process.learner.begin = note
            await process.take_batch(1)
            await process.train_step()
            is_begun = await asyncio.to_thread(begun.wait, PATIENCE_S if num_ranks == 1 else 0.2)
            assert process.learner.version == 1
            await process.take_batch(2)
            await process.train_step()
            assert process.learner.version == 2
            return is_begun

    assert asyncio.run(run(1))
    assert not asyncio.run(run(2))


def test_the_states_of_a_step_sum_to_the_time_since_the_step_before(path, tmp_path, monkeypatch):
    readings: list[float] = []
    ticks = count()

    def now() -> float:
        readings.append(float(next(ticks)))  # time advances by 1 at every reading
        return readings[-1]

    class TickingClock(SharedClock):
        def take(self) -> dict[str, float]:
            taken = super().take()
            taken_at.append(readings[-1])  # nothing looks meanwhile: the next step begins in this very thread
            return taken

    async def run() -> None:
        async with learner(path, tmp_path, []) as process:
            for step in range(1, NUM_STEPS + 1):
                await process.take_batch(step)
                metrics = await process.train_step()
                times = {state: metrics[f"learner/time/{state}_s"] for state in (*LEARNER_STATES, "other")}
                assert sum(times.values()) == taken_at[-1] - taken_at[-2]
                assert all(times[state] > 0 for state in ("gradient", "sum", "optimizer", "first_pass"))

    taken_at = [0.0]
    monkeypatch.setattr(learner_module, "SharedClock", partial(TickingClock, now=now))
    asyncio.run(run())


def test_weights_are_sent_as_the_version_that_they_are(path, tmp_path) -> None:
    async def body() -> None:
        async with learner(path, tmp_path, []) as process:
            process.sender = SimpleNamespace()
            with pytest.raises(WeightsError, match="version 1 was to be sent, the learner has 0"):
                await process.send_weights(1, branch=0)

    asyncio.run(body())


def test_a_group_that_takes_long_to_leave_holds_up_nothing_else(path, tmp_path) -> None:
    """As NCCL's does, which waits for the GPU."""
    left = threading.Event()

    class SlowGroup:
        def close(self) -> None:
            left.wait(PATIENCE_S)

    async def body() -> None:
        async with learner(path, tmp_path, []) as process:
            process.weight_group = SlowGroup()
            leaving = asyncio.create_task(process.abandon_workers())
            assert (await asyncio.wait_for(process.health(), PATIENCE_S)).progress
            assert not leaving.done()
            left.set()
            await leaving

    asyncio.run(body())


def test_a_model_that_no_preflight_saw_is_checked_when_it_is_loaded(tmp_path):
    rotation = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    path = save_tiny_llama(tmp_path / "model", rope_parameters=rotation)
    config = load_config(find_config("quickstart"), [f"run.dir={tmp_path}", f"model.path={path}", "learner.device=cpu"])
    with pytest.raises(ConfigError, match=r"model\.path: can't be trained: its rope_type is dynamic"):
        load_learner(config, ALONE, None)


def test_the_log_probs_of_the_first_groups_are_kept_as_they_were_trained_on(path, tmp_path):
    async def run() -> None:
        async with learner(path, tmp_path, []) as process:
            await process.take_batch(1)
            assert process.prepared is not None
            groups = process.prepared.batch.groups[: process.config.metrics.keep_samples]
            ends = np.cumsum([len(group.completions) for group in groups]).tolist()
            rows = [
                row for rows in process.prepared.rows for row in rows if row.index < ends[-1] and row.num_loss_tokens
            ]
            before = process.learner.logprobs(0, [(row.prompt_ids, row.token_ids, None) for row in rows])
            await process.train_step()
            found = learned_logprobs(tmp_path, 1)
            assert len(found) == len(rows) > 1
            for row, logprobs in zip(rows, before, strict=True):
                place = bisect(ends, row.index)
                sample = row.index - (ends[place - 1] if place else 0)
                kept = found[f"{groups[place].lease_id}.{sample}.{row.context}"]
                assert np.array_equal(np.isnan(kept), ~row.loss_mask)
                assert np.allclose(kept[row.loss_mask], logprobs[row.loss_mask], atol=1e-5)

    asyncio.run(run())


def test_a_rank_that_does_not_see_the_payloads_of_its_run_says_so_before_training(tmp_path):
    keys = [f"run.dir={tmp_path}", "learner.device=cpu"]
    spec = ProcessSpec(role="learner", index=3, config=load_config(find_config("quickstart"), keys), keys=None)
    said = rf"run\.dir: has to be on storage that all nodes share: learner-3 reads its tokens from {tmp_path}/payloads"
    with pytest.raises(ConfigError, match=said):
        asyncio.run(LearnerProcess.start(spec, "tcp://127.0.0.1:1"))
