"""Rows that the model has solved are left out, in a resumed run exactly as in one that wasn't interrupted."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.replay.core.stream import SolvedRows
from asyncdapo.replay.ledger.audit import audit
from tests.replay.small_run import SmallRun, rows, write_files

NUM_ROWS = 4
RIGHT = {0: (1.0, 1.0), 1: (1.0, 1.0), 2: (0.0, 1.0), 3: (0.0, 1.0)}
"""Answers to each row."""


def row_at(prompt_id: int) -> tuple[str, int]:
    return "train", prompt_id % NUM_ROWS


SOLVED = partial(SolvedRows, 0.9, NUM_ROWS, row_at)


def step_of(run: SmallRun, step: int, right=RIGHT) -> None:
    """Answer leases in their order until the batch is full, and train it."""
    run.ready(0, 2)
    while run.state.next_batch.num_ready < 2:
        lease_id = run.running(0)[0]
        run.answer(lease_id, accs=right[run.leases[lease_id].prompt.prompt_id % NUM_ROWS], versions=((step - 1, 4),))
        run.ready(0, 2)
    run.train(step)


def retired(run_dir) -> list[int]:
    return [row["prompt_id"] for row in rows(run_dir, "SELECT prompt_id FROM prompts WHERE state = 'retired'")]


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0, 0.99))
def test_a_row_is_retired_if_its_last_two_prompts_were_both_solved(shares: list[float], above: float) -> None:
    solved = SolvedRows(above, 1, lambda _: ("train", 0))
    for prompt_id, share in enumerate(shares):
        solved.note(prompt_id, share)
    assert solved.retires(len(shares)) is (len(shares) >= 2 and min(shares[-2:]) > above)
    assert solved.num_retired == solved.retires(0)


@given(st.permutations(range(6)), st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_late_groups_change_nothing(order: list[int], shares: list[float]) -> None:
    in_order, late = SolvedRows(0.5, 2, lambda p: ("train", p % 2)), SolvedRows(0.5, 2, lambda p: ("train", p % 2))
    for prompt_id in range(6):
        in_order.note(prompt_id, shares[prompt_id])
        late.note(order[prompt_id], shares[order[prompt_id]])
    assert [late.retires(row) for row in range(2)] == [in_order.retires(row) for row in range(2)]


def test_solved_rows_are_left_out_from_the_third_epoch_on_and_listed_in_the_ledger(tmp_path) -> None:
    run = SmallRun(tmp_path, solved=SOLVED)
    run.join(0)
    for step in range(1, 6):
        step_of(run, step)
    answered = {row["prompt_id"] for row in rows(tmp_path, "SELECT prompt_id FROM groups")}
    assert answered >= set(range(8))
    assert all(row_at(prompt_id)[1] >= 2 for prompt_id in answered if prompt_id >= 12)
    assert retired(tmp_path), "each has its row and its end"
    assert all(row_at(prompt_id)[1] < 2 and prompt_id >= 8 for prompt_id in retired(tmp_path))
    run.journal.close()
    write_files(tmp_path, run.lines)
    assert audit(tmp_path) == []


def test_a_server_that_is_started_again_and_a_rollback_know_what_the_ledger_knows(tmp_path) -> None:
    run = SmallRun(tmp_path, solved=SOLVED)
    run.join(0)
    for step in range(1, 6):
        step_of(run, step)
    read_again = run.make_state(run.journal.recover())
    assert read_again.solved._latest == run.state.solved._latest
    assert read_again.solved._retired == run.state.solved._retired != set()
    run.roll_back(0)
    assert run.state.solved.num_retired == 0, "only the first epoch was sampled with the initial model"
    assert retired(tmp_path) == [], "they wait again"
    run.train(1)
    for step in range(2, 6):
        step_of(run, step)
    assert {row_at(prompt_id)[1] for prompt_id in retired(tmp_path)} == {0, 1}
    assert min(retired(tmp_path)) >= 2 * NUM_ROWS


def test_a_run_whose_rows_are_all_solved_ends_and_says_so(tmp_path) -> None:
    run = SmallRun(tmp_path, solved=SOLVED)
    run.join(0)
    for _ in range(2 * NUM_ROWS):
        run.ready(0, 1)
        run.answer(run.running(0)[0], accs=(1.0, 1.0))
    assert run.state.over
    assert run.dispatch.failure.get_nowait() == (
        "prompts.retire_above: all 4 rows were solved above 0.9 in two epochs (harder prompts, a higher share, or null)"
    )
