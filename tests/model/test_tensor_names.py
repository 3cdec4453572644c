"""Which tensors of a model's files are its weights."""

from asyncdapo.model.tensor_names import weight_names

NAMES = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}


def test_a_second_copy_of_a_tied_embedding_and_angles_are_no_weights():
    more = NAMES | {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert weight_names(more, tied=True) == NAMES
    assert weight_names(more, tied=False) == NAMES | {"lm_head.weight"}
