"""What a full disk makes of writing: one line with the file and the cause, whoever wrote. Who holds a lock."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from asyncdapo.disk import LockedError, disk_errors, lock_file
from asyncdapo.errors import DiskError
from asyncdapo.learner.storage.checkpoint import kept_steps
from tests.learner.tiny import make_batch, make_learner, save, save_tiny_llama, train


@contextmanager
def files_end_at(num_bytes: int) -> Iterator[None]:
    """No file of this process can grow further, as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("num_bytes", [5_000, 50_000], ids=["the state doesn't fit", "the weights don't fit"])
def test_a_checkpoint_that_finds_no_room_is_one_line_and_leaves_those_before(tmp_path: Path, num_bytes: int) -> None:
    learner = make_learner(save_tiny_llama(tmp_path / "model"))
    train(learner, *make_batch())
    save(learner, tmp_path, 1)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoints/step-000001").iterdir()}
    assert 5_000 < sizes["learner.pt"] < 50_000 < sizes["model.safetensors"], sizes
    with files_end_at(num_bytes), pytest.raises(DiskError, match=r"step-000002: can't be written: .*File too large"):
        save(learner, tmp_path, 2)
    assert kept_steps(tmp_path) == [1]
    save(learner, tmp_path, 2)
    assert kept_steps(tmp_path) == [1, 2]


def test_a_full_database_is_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as ledger:
        ledger.execute("CREATE TABLE numbers (text)")
        ledger.execute("PRAGMA max_page_count = 10")
        full = pytest.raises(DiskError, match=r"ledger.db: can't be written: database or disk is full \(free space")
        with full, disk_errors(path):
            ledger.execute("INSERT INTO numbers VALUES (?)", ("x" * 100_000,))


def test_what_is_not_the_disks_fault_keeps_its_name(tmp_path: Path) -> None:
    with (
        closing(sqlite3.connect(tmp_path / "ledger.db")) as ledger,
        pytest.raises(sqlite3.OperationalError, match="no such table"),
        disk_errors(tmp_path),
    ):
        ledger.execute("SELECT * FROM numbers")
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError


HOLDER = """
import sys, time
from pathlib import Path
from asyncdapo.disk import lock_file
file = lock_file(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_names_its_holder_and_ends_with_it_even_by_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"^{holder.pid}$"):
        lock_file(path)
    holder.kill()
    with lock_file(path, wait_s=30):
        assert path.exists()
    assert holder.wait() == -signal.SIGKILL
    holder.stdout.close()


def test_a_lock_that_is_given_up_can_be_taken_again_in_the_same_process(tmp_path: Path) -> None:
    with lock_file(tmp_path / "a.lock"), pytest.raises(LockedError):
        lock_file(tmp_path / "a.lock")
    lock_file(tmp_path / "a.lock").close()
