"""Seeds: every random draw of a run comes from the run's seed and from what is drawn.

In: integers that name a draw (run seed, prompt id, sample index). Out: a seed. The same integers give the same seed in
every process, and neighbouring ones give unrelated seeds. Does not own: the generators that are seeded.
"""

from __future__ import annotations


def sample_seed(*parts: int) -> int:
    """63-bit seed from integers (run seed, prompt id, sample index). The attempt is left out on purpose.

    SplitMix64 over the parts (Steele, Lea, Flood 2014), so that neighbouring seeds are unrelated.
    """
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFF_FFFF_FFFF_FFFF)) + 0x9E37_79B9_7F4A_7C15 & 0xFFFF_FFFF_FFFF_FFFF
        state = (state ^ state >> 30) * 0xBF58_476D_1CE4_E5B9 & 0xFFFF_FFFF_FFFF_FFFF
        state = (state ^ state >> 27) * 0x94D0_49BB_1331_11EB & 0xFFFF_FFFF_FFFF_FFFF
        state ^= state >> 31
    return state >> 1


def eval_seed(seed: int, prompt_id: int, sample: int) -> int:
    """Seed of a held-out prompt's completion. It doesn't depend on how prompts and samples are spread over requests.
    The first sample has the seed that a single one would have."""
    return sample_seed(seed, prompt_id, sample) if sample else sample_seed(seed, prompt_id)
