"""Parity: wrong engines are caught, sound ones are not, and who can't take part is left out and named."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from asyncdapo.controller.fleet.process import ProcessDied
from asyncdapo.controller.fleet.ranks import LearnerRanks
from asyncdapo.controller.loop import logprob_mismatch as parity
from asyncdapo.controller.loop.logprob_mismatch import Differences, LogprobMismatch
from asyncdapo.errors import EngineError, RunError
from asyncdapo.eval_messages import Sampling
from asyncdapo.learner.step.learner import Learner
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Request, Sample
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine
from tests.controller.fakes import Pick, picked
from tests.controller.runs import launch
from tests.learner.tiny import VOCAB_SIZE, make_batch, make_learner, save_tiny_llama, train

CONFIG = RolloutConfig(slots=4, max_response_length=16, temperature=0.7, device="cpu", dtype="float32")
PROMPTS = [np.random.default_rng(index).integers(3, VOCAB_SIZE, 3 + index).tolist() for index in range(6)]

Probe = Callable[[list[list[int]], list[int], Sampling], Any]


class FakeProcess:
    """A process that answers the one command `probe`."""

    def __init__(self, name: str, probe: Probe, up: bool = True) -> None:
        self.name, self.up, self._probe = name, asyncio.Event(), probe
        if up:
            self.up.set()

    def end(self) -> None:
        """It is dead already."""

    async def call(self, pick: Pick, *args: Any) -> Any:
        assert picked(self.name, pick, *args) == "probe"
        return await self._probe(*args)


class Publishing:
    """A turn that somebody may have, and workers."""

    def __init__(self) -> None:
        self.turn, self.workers = asyncio.Lock(), []

    def reachable(self) -> Sequence[FakeProcess]:
        return [worker for worker in self.workers if worker.up.is_set()]


def made(
    workers: Sequence[FakeProcess], learner: Probe, publishing: Publishing | None = None, **config: Any
) -> LogprobMismatch:
    """`learner` answers `probe(version, pairs)`."""
    one, publishing = FakeProcess("learner", learner), publishing or Publishing()
    publishing.workers = workers
    return LogprobMismatch(replace(CONFIG, **config), LearnerRanks([one]), publishing, PROMPTS, seed=0)


# ------------------------------------------------------------------------------------------- real engines and learners


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def trained_learner(path: str) -> Learner:
    """With version 1, which is visibly another policy than version 0."""
    learner = make_learner(path, temperature=CONFIG.temperature, lr=1e-2)
    train(learner, *make_batch(1))
    return learner


@asynccontextmanager
async def serving(path: str, spoil: Callable[[Sampling], Sampling] = lambda sampling: sampling):
    """The engine, and the worker that it makes; `spoil` changes how it draws."""
    engine = TorchEngine(path, CONFIG, max_prompt_length=16)
    await engine.start()

    async def probe(prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Sample]:
        requests = [
            Request(prompt_ids=ids, seeds=[seed], sampling=spoil(sampling))
            for ids, seed in zip(prompts, seeds, strict=True)
        ]
        return [sample for [sample] in await asyncio.gather(*map(engine.generate, requests))]

    try:
        yield engine, FakeProcess("rollout-0", probe)
    finally:
        await engine.stop()


def answers_of(learner: Learner) -> Probe:
    async def probe(version: int, pairs: list) -> list[np.ndarray]:
        return learner.logprobs(version, pairs)

    return probe


def test_an_engine_with_the_learners_weights_agrees_with_it(path):
    async def main() -> dict[str, float]:
        learner = trained_learner(path)
        async with serving(path) as (engine, worker):
            await engine.load_weights(1, {name: weight.clone() for name, weight in learner.weights().items()})
            return await made([worker], answers_of(learner)).compare(1)

    metrics = asyncio.run(main())
    assert set(metrics) == {"rollout/parity_mean", "rollout/parity_p99", "rollout/parity_max"}
    assert 0 < metrics["rollout/parity_mean"] < metrics["rollout/parity_max"] < 1e-4


def older_version(name: str, learner: Learner, path: str) -> Any:
    return make_learner(path).weights()[name]


def one_layer_off(name: str, learner: Learner, path: str) -> Any:
    weight = learner.weights()[name]
    return weight * 1.5 if name == "model.layers.1.mlp.down_proj.weight" else weight


@pytest.mark.parametrize("wrong", [older_version, one_layer_off])
def test_an_engine_with_other_weights_than_it_says_ends_the_run(path, wrong):
    async def main() -> None:
        learner = trained_learner(path)
        async with serving(path) as (engine, worker):
            await engine.load_weights(1, {name: wrong(name, learner, path).clone() for name in learner.weights()})
            await made([worker], answers_of(learner)).compare(1)

    said = (
        r"log-probs of version 1, rollout-0 against the learner: mean 0\.\d+, p99 [\d.]+, max [\d.]+ nats over \d+ "
        r"tokens; the mean is above rollout.parity_stop 0.05: what it samples is not the policy that is trained"
    )
    with pytest.raises(RunError, match=said):
        asyncio.run(main())


def test_an_engine_that_samples_at_another_temperature_ends_the_run(path):
    async def main() -> None:
        async with serving(path, lambda sampling: msgspec.structs.replace(sampling, temperature=1.0)) as (_, worker):
            await made([worker], answers_of(make_learner(path, temperature=CONFIG.temperature))).compare(0)

    with pytest.raises(RunError, match=r"rollout-0 against the learner.*above rollout.parity_stop"):
        asyncio.run(main())


# ----------------------------------------------------------------------------------------------- made-up differences


@pytest.fixture(autouse=True)
def only_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """Unless a test asks for more: a reporter of an earlier test may have the stages say more."""
    caplog.set_level(logging.WARNING, "rollout")


def sampling_with(version: int = 3, apart: float = 0.0) -> Probe:
    """Log-probs of −1, and this far from the learner's."""

    async def probe(prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Sample]:
        token_ids, logprobs = np.arange(4, dtype=np.int32), np.full(4, -1 + apart, np.float32)
        one = Sample(token_ids=token_ids, logprobs=logprobs, versions=[(version, 4)], finish_reason="length")
        return [one] * len(prompts)

    return probe


async def minus_one(version: int, pairs: list) -> list[np.ndarray]:
    return [np.full(len(token_ids), -1, np.float32) for _, token_ids, _ in pairs]


def test_the_metrics_are_those_of_the_worst_worker(caplog):
    caplog.set_level(logging.INFO, "rollout")
    workers = [
        FakeProcess("rollout-0", sampling_with(apart=1e-4)),
        FakeProcess("rollout-1", sampling_with(apart=-3e-4)),
    ]
    metrics = asyncio.run(made(workers, minus_one).compare(3))
    assert metrics == {f"rollout/parity_{of}": pytest.approx(3e-4, rel=1e-2) for of in ("mean", "p99", "max")}
    assert [text.partition(":")[0] for text in caplog.messages] == [
        "log-probs of version 3, rollout-0 against the learner",
        "log-probs of version 3, rollout-1 against the learner",
    ]


def test_the_warning_is_said_when_it_begins_and_again_only_after_it_had_ended(caplog):
    async def main() -> list[int]:
        worker = FakeProcess("rollout-0", sampling_with())
        probes, said = made([worker], minus_one, parity_warn=0.01, parity_stop=1.0), []
        for apart in (0.0, 0.02, 0.03, 0.0, 0.02):
            worker._probe = sampling_with(apart=apart)
            await probes.compare(3)
            said.append(len(caplog.messages))
        return said

    assert asyncio.run(main()) == [0, 1, 1, 1, 2]
    assert "rollout-0 against the learner: mean 0.02" in caplog.text
    assert "above rollout.parity_warn 0.01: what it samples is not the policy that is trained" in caplog.text


def test_log_probs_that_are_no_numbers_end_the_run():
    worker = FakeProcess("rollout-0", sampling_with(apart=float("nan")))
    with pytest.raises(RunError, match="mean nan"):
        asyncio.run(made([worker], minus_one).compare(3))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"dtype": "bfloat16"}, "rollout.dtype=float32 rounds less"),
        ({"engine": "vllm"}, "see whether rollout.engine=torch agrees"),
        ({"engine": "vllm", "engine_args": {"quantization": "fp8"}}, r"leave out rollout.engine_args \(quantization\)"),
    ],
)
def test_the_error_names_the_keys_that_may_be_its_cause(config, said):
    worker = FakeProcess("rollout-0", sampling_with(apart=5.0))
    with pytest.raises(RunError, match=said):
        asyncio.run(made([worker], minus_one, **config).compare(3))


async def dies(*_: Any) -> list[Sample]:
    raise ProcessDied("rollout-1", "killed")


async def fails(*_: Any) -> list[Sample]:
    raise EngineError("rollout-1: the engine is gone")


async def never(*_: Any) -> list[Sample]:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (FakeProcess("rollout-1", dies), "killed"),
        (FakeProcess("rollout-1", fails), "the engine is gone"),
        (FakeProcess("rollout-1", never), "has not sampled them in 0.05 s"),
        (FakeProcess("rollout-1", sampling_with(version=2, apart=9.0)), "sampled with other versions"),
    ],
    ids=lambda value: "" if isinstance(value, FakeProcess) else value,
)
def test_a_worker_that_cannot_take_part_is_left_out_and_named(other, reason, caplog, monkeypatch):
    monkeypatch.setattr(parity, "SAMPLE_S", 0.05)
    workers = [FakeProcess("rollout-0", sampling_with(apart=1e-4)), other]
    metrics = asyncio.run(made(workers, minus_one).compare(3))
    assert metrics["rollout/parity_max"] == pytest.approx(1e-4, rel=1e-2)
    [said] = caplog.messages
    assert said.startswith("rollout-1 is left out of the comparison of log-probs of version 3: ")
    assert reason in said


def test_completions_that_span_versions_do_not_count():
    async def mixed(prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Sample]:
        good, *others = await sampling_with(apart=1e-4)(prompts, seeds, sampling)
        spanning = replace(good, logprobs=good.logprobs + 7, versions=[(2, 1), (3, 3)])
        return [spanning, good, *others[1:]]

    metrics = asyncio.run(made([FakeProcess("rollout-0", mixed)], minus_one).compare(3))
    assert metrics["rollout/parity_max"] == pytest.approx(1e-4, rel=1e-2)


def test_with_every_worker_left_out_there_are_no_numbers_and_the_learner_is_not_asked():
    assert asyncio.run(made([FakeProcess("rollout-0", dies)], never).compare(3)) == {}


def test_a_learner_that_dies_is_told_to_the_one_who_waits():
    async def dead(*_: Any) -> list[np.ndarray]:
        raise ProcessDied("learner", "killed")

    with pytest.raises(ProcessDied, match="learner"):
        asyncio.run(made([FakeProcess("rollout-0", sampling_with())], dead).compare(3))


def test_the_turn_is_taken_only_while_the_learner_computes():
    async def main() -> list[bool]:
        publishing, held = Publishing(), []

        async def sampled(*args: Any) -> list[Sample]:
            held.append(publishing.turn.locked())
            return await sampling_with()(*args)

        async def computed(*args: Any) -> list[np.ndarray]:
            held.append(publishing.turn.locked())
            return await minus_one(*args)

        await made([FakeProcess("rollout-0", sampled)], computed, publishing).compare(3)
        return [*held, publishing.turn.locked()]

    assert asyncio.run(main()) == [False, True, False]


def test_differences_are_taken_without_regard_to_sign():
    found = Differences.of(np.array([-1.0, -2.0, -3.0]), np.array([-1.5, -2.0, -2.0]))
    assert (found.mean, found.max, found.num_tokens) == (0.5, 1.0, 3)
    assert found.p99 == pytest.approx(0.99)


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.soak
def test_a_run_past_the_limit_ends_before_it_trains(tmp_path: Path) -> None:
    refused = launch(tmp_path / "run", "run.steps=3", "rollout.parity_stop=1e-15")
    assert refused.exit_code == 1, refused.output
    last = refused.output.splitlines()[-1]
    assert "the run ended: log-probs of version 0, rollout-" in last
    assert "above rollout.parity_stop 1e-15" in last
    assert refused.lines == []


@pytest.mark.soak
@pytest.mark.timeout(500)
def test_once_the_limit_is_fixed_the_run_resumes_and_compares_every_worker_at_every_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert launch(run_dir, "run.steps=3", "rollout.parity_stop=1e-15", "rollout.num_workers=2").exit_code == 1
    run = launch(run_dir, "run.steps=4", "rollout.parity_every=1", "rollout.num_workers=2")
    assert run.exit_code == 0, run.output
    compared = {line["step"]: line["rollout/parity_max"] for line in run.lines if "rollout/parity_max" in line}
    assert set(compared) == {0, 2, 3, 4}, "of version 0, then of 1, 2 and 3, each in the line of the step after it"
    assert all(0 < most < 1e-3 for most in compared.values()), compared
    assert all("controller/parity_s" in line for line in run.lines[1:])
    said = (run_dir / "run.log").read_text()
    for worker in ("rollout-0", "rollout-1"):
        for version in range(4):
            assert f"log-probs of version {version}, {worker} against the learner: mean " in said
    assert audit(run_dir) == []
