"""The prompt stream: order, random access, ends, what is left out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.errors import ConfigError
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.prompts.task import Question
from asyncdapo.prompts.tasks.chain import ChainTask


class TableTask:
    """Question `i` has text of `lengths[i]` characters that begins with i."""

    def __init__(self, lengths, eval_lengths=()):
        self.lengths, self.eval_lengths = list(lengths), list(eval_lengths)
        self.num_rows, self.num_eval_rows = len(self.lengths), len(self.eval_lengths)

    def question_at(self, row):
        return Question(text="t" * self.lengths[row], answer=str(row), source="table", row=row)

    def eval_question_at(self, row):
        return Question(text="e" * self.eval_lengths[row], answer=str(row), source="table", row=row)


def characters(text):
    return [ord(character) for character in text]


def open_stream(task, seed=0, **keys):
    return PromptStream(PromptsConfig(**keys), task, characters, seed)


@given(num_rows=st.integers(1, 60), epochs=st.integers(1, 4), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_each_row_once(num_rows, epochs, seed):
    stream = open_stream(TableTask([1] * num_rows), seed, epochs=epochs)
    prompts = [stream.prompt_at(i) for i in range(stream.num_prompts)]
    assert len(prompts) == num_rows * epochs
    for epoch in range(epochs):
        rows = [prompt.row for prompt in prompts if prompt.epoch == epoch]
        assert sorted(rows) == list(range(num_rows))


@given(positions=st.lists(st.integers(0, 400), min_size=1, max_size=30), seed=st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_random_access_equals_reading_in_order(positions, seed):
    in_order = open_stream(TableTask([1] * 37), seed)
    expected = [in_order.prompt_at(i) for i in range(401)]
    fresh = open_stream(TableTask([1] * 37), seed)
    assert [fresh.prompt_at(i) for i in positions] == [expected[i] for i in positions]


def test_order_differs_between_epochs_and_seeds():
    def rows(seed, epoch):
        stream = open_stream(TableTask([1] * 50), seed)
        return tuple(stream.prompt_at(epoch * 50 + i).row for i in range(50))

    assert len({rows(0, 0), rows(0, 1), rows(1, 0), rows(1, 1)}) == 4


def test_order_of_an_epoch_is_spread_evenly():
    first_rows = np.bincount([open_stream(TableTask([1] * 10), seed).prompt_at(0).row for seed in range(2000)])
    assert first_rows.min() > 140, "each of 10 rows comes first about 200 times in 2000 seeds"
    assert first_rows.max() < 260


def test_order_is_the_same_in_every_version_of_python_and_numpy():
    stream = open_stream(TableTask([1] * 8), seed=3)
    assert [stream.prompt_at(i).row for i in range(16)] == [1, 0, 7, 2, 6, 5, 3, 4, 5, 1, 4, 6, 0, 3, 2, 7]


def test_the_stream_ends_after_the_last_epoch():
    stream = open_stream(TableTask([1] * 5), epochs=2)
    assert stream.num_prompts == 10
    assert stream.prompt_at(9) is not None
    assert stream.prompt_at(10) is None


def test_without_a_number_of_epochs_the_stream_has_no_end():
    stream = open_stream(TableTask([1] * 5))
    assert stream.num_prompts is None
    assert stream.prompt_at(5_000).epoch == 1000


def test_rows_that_are_too_long_are_left_out_and_counted():
    stream = open_stream(TableTask([3, 9, 4, 5], eval_lengths=[9, 2]), max_prompt_length=4, epochs=1)
    assert sorted(stream.prompt_at(i).row for i in range(stream.num_prompts)) == [0, 2]
    assert [prompt.row for prompt in stream.eval_prompts(2)] == [1]
    assert stream.num_left_out == 3


def test_a_stream_whose_rows_are_all_too_long_is_refused():
    with pytest.raises(ConfigError, match="prompts.max_prompt_length: all 2 prompts are longer, got 4"):
        open_stream(TableTask([5, 6]), max_prompt_length=4)


def test_an_endless_task_whose_prompts_are_too_long_is_refused():
    stream = open_stream(ChainTask(seed=0), max_prompt_length=5)
    with pytest.raises(ConfigError, match="the task 'chain' makes prompts of"):
        stream.prompt_at(0)


def test_evaluation_prompts_have_ids_of_their_own_table():
    stream = open_stream(TableTask([1], eval_lengths=[1, 2, 3]))
    prompts = stream.eval_prompts(2)
    assert [(prompt.prompt_id, prompt.row, len(prompt.token_ids)) for prompt in prompts] == [(0, 0, 1), (1, 1, 2)]
    assert len(stream.eval_prompts(100)) == 3


def test_an_endless_task_is_read_row_by_row():
    stream = open_stream(ChainTask(seed=1))
    assert stream.num_prompts is None
    assert [(p.epoch, p.row, p.source) for p in map(stream.prompt_at, (0, 7))] == [(0, 0, "chain"), (0, 7, "chain")]
    assert stream.num_left_out == 0
