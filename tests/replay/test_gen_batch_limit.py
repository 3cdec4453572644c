"""The limit of generation batches after it was reached; what it does then is in `tests/vectors/dynamic_sampling.py`."""

from __future__ import annotations

from tests.vectors.dynamic_sampling import Replayed


def test_a_run_that_stopped_at_its_limit_takes_in_what_still_runs_and_stops_once() -> None:
    replayed = Replayed(batch_groups=2, max_num_gen_batches=1, on_limit="raise")
    replayed.arrive("a", kept=False)
    replayed.close_gen_batch()
    assert replayed.error == "max_num_gen_batches"
    replayed.error = None
    replayed.arrive("b", kept=True)
    replayed.close_gen_batch()
    assert replayed.error is None
    assert replayed.surplus == ["b"]
