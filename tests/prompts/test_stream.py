"""The prompt stream: order, random access, mixtures, ends, what is left out."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.errors import ConfigError
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.prompts.task import Part, Question
from asyncdapo.prompts.tasks.chain import ChainTask


class TableTask:
    """Question `i` has text of `lengths[i]` characters that begins with i."""

    def __init__(self, lengths, eval_lengths=()):
        self.lengths, self.eval_lengths = list(lengths), list(eval_lengths)
        self.num_eval_rows = len(self.eval_lengths)
        self.parts = [Part(name="table", rows=range(len(self.lengths)), weight=Fraction(1))]

    def question_at(self, row):
        return Question(text="t" * self.lengths[row], answer=str(row), source="table", row=row)

    def eval_question_at(self, row):
        return Question(text="e" * self.eval_lengths[row], answer=str(row), source="table", row=row)


class MixedTask(TableTask):
    """Parts of these numbers of rows and weights; the text of row `i` has `lengths[i]` characters."""

    def __init__(self, sizes, weights, lengths=None):
        super().__init__(lengths or [1] * sum(sizes))
        ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        self.parts = [
            Part(name=f"part {number}", rows=range(end - size, end), weight=Fraction(weight))
            for number, (size, end, weight) in enumerate(zip(sizes, ends, weights, strict=True))
        ]

    def part_of(self, prompt):
        return next(number for number, part in enumerate(self.parts) if prompt.row in part.rows)


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
    assert (stream.num_left_out, stream.num_eval_left_out) == (3, 1)


def test_a_stream_whose_rows_are_all_too_long_is_refused():
    with pytest.raises(ConfigError) as caught:
        open_stream(TableTask([6, 5]), max_prompt_length=4)
    assert str(caught.value) == (
        "prompts.max_prompt_length: all 2 prompts of table are longer, template included: the shortest has 5 tokens, "
        "got 4 (prompts.max_prompt_length=5)"
    )
    assert open_stream(TableTask([6, 5]), max_prompt_length=5).prompt_at(0).row == 1


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
    assert stream.num_left_out == stream.num_eval_left_out == 0


# ------------------------------------------------------------------------------------------------------------- mixtures

SIZES_AND_WEIGHTS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=2, max_size=4)


@given(parts=SIZES_AND_WEIGHTS, seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_each_part_of_a_mixture_has_epochs_of_its_own(parts, seed):
    task = MixedTask(*zip(*parts, strict=True))
    stream = open_stream(task, seed)
    prompts = [stream.prompt_at(i) for i in range(300)]
    for number, part in enumerate(task.parts):
        drawn = [prompt for prompt in prompts if task.part_of(prompt) == number]
        assert [prompt.epoch for prompt in drawn] == [place // len(part.rows) for place in range(len(drawn))]
        for epoch in range(len(drawn) // len(part.rows)):
            assert sorted(prompt.row for prompt in drawn if prompt.epoch == epoch) == list(part.rows)


@given(parts=SIZES_AND_WEIGHTS, epochs=st.integers(1, 3), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_a_mixture_ends_right_before_a_row_would_be_drawn_once_too_often(parts, epochs, seed):
    task = MixedTask(*zip(*parts, strict=True))
    stream, endless = open_stream(task, seed, epochs=epochs), open_stream(task, seed)
    drawn = Counter(stream.prompt_at(i).row for i in range(stream.num_prompts))
    assert max(drawn.values()) == epochs
    assert stream.prompt_at(stream.num_prompts) is None
    assert drawn[endless.prompt_at(stream.num_prompts).row] == epochs, "the next one would be one too many"


@given(start=st.integers(0, 200), seed=st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_a_mixture_that_is_opened_again_resumes_at_the_next_row(start, seed):
    task = MixedTask([7, 4], [3, 1])
    before = open_stream(task, seed)
    prompts = [before.prompt_at(i) for i in range(start + 50)]
    resumed = open_stream(MixedTask([7, 4], [3, 1]), seed)
    assert [resumed.prompt_at(i) for i in range(start, start + 50)] == prompts[start:]


def test_parts_of_equal_size_are_in_different_orders():
    task = MixedTask([50, 50], [1, 1])
    prompts = [open_stream(task).prompt_at(i) for i in range(100)]
    first, second = ([p.row % 50 for p in prompts if task.part_of(p) == number] for number in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_rows_of_a_mixture_that_are_too_long_are_left_out_of_their_part():
    task = MixedTask([3, 2], [1, 1], lengths=[1, 9, 1, 1, 9])
    stream = open_stream(task, max_prompt_length=4, epochs=1)
    assert stream.num_left_out == 2
    assert {stream.prompt_at(i).row for i in range(stream.num_prompts)} <= {0, 2, 3}


def test_a_part_whose_rows_are_all_too_long_is_refused_by_name():
    task = MixedTask([2, 2], [1, 1], lengths=[1, 1, 9, 9])
    with pytest.raises(ConfigError, match="all 2 prompts of part 1 are longer"):
        open_stream(task, max_prompt_length=4)


def test_the_order_of_a_mixture_is_the_same_in_every_version_of_python():
    task = MixedTask([3, 2], [2, 1])
    assert [open_stream(task, seed=3).prompt_at(i).row for i in range(12)] == [1, 0, 3, 2, 4, 1, 0, 3, 2, 0, 4, 2]
