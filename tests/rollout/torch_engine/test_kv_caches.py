"""PyTorch's cache attends like the formula, whatever earlier sequences have left in its slots."""

import numpy as np
import pytest
import torch

from asyncdapo.rollout.torch_engine.checkpoint import ModelShape
from asyncdapo.rollout.torch_engine.kv_cache import SdpaCache
from asyncdapo.rollout.torch_engine.workspace import Workspace

SLOTS, TIMES, CPU = 5, 100, torch.device("cpu")


def shape_of(num_heads, num_kv_heads, head_dim):
    return ModelShape(
        vocab_size=11,
        hidden_size=num_heads * head_dim,
        intermediate_size=16,
        num_layers=2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tied_embeddings=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        max_positions=TIMES,
        norm_eps=1e-5,
    )


def attended(queries_QD, kv_KTD):
    """Attention by the formula, of one token of one sequence."""
    keys_KTD, values_KTD = kv_KTD.chunk(2)
    shared = len(queries_QD) // len(keys_KTD)
    heads = [(query, keys_KTD[head // shared], values_KTD[head // shared]) for head, query in enumerate(queries_QD)]
    return torch.cat([(keys @ query).softmax(0) @ values for query, keys, values in heads])


@pytest.mark.parametrize("sizes", [(4, 2, 16), (3, 3, 8), (6, 1, 64)])
def test_a_token_attends_to_the_whole_of_its_own_sequence_and_to_nothing_else(sizes):
    torch.manual_seed(0)
    shape = shape_of(*sizes)
    cache = SdpaCache(shape, SLOTS, TIMES, torch.float32, CPU)
    rows = Workspace(shape, SLOTS, torch.float32, CPU).rows((2, 2))
    prompts = [torch.randn(2, 1, 2 * shape.num_kv_heads, length, shape.head_dim) for length in (31, 70, 1, 32)]
    cache.write(np.arange(SLOTS), 50 * torch.randn(2, 1, 2 * shape.num_kv_heads, TIMES, shape.head_dim))
    for slot, prompt in zip((0, 4, 2, 3), prompts, strict=True):
        cache.write(np.array([slot]), prompt)
    cache.move(4, 1, 70)
    sequences = [[prompt[layer, 0] for prompt in prompts] for layer in range(2)]
    for _ in range(2):  # the second token attends to the first, which may be the last one of its chunk
        positions_B = torch.tensor([kv_KTD.shape[1] for kv_KTD in sequences[0]])
        attend = cache.attention(positions_B, [(0, 2, 96), (2, 4, 64)])
        for layer in range(2):
            rows.heads_MR.normal_()
            result_BQ = attend(layer, rows)
            for slot, result_Q in enumerate(result_BQ):
                kv_KTD = torch.cat([sequences[layer][slot], rows.kv_MKD[slot].unsqueeze(1)], 1)
                torch.testing.assert_close(result_Q, attended(rows.queries_MQD[slot], kv_KTD))
                sequences[layer][slot] = kv_KTD
