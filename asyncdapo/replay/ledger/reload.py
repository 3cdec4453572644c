"""Reload: reads the state of the replay server and its core from the ledger.

In: the tables, as a former process or a rollback left them. Out: a `Recovered`, or the facts of one batch. Nothing is
written. All counters of the core (verdicts, generation batches, places in the stream) are counted again from the rows.
Does not own: the records (`recovery`), what a rollback undoes (`rollback`).
"""

from __future__ import annotations

import json
import sqlite3
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from asyncdapo.records.record import BadRecord
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.admission import NUM_MEASURED
from asyncdapo.replay.core.batch import HeldGroup, draw_copies
from asyncdapo.replay.core.events import LEASE_ENDS, VERDICT_STATES
from asyncdapo.replay.core.recovery import GroupFacts, KnownWorker, OpenLease, Recovered, Totals
from asyncdapo.replay.ledger.schema import HELD_STATES
from asyncdapo.transport.codec import Malformed
from asyncdapo.transport.payload import read_partial

GROUP_ENDS = ("trained", "filtered", "expired", "surplus", "failed")
NUM_VERDICTS = 1 << 16
"""Latest verdicts that are read. The keep rate needs fewer."""


def recover(db: sqlite3.Connection) -> Recovered:
    """The ledger's record of the run."""
    branch, branch_step = db.execute("SELECT branch, step FROM branches ORDER BY branch DESC LIMIT 1").fetchone()
    published = max(branch_step, _one(db, "SELECT MAX(version) FROM publishes") or 0)
    stop = db.execute("SELECT detail, number FROM events WHERE kind = 'stopped'").fetchone()
    return Recovered(
        branch=branch,
        published=published,
        next_step=1 + (_one(db, "SELECT MAX(step) FROM events WHERE kind = 'cut'") or 0),
        in_training=_in_training(db, published),
        leases=_open_leases(db),
        num_leases=_one(
            db, "SELECT MAX(id) FROM (SELECT lease_id AS id FROM leases UNION ALL SELECT lease_id FROM undone_leases)"
        )
        or 0,
        workers=_known_workers(db, branch),
        measured=_measured(db),
        partials=_partials(db),
        verdicts=_verdicts(db),
        totals=_totals(db),
        first_lease_at_s=_one(
            db,
            "SELECT MIN(at_s) FROM"
            " (SELECT granted_at_s AS at_s FROM leases UNION ALL SELECT granted_at_s FROM undone_leases)",
        ),
        stop=None if stop is None else core.StopRun(reason=stop[0], error=bool(stop[1])),
        over=bool(_one(db, "SELECT EXISTS (SELECT 1 FROM events WHERE kind IN ('stopped', 'run_ended'))")),
        **_prompts(db),
        **_held_groups(db),
        **_gen_batches(db),
    )


def batch_facts(db: sqlite3.Connection, step: int) -> list[GroupFacts]:
    """Members of a trained batch, by rising `prompt_id`; empty if there is no such batch."""
    rows = db.execute(
        "SELECT group_id, tokens, completions, reward_mean, min_version FROM groups"
        " WHERE step = ? AND state = 'trained' ORDER BY prompt_id",
        (step,),
    )
    return [_facts(*row) for row in rows]


def batch_copies(db: sqlite3.Connection, step: int) -> dict[int, int]:
    """Extra copies of each member of a batch that was cut, by `group_id`, in the order of rising `prompt_id`; empty if
    there are none. The ledger has only their total: which members they are of is drawn again, with the same seed."""
    number = db.execute("SELECT number FROM events WHERE kind = 'cut' AND step = ?", (step,)).fetchone()
    members = db.execute(
        "SELECT group_id, prompt_id FROM groups WHERE step = ? AND state IN ('cut', 'trained') ORDER BY prompt_id",
        (step,),
    ).fetchall()
    copies = draw_copies(step, [prompt_id for _, prompt_id in members], number[0]) if number else ()
    return dict(zip([group_id for group_id, _ in members], copies, strict=False))


def outcome(db: sqlite3.Connection, lease_id: int) -> str | None:
    """See `Journal.outcome`."""
    try:
        row = db.execute(
            "SELECT outcome FROM leases WHERE lease_id = :id"
            " UNION ALL SELECT 'undone' FROM undone_leases WHERE lease_id = :id",
            {"id": lease_id},
        ).fetchone()
    except OverflowError:  # a peer may send any number, but one above 64 bits was never granted
        row = None
    if row is None:
        raise LookupError(f"no lease {lease_id} in the ledger")
    return row[0]


def saved_frames(db: sqlite3.Connection, prompt_id: int, before: int | None = None) -> Sequence[bytes]:
    """Header and buffers of what is saved of the prompt, by a lease before this one if it is given; empty if that is
    nothing. Raises BadRecord if the row isn't as it was written."""
    row = db.execute(
        "SELECT completions, token_ids, logprobs, lease_id, tokens, min_version, max_version FROM partials"
        " WHERE prompt_id = ? AND lease_id < COALESCE(?, lease_id + 1)",
        (prompt_id, before),
    ).fetchone()
    if row is None:
        return ()
    frames, columns = row[:3], row[3:]
    try:
        group, _ = read_partial(frames)
        versions = group.token_versions
        if columns != (group.lease_id, group.num_tokens, min(versions), max(versions)):
            raise Malformed("its columns aren't those of its tokens")
    except Malformed as malformed:
        raise BadRecord(f"what is saved of prompt {prompt_id} in `partials`: {malformed}") from malformed
    return frames


def last_position(db: sqlite3.Connection) -> int:
    """The highest position in any row. Later entries get higher ones."""
    columns = {
        "prompts": ("changed_pos",),
        "leases": ("granted_pos", "ended_pos"),
        "groups": ("arrived_pos", "changed_pos"),
        "batches": ("trained_pos",),
        "publishes": ("pos",),
        "loads": ("pos",),
        "events": ("pos",),
    }
    highest = [
        _one(db, f"SELECT MAX({column}) FROM {prefix}{table}")
        for table, names in columns.items()
        for column in names
        for prefix in ("", "undone_")
    ]
    last = [_one(db, "SELECT MAX(opened_pos) FROM branches"), _one(db, "SELECT MAX(saved_pos) FROM partials")]
    return max(position or 0 for position in [*highest, *last])


def sessions(db: sqlite3.Connection) -> dict[int, str]:
    """The latest session of every worker that ever joined."""
    rows = db.execute("SELECT worker, detail, MAX(event_id) FROM events WHERE kind = 'worker_joined' GROUP BY worker")
    return {worker: session for worker, session, _ in rows}


def answer_lengths(db: sqlite3.Connection) -> dict[tuple[str, int], float]:
    """Mean tokens of a completion of the latest group of each row of the data."""
    rows = db.execute(
        "SELECT source, row, 1.0 * tokens / completions, MAX(arrived_pos) FROM groups JOIN prompts USING (prompt_id)"
        " GROUP BY source, row"
    )
    return {(source, row): mean for source, row, mean, _ in rows}


def solved_shares(db: sqlite3.Connection) -> Iterator[tuple[int, float]]:
    """Prompt and share of right answers of each group, in the order of arrival."""
    return db.execute("SELECT prompt_id, acc_mean FROM groups WHERE acc_mean IS NOT NULL ORDER BY arrived_pos")


def _one(db: sqlite3.Connection, query: str) -> Any:
    return db.execute(query).fetchone()[0]


def _facts(group_id: int, num_tokens: int, num_completions: int, reward_mean: float, min_version: int) -> GroupFacts:
    return GroupFacts(
        group_id=group_id,
        num_tokens=num_tokens,
        num_completions=num_completions,
        reward_mean=reward_mean,
        min_version=min_version,
    )


def _prompts(db: sqlite3.Connection) -> dict[str, Any]:
    rows = db.execute(
        f"SELECT prompt_id, state, attempts, place FROM prompts WHERE state IN {('waiting', 'leased', *HELD_STATES)}"
    ).fetchall()
    highest, number = db.execute("SELECT MAX(prompt_id), COUNT(*) FROM prompts").fetchone()
    num_fresh = 0 if highest is None else highest + 1
    return {
        "num_fresh": num_fresh,
        "prompts": {prompt_id: (state, attempts) for prompt_id, state, attempts, _ in rows},
        "places": {prompt_id: place for prompt_id, state, _, place in rows if state == "waiting"}
        | (_passed_over(db, num_fresh) if number < num_fresh else {}),
    }


def _passed_over(db: sqlite3.Connection, num_fresh: int) -> dict[int, int]:
    """Prompts that were never leased, before one that was (`replay.order: longest_first`): each is in its own place."""
    leased = {prompt_id for (prompt_id,) in db.execute("SELECT prompt_id FROM prompts")}
    return {prompt_id: prompt_id for prompt_id in range(num_fresh) if prompt_id not in leased}


def _held_groups(db: sqlite3.Connection) -> dict[str, Any]:
    rows = db.execute(
        "SELECT group_id, tokens, completions, reward_mean, min_version, prompt_id, verdict, state, step"
        f" FROM groups WHERE state IN {HELD_STATES} ORDER BY step, prompt_id"
    )
    held: dict[str, list[HeldGroup]] = {"queued": [], "spare": []}
    batches: dict[int, list[HeldGroup]] = {}
    facts = {}
    for *fields, prompt_id, verdict, state, step in rows:
        fact = facts[fields[0]] = _facts(*fields)
        group = HeldGroup(min_version=fact.min_version, prompt_id=prompt_id, group_id=fact.group_id, verdict=verdict)
        (batches.setdefault(step, []) if state == "cut" else held[state]).append(group)
    copies = {step: tuple(batch_copies(db, step).values()) for step in batches}
    return {
        "queued": sorted(held["queued"]),
        "spare": sorted(held["spare"]),
        "batches": batches,
        "copies": {step: counts for step, counts in copies.items() if counts},
        "facts": facts,
    }


def _in_training(db: sqlite3.Connection, published: int) -> dict[int, int]:
    rows = db.execute(
        "SELECT g.step, COUNT(*), (SELECT number FROM events WHERE kind = 'cut' AND step = g.step)"
        " FROM groups g WHERE g.step > ? GROUP BY g.step",
        (published,),
    )
    return {step: members + (copies or 0) for step, members, copies in rows}


def _open_leases(db: sqlite3.Connection) -> list[OpenLease]:
    columns = ("lease_id", "prompt_id", "worker", "session", "attempt", "started_version")
    rows = db.execute(f"SELECT {', '.join(columns)} FROM leases WHERE outcome IS NULL ORDER BY lease_id")
    return [OpenLease(**dict(zip(columns, row, strict=True))) for row in rows]


def _known_workers(db: sqlite3.Connection, branch: int) -> dict[int, KnownWorker]:
    """Workers whose latest event in this branch is that they joined. (SQLite takes bare columns beside MAX from the row
    of the maximum.)"""
    latest = db.execute(
        "SELECT worker, kind, detail, number, MAX(event_id) FROM events"
        " WHERE branch = ? AND kind IN ('worker_joined', 'worker_lost', 'worker_drained') GROUP BY worker",
        (branch,),
    )
    loads = db.execute("SELECT worker, version, MAX(pos) FROM loads WHERE branch = ? GROUP BY worker", (branch,))
    loaded = {worker: version for worker, version, _ in loads}
    return {
        worker: KnownWorker(session=session, loaded_version=loaded[worker], continues=bool(continues))
        for worker, kind, session, continues, _ in latest
        if kind == "worker_joined"
    }


def _partials(db: sqlite3.Connection) -> dict[int, core.Partial]:
    rows = db.execute("SELECT prompt_id, min_version, max_version, tokens FROM partials")
    return {
        prompt_id: core.Partial(min_version=low, max_version=high, num_tokens=num_tokens)
        for prompt_id, low, high, num_tokens in rows
    }


def _verdicts(db: sqlite3.Connection) -> list[bool]:
    rows = db.execute(
        f"SELECT entered = 'queued' FROM groups WHERE entered IN {VERDICT_STATES}"
        f" ORDER BY arrived_pos DESC LIMIT {NUM_VERDICTS}"
    ).fetchall()
    return [bool(kept) for (kept,) in reversed(rows)]


def _measured(db: sqlite3.Connection) -> list[tuple[float, float]]:
    rows = db.execute(
        f"SELECT detail FROM events WHERE kind = 'pace_measured' ORDER BY event_id DESC LIMIT {NUM_MEASURED}"
    ).fetchall()
    return [tuple(json.loads(detail)) for (detail,) in reversed(rows)]


def _gen_batches(db: sqlite3.Connection) -> dict[str, Any]:
    """A verdict belongs to the step after the last cut before it. (A cut follows the verdict that causes it, at
    the same position.)"""
    cuts = db.execute("SELECT pos, step FROM events WHERE kind = 'cut' ORDER BY pos").fetchall()
    since = _one(db, "SELECT MAX(pos) FROM events WHERE kind = 'gen_batch_closed'") or 0
    arrived = db.execute(
        f"SELECT arrived_pos FROM groups WHERE entered IN {VERDICT_STATES} AND arrived_pos > ? ORDER BY arrived_pos",
        (since,),
    )
    limit = "SELECT MAX(pos) FROM events WHERE kind = 'gen_batch_closed' AND detail = 'limit reached'"
    last_cut = cuts[-1][0] if cuts else 0
    return {
        "gen_batches": dict(
            db.execute("SELECT step, MAX(number) FROM events WHERE kind = 'gen_batch_closed' GROUP BY step")
        ),
        "open_verdicts": [1 + _step_before(cuts, position) for (position,) in arrived],
        "limit_reached": (_one(db, limit) or 0) > last_cut,
    }


def _step_before(cuts: list[tuple[int, int]], position: int) -> int:
    index = bisect_left(cuts, (position, 0))
    return cuts[index - 1][1] if index else 0


def _totals(db: sqlite3.Connection) -> Totals:
    ends = db.execute(
        f"SELECT state, COUNT(*), SUM(tokens), SUM(completions) FROM groups WHERE state IN {GROUP_ENDS} GROUP BY state"
        " UNION ALL SELECT 'undone', COUNT(*), SUM(tokens), SUM(completions) FROM undone_groups"
    ).fetchall()
    dropped = _one(
        db,
        "SELECT SUM(number) FROM (SELECT kind, number FROM events UNION ALL SELECT kind, number FROM undone_events)"
        " WHERE kind = 'partial_dropped'",
    )
    withdrawn_stale = _one(db, "SELECT COUNT(*) FROM leases WHERE outcome = 'withdrawn' AND reason = 'stale'")
    return Totals(
        groups={end: groups for end, groups, _, _ in ends} | {"withdrawn_stale": withdrawn_stale},
        tokens={end: tokens or 0 for end, _, tokens, _ in ends} | {"dropped": dropped or 0},
        completions={end: completions or 0 for end, _, _, completions in ends},
        verdicts=_one(db, f"SELECT COUNT(*) FROM groups WHERE entered IN {VERDICT_STATES}"),
        gen_batches=_one(db, "SELECT COUNT(*) FROM events WHERE kind = 'gen_batch_closed'"),
        lease_ends=dict(db.execute(f"SELECT kind, COUNT(*) FROM events WHERE kind IN {LEASE_ENDS} GROUP BY kind")),
    )
