"""The reference vectors, one test for each: every rule of DAPO, and of what others put in its place, by the numbers.

    ASYNCDAPO_VECTORS=FILE pytest tests/test_vectors.py      of any file of the format; ours when none is named

All values come from the functions that training calls, in float64. A vector fails when any leaf of its `expected` is
off, and when anything in it is unknown; so as many tests pass as the file says it has vectors.
"""

import os
from pathlib import Path

import pytest

from tests.vectors.comparison import compute, differences
from tests.vectors.file import read
from tests.vectors.make import FILE

OURS = [Path(__file__).parent / "vectors" / "dapo_vectors.json", FILE]
NAMED = os.environ.get("ASYNCDAPO_VECTORS")


@pytest.mark.parametrize(
    "vector",
    [vector for path in ([Path(NAMED)] if NAMED else OURS) for vector in read(path)],
    ids=lambda vector: f"{vector['group']}: {vector['name']}",
)
def test_the_vector_is_reproduced(vector):
    assert not list(differences(compute(vector), vector["expected"], vector["tolerance"]))
