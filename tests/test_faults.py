"""Faults on purpose: off they are not there, on they do what the section says, the same each time."""

from __future__ import annotations

import ast
import asyncio
import errno
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo import faults
from asyncdapo.errors import ConfigError
from asyncdapo.faults import HOLD_S, POINTS, FaultsConfig, Link, parse_kill

PACKAGE = Path(faults.__file__).parent
LIFE = """
import sys
from pathlib import Path
from asyncdapo import faults
from asyncdapo.faults import FaultsConfig
faults.install(sys.argv[1], FaultsConfig(kill=tuple(sys.argv[3:])), Path(sys.argv[2]))
for number in range(1, 6):
    print(number, flush=True)
    faults.point("after_train")
"""

shares = st.sampled_from([0.0, 0.3, 1.0])
settings = st.builds(
    FaultsConfig,
    seed=st.integers(0, 100),
    drop=shares,
    duplicate=shares,
    reorder=shares,
    truncate=shares,
    delay_s=st.sampled_from([0.0, 0.5]),
)
frame_lists = st.lists(st.builds(lambda head, rest: [head, *rest], st.binary(min_size=1), st.lists(st.binary())))


@pytest.fixture(autouse=True)
def healthy_again(tmp_path: Path) -> Iterator[None]:
    yield
    faults.install("learner", FaultsConfig(), tmp_path)


def test_a_section_at_its_defaults_leaves_no_trace(tmp_path: Path) -> None:
    faults.install("replay", FaultsConfig(), tmp_path)
    faults.point("after_commit")
    faults.disk_write(1 << 40)
    asyncio.run(faults.slow_worker())
    assert faults.link() is None
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- deaths


def live(process: str, run_dir: Path, *kill: str) -> tuple[int, int]:
    """One life of a process that passes `after_train` five times. Returns how often it got there, and its exit code."""
    life = subprocess.run([sys.executable, "-c", LIFE, process, run_dir, *kill], capture_output=True, text=True)
    return len(life.stdout.split()), life.returncode


def test_a_process_dies_the_nth_time_it_passes_the_point_and_only_once_in_a_run(tmp_path: Path) -> None:
    entries = ("learner.after_train:3", "learner.after_train:4")
    assert live("learner", tmp_path, *entries) == (3, -signal.SIGKILL)
    assert live("learner", tmp_path, *entries) == (4, -signal.SIGKILL)
    assert live("learner", tmp_path, *entries) == (5, 0)


def test_an_entry_without_a_number_kills_the_first_time(tmp_path: Path) -> None:
    assert live("controller", tmp_path, "controller.after_train") == (1, -signal.SIGKILL)


def test_the_deaths_of_others_are_not_this_process_own(tmp_path: Path) -> None:
    assert live("learner", tmp_path, "controller.after_train:2", "rollout-1.after_lease") == (5, 0)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("after_train", "an entry is process.point"),
        ("learner.after_train:0", "an entry is process.point"),
        ("rollout.after_lease", "an entry is process.point"),
        ("learner-0.after_train", "an entry is process.point"),
        ("replay.after_train", r"replay has no such point, got 'replay.after_train' \(it has before_commit, "),
    ],
)
def test_an_entry_that_could_never_kill_is_refused(entry: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"faults.kill: {words}"):
        FaultsConfig(kill=(entry,))


def test_an_entry_names_process_point_and_time() -> None:
    assert parse_kill("rollout-12.before_send_group:7") == ("rollout-12", "before_send_group", 7)
    assert parse_kill("learner-1.before_train") == ("learner-1", "before_train", 1)


def test_every_point_that_the_code_passes_can_be_named() -> None:
    passed = {
        node.args[0].value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.point"
    }
    assert passed == {point for points in POINTS.values() for point in points}


def test_a_point_of_another_process_is_a_defect_of_ours(tmp_path: Path) -> None:
    faults.install("replay", FaultsConfig(drop=0.1), tmp_path)
    with pytest.raises(AssertionError, match="replay has no point after_train"):
        faults.point("after_train")


# -------------------------------------------------------------------------------------------------------------- links


@given(settings, frame_lists)
def test_a_message_is_sent_as_the_section_says_and_never_changed_but_for_a_cut(
    config: FaultsConfig, messages: list[list[bytes]]
) -> None:
    link = Link(config, "rollout-0 1")
    for number, frames in enumerate(messages):
        sent = link.pass_on(frames, float(number))
        assert len(sent) in ({0: (1,), 0.3: (0, 1), 1: (0,)}[config.drop] if not config.duplicate else (0, 1, 2))
        for at, passed in sent:
            assert number <= at <= number + config.delay_s + HOLD_S * (config.reorder > 0)
            lost = [len(before) - len(after) for before, after in zip(frames, passed, strict=True)]
            assert all(before[: len(after)] == after for before, after in zip(frames, passed, strict=True))
            assert sum(number_lost > 0 for number_lost in lost) == {0: 0, 0.3: any(lost), 1: 1}[config.truncate]


@given(settings, frame_lists)
def test_the_same_seed_and_socket_meet_the_same_faults(config: FaultsConfig, messages: list[list[bytes]]) -> None:
    one, two = (Link(config, "rollout-0 1") for _ in range(2))
    assert [one.pass_on(frames, 0.0) for frames in messages] == [two.pass_on(frames, 0.0) for frames in messages]


def test_another_seed_or_socket_meets_others() -> None:
    def dropped(seed: int, name: str) -> list[bool]:
        link = Link(FaultsConfig(seed=seed, drop=0.5), name)
        return [not link.pass_on([b"x"], 0.0) for _ in range(100)]

    assert dropped(0, "replay 1") != dropped(0, "replay 2") != dropped(1, "replay 1") != dropped(0, "replay 1")


def test_delays_alone_keep_the_order_and_reordering_changes_it() -> None:
    late, jumbled = Link(FaultsConfig(delay_s=1.0), "replay 1"), Link(FaultsConfig(reorder=0.3), "replay 1")
    now = [number / 1000 for number in range(200)]
    late_at = [late.pass_on([b"x"], at)[0][0] for at in now]
    assert late_at == sorted(late_at)
    assert max(at - then for at, then in zip(late_at, now, strict=True)) > 0.5
    jumbled_at = [jumbled.pass_on([b"x"], at)[0][0] for at in now]
    assert jumbled_at != sorted(jumbled_at)


def test_a_share_of_messages_is_about_that_share(tmp_path: Path) -> None:
    faults.install("replay", FaultsConfig(drop=0.2), tmp_path)
    link = faults.link()
    assert link is not None
    num_lost = sum(not link.pass_on([b"x"], 0.0) for _ in range(2000))
    assert 320 < num_lost < 480


# ---------------------------------------------------------------------------------------------------- slow and full


def test_a_full_disk_is_full_for_every_process_and_stays_so(tmp_path: Path) -> None:
    config = FaultsConfig(disk_full_after_mb=1.0)
    faults.install("learner", config, tmp_path)
    faults.disk_write(600_000)
    with pytest.raises(OSError, match="No space left on device") as caught:
        faults.disk_write(600_000)
    assert caught.value.errno == errno.ENOSPC
    faults.install("replay", config, tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        faults.disk_write(1)


def test_a_slow_disk_takes_its_time(tmp_path: Path) -> None:
    faults.install("replay", FaultsConfig(slow_disk_s=0.05), tmp_path)
    began = time.monotonic()
    faults.disk_write(1)
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize(("process", "slow"), [("rollout-0", True), ("rollout-1", False)])
def test_worker_0_is_the_slow_one(tmp_path: Path, process: str, slow: bool) -> None:
    faults.install(process, FaultsConfig(slow_worker_s=0.05), tmp_path)
    began = time.monotonic()
    asyncio.run(faults.slow_worker())
    assert (time.monotonic() - began >= 0.05) == slow
