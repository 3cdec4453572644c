"""asyncdapo from Python: configure a run, launch it, read its results. `import asyncdapo` exports all of it.

    config = asyncdapo.load_config("quickstart", run={"steps": 2})
    run = asyncdapo.launch(config)
    run.metrics()[-1]["eval/accuracy"]

In: a config, or the directory of a run. Out: plain Python values and numpy arrays. A launch is the command
`asyncdapo launch` in a process of its own, so that Ray, signals and GPU memory don't touch the caller's process. `Run`
only reads files: it works during a run, and after the run has ended or died. Nothing heavy is imported before it is
used.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncdapo.errors import EXIT_INTERRUPTED, RunError, UserError

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame  # pyright: ignore[reportMissingImports] (the user may have it)

    from asyncdapo.config.config import Config

__version__ = "0.1.0"

SAID = "asyncdapo: "
"""Prefix of a command's last message (`cli`)."""


def load_config(name_or_path: str | Path, /, *overrides: str, **sections: Mapping[str, Any]) -> Config:
    """The checked configuration of a run, by the rules of the command line.

    `name_or_path` is a YAML file or a name such as `quickstart`. `rollout={"slots": 32}` is `"rollout.slots=32"`; a
    section wins over an override. Model paths relative to the file become absolute. Raises UserError that names every
    wrong key, its value and the fix.
    """
    from asyncdapo.config.config import load_config as load
    from asyncdapo.config.config import models_beside, to_dict
    from asyncdapo.config.found import find_config

    path = find_config(str(name_or_path))
    config = load(path, [*overrides, *_as_overrides(sections)])
    model = models_beside(path, to_dict(config)).get("model", {})
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def _as_overrides(sections: Mapping[str, Any]) -> Iterator[str]:
    """`key=value` of every key, the value as JSON, which is YAML."""
    for section, keys in sections.items():
        given = {f"{section}.{key}": value for key, value in keys.items()} if isinstance(keys, Mapping) else None
        for key, value in ({section: keys} if given is None else given).items():
            yield f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"


def launch(config: Config) -> Run:
    """Train to the last step in a process of its own, and print its output as it comes. A second launch of the same run
    resumes from its newest checkpoint.

    Ctrl-C stops the run as in a terminal: it finishes its step and writes a checkpoint, and KeyboardInterrupt is raised
    once it has ended. Raises UserError if a key, a file or the data is wrong, and RunError if the run failed, both with
    its last message.
    """
    from asyncdapo.config.config import to_yaml

    with tempfile.TemporaryDirectory(prefix="asyncdapo-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        code, words = _follow([sys.executable, "-m", "asyncdapo", "launch", str(file)])
    if code == 2:
        raise UserError(words)
    if code == EXIT_INTERRUPTED:
        raise RunError("the run was stopped from elsewhere; launched again, it resumes")
    if code:
        raise RunError(words or f"the run ended with exit code {code}")
    return Run(config.run.dir)


def _follow(command: list[str]) -> tuple[int, str]:
    """Print what a command prints. Returns its exit code and its last message. The command has a session of its own, so
    Ctrl-C reaches it only through us, as SIGTERM: a run handles both alike, and SIGTERM also works in the background,
    where shells ignore Ctrl-C."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        start_new_session=True,
    )
    words, interrupt = "", None
    assert process.stdout is not None, "a pipe was asked for"
    with process:
        while process.returncode is None:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    words = words + line if words.startswith(SAID) and not line.startswith(SAID) else line
                process.wait()
            except KeyboardInterrupt as error:
                interrupt = error
                process.terminate()
    if interrupt:
        raise interrupt
    return process.returncode, words.removeprefix(SAID).strip()


@dataclass(frozen=True, eq=False)
class Completion:
    """One sampled response, or episode of several turns, of T tokens behind the prompt. The arrays are aligned: element
    t is about `token_ids[t]`. An episode that forked has several contexts, which stand one after the other."""

    group_id: int
    prompt_id: int
    step: int | None
    """Train step of the batch that holds its group; None if none does."""
    sample: int
    """Place in the group, from 0."""
    prompt: str
    """As the model read it, with special tokens."""
    response: str
    """As the verifier read it, without special tokens; of an episode with what its environment answered."""
    token_ids: np.ndarray
    """int32 [T]."""
    sampled: np.ndarray
    """int64 [T]: 1 where the model sampled the token, 0 where it observed it."""
    contexts: np.ndarray
    """int64 [T]: number of each token's context, from 0."""
    logprobs: np.ndarray
    """float32 [T]: log-probs under the policy that sampled them (μ), at the sampling temperature; 0 if observed."""
    versions: np.ndarray
    """int64 [T]: version of the weights that sampled each token, 0 for the initial model; -1 if observed."""
    loss_mask: np.ndarray
    """int64 [T]: 1 where the token bears loss, else 0."""
    num_turns: int
    """Responses that were sampled."""
    reward: float
    """The number that the advantage is computed from."""
    metrics: dict[str, float]
    """Numbers of the reward function: `acc`, `score`, `seq_reward`, and its own."""
    finish_reason: str


class Run:
    """A run, given by its directory; it may be running, finished or dead. Only `export` writes."""

    def __init__(self, dir: str | Path) -> None:
        """Raises UserError if there is no run."""
        self.dir = Path(dir).absolute()
        self._config_file = self.dir / "config.yaml"
        if not self._config_file.is_file():
            raise UserError(f"{self.dir}: no run there (give the run.dir of a launch)")

    def __repr__(self) -> str:
        return f"Run({str(self.dir)!r})"

    @property
    def config(self) -> Config:
        """As recorded by its latest launch. Keys that this version no longer knows are left out."""
        from asyncdapo.config.config import load_recorded

        return load_recorded(self._config_file)[0]

    def metrics(self) -> list[dict[str, float]]:
        """One dict a train step, and one for step 0; docs/metrics.md says what the names mean. A mean over nothing is
        NaN."""
        from asyncdapo.metrics.jsonl import to_metrics, whole_lines

        return [to_metrics(line) for line in whole_lines(self.dir)[0]]

    def frame(self) -> DataFrame:
        """`metrics()` as a pandas DataFrame, a row a step. Raises UserError if pandas is missing."""
        try:
            from pandas import DataFrame  # pyright: ignore[reportMissingImports] (the user may have it)
        except ImportError as error:
            raise UserError("Run.frame: needs pandas (pip install pandas, or use Run.metrics)") from error
        return DataFrame(self.metrics())

    def groups(self, step: int | None = None) -> list[dict[str, Any]]:
        """The rows of the ledger's table `groups` (docs/ledger.md), or those in the batch of `step`. Raises
        sqlite3.Error for a damaged ledger."""
        from asyncdapo.replay.ledger.ledger import is_begun, open_ledger

        if not is_begun(self.dir):
            return []
        with closing(open_ledger(self.dir)) as ledger:
            of_step = "" if step is None else "WHERE step = :step"  # which the ledger has an index for
            query = f"SELECT * FROM groups {of_step} ORDER BY group_id"
            return [dict(row) for row in ledger.execute(query, {"step": step})]

    def completions(self, step: int | None = None, group_id: int | None = None) -> Iterator[Completion]:
        """The completions of the batch of `step`, of one group, or of all groups whose tokens are kept.

        Raises LookupError for a step or a group that isn't there, or whose tokens are freed: a run keeps all of them
        with `replay.keep_payloads=true`. Raises BadRecord for a damaged file.
        """
        rows = [row for row in self.groups(step) if group_id in (None, row["group_id"])]
        if step is None and group_id is None:
            rows = [row for row in rows if row["segment"] is not None]
        elif not rows:
            asked = {"group": group_id, "step": step}
            what = ", ".join(f"{name} {number}" for name, number in asked.items() if number is not None)
            raise LookupError(f"{self.dir}: no groups of {what} in the ledger")
        if freed := [row["group_id"] for row in rows if row["segment"] is None]:
            raise LookupError(
                f"{self.dir}: the tokens of {len(freed)} of {len(rows)} groups aren't kept, the first is group "
                f"{freed[0]} (launch with replay.keep_payloads=true)"
            )
        return self._read(rows)

    def _read(self, rows: list[dict[str, Any]]) -> Iterator[Completion]:
        import numpy as np

        from asyncdapo.model.tokenizer import load_tokenizer
        from asyncdapo.records.record import PAYLOAD_FOLDER, Place, read_record
        from asyncdapo.transport.payload import expand

        model = self.config.model
        tokenizer = load_tokenizer(model.tokenizer_files)
        for row in rows:
            place = Place(row["segment"], row["offset"], row["bytes"])
            group, payload = read_record(self.dir / PAYLOAD_FOLDER, row["group_id"], place)
            prompt, contexts = tokenizer.spell(payload.prompt_ids.tolist()), list(payload.of_contexts(group))
            for sample, completion in enumerate(group.completions):
                own = [context for context in contexts if context.index == sample]
                token_ids = np.concatenate([context.own_ids for context in own])
                yield Completion(
                    group_id=row["group_id"],
                    prompt_id=row["prompt_id"],
                    step=row["step"],
                    sample=sample,
                    prompt=prompt,
                    response=tokenizer.decode(token_ids),
                    token_ids=token_ids,
                    sampled=np.concatenate([expand(context.header.sampled) for context in own]),
                    contexts=np.repeat(range(len(own)), [len(context.own_ids) for context in own]),
                    logprobs=np.concatenate([context.spread(context.logprobs_S) for context in own]),
                    versions=np.concatenate([context.spread(expand(context.header.versions), -1) for context in own]),
                    loss_mask=np.concatenate([context.spread(expand(context.header.loss_mask)) for context in own]),
                    num_turns=completion.num_turns,
                    reward=completion.reward,
                    metrics=completion.metrics,
                    finish_reason=completion.finish_reason,
                )

    def audit(self) -> list[str]:
        """Every broken promise of the run, a sentence each; empty for a sound run. The same as `asyncdapo audit`."""
        from asyncdapo.replay.ledger.audit import audit

        return audit(self.dir)

    def export(self, out: str | Path, step: int | None = None) -> Path:
        """Copy the newest whole checkpoint, or that of `step`, to the new directory `out`: a Hugging Face model with
        its tokenizer, without the optimizer's state. A warning names a newer checkpoint that is damaged. Returns
        `out`. Raises UserError if the checkpoint doesn't exist or is damaged, or if `out` is in use."""
        from asyncdapo.controller.commands.export import export
        from asyncdapo.learner.storage.checkpoint import checkpoint_dir, kept_steps

        out, steps = Path(out), kept_steps(self.dir)
        if step is not None and step not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none yet"
            raise UserError(f"{self.dir}: no checkpoint of step {step} ({there})")
        for problem in export(str(self.dir if step is None else checkpoint_dir(self.dir, step)), out).problems:
            warnings.warn(problem, stacklevel=2)
        return out
