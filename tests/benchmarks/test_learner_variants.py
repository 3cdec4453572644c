"""Names of variants, and what each of them changes."""

from __future__ import annotations

import pytest

from asyncdapo.errors import ConfigError
from benchmarks.learner_step.variants import DEFAULT, Variant, parse_variants

BASE = Variant("", "", "float32", compile=True)


def test_a_name_changes_what_it_says_and_leaves_the_rest_to_the_options() -> None:
    plain, changed = parse_variants("ours,ours+bfloat16+eager+full+unshared", BASE, 8)
    assert (plain.dtype, plain.compile, plain.checkpointing, plain.shared) == ("float32", True, "none", True)
    assert (changed.dtype, changed.compile, changed.checkpointing, changed.shared) == ("bfloat16", False, "full", False)


def test_trl_is_tried_with_the_whole_batch_a_forward_pass_and_with_parts_of_it() -> None:
    assert [variant.micro_batch for variant in parse_variants("trl", BASE, 256)] == [256, 64, 32]
    assert [variant.micro_batch for variant in parse_variants("trl", BASE, 6)] == [6]


def test_all_is_every_combination_of_ours_once() -> None:
    variants = [variant for variant in parse_variants("all", BASE, 8) if variant.kind == "ours"]
    known = {(variant.dtype, variant.compile, variant.checkpointing, variant.shared) for variant in variants}
    assert len(known) == len(variants) == 2 * 2 * 3 * 2


def test_names_of_rows_are_distinct() -> None:
    names = [variant.name for variant in parse_variants(DEFAULT, BASE, 256)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("names", ["theirs", "", "ours+fast", "trl+compile", "ours,ours"])
def test_names_that_are_not_known_are_refused(names: str) -> None:
    with pytest.raises(ConfigError, match="--variants"):
        parse_variants(names, BASE, 8)
