"""One thread per process: two OpenMP threads on a core that others use make everything slow. Hypothesis has no deadline
for an example: on a busy machine any example may take a second, and that is no fault of what is tested. The garbage
collector leaves alone what stays to the end, modules and tests: walking them took a sixth of the time."""

import atexit
import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

settings.register_profile("asyncdapo", deadline=None)
settings.load_profile("asyncdapo")
gc.disable()

LONGEST = ("tests/controller/test_deaths.py", "tests/controller/test_whole_run.py")
WITH_WHOLE_RUNS = "tests/controller/"
TESTS_OF_VLLM = "vllm and not soak"
"""Their marker expression in the README."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files without such a test are not imported for these tests: it would take as long as an engine's start."""
    if config.option.markexpr == TESTS_OF_VLLM and collection_path.suffix == ".py":
        return "mark.vllm" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: the last one that a worker is dealt is short, and the workers end together. The two
    longest wait for their processes most of the time; begun at once, they leave the processor to the others."""
    items.sort(key=lambda item: (not item.nodeid.startswith(LONGEST), not item.nodeid.startswith(WITH_WHOLE_RUNS)))


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else some libraries report all that is left at the end
