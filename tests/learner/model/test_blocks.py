"""Compiled and checkpointed blocks: the gradients of the plain model, less kept for them, no length compiled in."""

from __future__ import annotations

import sysconfig
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from asyncdapo.config.config import load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.checks.preflight import check_config
from asyncdapo.errors import ConfigError
from asyncdapo.learner.model.blocks import compiles, settle_blocks
from asyncdapo.learner.model.compiler import check_compiler
from asyncdapo.learner.model.packing import pack
from asyncdapo.learner.model.policy import Policy
from tests.learner.tiny import (
    VOCAB_SIZE,
    make_batch,
    make_learner,
    make_row,
    needs_compiler,
    save_tiny_llama,
    tiny_llama,
    train,
)

CPU = torch.device("cpu")
CHECKPOINTING = ["none", "selective", "full"]


def exact_llama(**changes) -> PreTrainedModel:
    """In float64 throughout; the norms of Hugging Face's Llama compute in float32 whatever comes in."""
    model = tiny_llama(**changes).double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, norm)
    return model


def pass_over(model: PreTrainedModel, num_tokens: int) -> Tensor:
    """Outputs for a prompt of so many tokens with two responses, and another prompt with one."""
    rows = [make_row(num_tokens, num_tokens), make_row(num_tokens, 3), make_row(4, 7, prompt=1)]
    packed = pack(rows, CPU)
    return Policy(model).packed_outputs(packed.tokens_S % VOCAB_SIZE, packed.positions_S, packed.layout)


def gradient(model: PreTrainedModel, num_tokens: int) -> Tensor:
    model.zero_grad()
    outputs_SH = pass_over(model, num_tokens)
    (outputs_SH * torch.sin(torch.arange(outputs_SH.numel())).view_as(outputs_SH)).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def kept_bytes(model: PreTrainedModel) -> int:
    """What a forward pass keeps for its backward pass, the weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        outputs_SH = pass_over(model, num_tokens=12)
    assert outputs_SH.requires_grad  # what it keeps is still there: no address was used twice
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_checkpointing_leaves_gradients_as_they_are(checkpointing: str) -> None:
    plain, model = exact_llama(), exact_llama()
    settle_blocks(model, model.device, compile=False, checkpointing=checkpointing)
    for num_tokens in (9, 20):
        expected = gradient(plain, num_tokens)
        assert (gradient(model, num_tokens) - expected).norm() <= 1e-12 * expected.norm()


@needs_compiler
@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [("aot_eager", "selective"), *(("inductor", name) for name in CHECKPOINTING)],
)
def test_compiled_blocks_leave_gradients_as_they_are_and_share_graphs_among_all_lengths(
    backend: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More blocks and more lengths than dynamo would compile anew, before it gave up and compiled none."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    plain, model = (exact_llama(num_hidden_layers=10) for _ in range(2))
    settle_blocks(model, model.device, compile=True, checkpointing=checkpointing)
    num_graphs = set()
    for num_tokens in (9, 20, 5, 31, 14, 8, 25, 3, 17, 40):
        expected = gradient(plain, num_tokens)
        assert (gradient(model, num_tokens) - expected).norm() <= 1e-9 * expected.norm()
        num_graphs.add(graphs["unique_graphs"])
    assert len(num_graphs) == 1
    assert 1 <= num_graphs.pop() <= 5


@needs_compiler
@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_learner_with_compiled_blocks_makes_the_same_steps(tmp_path, checkpointing: str, dtype: str) -> None:
    torch._dynamo.reset()
    path = save_tiny_llama(tmp_path)
    settings = {"dtype": dtype, "updates_per_step": 2, "tokens_per_microbatch": 60}
    plain = make_learner(path, **settings)
    learner = make_learner(path, compile=True, activation_checkpointing=checkpointing, **settings)
    for step in (1, 2, 3):
        metrics, expected = (train(one, *make_batch(step, seed=step)) for one in (learner, plain))
        tolerance = {"float32": 1e-4, "bfloat16": 0.05}[dtype]
        assert metrics["learner/grad_norm"] == pytest.approx(expected["learner/grad_norm"], rel=tolerance)


def test_less_is_kept_the_more_is_computed_again() -> None:
    models = {name: tiny_llama(num_hidden_layers=4, intermediate_size=128) for name in CHECKPOINTING}
    for name, model in models.items():
        settle_blocks(model, model.device, compile=False, checkpointing=name)
    none, selective, full = (kept_bytes(model) for model in models.values())
    assert none > 1.5 * selective
    assert selective > 1.5 * full


def test_passes_without_gradient_need_no_checkpoint() -> None:
    plain, model = tiny_llama(), tiny_llama()
    settle_blocks(model, model.device, compile=False, checkpointing="full")
    with torch.no_grad():
        assert torch.equal(pass_over(model, 9), pass_over(plain, 9))


def test_blocks_are_left_alone_unless_asked() -> None:
    model = tiny_llama()
    settle_blocks(model, model.device, compile=False, checkpointing="none")
    assert not any("forward" in vars(module) for module in model.modules())


def test_blocks_of_another_name_are_found() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=29, n_embd=16, n_layer=2, n_head=2)).eval()
    settle_blocks(model, model.device, compile=False, checkpointing="selective")
    assert all("forward" in vars(block.mlp) for block in model.transformer.h)


def test_a_model_whose_blocks_or_mlps_cannot_be_told_is_refused() -> None:
    class Opaque(nn.Module):
        @property
        def base_model(self) -> nn.Module:
            return self

    with pytest.raises(ConfigError, match="learner.activation_checkpointing: needs a model whose blocks can be told"):
        settle_blocks(Opaque(), torch.device("cpu"), compile=True, checkpointing="full")
    with pytest.raises(ConfigError, match="learner.compile: needs a model whose blocks .* Opaque is none, got True"):
        settle_blocks(Opaque(), torch.device("cpu"), compile=True, checkpointing="none")
    sizes = {"vocab_size": 29, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16))
    with pytest.raises(ConfigError, match="learner.activation_checkpointing: .* OPTDecoderLayer has none"):
        settle_blocks(opt, opt.device, compile=False, checkpointing="selective")
    settle_blocks(opt, opt.device, compile=False, checkpointing="full")


@needs_compiler
def test_blocks_are_compiled_on_a_gpu_unless_asked_otherwise() -> None:
    asked = [(asked, device) for asked in (None, True, False) for device in ("cpu", "cuda")]
    assert [compiles(asked, torch.device(device)) for asked, device in asked] == [False, True, True, True, False, False]


@needs_compiler
def test_headers_of_python_that_are_missing_are_found_out_before_anything_is_compiled(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=rf"there is no {tmp_path}/Python.h.*python3\.\d+-dev.*learner.compile=false"):
        check_compiler("cpu", True)
    (tmp_path / "Python.h").touch()
    check_compiler("cpu", True)


@needs_compiler
def test_a_missing_compiler_is_found_out_before_the_run_and_by_the_learner(monkeypatch, tmp_path) -> None:
    check_compiler("cpu", True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = "learner.compile: needs a compiler on this machine, and there is no no-such-compiler, got True"
    asked = ["learner.compile=true", "learner.device=cpu"]
    with pytest.raises(ConfigError, match=words):
        check_config(load_config(find_config("quickstart"), asked))
    with pytest.raises(ConfigError, match=words):
        make_learner(save_tiny_llama(tmp_path), compile=True)
    check_compiler("auto", True)  # it may be for a GPU
    monkeypatch.setenv("CC", "none-either")
    with pytest.raises(ConfigError, match="no-such-compiler or none-either"):
        check_compiler("auto", True)
    with pytest.raises(ConfigError, match="there is no none-either .*learner.compile=false"):
        compiles(None, torch.device("cuda"))
