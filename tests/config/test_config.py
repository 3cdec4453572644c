"""The configuration: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from asyncdapo.config.config import SECTIONS, config_from_dict, load_config, to_dict, to_yaml
from asyncdapo.config.field_docs import field_docs
from asyncdapo.config.found import find_config
from asyncdapo.config.mistakes import LIMITS, convert_section, limits_of, numbers_of
from asyncdapo.errors import ConfigError, UserError

QUICKSTART = find_config("quickstart")


def test_the_quickstart_is_the_measured_recipe() -> None:
    config = load_config(QUICKSTART)
    assert (config.replay.prompts_per_step, config.rollout.group_size, config.run.steps) == (16, 16, 36)
    assert (config.replay.run_ahead, config.replay.max_staleness) == (1.0, 2)
    assert (config.rollout.num_workers, config.rollout.slots) == (1, 64)
    assert (config.rollout.threads, config.learner.threads) == (1, 1)
    assert (config.learner.lr, config.learner.warmup_steps, config.learner.betas) == (2e-4, 3, (0.9, 0.999))
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.dual_clip) == (0.2, 0.28, 10.0)


def test_a_number_of_workers_is_a_range_of_one() -> None:
    ranges = {"3": (3, 3), "{min: 1, max: 4}": (1, 4)}
    for written, (least, most) in ranges.items():
        rollout = load_config(QUICKSTART, [f"rollout.num_workers={written}"]).rollout
        assert (rollout.min_workers, rollout.max_workers) == (least, most)


@pytest.mark.parametrize("written", ["{min: 3, max: 2}", "{min: 1}", "{min: 1, max: 2, most: 3}"])
def test_a_range_of_workers_that_is_none_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout.num_workers: must be a number or a range.*\(\{min: 1, max: 4\}"):
        load_config(QUICKSTART, [f"rollout.num_workers={written}"])


def test_a_group_of_one_is_refused_without_the_filter_too() -> None:
    for advantage in ("grpo", "dr_grpo", "rloo"):
        with pytest.raises(ConfigError, match="rollout.group_size: a group of one has no baseline"):
            load_config(QUICKSTART, ["rollout.group_size=1", "filter.enabled=false", f"loss.advantage={advantage}"])


def test_overrides_change_keys_and_interpolations_follow() -> None:
    config = load_config(QUICKSTART, ["run.name=mine", "replay.run_ahead=0.5", "learner.betas=[0.8,0.9]"])
    assert config.run.dir == "runs/mine"
    assert config.replay.run_ahead == 0.5
    assert config.learner.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("replay.max_stalness=3", "replay.max_stalness: is not a known key (did you mean replay.max_staleness?)"),
        ("replai.max_staleness=3", "replai: is not a known key (did you mean replay?)"),
        ("replay.max_staleness=-1", "replay.max_staleness: must be at least 0, got -1"),
        ("replay.max_staleness=many", "replay.max_staleness: expected `int`, got 'many'"),
        ("replay.run_ahead=3", "replay.run_ahead: must be at most replay.max_staleness (2)"),
        ("rollout.group_size=1", "rollout.group_size: a group of one has no variance"),
        ("rollout.temperature=0", "rollout.temperature: must be above 0"),
        ("rollout.engine=fast", "rollout.engine: must be one of torch, vllm, got 'fast'"),
        ("filter.on_limit=stop", "filter.on_limit: must be one of raise, partial, unfiltered, got 'stop'"),
        ("learner.updates_per_step=3", "learner.updates_per_step: must divide replay.prompts_per_step (16)"),
        ("learner.betas=[0.9]", "learner.betas: expected `array` of length 2"),
        ("learner.lr=high", "learner.lr: expected `float`, got 'high'"),
        ("learner.lr=.nan", "learner.lr: must be a finite number, got nan"),
        ("learner.betas=[0.9,.inf]", "learner.betas: must be a finite number, got inf"),
        ("learner.betas=[0.9,1.5]", "learner.betas: must be at least 0 and below 1, got [0.9, 1.5]"),
        ("replay.run_ahead=.nan", "replay.run_ahead: must be a finite number"),
        ("replay.lease_stall_s=0.1", "replay.lease_stall_s: must be at least two heartbeats"),
        ("loss.variant=gspo", "loss.clip_low: must be given for loss.variant gspo (its ratio moves far less"),
        (
            "loss.variant=estr",
            "loss.estr_threshold: must be given for loss.variant estr (largest (log ratio)² for each",
        ),
        (
            "loss.sapo_tau=[1,2]",
            "loss.sapo_tau: has no meaning for loss.variant ppo, got (1.0, 2.0) (use null, or loss.v",
        ),
        ("loss.vespo_k=[1]", "loss.vespo_k: expected `array` of length 2, got [1]"),
        ("loss.m2po_threshold=0", "loss.m2po_threshold: must be above 0, got 0"),
        ("loss.correction=token", "loss.correction: would weigh by the ratio that loss.anchor behavior clips already"),
        (
            "loss.correction_mode=mask",
            "loss.correction_mode: does nothing without loss.correction, got 'mask' (loss.anch",
        ),
        ("loss.correction_band=[0,5]", "loss.correction_band: does nothing without loss.correction"),
        ("loss.outlier_scope=sequence", "loss.outlier_scope: does nothing without loss.outlier_band"),
        ("loss.kl_estimator=k1", "loss.kl_estimator: does nothing without loss.kl_coef"),
        ("model.reference=models/other", "model.reference: does nothing without loss.kl_coef"),
        ("learner.ranks=2000", "learner.ranks: must be at least 1 and at most 1024, got 2000"),
        ("reward.timeout_s=60", "controller.stall_s: must be above the 120 s that a verdict may take"),
        ("loss.outlier_band=[2,1]", "loss.outlier_band: must be two rising numbers"),
        ("loss.kl_coef=-1", "loss.kl_coef: must be at least 0, got -1"),
        ("loss.agg=null", "loss.agg: expected `str`, got None"),
        ("loss.outlier_band=[1.5,3]", "loss.outlier_band: must hold 1, the ratio of tokens that nothing is wrong with"),
        ("loss.outlier_band=[1", "loss.outlier_band: is not YAML: while parsing a flow sequence"),
        ("reward.overlong_penalty=0.5", "reward.overlong_penalty: does nothing without reward.overlong_buffer"),
        ("loss.agg=mean", "loss.agg: must be one of token-mean, token-sum,"),
        ("learner.ranks=0", "learner.ranks: must be at least 1 and at most 1024, got 0"),
        ("learner.shards=2", "learner.shards: must be at most learner.ranks, which is 1, got 2 (learner.ranks=2)"),
        ("learner.shards=0", "learner.shards: must be at least 1 or auto, got 0"),
        ("learner.shards=all", "learner.shards: must be at least 1 or auto, got 'all'"),
        ("reward.overlong_buffer=129", "reward.overlong_buffer: must be at most rollout.max_response_length (128)"),
        ("reward.overlong_penalty=-1", "reward.overlong_penalty: must be at least 0, got -1"),
        ("prompts.eval_path=held.jsonl", "prompts.eval_path: belongs to the task 'file'"),
        ("faults.drop=2", "faults.drop: must be at least 0 and at most 1, got 2"),
        ("faults.kill=[learner.sometimes]", "learner has no such point, got 'learner.sometimes' (it has before_train,"),
        ("rollout.engine_args={max_model_len: 8}", "rollout.engine_args: does nothing without rollout.engine vllm"),
        (
            "rollout.tensor_parallel=2",
            "rollout.tensor_parallel: does nothing without rollout.engine vllm, got 2 (remove",
        ),
        ("rollout.memory_fraction=0.5", "rollout.memory_fraction: does nothing without rollout.engine vllm"),
        ("rollout.engine_args={seed: 1}", "rollout.engine_args: does nothing without rollout.engine vllm"),
        ("rollout.parity_every=-1", "rollout.parity_every: must be at least 0, got -1"),
        ("rollout.parity_stop=0", "rollout.parity_stop: must be above 0, got 0"),
        ("controller.placement=packed", "controller.placement: must be one of auto, separate, shared, got 'packed'"),
        ("run=3", "run: is a section"),
        ("run.steps=0", "run.steps: must be at least 1, got 0"),
        ("model.path=null", "model.path: expected `str`, got None"),
        ("steps", "steps: an override is written key=value"),
        ("run.dir=${nowhere}", "nowhere"),
    ],
)
def test_a_bad_key_or_value_is_named_with_its_fix(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("controller.placement=shared", "learner.device=cpu"), "learner.device: leaves nothing to share a GPU with"),
        (("controller.placement=shared", "rollout.device=cpu"), "rollout.device: leaves nothing to share a GPU with"),
        (
            ("controller.placement=shared", "rollout.engine=vllm", "rollout.tensor_parallel=2"),
            "rollout.tensor_parallel: must be 1 where learner and engine share a GPU (controller.placement is shared)",
        ),
        (
            ("rollout.engine=vllm", "rollout.memory_fraction=1.2"),
            "rollout.memory_fraction: must be above 0 and at most",
        ),
        (
            ("rollout.engine=vllm", "rollout.temperature=3"),
            "rollout.temperature: must be 0.01 to 2 with rollout.engine vllm, got 3",
        ),
        (("rollout.engine=vllm", "eval.temperature=0.001"), "eval.temperature: must be 0.01 to 2 with rollout.engine"),
        (
            ("rollout.engine=vllm", "rollout.top_p=0.9"),
            "rollout.top_p: needs an engine that tells which tokens it drew from; vllm doesn't, got 0.9 "
            "(rollout.engine=torch, or rollout.top_p=1)",
        ),
        (("rollout.engine=vllm", "rollout.top_k=20"), "rollout.top_k: needs an engine that tells which tokens"),
        (("rollout.engine=vllm", "rollout.deterministic=true"), "rollout.deterministic: is a mode of the torch engine"),
        (
            ("learner.ranks=6", "learner.shards=4"),
            "learner.shards: must divide learner.ranks, which is 6, got 4 (learner.ranks=4, or another learner.shards)",
        ),
        (
            ("learner.device=cpu", "learner.offload=optimizer"),
            "learner.offload: needs GPUs: on a CPU everything is in host memory already, got 'optimizer' (none)",
        ),
    ],
)
def test_keys_that_exclude_each_other_are_named(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "fix"),
    [
        ("max_model_len: 8", "set prompts.max_prompt_length and rollout.max_response_length"),
        ("logprobs_mode: raw_logprobs", "remove it"),
        ("distributed_executor_backend: ray", "remove it"),
    ],
)
def test_arguments_of_vllm_that_are_not_the_users_are_refused_with_the_key_that_is(argument: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout.engine_args: holds an argument that isn't yours") as caught:
        load_config(QUICKSTART, ["rollout.engine=vllm", f"rollout.engine_args={{{argument}}}"])
    assert fix in str(caught.value)


@pytest.mark.parametrize("tree", [{"run": {"steps": 3}}, {"model": {"tokenizer": None}}])
def test_a_config_without_a_model_is_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model.path: is missing \(a Hugging Face id or a directory\)"):
        config_from_dict(tree)


def test_an_empty_file_is_told_the_key_that_it_needs(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ConfigError, match=r"model.path: is missing \(a Hugging Face id or a directory\)"):
        load_config(tmp_path / "empty.yaml")


RANGES = [
    (section, cls, key, type(number)(number + step), LIMITS[limit])
    for section, cls in SECTIONS.items()
    for key, hint in get_type_hints(cls, include_extras=True).items()
    for limit, number in numbers_of(limits_of(hint))
    for step in [{"gt": 0, "ge": -1, "lt": 0, "le": 1}[limit]]
]


@pytest.mark.parametrize(("section", "cls", "key", "number", "limit"), RANGES)
def test_a_number_just_out_of_its_range_is_refused_with_the_range(
    section: str, cls: type, key: str, number: float, limit: str
) -> None:
    given = [number, number] if "tuple" in cls.__annotations__[key] else number
    with pytest.raises(ConfigError, match=rf"{section}.{key}: must be .*{limit} .*, got .*{number}"):
        convert_section(section, cls, {key: given})


def test_broken_yaml_and_missing_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    for text in ("run: [1,\n", "- 1\n- 2\n", "model: [1]\n"):
        broken.write_text(text)
        with pytest.raises(UserError):
            load_config(broken)
    with pytest.raises(UserError, match="no such config"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="did you mean quickstart"):
        find_config("quickstrat")


def test_the_printed_yaml_reads_back_as_the_same_config(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["rollout.temperature=0.7", "loss.dual_clip=3.0", "loss.outlier_band=[1e-4,100]"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(to_yaml(config))
    assert load_config(printed) == config


def test_copies_need_the_filter() -> None:
    with pytest.raises(ConfigError, match="filter.mode: does nothing without filter.enabled"):
        load_config(QUICKSTART, ["filter.enabled=false", "filter.mode=replace"])


def test_a_truncated_weight_has_no_lower_end() -> None:
    with pytest.raises(ConfigError, match="loss.correction_band: has no lower end where weights are cut"):
        load_config(QUICKSTART, ["loss.anchor=proximal", "loss.correction_band=[0.5,2]"])


RECIPES = (Path(__file__).parents[2] / "docs" / "dapo.md").read_text().split("## Recipes")[1].split("```")[1]


@pytest.mark.parametrize("line", RECIPES.strip().splitlines())
def test_every_recipe_of_the_page_is_a_config(line: str) -> None:
    keys = [word for word in shlex.split(line) if "=" in word]
    assert keys
    load_config(QUICKSTART, ["rollout.max_response_length=20480", *keys])


def test_defaults_that_depend_on_other_keys_are_on_record() -> None:
    def loss_of(*overrides: str) -> tuple[object, ...]:
        loss = load_config(QUICKSTART, overrides).loss
        return loss.clip_low, loss.clip_high, loss.correction

    assert loss_of() == (0.2, 0.28, "none")
    assert loss_of("loss.anchor=proximal") == (0.2, 0.28, "token")
    assert loss_of("loss.anchor=proximal", "loss.correction=none") == (0.2, 0.28, "none")
    assert loss_of("loss.variant=gspo", "loss.clip_low=3e-4", "loss.clip_high=4e-4") == (3e-4, 4e-4, "none")

    def dual_clip_of(*overrides: str) -> float | None:
        return load_config(QUICKSTART, overrides).loss.dual_clip

    assert dual_clip_of() == dual_clip_of("loss.anchor=proximal") == 10.0
    assert dual_clip_of("loss.dual_clip=null") is None
    assert dual_clip_of("loss.variant=cispo") is None

    def parity_of(*overrides: str) -> tuple[float | None, float | None]:
        rollout = load_config(QUICKSTART, overrides).rollout
        return rollout.parity_warn, rollout.parity_stop

    assert parity_of() == (None, None)  # until it is known who has a GPU
    assert parity_of("rollout.parity_warn=1") == (1, None)
    assert parity_of("rollout.dtype=float32") == (1e-3, 0.05)
    assert parity_of("rollout.dtype=bfloat16") == (0.1, 0.5)
    assert parity_of("rollout.dtype=float16") == (0.0125, 0.0625)
    assert parity_of("rollout.dtype=bfloat16", "rollout.parity_stop=2") == (0.1, 2)


def test_every_key_has_a_doc_line_and_appears_in_the_printed_yaml() -> None:
    config = load_config(QUICKSTART)
    printed = to_yaml(config)
    for name, cls in SECTIONS.items():
        fields = [field.name for field in dataclasses.fields(cls)]
        assert list(field_docs(cls)) == fields, f"a field of {name} has no doc line"
        assert list(to_dict(config)[name]) == list(OmegaConf.create(printed)[name])
    assert "# Most train steps between" in printed


def test_the_set_of_keys_is_frozen_so_that_a_new_one_is_a_decision() -> None:
    keys = {f"{name}.{field.name}" for name, cls in SECTIONS.items() for field in dataclasses.fields(cls)}
    assert sum(not key.startswith("faults.") for key in keys) < 150
    expected = set((Path(__file__).parents[1] / "config_keys.txt").read_text().split())
    assert keys == expected


def test_sections_stand_in_the_order_of_the_design() -> None:
    assert list(SECTIONS) == (
        "run model prompts rollout environment reward filter replay loss learner weights eval controller metrics "
        "faults".split()
    )
