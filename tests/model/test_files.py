"""Which model paths are accepted before anything starts, what is said of the others, and what a model's files say."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import INDEX, WHOLE, ModelFiles
from asyncdapo.model.location import check_model_path, check_tokenizer_path


def make_model_dir(directory, *names):
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).touch()
    return directory


def test_a_relative_path_is_looked_up_in_each_base_directory_in_turn(tmp_path):
    model = make_model_dir(tmp_path / "second/models/tiny", "config.json", "model.safetensors")
    assert check_model_path("models/tiny", [tmp_path / "first", tmp_path / "second"]) == str(model)
    nearer = make_model_dir(tmp_path / "first/models/tiny", "config.json", "model-00001-of-00002.safetensors")
    assert check_model_path("models/tiny", [tmp_path / "first", tmp_path / "second"]) == str(nearer)


def test_an_absolute_path_is_taken_as_it_is(tmp_path):
    model = make_model_dir(tmp_path / "model", "config.json", "pytorch_model.bin")
    assert check_model_path(str(model), ["/"]) == str(model)
    assert ModelFiles(str(model)).fetch() == model


@pytest.mark.parametrize(
    ("names", "problem"), [([], "has no config.json"), (["config.json"], r"has no weights \(\*.safetensors or")]
)
def test_a_directory_without_a_model_is_refused(tmp_path, names, problem):
    make_model_dir(tmp_path / "model", *names)
    with pytest.raises(ConfigError, match=f"model.path: {problem}"):
        check_model_path("model", [tmp_path])


@pytest.mark.parametrize("path", ["./missing", "/missing/model", "~/missing/model", "a/b/c"])
def test_a_missing_directory_is_refused_a_relative_one_with_the_places_that_were_looked_at(tmp_path, path):
    with pytest.raises(ConfigError, match="model.path: no such directory, got .*model.path=ORG/NAME") as caught:
        check_model_path(path, [tmp_path, tmp_path])
    assert str(caught.value).count(str(tmp_path)) == (0 if path[0] in "/~" else 1)


def test_a_tokenizer_is_a_directory_with_its_file(tmp_path):
    tokenizer = make_model_dir(tmp_path / "words", "tokenizer.json")
    assert check_tokenizer_path("words", [tmp_path]) == str(tokenizer)
    make_model_dir(tmp_path / "other")
    with pytest.raises(ConfigError, match="model.tokenizer: has no tokenizer.json, got 'other'"):
        check_tokenizer_path("other", [tmp_path])
    with pytest.raises(ConfigError, match="model.tokenizer: no such directory, got './missing'"):
        check_tokenizer_path("./missing", [tmp_path])


def check_offline(code, cache):
    """Run `code` in a process that may not use the network, with an own cache."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


CHECK = "from asyncdapo.model.location import check_model_path; print(check_model_path('some/model', ['.']))"


def test_an_id_that_nobody_knows_is_refused(tmp_path):
    done = check_offline(CHECK, tmp_path)
    assert done.returncode == 1
    assert (
        "model.path: is neither a directory nor a model in the local Hugging Face cache or on the hub, got"
        in done.stderr
    )


def test_an_id_in_the_local_cache_is_accepted_without_a_network(tmp_path):
    repository = tmp_path / "hub/models--some--model"
    make_model_dir(repository / "snapshots/abc123", "config.json")
    make_model_dir(repository / "refs")
    (repository / "refs/main").write_text("abc123")
    done = check_offline(CHECK, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "some/model"), done.stderr


def test_a_tokenizer_in_the_local_cache_is_accepted_and_one_that_nobody_knows_is_refused(tmp_path):
    repository = tmp_path / "hub/models--some--words"
    make_model_dir(repository / "snapshots/abc123", "tokenizer.json")
    make_model_dir(repository / "refs")
    (repository / "refs/main").write_text("abc123")
    code = "from asyncdapo.model.location import check_tokenizer_path; print(check_tokenizer_path('{}', ['.']))"
    done = check_offline(code.format("some/words"), tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "some/words"), done.stderr
    problem = "model.tokenizer: is neither a directory nor a tokenizer in the local Hugging Face cache or on the hub"
    assert problem in check_offline(code.format("some/other"), tmp_path).stderr


def test_the_check_imports_neither_torch_nor_transformers(tmp_path):
    code = "import sys, asyncdapo.model.files; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    assert check_offline(code, tmp_path).stdout.strip() == "set()"


def shapes(directory):
    return {name: tensor.shape for name, tensor in ModelFiles(str(directory)).tensors.items()}


def test_shapes_come_from_the_headers_of_the_model_s_own_files(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-1-of-2.safetensors")
    save_file({"b": torch.zeros(5)}, tmp_path / "model-2-of-2.safetensors")
    save_file({"layers.0.wq": torch.zeros(7)}, tmp_path / "consolidated.safetensors")  # the same in another format
    assert shapes(tmp_path) == {}
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
    )
    assert shapes(tmp_path) == {"a": (2, 3), "b": (5,)}


def test_a_file_that_is_cut_short_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3)}, file)
    whole = file.read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(
            ConfigError, match=r"model\.path: can't read model\.safetensors: .*fetch the model's files again"
        ):
            shapes(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_cannot_be_read_is_named(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ConfigError, match=rf"model\.path: can't read {INDEX}"):
        shapes(tmp_path)


def test_a_file_of_the_index_that_is_missing_is_named(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-1-of-1.safetensors"}}')
    with pytest.raises(ConfigError, match=r"model\.path: can't read model-1-of-1\.safetensors"):
        shapes(tmp_path)


def test_a_part_of_a_tensor_can_be_read_from_the_file_that_holds_it(tmp_path):
    matrix_AB = torch.arange(6.0).reshape(3, 2)
    save_file({"a": matrix_AB.bfloat16()}, tmp_path / WHOLE)
    stored = ModelFiles(str(tmp_path)).tensors["a"]
    assert (stored.file, stored.dtype, stored.shape) == (tmp_path / WHOLE, "BF16", (3, 2))
    with safe_open(stored.file, "pt") as file:
        assert torch.equal(file.get_slice("a")[1:].float(), matrix_AB[1:])


def test_files_that_are_not_here_yet_say_nothing_and_are_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = ModelFiles("some/model")
    assert (files.here, files.config, files.shape, files.vocab_size) == (None, None, None, None)
    assert (files.weights, files.safetensors, files.tensors) == ([], [], {})
    assert files.digests() == {"id": "some/model"}


def test_config_json_is_read_once_and_anew_in_another_process(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    files = ModelFiles(str(tmp_path), "model.reference")
    assert files.vocab_size == 7
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    assert files.vocab_size == 7
    sent = pickle.loads(pickle.dumps(files))
    assert (sent, sent.vocab_size) == (files, 8)
