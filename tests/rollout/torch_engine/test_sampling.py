"""Draws follow the distribution, depend on seed and index alone, and say how likely they were."""

import numpy as np
import pytest
import torch

from asyncdapo.rollout.torch_engine.sampling import draw, narrow, uniforms


def splitmix64(seed: int, count: int) -> list[int]:
    """The published generator, in Python integers."""
    outputs, mask = [], (1 << 64) - 1
    for _ in range(count):
        seed = seed + 0x9E3779B97F4A7C15 & mask
        mixed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
        outputs.append(mixed ^ mixed >> 31)
    return outputs


def draw_many(logits, count, temperature=1.0, **options):
    rows = logits.expand(count, -1)
    numbers = torch.from_numpy(uniforms([11], count)[0])
    return draw(rows, torch.full((count,), temperature), numbers, **options)


def test_uniforms_are_the_top_bits_of_splitmix64():
    # The first outputs for this seed are printed in many implementations of the generator.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    for seed in (0, 1234567, 2**63 - 1):
        expected = [output / 2**64 for output in splitmix64(seed, 50)]
        assert uniforms([seed], 50)[0] == pytest.approx(expected, abs=2**-53)


def test_a_longer_stream_begins_with_the_shorter_one():
    assert (uniforms([7], 100)[:, :10] == uniforms([7], 10)).all()


def test_neighbouring_seeds_give_unrelated_uniforms():
    numbers = uniforms(range(50), 400)
    assert abs(np.corrcoef(numbers) - np.eye(50)).max() < 0.25
    assert abs(numbers.mean() - 0.5) < 0.01


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax_at_the_temperature(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0, 1.5, -0.5])
    count = 40_000
    tokens, _ = draw_many(logits, count, temperature)
    expected = count * (logits / temperature).softmax(-1)
    chi_square = ((torch.bincount(tokens, minlength=8) - expected) ** 2 / expected).sum().item()
    assert chi_square < 24.3  # 0.1 % point for 7 degrees of freedom


def test_logprobs_are_those_of_the_drawn_tokens_at_the_temperature():
    logits = torch.randn(5, 33)
    temperatures = torch.tensor([0.3, 0.7, 1.0, 1.5, 4.0])
    tokens, logprobs = draw(logits, temperatures, torch.rand(5, dtype=torch.float64))
    for row in range(5):
        expected = (logits[row] / temperatures[row]).log_softmax(-1)[tokens[row]]
        assert logprobs[row].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).repeat(2, 1)
    tokens, _ = draw(logits, torch.ones(2), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [1, 3]


def test_greedy_rows_take_the_most_likely_token_beside_sampled_rows():
    logits = torch.tensor([[0.0, 3.0, 2.9]]).repeat(300, 1)
    greedy = torch.arange(300) % 2 == 0
    tokens, logprobs = draw(logits, torch.ones(300), torch.from_numpy(uniforms([3], 300)[0]), greedy_B=greedy)
    assert set(tokens[greedy].tolist()) == {1}
    assert set(tokens[~greedy].tolist()) == {0, 1, 2}
    assert logprobs[0].item() == pytest.approx(logits[0].log_softmax(-1)[1].item(), abs=1e-6)


def narrowed(logits, count=1, top_k=0, top_p=1.0):
    rows = logits.expand(count, -1)
    return narrow(rows, torch.ones(count), torch.full((count,), top_k), torch.full((count,), top_p))


def left(logits, **limits):
    return set((narrowed(logits, **limits)[0] > -torch.inf).nonzero().flatten().tolist())


def test_top_k_draws_only_the_k_most_likely_tokens_and_says_how_likely_they_were_among_them():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
    numbers = torch.from_numpy(uniforms([11], 2000)[0])
    tokens, logprobs = draw(narrowed(logits, 2000, top_k=2), torch.ones(2000), numbers)
    assert set(tokens.tolist()) == {1, 3}
    expected = torch.tensor([3.0, 2.0]).log_softmax(-1)
    assert (tokens == 1).float().mean().item() == pytest.approx(expected[0].exp().item(), abs=0.04)
    assert logprobs[tokens == 1].tolist() == pytest.approx([expected[0].item()] * int((tokens == 1).sum()), abs=1e-6)


def test_top_p_leaves_the_fewest_tokens_that_reach_the_share():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    for top_p, expected in ((0.3, {1}), (0.4, {1}), (0.45, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        assert left(logits, top_p=top_p) == expected


def test_top_p_applies_to_what_top_k_leaves():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert left(logits, top_k=2, top_p=0.5) == {1}  # 0.4 of 0.7 is more than half


def test_shares_are_those_at_the_temperature():
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
    hot = narrow(logits, torch.tensor([4.0]), torch.zeros(1, dtype=torch.int64), torch.tensor([0.6]))
    assert (hot > -torch.inf).sum() == 2  # at temperature 1 the first alone reaches 0.6
    assert torch.equal(hot[hot > -torch.inf], logits[0, 1:])


def test_rows_that_ask_for_nothing_keep_their_whole_distribution():
    logits = torch.randn(2, 9)
    both = narrow(logits, torch.ones(2), torch.tensor([0, 3]), torch.ones(2))
    assert torch.equal(both[0], logits[0])
    assert (both[1] > -torch.inf).sum() == 3
