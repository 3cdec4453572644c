"""Audit: does a run directory hold what the run promised? It reads files only, of a finished or an unfinished run.

In: `ledger.db`, `payloads/`, `metrics.jsonl`, and `config.yaml` with the limits that the run promised, above all the
staleness bound. Out: the breaches, one line each; none for a sound run.
It trusts no number that the run computed about itself: counts and staleness are recounted from the rows of the groups.
Does not own: the invariants of the ledger (`invariants`), what the tokens of a group show (`contexts`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from asyncdapo.errors import UserError
from asyncdapo.records.record import PAYLOAD_FOLDER, BadRecord, Place, read_record
from asyncdapo.replay.ledger.contexts import header_problem, token_problem
from asyncdapo.replay.ledger.invariants import INVARIANTS, NUM_COPIES
from asyncdapo.replay.ledger.ledger import LEDGER_FILE, check_values, is_begun, open_ledger
from asyncdapo.replay.ledger.schema import HELD_STATES, LEDGER_SCHEMA, PARTIALS_TABLE

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "eval.json"
"""In the directory of an evaluation (`controller/eval/record.py`)."""
NUM_SHOWN = 3
"""Rows shown of each breach; the others are only counted."""


class _Unreadable(Exception):  # noqa: N818 - a finding, not a failure
    """A file that the audit needs is missing, damaged or of another format."""


def run_audit(run_dir: Path) -> int:
    """Print a summary of the run and its breaches. Returns the exit code: 1 on a breach. Raises UserError if there is
    no run."""
    if not any((run_dir / name).exists() for name in (CONFIG_FILE, LEDGER_FILE)):
        raise UserError(f"{run_dir}: no run there (give the run.dir of a launch)")
    if (run_dir / EVALUATION_FILE).exists():
        raise UserError(f"{run_dir}: is an evaluation, which keeps no ledger: give the run.dir of a launch")
    breaches, lost = _audit(run_dir)
    print(run_dir)
    for line in _summary(run_dir, lost):
        print(f"  {line}")
    for breach in breaches:
        print(f"breach: {breach}")
    if not breaches:
        print(f"sound: all {len(INVARIANTS)} invariants of the ledger hold, metrics and payloads agree with it")
    return 1 if breaches else 0


def audit(run_dir: Path) -> list[str]:
    """Every breach found, as a sentence and the rows that show it."""
    return _audit(run_dir)[0]


def _audit(run_dir: Path) -> tuple[list[str], list[dict]]:
    """The breaches; and the ended groups whose payload can't be read any more, which breaks no promise."""
    try:
        limits = _limits(run_dir / CONFIG_FILE)
        with closing(_open(run_dir)) as ledger:
            ledger.execute("BEGIN")  # a consistent view: the run may still write
            finished = ledger.execute("SELECT EXISTS (SELECT 1 FROM events WHERE kind = 'run_ended')").fetchone()[0]
            harmed, wrong = _read_payloads(ledger, run_dir / PAYLOAD_FOLDER)
            return [
                *_ledger_breaches(ledger, limits | {"finished": finished}),
                *_payload_breaches(ledger, harmed, wrong),
                *_metrics_breaches(ledger, run_dir / METRICS_FILE, bool(finished)),
            ], [group for group in harmed if group["state"] not in HELD_STATES]
    except (_Unreadable, sqlite3.Error) as error:
        return [f"{LEDGER_FILE}: {error}" if isinstance(error, sqlite3.Error) else str(error)], []


def ledger_breach(run_dir: Path, config: Mapping[str, Any]) -> str:
    """The first breach of `config` in the ledger of a run; empty if the run can be resumed with it."""
    try:
        if not is_begun(run_dir):
            return ""
        limits = _limits_of(config)
        with closing(_open(run_dir)) as ledger:
            breaches = _ledger_breaches(ledger, limits | {"finished": 0})
            return next((breach for breach in breaches if not breach.startswith("there is a batch")), "")
    except sqlite3.Error as error:
        return str(error)


def _limits(path: Path) -> dict[str, int]:
    """The limits in the run's config: parameters of the invariants."""
    if not path.is_file():
        raise _Unreadable(f"{path.name}: missing, so there is nothing to hold the run to")
    try:
        return _limits_of(yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except KeyError as error:
        raise _Unreadable(f"{path.name}: can't be read (no key {error})") from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise _Unreadable(f"{path.name}: can't be read ({str(error).splitlines()[0]})") from error


def _limits_of(config: Mapping[str, Any]) -> dict[str, int]:
    replay, prompts, filters = (config[section] for section in ("replay", "prompts", "filter"))
    batch_max = int(replay["prompts_per_step"])
    may_be_short = filters["on_limit"] != "raise" and (filters["max_gen_batches"] > 0 or prompts["epochs"] > 0)
    return {
        "bound": 0 if replay["run_ahead"] == 0 else int(replay["max_staleness"]),
        "batch_min": 1 if may_be_short else batch_max,  # at the limit of generation batches, or at the end of the data
        "batch_max": batch_max,
        "group_size": int(config["rollout"]["group_size"]),
        "max_attempts": int(prompts["max_attempts"]),
        "replaces": int(filters.get("mode") == "replace"),
    }


def _open(run_dir: Path) -> sqlite3.Connection:
    """The ledger, after a check of its schema and its pages."""
    if not (run_dir / LEDGER_FILE).is_file():
        raise _Unreadable(f"{LEDGER_FILE}: missing")
    ledger = open_ledger(run_dir)
    try:
        row = ledger.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if row is None or row[0] != LEDGER_SCHEMA:
            raise _Unreadable(f"{LEDGER_FILE}: schema {row and row[0]}, this program reads {LEDGER_SCHEMA}")
        check_values(ledger)
        if not ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'partials'").fetchone():
            ledger.execute(PARTIALS_TABLE.replace("TABLE", "TEMPORARY TABLE", 1))  # a run from before it was there
    except (sqlite3.Error, _Unreadable):
        ledger.close()
        raise
    return ledger


def _ledger_breaches(ledger: sqlite3.Connection, parameters: dict[str, int]) -> Iterator[str]:
    for invariant, query in INVARIANTS.items():
        rows = ledger.execute(query, parameters).fetchall()
        if rows:
            yield f"{invariant}: {_show([dict(row) for row in rows])}"


def _read_payloads(ledger: sqlite3.Connection, folder: Path) -> tuple[list[dict], list[dict]]:
    """Of all groups whose payload is kept: those that can't be read, and those whose tokens contradict what is said of
    them."""
    columns = "group_id, state, segment, offset, bytes, min_version, max_version, tokens"
    harmed, wrong = [], []
    for group_id, state, *place, low, high, num_tokens in ledger.execute(
        f"SELECT {columns} FROM groups WHERE segment IS NOT NULL"
    ):
        try:
            group, payload = read_record(folder, group_id, Place(*place))
        except BadRecord as bad:
            harmed.append({"group_id": group_id, "state": state, "file": bad})
            continue
        problem = next(filter(None, map(header_problem, group.completions)), None) or token_problem(group, payload)
        found, known = (group.min_version, group.max_version, group.num_sampled_tokens), (low, high, num_tokens)
        if problem is None and found != known:
            problem = f"lowest and highest version and number of tokens are {found}, the ledger has {known}"
        if problem:
            wrong.append({"group_id": group_id, "state": state, "problem": problem})
    return harmed, wrong


def _payload_breaches(ledger: sqlite3.Connection, harmed: list[dict], wrong: list[dict]) -> Iterator[str]:
    """Groups that may still be trained on and whose payload is missing or damaged; groups of wrong tokens."""
    held = f"SELECT group_id, state FROM groups WHERE state IN {HELD_STATES} AND segment IS NULL"
    lacking = [dict(row) for row in ledger.execute(held)]
    if harmed := [*lacking, *(group for group in harmed if group["state"] in HELD_STATES)]:
        yield f"a group that may still be trained has its payload: {_show(harmed)}"
    if wrong:
        yield f"a group is what its tokens show: {_show(wrong)}"


def _metrics_breaches(ledger: sqlite3.Connection, path: Path, finished: bool) -> Iterator[str]:
    """metrics.jsonl has one line for each batch, and they agree. The last batch's line may be missing, since it is
    written after the final evaluation. In a running run there may be lines that are newer than this view of the
    ledger."""
    try:
        lines = _metrics(path, finished)
    except _Unreadable as error:
        yield str(error)
        return
    rows = ledger.execute(f"SELECT *, {NUM_COPIES} AS num_copies FROM batches b ORDER BY step")
    batches = {row["step"]: row for row in rows}
    steps, expected = [line.get("step") for line in lines if line.get("step") != 0], list(batches)
    if not finished:
        steps = steps[: len(expected)]
    if steps not in (expected, expected[:-1]):
        yield f"{path.name} has one line for each batch: {_difference(steps, expected)}"
    for key, column in (
        ("replay/trained_groups", "groups"),
        ("replay/copies", "num_copies"),
        ("replay/staleness_max", "staleness_max"),
    ):
        different = [
            {"step": line["step"], path.name: line.get(key), "ledger": batches[line["step"]][column]}
            for line in lines
            if line.get("step") in batches and line.get(key) != batches[line["step"]][column]
        ]
        if different:
            yield f"{key} is what the ledger says of the batch: {_show(different)}"


def _metrics(path: Path, finished: bool) -> list[dict]:
    if not path.is_file():
        raise _Unreadable(f"{path.name}: missing")
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    if not finished and lines and not text.endswith("\n"):
        lines.pop()  # the writer was stopped in the middle of it
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise _Unreadable(f"{path.name}: line {number} isn't JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise _Unreadable(f"{path.name}: line {number} isn't an object")
        records.append(record)
    return records


def _difference(steps: list, expected: list[int]) -> str:
    lacking, extra = sorted(set(expected) - set(steps)), [step for step in steps if step not in expected]
    return f"{len(steps)} lines for {len(expected)} batches, lacking {lacking[:NUM_SHOWN]}, extra {extra[:NUM_SHOWN]}"


def _show(rows: list[dict]) -> str:
    shown = "; ".join(", ".join(f"{name} {value}" for name, value in row.items()) for row in rows[:NUM_SHOWN])
    more = len(rows) - NUM_SHOWN
    return shown + (f"; and {more} more" if more > 0 else "")


def _summary(run_dir: Path, lost: list[dict]) -> list[str]:
    """Counts from the ledger, for people; empty if it can't be read. `lost`: ended groups without a payload."""
    try:
        with closing(_open(run_dir)) as ledger:
            return [*_counts(ledger), _batches(ledger), *_rollbacks(ledger), *_unreadable(ledger, lost)]
    except (_Unreadable, sqlite3.Error):
        return []


def _counts(ledger: sqlite3.Connection) -> Iterator[str]:
    for table, column in (("prompts", "state"), ("groups", "state"), ("leases", "COALESCE(outcome, 'open')")):
        rows = ledger.execute(f"SELECT {column}, COUNT(*) FROM {table} GROUP BY 1 ORDER BY 2 DESC, 1")
        counts = " · ".join(f"{state} {count:,}" for state, count in rows)
        yield f"{table:<8} {counts or 'none'}"


def _rollbacks(ledger: sqlite3.Connection) -> Iterator[str]:
    rows = ledger.execute("SELECT step FROM branches WHERE branch > 0 ORDER BY branch").fetchall()
    if rows:
        groups, tokens = ledger.execute("SELECT COUNT(*), COALESCE(SUM(tokens), 0) FROM undone_groups").fetchone()
        steps = ", ".join(str(step) for (step,) in rows[-NUM_SHOWN:])
        yield f"rollbacks {len(rows)}, the last to step {steps} · undone: {groups:,} groups, {tokens:,} tokens"


def _unreadable(ledger: sqlite3.Connection, harmed: list[dict]) -> Iterator[str]:
    """Lost payloads, and what became of their groups. They break no promise."""
    every_event = "SELECT kind FROM events UNION ALL SELECT kind FROM undone_events"
    again = ledger.execute(f"SELECT COUNT(*) FROM ({every_event}) WHERE kind = 'unreadable'").fetchone()[0]
    if again:
        yield f"payloads {again:,} unreadable, whose prompts were sampled again"
    if harmed:
        yield f"payloads {len(harmed):,} unreadable, of groups that have ended: {_show(harmed)}"


def _batches(ledger: sqlite3.Connection) -> str:
    num, groups, copies, tokens, worst, mean = ledger.execute(
        f"SELECT COUNT(*), SUM(groups), SUM({NUM_COPIES}), SUM(tokens), MAX(staleness_max),"
        " SUM(staleness_mean * groups) / SUM(groups) FROM batches b"
    ).fetchone()
    if num == 0:
        return f"{'batches':<8} none"
    groups_text = f"{groups:,} groups" + (f" and {copies:,} copies" if copies else "")
    return f"{'batches':<8} {num:,} of {groups_text}, {tokens:,} tokens · staleness max {worst}, mean {mean:.2f}"
