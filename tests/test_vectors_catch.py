"""The check of the reference vectors notices everything: each leaf that is off, and all that it doesn't know."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_vectors import OURS
from tests.vectors.comparison import CHECKS, compute, differences
from tests.vectors.file import MisunderstoodError, read
from tests.vectors.make import FILE, text

ROOT = Path(__file__).parents[1]
VECTORS = [vector for path in OURS for vector in read(path)]
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['group']}: {vector['name']}")


def leaves(value, path=()):
    """Paths to everything that is neither a record nor a list, and to each empty list."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = enumerate(value)
    else:
        return [path]
    return [leaf for key, part in parts for leaf in leaves(part, (*path, key))]


def shifted(value, tolerance):
    """Another value: numbers by ten tolerances, what is compared exactly by what it likes."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + (10 * tolerance * max(1.0, abs(value)) or 1e-9)
    if isinstance(value, list):
        return ["another"]
    return "another" if value is None else value + "s"


def with_shifted(expected, paths, tolerance):
    expected = copy.deepcopy(expected)
    for *parents, last in paths:
        place = expected
        for key in parents:
            place = place[key]
        place[last] = shifted(place[last], tolerance)
    return expected


def changed(vector, **changes):
    """A copy in which some inputs are others."""
    return vector | {"inputs": vector["inputs"] | changes}


def one_of(group, **inputs):
    """The first vector of a group that has these inputs."""
    return next(v for v in VECTORS if v["group"] == group and inputs.items() <= v["inputs"].items())


@each_vector
def test_every_single_leaf_that_is_off_by_ten_tolerances_is_noticed(vector):
    computed, tolerance = compute(vector), vector["tolerance"]
    assert not list(differences(computed, vector["expected"], tolerance))
    for path in leaves(vector["expected"]):
        expected = with_shifted(vector["expected"], [path], tolerance)
        assert len(list(differences(computed, expected, tolerance))) == 1, path


@each_vector
def test_a_copy_with_everything_shifted_differs_in_every_leaf(vector):
    paths = leaves(vector["expected"])
    expected = with_shifted(vector["expected"], paths, vector["tolerance"])
    assert len(list(differences(compute(vector), expected, vector["tolerance"]))) == len(paths) > 0


@each_vector
def test_an_expected_value_that_nothing_computes_is_noticed(vector):
    [difference] = differences(compute(vector), {**vector["expected"], "unheard_of": 1.0}, vector["tolerance"])
    assert difference == "expected.unheard_of: nothing computes it"


@each_vector
def test_an_input_that_nothing_reads_is_noticed(vector):
    with pytest.raises(MisunderstoodError, match="inputs that nothing reads: unheard_of"):
        compute(changed(vector, unheard_of=1))


def test_a_count_that_became_a_verdict_or_a_list_of_another_length_is_noticed():
    computed = {"n": 1, "acc": True, "ids": ["a", "b"], "loss": 1.0}
    for expected in ({"n": True}, {"acc": 1}, {"ids": ["a"]}, {"ids": ["b", "a"]}, {"ids": "ab"}, {"loss": True}):
        assert list(differences(computed, expected, tolerance=0.1))
    assert not list(differences(computed, computed, tolerance=0.0))
    assert list(differences({"loss": float("nan")}, {"loss": 1.0}, tolerance=0.1))


def test_a_vector_that_expects_nothing_is_noticed():
    assert list(differences({"loss": 1.0}, {}, tolerance=1.0)) == ["expected: nothing is expected"]


def test_a_record_that_lacks_an_entry_is_noticed():
    computed = {"loss": 1.0, "groups": {"a": {"mean": 0.0, "n": 2}}, "steps": [{"used": 1, "fill": []}]}
    left_out = {
        "expected.groups.a: nothing is expected": {"groups": {}},
        "expected.groups.a.n: nothing is expected": {"groups": {"a": {"mean": 0.0}}},
        "expected.steps[0].used: nothing is expected": {"steps": [{"fill": []}]},
    }
    for difference, expected in left_out.items():
        assert list(differences(computed, expected, tolerance=0.1)) == [difference]
    assert not list(differences(computed, {"loss": 1.0}, tolerance=0.1))


def test_an_unknown_group_is_named():
    with pytest.raises(MisunderstoodError, match="unknown group 'entropie', known are policy_loss"):
        compute(VECTORS[0] | {"group": "entropie"})


@pytest.mark.parametrize(
    ("group", "name"),
    [("policy_loss", "variant"), ("policy_loss", "loss_agg"), ("agg", "mode"), ("advantage", "mode")]
    + [("overlong", "rule"), ("tis", "mode"), ("tis", "level"), ("eval", "metric"), ("dynamic_sampling", "on_limit")],
)
def test_an_unknown_variant_mode_level_rule_or_metric_is_named(group, name):
    with pytest.raises(MisunderstoodError, match=f"unknown {name} 'unheard_of'"):
        compute(changed(one_of(group), **{name: "unheard_of"}))


def test_unknown_things_inside_the_inputs_are_named():
    tis = changed(one_of("tis", outlier_scope="token"), outlier_scope="prompt")
    with pytest.raises(MisunderstoodError, match="unknown outlier_scope 'prompt'"):
        compute(tis)
    reasons = changed(one_of("overlong", rule="filtering"), finish_reasons=["stop", "eos", "stop", "length"])
    with pytest.raises(MisunderstoodError, match="unknown finish reasons: eos"):
        compute(reasons)
    splits = changed(one_of("agg"), splits=[{"name": "pipelined", "stages": []}])
    with pytest.raises(MisunderstoodError, match="a record of input 'splits' has"):
        compute(splits)
    arrivals = changed(one_of("dynamic_sampling"), gen_batches=[[{"id": "a", "verdict": "kept"}]])
    with pytest.raises(MisunderstoodError, match="a group of input 'gen_batches' has"):
        compute(arrivals)
    with pytest.raises(MisunderstoodError, match="threshold is 0.1, the filter's is 1e-06"):
        compute(changed(one_of("filter"), threshold=0.1))


def test_an_input_that_is_missing_is_named():
    vector = one_of("agg", mode="seq-mean-token-sum-norm")
    inputs = {name: value for name, value in vector["inputs"].items() if name != "max_response_length"}
    with pytest.raises(MisunderstoodError, match="input 'max_response_length' is missing"):
        compute(vector | {"inputs": inputs})


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


def test_every_group_that_can_be_checked_has_a_vector():
    assert set(CHECKS) == {vector["group"] for vector in VECTORS}


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"count": 2}, "count is 2, it holds 1"), ({"count": 0, "vectors": []}, "count is 0, it holds 0")]
    + [({"format": "dapo-vectors/2"}, "unknown format 'dapo-vectors/2'")],
)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path, change, problem):
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps({"format": "dapo-vectors/1", "count": 1, "vectors": VECTORS[:1]} | change))
    with pytest.raises(MisunderstoodError, match=problem):
        read(path)


def test_our_file_is_what_the_reference_makes():
    assert FILE.read_text() == text()


def test_the_command_runs_one_test_for_each_vector_of_the_file_that_is_named(tmp_path):
    off = VECTORS[1] | {"expected": VECTORS[1]["expected"] | {"loss": 0.0}}
    path = tmp_path / "others.json"
    content = {"format": "dapo-vectors/1", "count": 3, "vectors": [VECTORS[0], off, VECTORS[0] | {"group": "other"}]}
    path.write_text(json.dumps(content))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "tests/test_vectors.py"],
        cwd=ROOT,
        env=os.environ | {"ASYNCDAPO_VECTORS": str(path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-1].startswith("2 failed, 1 passed in")
