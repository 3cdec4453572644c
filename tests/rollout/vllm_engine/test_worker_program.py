"""Two claims about a process that generates through updates: exact versions, and nothing left when it is killed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from .models import NUM_VERSIONS, differences, model_of, save_versions
from .worker_program import PROMPT_IDS

pytestmark = [pytest.mark.vllm, pytest.mark.soak]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = save_versions(tmp_path_factory.mktemp("versions"))
    command = [sys.executable, "-m", "tests.rollout.vllm_engine.worker_program", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def said(program):
    """Its line of JSON, among whatever vLLM prints."""
    return next(json.loads(line) for line in program.stdout if line.startswith("{"))


def test_with_recomputed_keys_and_values_every_log_prob_is_that_of_its_tokens_version(said):
    models = {version: model_of(version) for version in range(NUM_VERSIONS)}
    swapped = {version: models[(version + 1) % NUM_VERSIONS] for version in models}
    assert [version for version, _ in said["samples"][0]["versions"]] == list(range(NUM_VERSIONS))
    for sample in said["samples"]:
        sampled = sample["token_ids"], sample["logprobs"], sample["versions"], PROMPT_IDS
        assert max(differences(*sampled, models).values()) < 1e-3
        assert min(differences(*sampled, swapped).values()) > 0.5


def test_no_process_of_the_engine_survives_the_kill_of_its_worker(program, said):
    pidfds = [os.pidfd_open(pid) for pid in said["pids"]]
    assert pidfds
    program.kill()
    for pidfd in pidfds:
        ended = bool(select.select([pidfd], [], [], 30)[0])
        if not ended:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        assert ended, "a process of the engine lived on"
