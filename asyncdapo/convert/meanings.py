"""What several peers mean by the same words: functions from their values to ours, for the tables of rules."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

from asyncdapo.convert.rules import Left, Made, Rule, either, flag, number, plain, whole

NO_LIMIT = 1_000_000
"""Of train steps, where only the data end a run."""
DATA_FILES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
SAME_SPLITS = ("train", "test", "validation", "val")

# Why a key has no line.
IN_LOSS = "a KL penalty is part of the loss here: loss.kl_coef"
SPEED = "an implementation's own setting of speed or memory, which results don't depend on"
UNREPEATED = (
    "asyncdapo data prepare leaves repeated rows out: if yours repeat on purpose, multiply prompts.epochs and "
    "eval.num_samples by how often."
)
REPEATS = {"dapo-math-17k": 100, "aime-2024": 32, "gsm8k": 1}
"""How often the published files hold each of their rows: 1,791,700 are 17,917 x 100, and 960 are 30 x 32."""
OWN_FUNCTION = "path/to/file.py:function"
"""Stands for a verifier that the user has to name; a launch refuses it."""
OWN_GPUS = "which GPU holds what is settled by controller.placement, learner.ranks and rollout.num_workers"
ENGINE = "the engine is set up otherwise here; rollout.engine_args passes arguments to vLLM"
CONSTANT = "the learning rate is constant after warm-up here"

SYNCHRONOUS = (
    "It samples and trains in turn: replay.run_ahead=0 does so here; by default sampling runs one step ahead.",
    "Its ratio is against log-probs that the learner computes at the start of a step, as loss.anchor=proximal has it "
    "here; by default it is against those of the policy that sampled.",
)
SURPLUS = "Groups beyond a batch are thrown away there; here they open the next batch."
WHOLE_FILES = "It evaluates every row of its files; here eval.num_prompts of them."
MODEL_GPUS = (
    "It splits a model over GPUs to train it; here each learner rank holds all of it (asyncdapo plan says how much)."
)


# ----------------------------------------------------------------------------------------------------------------- data


def data_rules(train: str, held_out_key: str) -> tuple[Rule, ...]:
    """Of the keys that name files."""
    return (
        Rule("prompts.task", (train,), lambda files: "file"),
        Rule("prompts.path", (train,), train_data),
        Rule("prompts.eval_path", (held_out_key, train), held_out),
        Rule("prompts.chat_template", (train,), lambda files: Made(True, "they always use it")),
        Rule("eval.num_greedy_prompts", (held_out_key,), lambda files: Made(0, "they have one evaluation, not two")),
    )


def epochs_rule(passes: str, *train: str) -> Rule:
    """Of the key that counts passes, and those that name the data."""
    return Rule("prompts.epochs", (passes, *train), epochs)


def epochs(passes: Any, *train: Any) -> Any:
    """Passes over rows that are no longer repeated."""
    if passes is None:
        return None
    named = [files for files in train if files]
    if not named:
        return Left("no data are named that are known here, and the task chain has no end", always=True)
    times = repeats(named[0]) or 1
    return repeated(whole(passes), times)


def repeated(count: int, times: int) -> Any:
    """A number that is to make up for the repetitions."""
    why = f"{count} x {times}: theirs holds every row {times} times, and data prepare leaves repetitions out"
    return Made(count * times, why) if times > 1 else count


def repeats(files: Any) -> int | None:
    """How often a file that is known by its name holds each row; None for another, for several, for a part of one."""
    files = files if isinstance(files, list) else [files]
    stem = re.sub(r"\.(parquet|jsonl?)$", "", str(files[0]).rpartition("/")[2]).lower() if len(files) == 1 else ""
    return REPEATS.get(stem)


def samples(count: Any, files: Any) -> Any:
    """Completions of each held-out prompt, in place of its repetitions. Only the first file is held out."""
    times = (repeats(files[:1] if isinstance(files, list) else files) if files else None) or 1
    if count is None and times == 1:
        return None
    return repeated(1 if count is None else whole(count), times)


def own_function(*theirs: Any) -> Any:
    """A reward function of the user's: its arguments are others there."""
    named = ":".join(str(part) for part in theirs if part)
    return not_carried_over(f"REWARD FUNCTION {named}") if theirs[0] else None


def not_carried_over(what: str) -> Left:
    """Of what the user has to write anew."""
    return Left(f"YOUR {what} IS NOT CARRIED OVER: reward.verifier={OWN_FUNCTION} (docs/reward.md)", loud=True)


def advantage_of(name: Any, table: dict[str, str]) -> Any:
    """Ours, else said aloud: another stands in for it."""
    if name == "gae":
        return Left("IS NOT CARRIED OVER: there is no critic here; loss.advantage is grpo, or dr_grpo, rloo", loud=True)
    return table.get(str(name)) or Left("IS NOT CARRIED OVER: loss.advantage is grpo, or dr_grpo, rloo", loud=True)


def train_data(files: Any) -> Any:
    """Files or data sets to what `data prepare` makes of them; several are drawn from as one."""
    files = files if isinstance(files, list) else [files]
    if not files or not all(isinstance(file, str) and file for file in files):
        raise ValueError("it takes a file or a list of files")
    if len(files) == 1:
        return _prepared(files[0], "train")
    made = [_prepared(file, "train") for file in files]
    why = "drawn from alike here, row after row there: make the weights the numbers of rows"
    before = tuple(command for one in made for command in one.before)
    return Made({one.value: 1 for one in made}, why, before, UNREPEATED)


def held_out(files: Any, train: Any) -> Any:
    """As `train_data`; only one file can be held out, and of no use without data for training."""
    if not files:
        return None
    files = files if isinstance(files, list) else [files]
    if not train:
        return Left("the training data are not known here")
    if not all(isinstance(file, str) and file for file in files):
        raise ValueError("it takes a file or a list of files")
    made = _prepared(files[0], "test")
    more = f"the first of {len(files)}: asyncdapo eval takes others with --data" if len(files) > 1 else ""
    return Made(made.value, more or made.why, made.before, made.note)


def _prepared(source: str, split: str) -> Made:
    """Where `data prepare` puts it; hub ids, files and the names of known sets are its sources."""
    note = "" if repeats(source) else UNREPEATED
    source, _, rows = source.partition("#")
    is_file = source.endswith(DATA_FILES) or source.startswith(("/", "~", "."))
    stem = re.sub(r"\.(parquet|jsonl?|csv|arrow)$", "", source.rpartition("/")[2])
    if is_file and stem in SAME_SPLITS:
        stem = source.rstrip("/").split("/")[-2] if source.count("/") > 1 else "data"
        stem += "-test" if split == "test" else ""
    stem = re.sub(r"[^\w.-]", "-", stem) or "data"
    quoted = source if re.fullmatch(r"[\w@%+=:,./~-]+", source) else "'" + source.replace("'", "'\\''") + "'"
    other = " --split test" if split == "test" and is_file else ""
    why = f"{rows} of its rows there, all here" if rows else ""
    command = f"asyncdapo data prepare {quoted} --out data/{stem}{other}"
    return Made(f"data/{stem}/{split}.parquet", why, (command,), note)


def verifier_of(name: str) -> str:
    """By the data set's name: GSM8K's answers stand behind ####, DAPO's behind Answer:."""
    return "gsm8k" if "gsm8k" in name.lower() else "dapo"


# ----------------------------------------------------------------------------------------------------------------- loss


def kl_coef(use: Any, coef: Any) -> Any:
    """A weight that counts only if it is used."""
    return (number(coef) if coef is not None else None) if flag(use) else 0.0


def estimator(name: Any, use: Any, coef: Any, table: dict[str, str]) -> Any:
    """Of the KL penalty, where there is one."""
    if name is None:
        return None
    if not flag(use) or not coef:
        return Left("there is no KL penalty")
    return either(name, table, "it isn't one of k1, k2, k3")


def none_of_it(here: str) -> Any:
    """For a thing that is off here always: fine if it is off there, else without counterpart."""

    def value(theirs: Any) -> Left:
        return Left("off, as it always is here" if theirs in (False, None, 0) else here)

    return value


def whole_distribution(value: Any) -> Left:
    """Nucleus and top-k in training."""
    off = value in (None, 1, -1, 0)
    return Left("off, as it always is in training here" if off else "training samples from the whole distribution here")


# ------------------------------------------------------------------------------------------------------ batch and clock


def ceil_of(value: float, what: str) -> Any:
    """A whole number here, a fraction there."""
    return int(value) if value == int(value) else Made(ceil(value), f"{value:g} there; {what} here")


def group(completions: Any) -> Any:
    """Completions of a prompt."""
    if completions != 1:
        return None if completions is None else whole(completions)
    return Left("a group of one has no baseline here: the default of rollout.group_size stands", always=True)


def updates(prompts: Any, mini: Any) -> Any:
    """Mini-batches of a train step, both counted in prompts."""
    if prompts is None or mini is None:
        return None
    prompts, mini = whole(prompts), whole(mini)
    return ceil_of(prompts / mini, "whole mini-batches") if mini < prompts else 1


def warmup(steps: Any, updates_of_step: Any) -> Any:
    """Train steps to optimizer updates."""
    if steps is None:
        return None
    per_step = plain(updates_of_step) or 1
    why = f"{steps} train steps there, each of {per_step} updates" if per_step != 1 else ""
    return Made(whole(steps) * per_step, why)


def every(value: Any) -> Any:
    """Steps between evaluations; less than 1 is never."""
    return None if value is None else max(0, whole(value))


def saves(value: Any) -> Any:
    """Steps between checkpoints."""
    if value is None:
        return None
    if whole(value) < 1:
        return Left("the first and the last checkpoint are always written here, by default every 50 steps too")
    return whole(value)


def checkpointing(on: Any) -> str:
    """Theirs is that of whole blocks."""
    return "full" if flag(on) else "none"


def kept_checkpoints(value: Any) -> Any:
    """How many; null and negative are all."""
    return 0 if value is None or whole(value) < 1 else whole(value)


def wandb(loggers: Any) -> Any:
    """Whether W&B is among them."""
    if loggers is None:
        return None
    return "auto" if "wandb" in (loggers if isinstance(loggers, list) else [loggers]) else "disabled"


def top_k(value: Any) -> Any:
    """-1 is all there, 0 here."""
    return None if value is None else max(0, whole(value))


def engine(name: Any) -> Any:
    """vLLM where a GPU's engine was asked for."""
    if name is None:
        return None
    return "vllm" if name == "vllm" else Made("torch" if name == "hf" else "vllm", f"{name} isn't known here")


def dtype(name: Any) -> Any:
    """Number format of the engine."""
    if name is None:
        return None
    table = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
    return table.get(name) or Made("bfloat16", f"{name} isn't known here")
