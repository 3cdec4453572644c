"""Which tensors of a model's files are its weights: one rule for the learner, which sends them, and for the engines.

Some files hold more than the weights: a second copy of a tied embedding, angles of the rotation. Nobody sends or asks
for those. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

TIED_HEAD = "lm_head.weight"
"""The output layer: where it is tied, a copy of the embedding."""
DERIVED = "rotary_emb.inv_freq"
"""Old files hold these, which every model computes by itself."""


def weight_names(names: Iterable[str], *, tied: bool) -> set[str]:
    """Those that are weights of a model whose output layer is tied to its embedding, or isn't."""
    passed_over = (TIED_HEAD, DERIVED) if tied else (DERIVED,)
    return {name for name in names if not name.endswith(passed_over)}
