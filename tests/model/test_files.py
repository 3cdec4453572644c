"""Which model paths are accepted before anything starts, and what is said of the others."""

import subprocess
import sys

import pytest

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import check_model_path, check_tokenizer_path, model_directory


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
    assert model_directory(str(model)) == model


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


CHECK = "from asyncdapo.model.files import check_model_path; print(check_model_path('some/model', ['.']))"


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
    code = "from asyncdapo.model.files import check_tokenizer_path; print(check_tokenizer_path('{}', ['.']))"
    done = check_offline(code.format("some/words"), tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "some/words"), done.stderr
    problem = "model.tokenizer: is neither a directory nor a tokenizer in the local Hugging Face cache or on the hub"
    assert problem in check_offline(code.format("some/other"), tmp_path).stderr


def test_the_check_imports_neither_torch_nor_transformers(tmp_path):
    code = "import sys, asyncdapo.model.files; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    assert check_offline(code, tmp_path).stdout.strip() == "set()"
