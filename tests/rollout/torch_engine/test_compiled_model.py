"""The compiled model computes and draws what PyTorch's does, and gives way to it where there is no compiler."""

import asyncio
import platform
import shutil

import numpy as np
import pytest
import torch

from asyncdapo.rollout.torch_engine.batch import Batch
from asyncdapo.rollout.torch_engine.checkpoint import read_checkpoint
from asyncdapo.rollout.torch_engine.compiled.compiled_model import CompiledModel, fastest_model
from asyncdapo.rollout.torch_engine.compiled.library import compiled_library
from asyncdapo.rollout.torch_engine.model import TorchModel

from .models import VOCAB_SIZE, engine_for, largest_difference, random_model, request, saved

SLOTS, TIMES, CPU = 5, 100, torch.device("cpu")


@pytest.fixture
def other_compiler(monkeypatch):
    def compile_by(command):
        monkeypatch.setenv("CC", command)
        compiled_library.cache_clear()

    yield compile_by
    compiled_library.cache_clear()


@pytest.fixture
def without_compiler(other_compiler):
    other_compiler("no-such-compiler")


def compiled(model, directory, num_threads=1):
    checkpoint = read_checkpoint(saved(model, directory))
    result = fastest_model(checkpoint, SLOTS, TIMES, torch.float32, CPU, num_threads)
    if not isinstance(result, CompiledModel):
        pytest.skip("needs a C compiler")
    return result, checkpoint


@torch.inference_mode()
def logits_of(model, source, rounds=3):
    """Of prompts and of some tokens behind them, in slots in which other sequences have been."""
    weights = model.new_weights()
    weights.fill(source.state_dict())
    numbers = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(VOCAB_SIZE, (4, 70), generator=numbers)
    lengths_N = torch.tensor([31, 70, 1, 32])
    _, leftovers = model.prefill(weights, tokens_NT.flip(0), torch.full((4,), 70))
    model.cache.write(np.arange(4), leftovers)
    logits_NV, kv = model.prefill(weights, tokens_NT, lengths_N)
    model.cache.write(np.array([0, 4, 2, 3]), kv)
    model.cache.move(4, 1, 70)
    every, batch = [logits_NV], Batch(SLOTS, max_tokens=1, block_size=2)
    batch.num_used = 4
    for at in range(rounds):
        batch.token[:4], batch.position[:4] = torch.randint(VOCAB_SIZE, (4,), generator=numbers), lengths_N + at
        every.append(model.decode(weights, batch).clone())
    return torch.cat(every)


@pytest.mark.parametrize("shape", ["llama with biases", "mistral", "qwen3", "yarn rope"])
def test_both_models_give_the_same_logits(shape, tmp_path):
    source = random_model(shape)
    ours, checkpoint = compiled(source, tmp_path)
    plain = TorchModel(checkpoint, SLOTS, TIMES, torch.float32, CPU)
    torch.testing.assert_close(logits_of(ours, source), logits_of(plain, source), atol=1e-3, rtol=1e-4)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs a processor whose vectors can be shortened")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx512f -mno-avx"])
def test_shorter_vectors_give_the_same_logits(flags, tmp_path, other_compiler):
    source = random_model("qwen3")
    expected = logits_of(compiled(source, tmp_path)[0], source)
    other_compiler(f"cc {flags}")
    torch.testing.assert_close(logits_of(compiled(source, tmp_path)[0], source), expected, atol=1e-4, rtol=1e-5)


def drawn(model, logits, temperatures, uniforms, *, greedy: torch.Tensor | bool = False):
    """A token of each row and its log-prob."""
    batch = Batch(len(logits), max_tokens=1, block_size=16)
    batch.active[:], batch.temperature[:], batch.greedy[:] = 1, temperatures, greedy
    batch.uniforms[:, 0] = uniforms
    model.sample(logits, batch, np.arange(len(logits)))
    assert set(batch.num_sampled) == set(batch.position) == {1}
    assert batch.token.tolist() == batch.tokens[:, 0].tolist()
    return torch.from_numpy(batch.token), torch.from_numpy(batch.logprobs[:, 0])


def test_threads_do_not_change_a_bit(tmp_path):
    source = random_model()
    one, two = (compiled(source, tmp_path, threads)[0] for threads in (1, 2))
    assert torch.equal(logits_of(one, source), logits_of(two, source))


def test_draws_are_those_of_pytorch(tmp_path):
    model, checkpoint = compiled(random_model(), tmp_path)
    plain = TorchModel(checkpoint, SLOTS, TIMES, torch.float32, CPU)
    torch.manual_seed(0)
    logits = 5 * torch.randn(2000, VOCAB_SIZE)
    logits[torch.rand(logits.shape) < 0.2] = -torch.inf
    logits[:500] *= 40  # one token has nearly all of the probability
    temperatures, numbers = torch.rand(2000) * 2 + 0.1, torch.rand(2000, dtype=torch.float64)
    greedy = torch.rand(2000) < 0.3
    tokens, logprobs = drawn(model, logits, temperatures, numbers, greedy=greedy)
    expected, expected_logprobs = drawn(plain, logits, temperatures, numbers, greedy=greedy)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=2e-6, rtol=1e-5)
    assert torch.equal(*(drawn(each, logits, temperatures, numbers)[0] for each in (model, plain)))


def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(tmp_path):
    model, _ = compiled(random_model(), tmp_path)
    logits = torch.full((2, VOCAB_SIZE), -torch.inf)
    logits[:, [1, 30]] = torch.tensor([0.0, 1.0])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert drawn(model, logits, 1, ends)[0].tolist() == [1, 30]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_a_log_prob_that_is_not(tmp_path, value):
    model, _ = compiled(random_model(), tmp_path)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7] = value
    _, logprobs = drawn(model, logits, 1, 0.5)
    assert not logprobs.isfinite().any()


def test_without_a_compiler_the_engine_says_so_and_samples_by_pytorch(tmp_path, without_compiler, caplog):
    source, asked = random_model(), request(9, range(8))
    path = saved(source, tmp_path)
    checkpoint = read_checkpoint(path)
    assert isinstance(fastest_model(checkpoint, SLOTS, TIMES, torch.float32, CPU, 1), TorchModel)
    assert "no-such-compiler" in caplog.text

    async def main():
        engine = engine_for(path)
        await engine.start()
        samples = await engine.generate(asked)
        await engine.stop()
        return samples

    assert max(largest_difference(source, asked, sample) for sample in asyncio.run(main())) < 1e-4


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_compiler_that_fails_is_quoted(tmp_path, without_compiler, monkeypatch, caplog):
    monkeypatch.setenv("CC", "cc --no-such-flag")
    checkpoint = read_checkpoint(saved(random_model(), tmp_path))
    assert isinstance(fastest_model(checkpoint, SLOTS, TIMES, torch.float32, CPU, 1), TorchModel)
    assert "no-such-flag" in caplog.text
