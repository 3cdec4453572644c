"""Conversions that several peers share: functions from their values to ours, for the tables of rules."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

from asyncdapo.convert.rules import Differs, Left, Made, Rank, Rule, chat_template, either, flag, number, plain, whole

NO_LIMIT = 1_000_000
"""Train steps of a run that ends with its data."""
DATA_FILES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
SAME_SPLITS = ("train", "test", "validation", "val")

# Why a key has no line.
IN_LOSS = "a KL penalty is part of the loss here: loss.kl_coef"
PARALLEL = (
    "no tensor, pipeline or expert parallelism in the learner here: learner.shards divides weights, gradients and "
    "AdamW among ranks, which gather a block at a time"
)
SEQUENCE = (
    "a rank computes whole sequences here: learner.activation_checkpointing and learner.tokens_per_microbatch set "
    "their memory, and asyncdapo plan says whether they fit"
)
BETWEEN = (
    "moves them out of the engine's way between sampling and training there; here the learner has its own part of the "
    "memory, and learner.offload=optimizer keeps weights and AdamW on the host all the time"
)
SPEED = "an implementation's own setting of speed or memory, without effect on results"
UNREPEATED = (
    "asyncdapo data prepare leaves repeated rows out: if yours repeat on purpose, multiply prompts.epochs and "
    "eval.num_samples by how often."
)
REPEATS = {"dapo-math-17k": 100, "aime-2024": 32, "gsm8k": 1}
"""How often the published files repeat each row: 1,791,700 rows are 17,917 x 100, and 960 are 30 x 32."""
ROWS = {"aime-2024": 30, "gsm8k": 1319}
"""Evaluation rows of the published files."""
OWN_FUNCTION = "path/to/file.py:function"
"""Placeholder for a verifier that the user has to name; a launch refuses it."""
OWN_GPUS = "controller.placement, learner.ranks and rollout.num_workers decide the use of GPUs here"
ENGINE = "the engine has other settings here; rollout.engine_args passes arguments to vLLM"
CONSTANT = "the learning rate is constant after warm-up here, unless learner.lr_schedule has it fall over run.steps"
ALL_WEIGHTS = "LoRA there, full training here: it takes more memory, and a learning rate for LoRA is too high for it"
ADVANTAGES = "loss.advantage is grpo here, or dr_grpo, rloo, maxrl, grpo_batch_std, reinforce_pp"
CRITIC = "there is no critic here"

SYNCHRONOUS = (
    Differs(
        "It samples and trains in turn; here sampling runs one step ahead: replay.run_ahead=0 turns that off",
        Rank.SAMPLING,
        lambda made: "replay.run_ahead" not in made,
    ),
    Differs(
        "Its ratio is against log-probs that the learner computes at the start of a step, as with "
        "loss.anchor=proximal; here it is against those of the policy that sampled",
        Rank.LOSS,
        lambda made: "loss.anchor" not in made,
    ),
)
SURPLUS = Differs(
    "Groups beyond a batch are thrown away there; here they go into the next batch",
    Rank.DETAIL,
    lambda made: made.get("filter.enabled", True) and made.get("filter.mode") != "replace",
)
WHOLE_FILES = Differs(
    "It evaluates every row of its files; here eval.num_prompts of them, 512 by default",
    Rank.EVAL,
    lambda made: "prompts.eval_path" in made and "eval.num_prompts" not in made,
)


# ----------------------------------------------------------------------------------------------------------------- data


def data_rules(train: str, held_out_key: str, template_arguments: str) -> tuple[Rule, ...]:
    """Rules for the keys that name files, and for the arguments of their chat template."""
    return (
        Rule("prompts.task", (train,), lambda files: "file"),
        Rule("prompts.path", (train,), train_data),
        Rule("prompts.eval_path", (held_out_key,), held_out),
        Rule("prompts.chat_template", (train, f"{template_arguments}.enable_thinking"), chat_template),
        Rule("eval.num_greedy_prompts", (held_out_key,), lambda files: Made(0, "they have one evaluation, not two")),
    )


def epochs(passes: Any, *train: Any) -> Any:
    """Epochs over data without the repeated rows."""
    if passes is None:
        return None
    named = [files for files in train if files]
    return repeated(whole(passes), (repeats(named[0]) if named else None) or 1)


def repeated(count: int, times: int) -> Any:
    """The count, multiplied to make up for removed repetitions."""
    why = f"{count} x {times}: their file holds every row {times} times, and data prepare removes repetitions"
    return Made(count * times, why) if times > 1 else count


def repeats(files: Any) -> int | None:
    """How often a published file repeats each row; None for other files, several files, or a part of one."""
    return REPEATS.get(_place(files)[1])


def _place(files: Any) -> tuple[str, str]:
    """Folder and name, without the ending, of a single file."""
    files = files if isinstance(files, list) else [files]
    folder, _, name = str(files[0]).rpartition("/") if len(files) == 1 else ("", "", "")
    return folder.rpartition("/")[2].lower(), re.sub(r"\.(parquet|jsonl?)$", "", name).lower()


def all_rows(files: Any) -> Any:
    """Number of rows of the first file, if it is a published one."""
    folder, name = _place(files[:1] if isinstance(files, list) else files)
    rows = ROWS.get(folder if name in SAME_SPLITS else name)
    return None if rows is None else Made(rows, "all of its rows, as there")


def samples(count: Any, files: Any) -> Any:
    """Completions of each held-out prompt, instead of its repetitions. Only the first file is held out."""
    times = (repeats(files[:1] if isinstance(files, list) else files) if files else None) or 1
    if count is None and times == 1:
        return None
    return repeated(1 if count is None else whole(count), times)


def own_function(*theirs: Any) -> Any:
    """A user's reward function: theirs has other arguments."""
    named = ":".join(str(part) for part in theirs if part)
    return not_carried_over(f"REWARD FUNCTION {named}") if theirs[0] else None


def not_carried_over(what: str) -> Left:
    """For something that the user has to write again."""
    why = f"YOUR {what} IS NOT CARRIED OVER: reward.verifier={OWN_FUNCTION} (docs/reward.md)"
    return Left(why, loud=Rank.TASK)


def advantage_of(name: Any, table: dict[str, str]) -> Any:
    """Our advantage for theirs; if there is none, the output says that another one is used."""
    why = f"{CRITIC}; {ADVANTAGES}" if name == "gae" else ADVANTAGES
    return table.get(str(name)) or Left(f"IS NOT CARRIED OVER: {why}", loud=Rank.LOSS)


def train_data(files: Any) -> Any:
    """The prepared files of their files or data sets; several become a mixture."""
    files = [file for file in (files if isinstance(files, list) else [files]) if file not in (None, "")]
    if not files:
        return Left("it names no file")
    if not all(isinstance(file, str) for file in files):
        raise ValueError("it takes a file or a list of files")
    if len(files) == 1:
        return _prepared(files[0], "train")
    made = [_prepared(file, "train") for file in files]
    why = "drawn from equally here, row after row there: set the weights to the numbers of rows"
    before = tuple(command for one in made for command in one.before)
    return Made({one.value: 1 for one in made}, why, before, UNREPEATED, Rank.TASK)


def held_out(files: Any) -> Any:
    """As `train_data`; only one file can be held out."""
    files = [file for file in (files if isinstance(files, list) else [files]) if file not in (None, "")]
    if not files:
        return None
    if not all(isinstance(file, str) for file in files):
        raise ValueError("it takes a file or a list of files")
    made = _prepared(files[0], "test")
    if len(files) == 1:
        return made
    more = f"the first of {len(files)}: asyncdapo eval takes others with --data"
    return Made(made.value, more, made.before, made.note, Rank.EVAL)


def _prepared(source: str, split: str) -> Made:
    """The file that `data prepare` makes of a source: a hub id, a file or a published data set."""
    note = "" if repeats(source) else UNREPEATED
    is_file = source.endswith(DATA_FILES) or source.startswith(("/", "~", "."))
    stem = re.sub(r"\.(parquet|jsonl?|csv|arrow)$", "", source.rpartition("/")[2])
    if is_file and stem in SAME_SPLITS:
        stem = source.rstrip("/").split("/")[-2] if source.count("/") > 1 else "data"
        stem += "-test" if split == "test" else ""
    stem = re.sub(r"[^\w.-]", "-", stem) or "data"
    quoted = source if re.fullmatch(r"[\w@%+=:,./~-]+", source) else "'" + source.replace("'", "'\\''") + "'"
    other = " --split test" if split == "test" and is_file else ""
    command = f"asyncdapo data prepare {quoted} --out data/{stem}{other}"
    return Made(f"data/{stem}/{split}.parquet", "", (command,), note)


# ----------------------------------------------------------------------------------------------------------------- loss


def kl_coef(use: Any, coef: Any) -> Any:
    """The KL penalty's weight, 0 if the penalty is off."""
    return (number(coef) if coef is not None else None) if flag(use) else 0.0


def estimator(name: Any, use: Any, coef: Any, table: dict[str, str]) -> Any:
    """The estimator of the KL penalty, if there is a penalty."""
    if name is None:
        return None
    if not flag(use) or not coef:
        return Left("there is no KL penalty")
    return either(name, table, "it isn't one of k1, k2, k3")


def otherwise(theirs: str, why: str, rank: Rank, off: tuple[Any, ...] = ()) -> Rule:
    """Rule for a key that changes training, unless its value is empty or one of `off`."""

    def value(given: Any) -> Left:
        if not given or given in off:
            return Left("off, as it always is here" if not given else "as it is here")
        return Left(why, loud=rank)

    return Rule("", (theirs,), value)


def known_loss(name: Any, table: dict[str, str]) -> Any:
    """Our loss for theirs; if there is none, the output says that another one is used."""
    return table.get(str(name)) or Left("no such loss here: PPO's clipped one is used instead", loud=Rank.LOSS)


def soft_gate(pos: Any, neg: Any, variant: Any) -> Any:
    """The temperatures of SAPO's gate, for positive and for negative advantages."""
    if variant != "sapo" or (pos is None and neg is None):
        return None if pos is None else Left("their loss is another")
    return [1.0 if pos is None else number(pos), 1.05 if neg is None else number(neg)]


def whole_distribution(value: Any) -> Left:
    """Top-p and top-k in training."""
    if value in (None, 1, -1, 0):
        return Left("off, as it always is in training here")
    return Left("training samples from the whole distribution here", loud=Rank.SAMPLING)


# ------------------------------------------------------------------------------------------------------ batch and clock


def ceil_of(value: float) -> Any:
    """Rounded up to the whole number that our key takes."""
    return int(value) if value == int(value) else Made(ceil(value), f"{value:g} there; a whole multiple here")


def group(completions: Any) -> Any:
    """Completions of a prompt."""
    if completions != 1:
        return None if completions is None else whole(completions)
    return Left("a group of one has no baseline here: our default of rollout.group_size is used", loud=Rank.LOSS)


def updates(prompts: Any, mini: Any) -> Any:
    """Mini-batches of a train step. Step and mini-batch are given in prompts."""
    if prompts is None or mini is None:
        return None
    prompts, mini = whole(prompts), whole(mini)
    return even(prompts, prompts / mini)


def even(prompts: int, at_least: float) -> Any:
    """The least number of updates, at least `at_least`, that divides the prompts evenly."""
    at_least = min(max(1, at_least), prompts)
    made = next(count for count in range(ceil(at_least), prompts + 1) if prompts % count == 0)
    return made if made == at_least else Made(made, f"{at_least:g} there; even mini-batches here")


def warmup(steps: Any, updates_of_step: Any) -> Any:
    """Warm-up in optimizer updates; theirs is in train steps."""
    if steps is None:
        return None
    per_step = plain(updates_of_step) or 1
    why = f"{steps} train steps there, each of {per_step} updates" if per_step != 1 else ""
    return Made(whole(steps) * per_step, why)


def share_of_steps() -> Left:
    """For a warmup that is a ratio of the steps, if their number depends on the length of the data."""
    return Left("a share of the steps, whose number isn't known: set learner.warmup_steps", loud=Rank.SCHEDULE)


def every(value: Any) -> Any:
    """Steps between evaluations; less than 1: never."""
    return None if value is None else max(0, whole(value))


def saves(value: Any) -> Any:
    """Steps between checkpoints."""
    if value is None:
        return None
    if whole(value) < 1:
        return Left("the first and the last checkpoint are always written here, by default every 50 steps too")
    return whole(value)


def checkpointing(on: Any) -> str:
    """Activation checkpointing; theirs is of whole blocks."""
    return "full" if flag(on) else "none"


def offload(*on: Any) -> Any:
    """`optimizer` if any of them is on."""
    return "optimizer" if any(map(flag, on)) else "none"


def reshard(after_forward: Any) -> Any:
    """Whether weights are gathered again for the backward pass; a number there divides them among so many GPUs."""
    if after_forward is None or after_forward in (True, False):
        return None if after_forward is None else flag(after_forward)
    return Made(True, f"{whole(after_forward)} GPUs divide them between the passes there, all shards here")


def kept_checkpoints(value: Any) -> Any:
    """Number of checkpoints to keep; null and negative: all."""
    return 0 if value is None or whole(value) < 1 else whole(value)


def sinks(loggers: Any) -> Any:
    """Those of the loggers that are sinks here."""
    if loggers is None:
        return None
    given = loggers if isinstance(loggers, list) else [loggers]
    known = [name for name in given if name in ("wandb", "tensorboard", "trackio")]
    others = [str(name) for name in given if name not in (*known, "console", "none", None)]
    return Made(known, f"{', '.join(others)} isn't a sink here") if others else known


def top_k(value: Any) -> Any:
    """Top-k. No limit is -1 there and 0 here."""
    return None if value is None else max(0, whole(value))


def engine(name: Any) -> Any:
    """Our engine: torch for `hf`, vLLM for every other one."""
    if name is None:
        return None
    return "vllm" if name == "vllm" else Made("torch" if name == "hf" else "vllm", f"{name} isn't known here")


def dual_clip(bound: Any) -> Any:
    """The dual clip's bound, null if theirs is off; ours is on by default."""
    return Made(None, "off by default there") if bound is None else number(bound)


def dtype(name: Any) -> Any:
    """Number format of the engine."""
    if name is None:
        return None
    table = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
    table |= {"float16": "float16", "fp16": "float16", "half": "float16"}
    return table.get(name) or Made("bfloat16", f"{name} isn't known here")
