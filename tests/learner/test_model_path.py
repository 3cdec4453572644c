"""Which model paths are accepted before anything starts, and what is said of the others."""

import subprocess
import sys

import pytest

from asyncdapo.errors import ConfigError
from asyncdapo.learner.model_path import check_model_path, model_directory


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
def test_a_missing_directory_is_refused_with_the_places_that_were_looked_at(tmp_path, path):
    with pytest.raises(ConfigError, match=f"model.path: is not a directory, got .*looked up in {tmp_path}"):
        check_model_path(path, [tmp_path])


def check_offline(code, cache):
    """Run `code` in a process that may not use the network, with an own cache."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


CHECK = "from asyncdapo.learner.model_path import check_model_path; print(check_model_path('some/model', ['.']))"


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


def test_the_check_imports_neither_torch_nor_transformers(tmp_path):
    code = "import sys, asyncdapo.learner.model_path; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    assert check_offline(code, tmp_path).stdout.strip() == "set()"
