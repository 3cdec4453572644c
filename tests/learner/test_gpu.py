"""The learner on a GPU: a whole train step, and ranks that sum over NCCL. Skipped where there is none."""

from __future__ import annotations

import os

import pytest
import torch

from asyncdapo.learner.step.ranks import GradientGroup, Ranks
from tests.learner.ranks import JOIN_TIMEOUT_S, spawned
from tests.learner.test_equal_gradients import LOSSES, a_batch
from tests.learner.tiny import MEASURED, make_batch, make_learner, save, save_tiny_llama, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_train_step_on_a_gpu_is_that_of_a_cpu(tmp_path, loss):
    path, case = save_tiny_llama(tmp_path), a_batch()
    settings = {"loss": LOSSES[loss], "tokens_per_microbatch": 64, "epochs": 2, "dtype": "float32", "compile": False}
    on_gpu, on_cpu = (make_learner(path, device=device, **settings) for device in ("cuda", "cpu"))
    got, expected = train(on_gpu, *case), train(on_cpu, *case)
    for name in expected.keys() - MEASURED:
        assert got[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-4), name
    for name, weight in on_cpu.weights().items():
        torch.testing.assert_close(on_gpu.weights()[name].cpu(), weight, atol=1e-3, rtol=1e-2)


def test_a_checkpoint_of_a_gpu_resumes_bit_for_bit(tmp_path):
    path = save_tiny_llama(tmp_path / "model")
    straight, restored = (make_learner(path, device="cuda", staleness_bound=2) for _ in range(2))
    train(straight, *make_batch(step=1))
    restored.restore(save(straight, tmp_path / "run", 1))
    assert restored.digest() == straight.digest()


def sum_over_nccl(rank: int, address: str, pipe) -> None:
    """NCCL refuses two ranks on one GPU unless they seem to be on different hosts."""
    os.environ |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    group = GradientGroup.join(address, rank, 2, "nccl", JOIN_TIMEOUT_S)
    pipe.send(summed_at(group))


def summed_at(group: GradientGroup) -> list[list[float]]:
    """Of a tensor on the GPU, and of one on the CPU, as metrics are."""
    ranks = Ranks(group.rank, 2)
    ranks.join(group)
    ranks.check_same(b"weights", "weights")
    tensors = torch.full((3,), 1.0 + group.rank, device="cuda"), torch.ones(2, dtype=torch.float64)
    return [ranks.sum(tensor).tolist() for tensor in tensors]


def test_two_ranks_sum_numbers_over_nccl(monkeypatch):
    for key, value in {"NCCL_HOSTID": "rank-0", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}.items():
        monkeypatch.setenv(key, value)
    group = GradientGroup.create_master("127.0.0.1", 2, "nccl", JOIN_TIMEOUT_S)
    ours, theirs = spawned.Pipe()
    other = spawned.Process(target=sum_over_nccl, args=(1, group.address, theirs), daemon=True)
    other.start()
    group.connect()
    assert summed_at(group) == [[3.0, 3.0, 3.0], [2.0, 2.0]]
    assert ours.recv() == [[3.0, 3.0, 3.0], [2.0, 2.0]]
    other.join()
    group.close()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_in_bfloat16_with_the_flash_kernel_is_near_that_of_a_cpu(tmp_path, compile, checkpointing):
    path, case = save_tiny_llama(tmp_path), make_batch(num_groups=8, seed=11)
    settings = {"tokens_per_microbatch": 64, "activation_checkpointing": checkpointing, "compile": compile}
    on_gpu, on_cpu = make_learner(path, device="cuda", **settings), make_learner(path)
    got, expected = train(on_gpu, *case), train(on_cpu, *case)
    for name in ("learner/loss", "learner/entropy", "learner/ratio_mean", "learner/grad_norm"):
        assert got[name] == pytest.approx(expected[name], rel=0.05, abs=0.01), name
