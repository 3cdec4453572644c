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


@pytest.mark.parametrize("group", CHECKS)
def test_in_every_vector_of_a_group_whatever_is_off_is_noticed(group):
    """Each leaf by ten tolerances, alone and with all others, and an expected value that nothing computes."""
    for vector in [vector for vector in VECTORS if vector["group"] == group]:
        computed, paths = compute(vector), leaves(vector["expected"])

        def noticed(expected, computed=computed, tolerance=vector["tolerance"]):
            return list(differences(computed, expected, tolerance))

        assert paths, vector["name"]
        assert noticed(vector["expected"]) == []
        for path in paths:
            shifted_there = with_shifted(vector["expected"], [path], vector["tolerance"])
            assert len(noticed(shifted_there)) == 1, (vector["name"], path)
        shifted_everywhere = with_shifted(vector["expected"], paths, vector["tolerance"])
        assert len(noticed(shifted_everywhere)) == len(paths), vector["name"]
        unknown = noticed({**vector["expected"], "unheard_of": 1.0})
        assert unknown == ["expected.unheard_of: nothing computes it"], vector["name"]


@pytest.mark.parametrize("group", CHECKS)
def test_an_input_that_nothing_reads_is_noticed_in_every_vector_of_a_group(group):
    for vector in [vector for vector in VECTORS if vector["group"] == group]:
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
