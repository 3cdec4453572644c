"""Host memory of loading a sharded model: that of the model and of a few gathered blocks, whatever the ranks."""

from __future__ import annotations

import pytest

from benchmarks.load_memory import measure


def most(mib: float, num_ranks: int, block_mib: int) -> float:
    """At each rank a block as it arrives, twice in Gloo's hands, and the one before; one and a half for all else."""
    return mib + 4.5 * num_ranks * block_mib


@pytest.mark.soak
def test_two_ranks_hold_the_model_once_and_a_few_blocks_each_while_they_load_and_check_it() -> None:
    size, peak, loaded = measure(48, 2, 8)
    assert 0.9 * size < loaded < 1.25 * size
    assert peak < most(size, 2, 8)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_four_ranks_load_a_model_of_a_gigabyte_in_thirteen_tenths_of_it() -> None:
    size, peak, _ = measure(1024, 4, 20)
    assert size > 1000
    assert peak < 1.3 * size
