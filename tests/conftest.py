"""One thread per process: two OpenMP threads on a core that others use make everything slow. Hypothesis has no deadline
for an example: on a busy machine any example may take a second, and that is no fault of what is tested. It draws fifty
examples where a test names no number; every run draws others. The garbage collector leaves alone what stays to the end,
modules and tests: walking them took a sixth of the time."""

import atexit
import gc
import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

settings.register_profile("asyncdapo", deadline=None, max_examples=50)
settings.load_profile("asyncdapo")
gc.disable()

ROOT = Path(__file__).resolve().parents[1]
LONGEST = ("tests/controller/test_deaths.py", "tests/controller/test_whole_run.py")
WITH_WHOLE_RUNS = "tests/controller/"
OF_RANKS = (
    "tests/learner/model/test_loading.py",
    "tests/learner/step/test_ranks.py",
    "tests/learner/storage/test_resharding.py",
    "tests/learner/test_equal_gradients.py",
    "tests/learner/test_sharded_ranks.py",
    "tests/transport/test_shared_memory.py",
    "tests/weights/",
)
"""Those with processes of a fork server, which imports torch and the learner for five seconds."""
TESTS_OF_VLLM = "vllm and not soak"
"""Their marker expression in the README."""


def pytest_collection(session: pytest.Session) -> None:
    """Where nothing is compiled yet, each worker begins with files of its own. Pytest writes what it has made of a
    file, and the other workers read that; in one order all would do the same work at the same time."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None or session.config.args != ["tests"] or session.config.option.markexpr == TESTS_OF_VLLM:
        return
    files = sorted(path.relative_to(ROOT) for path in ROOT.glob("tests/**/test_*.py"))
    for file in files[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]:
        with suppress(Exception, pytest.skip.Exception):  # raised again, and reported, when pytest comes to the file
            import_module(".".join(file.with_suffix("").parts))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files without such a test are not imported for these tests: it would take as long as an engine's start."""
    if config.option.markexpr == TESTS_OF_VLLM and collection_path.suffix == ".py":
        return "mark.vllm" not in collection_path.read_text() or None
    return None


class OneForkServer(LoadFileScheduling):
    """Files that need the fork server go to one worker; of all others each goes where there is room."""

    def _split_scope(self, nodeid: str) -> str:
        return "ranks" if nodeid.startswith(OF_RANKS) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling | None:
    return OneForkServer(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: the last file that a worker is dealt is short, and the workers end together. The two longest,
    and those of ranks, wait for their processes most of the time; begun at once, they leave the processor to others."""
    order = (LONGEST, OF_RANKS, WITH_WHOLE_RUNS)
    items.sort(key=lambda item: [not item.nodeid.startswith(first) for first in order])


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else some libraries report all that is left at the end
