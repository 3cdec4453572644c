"""Reference vectors may say the same in other ways: inputs left out, null, or counted otherwise."""

import pytest

from tests.test_vectors_catch import VECTORS, changed, one_of
from tests.vectors.comparison import compute

GIVEN_OTHERWISE = {
    "a cap of null is none: decoupled": ({"variant": "decoupled"}, {"is_cap": None}, {"is_cap": 1e300}),
    "a cap of null is none: truncate": ({"mode": "truncate", "level": "token"}, {"cap": None}, {"cap": 1e300}),
    "mask needs no cap": ({"mode": "mask", "level": "token"}, {"cap": None}, {}),
    "truncate needs no band": ({"mode": "truncate", "level": "token"}, {"band": None}, {}),
    "no outlier band, with a scope": (
        {"mode": "mask", "level": "token"},
        {"outlier_band": None, "outlier_scope": "sequence"},
        {},
    ),
    "a scope of null is the token": ({"outlier_scope": "token"}, {"outlier_scope": None}, {}),
    "no scope is the token": ({"outlier_scope": "token"}, {"outlier_scope": ...}, {}),
    "decoupled needs no old_logp": ({"variant": "decoupled"}, {"old_logp": None}, {}),
    "ppo needs no is_cap": ({"variant": "ppo"}, {"is_cap": None, "prox_logp": None, "behav_logp": None}, {}),
    "no dual clip": ({"variant": "ppo", "dual_clip_c": None}, {"dual_clip_c": ...}, {}),
    "only prompt-mean needs groups": ({"mode": "token-mean"}, {"group_ids": None, "max_response_length": None}, {}),
    "only grpo needs eps": ({"mode": "rloo"}, {"eps": ...}, {}),
}
"""What the vector has, another way to give the inputs (`...`: left out), what both ways have instead."""


@pytest.mark.parametrize(("has", "others", "same"), GIVEN_OTHERWISE.values(), ids=GIVEN_OTHERWISE)
def test_an_optional_input_may_be_null_or_left_out(has, others, same):
    vector = next(v for v in VECTORS if has.items() <= v["inputs"].items())
    inputs = {name: value for name, value in (vector["inputs"] | others).items() if value is not ...}
    assert compute(vector | {"inputs": inputs}) == compute(changed(vector, **same))


def test_no_scope_of_outliers_is_not_their_sequence():
    """As the vector with outliers shows, in which the scope makes a difference."""
    vector = one_of("tis", outlier_scope="token")
    assert compute(vector) != compute(changed(vector, outlier_scope="sequence"))


def test_an_empty_generation_batch_counts():
    """Two of them are the limit, before there is a single group."""
    vector = one_of("dynamic_sampling", on_limit="raise")
    computed = compute(changed(vector, gen_batches=[[], [], [{"id": "a", "kept": True}]], max_num_gen_batches=2))
    assert computed["error"] == "max_num_gen_batches"
    assert computed["counters"] == {"gen_batches": 2, "prompts_consumed": 0, "train_steps": 0}


def test_the_scale_may_be_upside_down():
    assert compute(changed(one_of("reward_scaling"), source=[0.0, 0.5], correct=-1.0, incorrect=1.0)) == {
        "rewards": [1.0, 0.0]
    }


def test_the_filter_looks_at_numbers_only():
    samples = [{"group": "a", "acc": acc, "text": "x = 1", "id": None} for acc in (0, True)]
    assert compute(changed(one_of("filter"), metric="acc", samples=samples)) == {"kept": ["a"], "dropped": []}
    assert compute(changed(one_of("filter"), metric="text", samples=samples)) == {
        "error": "missing_metric",
        "group": "a",
    }


def test_avg_at_k_is_over_all_samples_of_each_problem():
    computed = compute(changed(one_of("eval", metric="avg@k"), k=2, correct=[[1, 0, 0, 0], [1, 1]]))
    assert computed == {"per_problem": [0.25, 1.0], "value": 0.625}
