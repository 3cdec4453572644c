"""What tests of log-probs share: the plain computation, inputs for it, and what is allocated meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def plain(hidden_NH, weight_VH, targets_N, *, temperature, bias_V=None, entropy_gradient=False):
    scores_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
    logprobs_NV = (scores_NV / temperature).log_softmax(-1)
    kept_NV = logprobs_NV if entropy_gradient else logprobs_NV.detach()
    return logprobs_NV.gather(-1, targets_N[:, None])[:, 0], -(kept_NV.exp() * kept_NV).sum(-1)


def inputs(num_tokens=7, size=5, num_columns=11, *, bias=True, dtype=torch.float64, seed=0, spread=2.0):
    """Hidden states, weight and bias as leaves that ask for gradients, and targets."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, size), (num_columns, size), (num_columns,)][: 3 if bias else 2]
    leaves = [spread * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    return *leaves, *([] if bias else [None]), torch.randint(num_columns, (num_tokens,), generator=generator)


def run(function, hidden_NH, weight_VH, bias_V, targets_N, *, temperature=1.0, entropy_gradient=False, seed=0):
    """Log-probs, entropies, and the gradients of every leaf under random weights of both."""
    leaves = [leaf for leaf in (hidden_NH, weight_VH, bias_V) if leaf is not None and leaf.requires_grad]
    options = {"temperature": temperature, "bias_V": bias_V, "entropy_gradient": entropy_gradient}
    logp_N, entropy_N = function(hidden_NH, weight_VH, targets_N, **options)
    generator = torch.Generator().manual_seed(seed)
    upstream_2N = torch.randn((2, len(targets_N)), generator=generator, dtype=torch.float64).to(logp_N.dtype)
    total = (logp_N * upstream_2N[0]).sum() + (entropy_N * upstream_2N[1]).sum()
    return [logp_N.detach(), entropy_N.detach(), *torch.autograd.grad(total, leaves)]


def assert_close(got, expected, tolerance):
    """Relative to the largest number of each tensor."""
    for part, reference in zip(got, expected, strict=True):
        assert part.shape == reference.shape
        scale = float(reference.abs().max()) if reference.numel() else 1.0
        torch.testing.assert_close(part.double(), reference.double(), rtol=tolerance, atol=tolerance * max(scale, 1.0))


class Allocations(TorchDispatchMode):
    """Storages made while it is on: their sizes in elements, and the shapes of the tensors they were made for."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.shapes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.sizes.append(leaf.untyped_storage().nbytes() // leaf.element_size())
                self.shapes.append(leaf.shape)
        return out
