"""The layout of safetensors files, as the library reads them."""

from __future__ import annotations

import json
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from asyncdapo.learner.storage.layout import lay_out
from asyncdapo.model.files import INDEX, ModelFiles

SHAPES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=8), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1
)


@given(SHAPES, st.integers(4, 400))
def test_tensors_written_at_their_places_are_read_by_the_library(tmp_path_factory, shapes, file_bytes) -> None:
    directory, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    layout = lay_out(shapes, "F32", 4, file_bytes)
    for file, header in layout.headers.items():
        (directory / file).write_bytes(header)
    for name, place in layout.places.items():
        with (directory / place.file).open("rb+") as file:
            file.seek(place.offset)
            file.write(tensors[name].tobytes())
    (directory / "config.json").write_text("{}")
    if layout.index:
        (directory / INDEX).write_bytes(layout.index)
        total = json.loads(layout.index)["metadata"]["total_size"]
        assert total == sum(4 * math.prod(shape) for shape in shapes.values())
    stored = ModelFiles(str(directory))
    stored.check_whole()
    assert {name: tensor.shape for name, tensor in stored.tensors.items()} == shapes
    for file in layout.headers:
        for name, tensor in load_file(directory / file).items():
            assert np.array_equal(tensor, tensors[name])
        of_file = [math.prod(shapes[name]) for name in shapes if layout.places[name].file == file]
        assert len(of_file) == 1 or 4 * sum(of_file) <= file_bytes
