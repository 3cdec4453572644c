"""`asyncdapo data prepare`: turns a data set into files that a run reads as they are.

    source ─▶ inputs (files by split) ─▶ rows ─▶ shape (question, answer) ─▶ sieve (what a run can use) ─▶ output

In: the command's arguments. Out: the directory, the counts of every stage, and the config keys that use it. A row that
can't be used doesn't end the job. A problem of all rows does, with a UserError, and leaves the directory unchanged.
Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from asyncdapo.errors import UserError
from asyncdapo.prompts.prepare import output
from asyncdapo.prompts.prepare.inputs import Inputs, find_inputs
from asyncdapo.prompts.prepare.published import FROM_MESSAGES, TEMPLATES
from asyncdapo.prompts.prepare.rows import column_names, num_rows, read_rows
from asyncdapo.prompts.prepare.shape import Shape, recognise
from asyncdapo.prompts.prepare.sieve import STAGES, KeptRow, Sieve, SystemPrompt

ANSWER_OF_VERL = "reward_model.ground_truth"
OPTIONS = (
    "split",
    "subset",
    "hold_out",
    "prompt_column",
    "answer_column",
    "template",
    "verifier",
    "model",
    "max_prompt_length",
    "chat_template",
    "system_prompt",
)
"""The options that change the output."""
MEANINGS = STAGES | {"held_out": "in test.parquet"}
EVAL_PROMPTS = {"num_prompts": 512, "num_greedy_prompts": 256}
"""How many prompts a run holds out by default (section `eval`)."""
HELD_OUT = ("test", "validation")
"""Splits that aren't for training."""
HOLD_OUT_SEED = 0
PROGRESS_S = 0.5


def command(args: argparse.Namespace) -> int:
    """Prepare, or say that it is done already. Raises UserError."""
    _check_options(args)
    directory = Path(args.out).resolve()
    output.read_manifest(directory)  # refuses a directory with other content before anything is downloaded
    inputs = find_inputs(args.source, args.split, args.subset)
    if args.hold_out is not None and (len(inputs.splits) > 1 or set(inputs.splits) & set(HELD_OUT)):
        raise UserError(
            f"--hold-out {args.hold_out}: {args.source} has {', '.join(inputs.splits)} already (leave it out)"
        )
    made_from = _made_from(args, inputs)
    manifest = _done_before(args, made_from, directory)
    if manifest is None:
        with output.begin(directory) as unfinished:  # another process may have finished it in the meantime
            manifest = _done_before(args, made_from, directory)
            if manifest is None:
                facts = {"made_from": made_from, **_prepare(args, inputs, unfinished)}
                manifest = output.finish(unfinished, directory, facts)
    _show(manifest, args.out)
    return 0


def _done_before(args: argparse.Namespace, made_from: dict[str, Any], directory: Path) -> dict[str, Any] | None:
    """The manifest, if the directory already holds what was asked for. Raises UserError for one that must be kept."""
    there = output.read_manifest(directory)
    if there is None:
        return None
    if there["made_from"] == made_from and output.is_whole(directory, there):
        print(f"{args.out} is prepared already, from the same input with the same options")
        return there
    if not args.force:
        different = [key for key in made_from if there["made_from"].get(key) != made_from[key]] or ["its own files"]
        problem = f"holds data that was prepared before and differs in {', '.join(different)}"
        raise UserError(f"--out {args.out}: {problem} (choose another directory, or --force replaces it)")
    output.check_replaceable(directory, there)
    return None


def _check_options(args: argparse.Namespace) -> None:
    if args.split is not None and not re.fullmatch(r"\w[\w.-]*", args.split):
        raise UserError(f"--split {args.split!r}: must be a name: the file is named after it")
    if args.template is not None and "{prompt}" not in args.template:
        raise UserError(f"--template {args.template!r}: must contain {{prompt}}")
    _check_line_breaks("--template", args.template)
    _check_line_breaks("--system-prompt", args.system_prompt)
    if args.model is None and args.max_prompt_length is not None:
        raise UserError("--max-prompt-length: tokens can be counted only with --model")
    if args.max_prompt_length is not None and args.max_prompt_length < 1:
        raise UserError(f"--max-prompt-length {args.max_prompt_length}: must be at least 1 token")
    if args.model is not None and args.max_prompt_length is None:
        raise UserError(f"--model {args.model}: does nothing without --max-prompt-length")
    if args.system_prompt is not None and not (args.chat_template and args.system_prompt.strip()):
        raise UserError("--system-prompt: needs words, and --chat-template")


def _check_line_breaks(option: str, text: str | None) -> None:
    """A shell leaves \\n between quotes as it is: the model would be trained on these two characters."""
    if text is not None and "\\n" in text:
        meant = text.replace("\\n", "\n").replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        problem = "holds a backslash and an n, which isn't a line break here"
        raise UserError(f"{option} {text!r}: {problem} ({option} $'{meant}' has one)")


def _made_from(args: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    """Everything that determines the output. Files count by content, so they may move."""
    files = {
        split: [{"name": path.name, "sha256": output.digest_of(path)} for path in paths]
        for split, paths in inputs.splits.items()
    }
    given = {option: getattr(args, option) for option in OPTIONS}
    return {"source": inputs.name, "revision": inputs.revision, "files": files, "options": given}


def _prepare(args: argparse.Namespace, inputs: Inputs, unfinished: Path) -> dict[str, Any]:
    """Write the files. Returns the counts of each split, and what a run needs to use them."""
    shapes = {split: _shape(args, inputs, split) for split in inputs.splits}
    verifier = _verifier(args, inputs, shapes)
    system = SystemPrompt(text=args.system_prompt, given=args.system_prompt is not None)
    fits = _length_check(args, system)
    counts, messages = {}, False
    # JSON may hold half of a surrogate pair, which UTF-8 can't encode: backslashreplace writes its escape
    with (unfinished / output.UNUSABLE).open("w", encoding="utf-8", errors="backslashreplace") as unusable:
        for split, files in inputs.splits.items():
            template = _template(args, inputs, verifier)
            sieve = Sieve(shape=shapes[split], name=inputs.name, template=template, system=system, fits=fits)
            rows = _kept_rows(sieve, split, files, unusable)
            output.write_rows(unfinished / f"{split}.parquet", rows)
            counts[split] = sieve.counts
            messages |= sieve.from_messages and args.model is None  # with a model, tokens were counted as asked
            _check_any_kept(args.source, split, sieve.counts, unfinished / output.UNUSABLE, unusable)
            if args.hold_out is not None:
                _hold_out(args.hold_out, unfinished / f"{split}.parquet", sieve.counts)
    chat_template = args.chat_template or messages or system.text is not None
    use = {"verifier": verifier, "chat_template": chat_template}
    return {"counts": counts, "use": {**use, "system_prompt": system.text}}


def _hold_out(wanted: int, training: Path, counts: dict[str, int]) -> None:
    """Move `wanted` rows, chosen by a seed, to test.parquet. Prompts are distinct by now."""
    kept = counts["kept"]
    if not 1 <= wanted < kept:
        fix = f"--hold-out {max(1, kept // 10)}" if kept > 1 else "leave it out"
        raise UserError(f"--hold-out {wanted}: must be at least 1 and leave some of the {kept} rows ({fix})")
    chosen = set(random.Random(HOLD_OUT_SEED).sample(range(kept), wanted))
    output.move_rows(training, training.with_name("test.parquet"), chosen)
    counts |= {"kept": kept - wanted, "held_out": wanted}


def _shape(args: argparse.Namespace, inputs: Inputs, split: str) -> Shape:
    known, files = inputs.published, inputs.splits[split]
    columns = list(dict.fromkeys(name for path in files for name in column_names(path)))
    prompt = args.prompt_column or (known and known.prompt_column)
    answer = args.answer_column or (known and known.answer_column)
    if not columns:
        raise UserError(f"{', '.join(map(str, files))}: {_why_no_columns(files)}")
    answer_after = known.answer_after if known and not args.answer_column else None
    return recognise(columns, prompt, answer, answer_after, " + ".join(path.name for path in files[:3]))


def _why_no_columns(files: Sequence[Path]) -> str:
    for row in chain.from_iterable(map(read_rows, files)):
        try:
            row.read()
        except ValueError as error:
            return f"no row of it can be read (first {row.place}: {error})"
    return "holds no record"


def _verifier(args: argparse.Namespace, inputs: Inputs, shapes: Mapping[str, Shape]) -> str:
    if args.verifier:
        return args.verifier
    if inputs.published:
        return inputs.published.verifier
    return "dapo" if all(shape.answer == ANSWER_OF_VERL for shape in shapes.values()) else "answer"


def _template(args: argparse.Namespace, inputs: Inputs, verifier: str) -> Callable[[bool], str]:
    """The user's template, the data set's, or one that asks for what the verifier looks for; messages need none."""
    if args.template is not None:
        return lambda from_messages: args.template
    published = inputs.published
    if published and verifier == published.verifier:
        return lambda from_messages: published.template
    return lambda from_messages: FROM_MESSAGES if from_messages else TEMPLATES.get(verifier, FROM_MESSAGES)


def _length_check(args: argparse.Namespace, system: SystemPrompt) -> Callable[[str], bool]:
    """Counts tokens as the run does. The encoder is made at the first prompt, when the system prompt is known."""
    if args.model is None:
        return lambda prompt: True
    from asyncdapo.model.files import TokenizerFiles
    from asyncdapo.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TokenizerFiles(args.model, "--model"))
    encoders: list[Callable[[str], list[int]]] = []

    def fits(prompt: str) -> bool:
        if not encoders:
            if system.text is not None and not args.chat_template:
                raise UserError("the rows have a system prompt, which needs --chat-template")
            encoders.append(tokenizer.prompt_encoder(args.chat_template, system.text))
        return len(encoders[0](prompt)) <= args.max_prompt_length

    return fits


# ----------------------------------------------------------------------------------------------------------------- rows


def _kept_rows(sieve: Sieve, split: str, files: Sequence[Path], unusable: IO[str]) -> Iterator[KeptRow]:
    def report(entry: dict[str, object]) -> None:
        unusable.write(json.dumps({"split": split, **entry}, ensure_ascii=False) + "\n")

    sizes = [size for path in files if (size := num_rows(path)) is not None]
    total = sum(sizes) if len(sizes) == len(files) else None
    with _Progress(split, total) as progress:
        for path in files:
            rows = progress.watched(read_rows(path), sieve.counts)
            yield from sieve.keep(path, rows, report)


class _Progress:
    """A progress line on a terminal, overwritten in place; prints nothing elsewhere."""

    def __init__(self, split: str, total: int | None) -> None:
        self._of = f" of {total:,}" if total else ""
        self._split, self._next, self._shown = split, time.monotonic() + PROGRESS_S, False

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def watched(self, rows: Iterator[Any], counts: Mapping[str, int]) -> Iterator[Any]:
        for row in rows:
            if sys.stderr.isatty() and time.monotonic() > self._next:
                line = f"{self._split}: {counts['read']:,}{self._of} rows read, {counts['kept']:,} kept"
                print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
                self._next, self._shown = time.monotonic() + PROGRESS_S, True
            yield row


def _check_any_kept(source: str, split: str, counts: Mapping[str, int], unusable: Path, file: IO[str]) -> None:
    """Raises UserError, with the first problem, if no row is left."""
    if counts["kept"]:
        return
    if not counts["read"]:
        raise UserError(f"{source}: {split} holds no record")
    file.flush()
    first = unusable.read_text(encoding="utf-8").splitlines()
    why = f"first {json.loads(first[0])['place']}: {json.loads(first[0])['reason']}" if first else "all are too long"
    raise UserError(f"{source}: of {counts['read']:,} rows of {split} none can be used ({why})")


# ------------------------------------------------------------------------------------------------------------- printing


def _show(manifest: Mapping[str, Any], out: Path) -> None:
    """Print the counts of all splits side by side, and the keys with which a run uses them."""
    counts = manifest["counts"]
    print(f"{'':14}" + "".join(f"{split:>12}" for split in counts))
    for stage in next(iter(counts.values())):
        numbers = [of_split[stage] for of_split in counts.values()]
        meaning = MEANINGS.get(stage, "") if any(numbers) else ""
        line = f"{stage.replace('_', ' '):14}" + "".join(f"{number:12,}" for number in numbers)
        print(f"{line}   {meaning}".rstrip())
    use = manifest["use"]
    keys = []
    held_out = [split for split in HELD_OUT if f"{split}.parquet" in manifest["files"]]
    if training := [split for split in counts if split not in held_out]:  # `train`, or the name given by --split
        keys += ["prompts.task=file", f"prompts.path={out / f'{training[0]}.parquet'}"]
    if held_out:
        keys.append(f"prompts.eval_path={out / f'{held_out[0]}.parquet'}")
    else:  # a run then holds prompts out of the training file, and some must be left to train on
        kept = counts[training[0]]["kept"]
        few = min(max(1, kept // 10), kept - 1)
        keys += [f"eval.{key}={few}" for key, usual in EVAL_PROMPTS.items() if few < usual]
    keys.append(f"reward.verifier={use['verifier']}")
    if use["chat_template"]:
        keys.append("prompts.chat_template=true")
    if use["system_prompt"] is not None:
        keys.append(f"prompts.system_prompt={json.dumps(use['system_prompt'], ensure_ascii=False)}")
    if manifest["made_from"]["options"]["max_prompt_length"]:
        keys.append(f"prompts.max_prompt_length={manifest['made_from']['options']['max_prompt_length']}")
    print("\nuse it with\n  " + " ".join(map(shlex.quote, keys)))
