"""What vLLM streams becomes samples, whichever release streams it."""

from types import SimpleNamespace

import numpy as np

from asyncdapo.rollout.vllm_engine.samples import Stream


def output(token_ids, logprobs, spans=None):
    """Of a release that labels tokens, or of an older one, whose outputs know nothing of versions."""
    labels = {} if spans is None else {"weight_versions": spans}
    return SimpleNamespace(token_ids=token_ids, logprobs=logprobs, **labels)


def by_position(token_ids, logprobs):
    """How a release without flat lists says it: a dict for each position."""
    return [{token: SimpleNamespace(logprob=logprob)} for token, logprob in zip(token_ids, logprobs, strict=True)]


def span(version: str, start: int, end: int):
    return SimpleNamespace(version=version, start=start, end=end)


def test_both_forms_of_log_probs_say_the_same():
    flat, dicts = Stream(), Stream()
    flat.add(output([5, 6], SimpleNamespace(logprobs=[-0.5, -1.5])), 0)
    dicts.add(output([5, 6], by_position([5, 6], [-0.5, -1.5])), 0)
    for sample in (flat.finish("stop"), dicts.finish("stop")):
        assert sample.token_ids.tolist() == [5, 6]
        assert sample.logprobs.tolist() == [-0.5, -1.5]
        assert (sample.token_ids.dtype, sample.logprobs.dtype) == (np.int32, np.float32)


def test_without_labels_of_its_own_an_output_has_the_version_in_use_when_it_came():
    stream = Stream()
    for version, tokens in ((3, [1, 2]), (3, [4]), (5, [6]), (5, [])):
        assert stream.add(output(tokens, by_position(tokens, [-1.0] * len(tokens))), version) == len(tokens)
    assert stream.finish("length").versions == [(3, 3), (5, 1)]


def test_an_output_of_two_versions_is_labelled_by_vllm_which_may_know_of_tokens_that_have_not_come():
    stream = Stream()
    stream.add(output([1, 2, 4], by_position([1, 2, 4], [-1.0] * 3), [span("3", 0, 2), span("4", 2, 9)]), 4)
    assert stream.so_far().versions == [(3, 2), (4, 1)]
    stream.add(output([5], by_position([5], [-1.0]), [span("3", 0, 2), span("4", 2, 4), span("5", 4, 9)]), 5)
    assert stream.so_far().versions == [(3, 2), (4, 2)]


def test_labels_of_vllms_own_win_over_when_an_output_came():
    stream = Stream()
    stream.add(output([1], by_position([1], [-1.0]), None), 3)
    stream.add(output([2, 4], by_position([2, 4], [-1.0] * 2), [span("3", 0, 2), span("4", 2, 3)]), 4)
    assert stream.finish("stop").versions == [(3, 2), (4, 1)]
