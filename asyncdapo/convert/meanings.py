"""What several peers mean by the same words: functions from their values to ours, for the tables of rules."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

from asyncdapo.convert.rules import Differs, Left, Made, Rank, Rule, either, flag, number, plain, whole

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
ROWS = {"aime-2024": 30, "gsm8k": 1319}
"""For evaluation in the published files."""
OWN_FUNCTION = "path/to/file.py:function"
"""Stands for a verifier that the user has to name; a launch refuses it."""
OWN_GPUS = "which GPU holds what is settled by controller.placement, learner.ranks and rollout.num_workers"
ENGINE = "the engine is set up otherwise here; rollout.engine_args passes arguments to vLLM"
CONSTANT = "the learning rate is constant after warm-up here"
ALL_WEIGHTS = "LoRA there, all weights are trained here: more memory, and a learning rate for LoRA is too high for them"
ADVANTAGES = "loss.advantage is grpo here, or dr_grpo, rloo"
CRITIC = "there is no critic here"
TURNS = "one turn only here: tools and further turns are left out"

SYNCHRONOUS = (
    Differs(
        "It samples and trains in turn; here sampling runs one step ahead: replay.run_ahead=0 does as it does",
        Rank.SAMPLING,
        lambda made: "replay.run_ahead" not in made,
    ),
    Differs(
        "Its ratio is against log-probs that the learner computes at the start of a step, as loss.anchor=proximal has "
        "it; here against those of the policy that sampled",
        Rank.LOSS,
        lambda made: "loss.anchor" not in made,
    ),
)
SURPLUS = Differs(
    "Groups beyond a batch are thrown away there; here they open the next batch",
    Rank.DETAIL,
    lambda made: made.get("filter.enabled", True) and made.get("filter.mode") != "replace",
)
WHOLE_FILES = Differs(
    "It evaluates every row of its files; here eval.num_prompts of them, 512 unless given",
    Rank.EVAL,
    lambda made: "prompts.eval_path" in made and "eval.num_prompts" not in made,
)
MODEL_GPUS = Differs(
    "It splits a model over GPUs to train it; here each learner rank holds all of it (asyncdapo plan says how much)",
    None,
)


# ----------------------------------------------------------------------------------------------------------------- data


def data_rules(train: str, held_out_key: str) -> tuple[Rule, ...]:
    """Of the keys that name files."""
    return (
        Rule("prompts.task", (train,), lambda files: "file"),
        Rule("prompts.path", (train,), train_data),
        Rule("prompts.eval_path", (held_out_key,), held_out),
        Rule("prompts.chat_template", (train,), lambda files: Made(True, "they always use it")),
        Rule("eval.num_greedy_prompts", (held_out_key,), lambda files: Made(0, "they have one evaluation, not two")),
    )


def epochs(passes: Any, *train: Any) -> Any:
    """Passes over rows that are no longer repeated."""
    if passes is None:
        return None
    named = [files for files in train if files]
    return repeated(whole(passes), (repeats(named[0]) if named else None) or 1)


def repeated(count: int, times: int) -> Any:
    """A number that is to make up for the repetitions."""
    why = f"{count} x {times}: theirs holds every row {times} times, and data prepare leaves repetitions out"
    return Made(count * times, why) if times > 1 else count


def repeats(files: Any) -> int | None:
    """How often a file that is known by its name holds each row; None for another, for several, for a part of one."""
    return REPEATS.get(_place(files)[1])


def _place(files: Any) -> tuple[str, str]:
    """A single file's folder, and its name without its ending."""
    files = files if isinstance(files, list) else [files]
    folder, _, name = str(files[0]).rpartition("/") if len(files) == 1 else ("", "", "")
    return folder.rpartition("/")[2].lower(), re.sub(r"\.(parquet|jsonl?)$", "", name).lower()


def all_rows(files: Any) -> Any:
    """Rows of the first file, where it is known."""
    folder, name = _place(files[:1] if isinstance(files, list) else files)
    rows = ROWS.get(folder if name in SAME_SPLITS else name)
    return None if rows is None else Made(rows, "all of its rows, as there")


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
    why = f"YOUR {what} IS NOT CARRIED OVER: reward.verifier={OWN_FUNCTION} (docs/reward.md)"
    return Left(why, loud=Rank.TASK)


def advantage_of(name: Any, table: dict[str, str]) -> Any:
    """Ours, else said aloud: another stands in for it."""
    if name == "gae":
        return Left(f"IS NOT CARRIED OVER: {CRITIC}; {ADVANTAGES}", loud=Rank.LOSS)
    return table.get(str(name)) or Left(f"IS NOT CARRIED OVER: {ADVANTAGES}", loud=Rank.LOSS)


def train_data(files: Any) -> Any:
    """Files or data sets to what `data prepare` makes of them; several are drawn from as one."""
    files = [file for file in (files if isinstance(files, list) else [files]) if file not in (None, "")]
    if not files:
        return Left("it names no file")
    if not all(isinstance(file, str) for file in files):
        raise ValueError("it takes a file or a list of files")
    if len(files) == 1:
        return _prepared(files[0], "train")
    made = [_prepared(file, "train") for file in files]
    why = "drawn from alike here, row after row there: make the weights the numbers of rows"
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
    """Where `data prepare` puts it; hub ids, files and the names of known sets are its sources."""
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
    """A weight that counts only if it is used."""
    return (number(coef) if coef is not None else None) if flag(use) else 0.0


def estimator(name: Any, use: Any, coef: Any, table: dict[str, str]) -> Any:
    """Of the KL penalty, where there is one."""
    if name is None:
        return None
    if not flag(use) or not coef:
        return Left("there is no KL penalty")
    return either(name, table, "it isn't one of k1, k2, k3")


def otherwise(theirs: str, why: str, rank: Rank, off: tuple[Any, ...] = ()) -> Rule:
    """For a key that trains something else, unless its value is nothing or one of `off`."""

    def value(given: Any) -> Left:
        if not given or given in off:
            return Left("off, as it always is here" if not given else "as it is here")
        return Left(why, loud=rank)

    return Rule("", (theirs,), value)


def known_loss(name: Any, table: dict[str, str]) -> Any:
    """Ours, else said aloud: another stands in for it."""
    return table.get(str(name)) or Left("no such loss here: PPO's clipped one stands for it", loud=Rank.LOSS)


def whole_distribution(value: Any) -> Left:
    """Nucleus and top-k in training."""
    if value in (None, 1, -1, 0):
        return Left("off, as it always is in training here")
    return Left("training samples from the whole distribution here", loud=Rank.SAMPLING)


# ------------------------------------------------------------------------------------------------------ batch and clock


def ceil_of(value: float, what: str) -> Any:
    """A whole number here, a fraction there."""
    return int(value) if value == int(value) else Made(ceil(value), f"{value:g} there; {what} here")


def group(completions: Any) -> Any:
    """Completions of a prompt."""
    if completions != 1:
        return None if completions is None else whole(completions)
    return Left("a group of one has no baseline here: rollout.group_size is ours", loud=Rank.LOSS)


def updates(prompts: Any, mini: Any) -> Any:
    """Mini-batches of a train step, both counted in prompts."""
    if prompts is None or mini is None:
        return None
    prompts, mini = whole(prompts), whole(mini)
    return even(prompts, prompts / mini)


def even(prompts: int, at_least: float) -> Any:
    """Updates of as many prompts each."""
    at_least = min(max(1, at_least), prompts)
    made = next(count for count in range(ceil(at_least), prompts + 1) if prompts % count == 0)
    return made if made == at_least else Made(made, f"{at_least:g} there; even mini-batches here")


def warmup(steps: Any, updates_of_step: Any) -> Any:
    """Train steps to optimizer updates."""
    if steps is None:
        return None
    per_step = plain(updates_of_step) or 1
    why = f"{steps} train steps there, each of {per_step} updates" if per_step != 1 else ""
    return Made(whole(steps) * per_step, why)


def share_of_steps(ours: str) -> Left:
    """Of a ratio, where the number of steps follows from the data's length."""
    return Left(f"a share of the steps, whose number isn't known: set {ours}", loud=Rank.SCHEDULE)


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


def dual_clip(bound: Any) -> Any:
    """Ours is on unless it is switched off."""
    return Made(None, "theirs is off unless it is given") if bound is None else number(bound)


def dtype(name: Any) -> Any:
    """Number format of the engine."""
    if name is None:
        return None
    table = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
    return table.get(name) or Made("bfloat16", f"{name} isn't known here")
