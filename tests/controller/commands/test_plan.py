"""`asyncdapo plan`: what it shows, what it refuses, and what it does without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdapo.cli import main
from asyncdapo.config.config import load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.commands.plan import plan
from asyncdapo.errors import ConfigError, UserError

GSM8K = ("qwen2.5_0.5b_gsm8k_1gpu", "qwen2.5_0.5b_gsm8k_2gpu")
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
"""The shape of Qwen2.5-0.5B, which has 494,032,768 parameters."""


@pytest.fixture
def qwen(tmp_path: Path) -> str:
    """An override that names a model of which only the shape is there."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    (tmp_path / "model.safetensors").touch()
    return f"model.path={tmp_path}"


def sections_of(text: str) -> dict[str, list[str]]:
    """The lines of each word on the left."""
    sections: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        word, content = line[2:13].strip(), line[13:]
        sections.setdefault(word or list(sections)[-1], []).append(content)
    return sections


def test_the_quickstart_is_planned_with_as_many_gpus_as_it_asks_for() -> None:
    sections = sections_of(plan("quickstart", []))
    assert sections["placement"][0] == "2 GPUs, separate: every process has GPUs of its own"
    assert sections["placement"][-1] == (
        "as many as it asks for; with none, everything is on the CPU (--gpus N: what it does with others)"
    )
    assert sections["weights"] == ["by nccl: every end has a GPU of its own"]
    assert sections["a step"][0] == "16 groups of 16 completions: 256, at most 32,768 sampled tokens; 1 update"
    assert sections["staleness"] == ["at most 2 train steps; up to 32 kept groups are ahead of the learner"]
    assert "800,768 parameters" in sections["model"][0]
    assert list(sections) == ["model", "data", "engine", "placement", "weights", "a step", "staleness", "memory"]


def test_other_gpus_make_another_plan() -> None:
    on_cpu = sections_of(plan("quickstart", [], [0]))
    assert on_cpu["placement"] == [
        "0 GPUs, there is no GPU: everything is on the CPU",
        "replay: CPU",
        "learner: CPU",
        "rollout-0: CPU",
    ]
    assert on_cpu["weights"] == ["by ipc: all ends are on one machine, and learner has no GPU"]
    idle = sections_of(plan("quickstart", [], [4]))["placement"]
    assert idle[-1] == "2 of 4 GPUs stay idle"
    on_one = sections_of(plan("quickstart", ["rollout.num_workers=3", "rollout.engine=vllm"], [1]))
    assert "learner + rollout-0 + rollout-1 + rollout-2: 1 GPU, of whose memory vLLM takes 0.2" in (on_one["placement"])


def test_workers_that_may_join_later_are_named_beside_those_of_the_start() -> None:
    overrides = ["rollout.num_workers={min: 1, max: 4}", "rollout.engine=vllm"]
    for gpus, line in (
        ([4], "up to 3 more, while there is room: 1 GPU each"),
        ([0], "up to 3 more, while there is room: CPU"),
    ):
        lines = sections_of(plan("quickstart", overrides, gpus))["placement"]
        assert [one for one in lines if one.startswith("rollout")] == [lines[3]]
        assert lines[4] == line


def test_many_alike_take_one_line() -> None:
    overrides = ["rollout.engine=vllm", "rollout.num_workers=12", "rollout.tensor_parallel=2", "learner.ranks=4"]
    lines = sections_of(plan("quickstart", overrides, [8, 8, 8, 8]))["placement"]
    assert lines[1:] == [
        "replay: CPU",
        "learner … learner-3: 1 GPU each",
        "rollout-0 … rollout-11: 2 GPUs each, of whose memory vLLM takes 0.9",
        "4 ranks have 4 copies of the weights, each a whole one",
        "4 of 32 GPUs stay idle",
    ]


def test_ranks_that_are_kept_on_one_node_have_a_gpu_each() -> None:
    overrides = ["rollout.num_workers=2", "learner.ranks=4", "learner.shards=2"]
    sections = sections_of(plan("quickstart", overrides, [3, 3]))
    assert sections["placement"][1:] == [
        "replay: CPU",
        "learner … learner-3: 1 GPU each",
        "rollout-0 … rollout-1: 1 GPU each",
        "4 ranks have 2 copies of the weights, divided among 2 ranks each, 2 of them on one node",
    ]
    assert sections["weights"] == ["by nccl: every end has a GPU of its own"]


def test_a_plan_says_what_a_checkpoint_and_offload_take_of_the_host(qwen: str) -> None:
    overrides = [qwen, "learner.ranks=2", "learner.shards=2"]
    lines = sections_of(plan(GSM8K[1], overrides))["memory"]
    assert "on the host for each rank: 2.76 (the copy of a checkpoint 2.76)" in lines  # 6 bytes x 494,032,768
    lines = sections_of(plan(GSM8K[1], [*overrides, "learner.offload=optimizer"]))["memory"]
    on_host = "weights 0.92, gradients 0.92, AdamW 1.84, the copy of a checkpoint 2.76"
    assert f"on the host for each rank: 6.44 ({on_host})" in lines
    assert lines[1].startswith("a rank of the learner: ")
    assert "AdamW" not in lines[1]


TWO_PARTS = """
from fractions import Fraction
from asyncdapo.prompts.task import Part, Question

def part(name, begin, end, weight):
    return Part(name=name, rows=range(begin, end), weight=Fraction(weight))

class Two:
    num_eval_rows = 600
    parts = [part("easy", 0, 3, 1), part("hard", 3, 10, 2)]
    def __init__(self, config, num_eval, seed): pass
    def question_at(self, row): return Question(text=f"Q: {row}", answer="1", source="two", row=row)
    eval_question_at = question_at
"""


def test_a_task_of_yours_may_have_several_parts(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_PARTS)
    assert sections_of(plan("quickstart", [f"prompts.task={tmp_path / 'two.py'}:Two"]))["data"] == [
        "easy (3 questions), 1 of every 3 prompts",
        "hard (7 questions), 2 of every 3 prompts",
        "verifier answer",
    ]


def test_the_plan_of_episodes_has_their_context_in_the_lengths_and_the_memory() -> None:
    def planned(*overrides: str) -> dict[str, list[str]]:
        return sections_of(plan("quickstart_tools", ["prompts.max_prompt_length=48", *overrides]))

    short = planned()
    assert short["a step"][1:4] == [
        "64 sequences at once, of at most 80 tokens, observations included",
        "64 episodes under way, each of at most 8 turns and 32 sampled tokens",
        "each turn reads what came before: at most 632 tokens of an episode, less what the engine has cached",
    ]
    long = planned("environment.max_context=200", "environment.max_turns=3", "environment.oversubscribe=1.5")
    assert long["a step"][1:4] == [
        "64 sequences at once, of at most 200 tokens, observations included",
        "96 episodes under way, each of at most 3 turns and 32 sampled tokens, beside 120 observed ones behind the "
        "longest prompt",
        "each turn reads what came before: at most 597 tokens of an episode, less what the engine has cached",
    ]
    assert "KV cache of 64 x 80 tokens" in " ".join(short["memory"])
    assert "KV cache of 64 x 200 tokens" in " ".join(long["memory"])


def test_synchronous_training_has_the_bound_0() -> None:
    lines = sections_of(plan("quickstart", ["replay.run_ahead=0"]))["staleness"]
    assert lines == ["0: nothing is sampled while the learner trains (replay.run_ahead is 0)"]


@pytest.mark.parametrize("name", GSM8K)
def test_the_gpu_configs_are_planned_before_model_and_data_are_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sections = sections_of(plan(name, []))
    assert sections["data"] == [
        f"data/gsm8k/{part}.parquet, which isn't here yet: a file with the columns 'prompt' and 'answer'"
        for part in ("train", "test")
    ]
    assert sections["engine"][0].startswith("vllm")
    one_gpu = name.endswith("1gpu")
    assert sections["placement"][0].startswith("1 GPU, shared" if one_gpu else "2 GPUs, separate")
    assert sections["weights"] == [
        "by ipc: all ends are on one GPU" if one_gpu else "by nccl: every end has a GPU of its own"
    ]


def test_a_model_in_a_directory_of_another_machine_is_planned_without_it() -> None:
    sections = sections_of(plan("quickstart", ["model.path=/no/such/model"]))
    assert sections["model"] == ["/no/such/model, which isn't here"]
    assert sections["memory"] == ["not known until the model is here"]


def test_the_shared_gpu_has_room_for_all_by_formula(qwen: str) -> None:
    lines = sections_of(plan(GSM8K[0], [qwen]))["memory"]
    assert lines[1].startswith("a rank of the learner: ")
    assert "weights 1.84, gradients 1.84, AdamW 3.68, gathered in bfloat16 " in lines[1]
    assert "KV cache of 256 x 1,536 tokens 4.5" in lines[2]
    together = float(lines[4].removeprefix("learner + rollout on one GPU: "))
    parts = [float(line.split(": ")[1].split(" ")[0]) for line in lines[1:3]]
    assert together == pytest.approx(sum(parts), abs=0.1)
    assert "494,032,768 parameters" in plan(GSM8K[0], [qwen])


def test_both_gpu_configs_differ_only_in_where_they_run_and_how_much_at_once() -> None:
    one, two = (load_config(find_config(name)) for name in GSM8K)
    assert (one.loss, one.reward, one.filter, one.replay, one.eval, one.prompts) == (
        two.loss,
        two.reward,
        two.filter,
        two.replay,
        two.eval,
        two.prompts,
    )
    assert (one.controller.placement, two.controller.placement) == ("shared", "separate")


def test_a_plan_says_what_engine_and_learner_compute_in_on_the_devices_that_it_supposes() -> None:
    said = "rollout.dtype bfloat16 (auto, on a GPU), learner.dtype bfloat16 (auto, on a GPU)"
    for name in GSM8K:
        assert said in sections_of(plan(name, []))["engine"]
    on_cpu = sections_of(plan("quickstart", [], [0]))["engine"]
    assert on_cpu == ["torch", "rollout.dtype float32 (auto, on a CPU), learner.dtype float32 (auto, on a CPU)"]
    costs = sections_of(plan("quickstart", ["rollout.dtype=float32"]))["engine"][2:]
    assert [cost.split(":")[0] for cost in costs] == [
        f"{role}.dtype float32 on a GPU" for role in ("rollout", "learner")
    ]


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        (["rollout.num_worker=2"], None, "did you mean rollout.num_workers?"),
        (["reward.verifier=anser"], None, "reward.verifier: unknown"),
        (["model.path=./no/such/model"], None, "model.path: no such directory"),
        (["model.path=no such model"], None, "model.path: is neither a directory nor an id: Repo id must"),
        (["controller.placement=separate"], [1], "asks for 2 GPUs (1 learner rank, 1 engine), there is 1"),
        (["weights.backend=nccl"], [0], "weights.backend: needs a GPU of its own at every end: learner has no GPU"),
        (["rollout.engine=vllm", "rollout.tensor_parallel=3"], None, "rollout.tensor_parallel: must divide the"),
    ],
)
def test_what_a_launch_would_refuse_is_refused(overrides: list[str], gpus: list[int] | None, words: str) -> None:
    with pytest.raises(UserError) as caught:
        plan("quickstart", overrides, gpus)
    assert words in str(caught.value)


def test_the_command_prints_the_plan_or_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "4,4", "quickstart", "rollout.num_workers=6"]) == 0
    assert "7 GPUs, separate" in capsys.readouterr().out
    assert main(["plan", "quickstart", "run.steps=0"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "asyncdapo: run.steps: must be at least 1, got 0\n"
    assert captured.out == ""


def test_overrides_may_stand_behind_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "--gpus", "1", "run.name=behind"]) == 0
    assert "behind in runs/behind" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "quickstart", "--gpu", "1", "--no-such-option"])


@pytest.mark.parametrize("gpus", ["x", "-1", "1,,2", ""])
def test_gpus_are_numbers(gpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", f"--gpus={gpus}", "quickstart"])
    assert "must be the GPUs of each node" in capsys.readouterr().err


def test_a_data_file_that_is_here_is_read(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1", "answer": n + 1}) + "\n" for n in range(9)))
    held_out = ["eval.num_prompts=2", "eval.num_greedy_prompts=2"]
    overrides = ["prompts.task=file", f"prompts.path={data}", *held_out]
    assert sections_of(plan("quickstart", overrides))["data"] == [f"{data} (7 questions), verifier answer"]
    with pytest.raises(ConfigError, match="prompts.prompt_column"):
        plan("quickstart", [*overrides, "prompts.prompt_column=question"])


def test_a_plan_needs_neither_torch_nor_ray_nor_vllm_nor_the_network() -> None:
    code = f"""
import socket, sys
def refuse(*args): raise AssertionError("the network")
socket.socket.connect = socket.getaddrinfo = refuse
from asyncdapo.cli import main
assert main(["plan", {GSM8K[0]!r}]) == 0
print([name for name in ("torch", "ray", "vllm", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
