"""The next step begins as soon as its batch is there: the same weights, and none that changes before its command."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from asyncdapo.errors import RunError
from asyncdapo.learner.batches.prepared import Prepared
from asyncdapo.learner.step.learner import Learner
from asyncdapo.learner.step.step_thread import StepThread
from tests.learner.tiny import make_batch, make_learner, payloads_of, save_tiny_llama

PATIENCE_S = 20


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def prepared(learner: Learner, step: int) -> Prepared:
    batch, payload = make_batch(step, seed=step)
    return learner.prepare(batch, payloads_of(batch, payload))


class Steps:
    """A real learner and its thread, told by the numbers of steps."""

    def __init__(self, path: str, **keys) -> None:
        self.learner = make_learner(path, **keys)
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.noted: list[int] = []
        """The step of each pass with gradient."""
        self.begun = {step: threading.Event() for step in range(1, 5)}
        begin = self.learner.begin

        def noted_begin(one: Prepared, note) -> None:
            begin(one, note)
            self.begun[one.batch.step].set()

        self.learner.begin = noted_begin
        self.steps = StepThread(self.learner, self.thread, self.observe)

    @contextmanager
    def observe(self, batch):
        yield lambda rows, logprobs: self.noted.append(batch.step)

    async def train(self, step: int, coming: int = 0) -> dict[str, float]:
        """Train this step; then begin `coming`, and wait until that is over."""

        async def come() -> Prepared:
            return prepared(self.learner, coming)

        metrics = await self.steps.train(prepared(self.learner, step), come() if coming else None)
        if coming:
            await asyncio.to_thread(self.begun[coming].wait, PATIENCE_S)
        return metrics


def trained(path: str, num_steps: int) -> Learner:
    """One after the other."""
    learner = make_learner(path)
    for step in range(1, num_steps + 1):
        learner.train(prepared(learner, step))
    return learner


def run(body: Callable) -> None:
    asyncio.run(body())


def test_the_next_step_begins_before_its_command_and_comes_to_the_same_weights(path):
    async def body() -> None:
        steps = Steps(path)
        await steps.train(1, coming=2)
        assert steps.begun[2].is_set()
        assert steps.noted[0] == 1
        assert steps.noted[-1] == 2
        ahead = [(await steps.train(2, coming=3))["learner/ahead_s"]]
        metrics = await steps.train(3)
        ahead.append(metrics["learner/ahead_s"])
        assert all(seconds > 0 for seconds in ahead)
        assert ahead[-1] < metrics["learner/train_s"]
        assert metrics["learner/version"] == 2
        assert steps.learner.digest() == trained(path, 3).digest()
        assert steps.noted == sorted(steps.noted)

    run(body)


def test_until_the_command_others_find_the_version_before(path):
    """What is sent, a checkpoint, and log-probs that are compared with an engine's."""

    async def body() -> None:
        steps = Steps(path)
        await steps.train(1, coming=2)
        reference, learner = trained(path, 1), steps.learner
        assert learner.version == 1
        assert learner.digest() == reference.digest()
        of_reference = reference.copy()
        for part, expected in zip(learner.copy()._parts, of_reference._parts, strict=True):
            assert torch.equal(part.content, expected.content), part.file
        pairs = [(np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32), None)]
        logprobs = await asyncio.wrap_future(steps.thread.submit(learner.logprobs, 1, pairs))
        assert logprobs[0].tolist() == reference.logprobs(1, pairs)[0].tolist()
        await steps.train(2)
        await steps.train(3)
        assert learner.digest() == trained(path, 3).digest(), "what was asked meanwhile changes nothing"

    run(body)


def test_a_batch_that_comes_with_its_command_is_begun_once(path):
    async def body() -> None:
        steps, never = Steps(path), asyncio.Event()

        async def come() -> Prepared:
            await never.wait()
            raise AssertionError("the command was first")

        await steps.steps.train(prepared(steps.learner, 1), come())
        assert (await steps.train(2))["learner/ahead_s"] == 0
        never.set()
        await asyncio.sleep(0)
        assert steps.learner.digest() == trained(path, 2).digest()

    run(body)


def test_without_a_next_batch_nothing_begins(path):
    async def body() -> None:
        steps = Steps(path)

        async def come() -> None:
            return None

        await steps.steps.train(prepared(steps.learner, 1), come())
        await asyncio.sleep(0)
        assert set(steps.noted) == {1}

    run(body)


def test_an_error_of_the_beginning_is_raised_by_the_command(path):
    async def body() -> None:
        steps = Steps(path)

        async def come() -> Prepared:
            return prepared(steps.learner, 3)

        await steps.steps.train(prepared(steps.learner, 1), come())
        await asyncio.sleep(0.01)
        with pytest.raises(RunError, match="batch 3 reached a learner whose weights are of version 1"):
            await steps.train(3)

    run(body)


def test_the_weights_do_not_change_while_they_are_read(path):
    async def body() -> None:
        steps = Steps(path)
        before = steps.learner.digest()
        with steps.learner.in_use:
            training = asyncio.create_task(steps.train(1))
            await asyncio.to_thread(steps.begun[1].wait, PATIENCE_S)
            await asyncio.sleep(0.05)
            assert not training.done()
            assert steps.learner.digest() == before
        await training
        assert steps.learner.digest() != before

    run(body)
