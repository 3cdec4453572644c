"""`rollout.engine_args`: how a mapping of a file is changed on the command line."""

from asyncdapo.config.config import load_config, to_yaml


def test_null_clears_the_mapping_of_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {path: m}\nrollout: {engine: vllm, engine_args: {enforce_eager: true}}\n")
    assert load_config(tmp_path / "c.yaml").rollout.engine_args == {"enforce_eager": True}
    cleared = load_config(tmp_path / "c.yaml", ["rollout.engine_args=null"])
    assert cleared.rollout.engine_args == {}
    (tmp_path / "effective.yaml").write_text(to_yaml(cleared))
    assert load_config(tmp_path / "effective.yaml") == cleared
    on_torch = ["rollout.engine_args=null", "rollout.engine=torch"]
    assert load_config(tmp_path / "c.yaml", on_torch).rollout.engine == "torch"
