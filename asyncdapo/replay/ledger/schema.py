"""The tables of `RUN_DIR/ledger.db`; docs/ledger.md explains every column to its readers.

Two rules hold in all tables. Columns that end in `_pos` are journal positions: the entries, one for each core event or
rollback, are numbered 1, 2, …, and a row has the position at which it was written and the one at which it last changed.
So "everything after position p" is a simple WHERE clause, which is most of what a rollback needs. Columns that end in
`_s` are seconds, `*_at_s` since 1970.

The tables hold only history that was not undone. What a rollback undoes is moved to tables named `undone_*`, with the
same columns and, as the last one, the branch that undid it.
"""

LEDGER_SCHEMA = 3
"""Raised when a column changes its meaning or is removed."""

HELD_STATES = ("queued", "spare", "cut")
"""States of a group whose tokens may still be trained on."""
UNDOABLE = ("prompts", "leases", "groups", "batches", "publishes", "loads", "events")

PARTIALS_TABLE = """
CREATE TABLE IF NOT EXISTS partials (
    prompt_id INTEGER PRIMARY KEY,
    lease_id INTEGER NOT NULL,
    min_version INTEGER NOT NULL,
    max_version INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    completions BLOB NOT NULL,
    token_ids BLOB NOT NULL,
    logprobs BLOB NOT NULL,
    saved_pos INTEGER NOT NULL,
    saved_at_s REAL NOT NULL
);
"""
"""Runs from before it was there get it when they are resumed. A row holds the tokens themselves: it is replaced, and
deleted, all the time, and segments only grow."""
TABLES = f"""
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value
);
CREATE TABLE branches (
    branch INTEGER PRIMARY KEY,
    step INTEGER NOT NULL,
    pos INTEGER NOT NULL,
    opened_pos INTEGER NOT NULL,
    reason TEXT NOT NULL,
    at_s REAL NOT NULL
);
CREATE TABLE prompts (
    prompt_id INTEGER PRIMARY KEY,
    epoch INTEGER,
    source TEXT,
    row INTEGER,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    step INTEGER,
    reason TEXT NOT NULL,
    place INTEGER,
    changed_pos INTEGER NOT NULL
);
CREATE TABLE leases (
    lease_id INTEGER PRIMARY KEY,
    prompt_id INTEGER NOT NULL,
    branch INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker INTEGER NOT NULL,
    session TEXT NOT NULL,
    started_version INTEGER,
    outcome TEXT,
    reason TEXT NOT NULL DEFAULT '',
    granted_pos INTEGER NOT NULL,
    ended_pos INTEGER,
    granted_at_s REAL NOT NULL,
    ended_at_s REAL
);
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY,
    prompt_id INTEGER NOT NULL,
    lease_id INTEGER NOT NULL,
    branch INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker INTEGER NOT NULL,
    min_version INTEGER NOT NULL,
    max_version INTEGER NOT NULL,
    verdict TEXT NOT NULL,
    entered TEXT NOT NULL,
    state TEXT NOT NULL,
    step INTEGER,
    reason TEXT NOT NULL,
    completions INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    truncated INTEGER NOT NULL,
    reward_mean REAL NOT NULL,
    acc_mean REAL,
    generate_s REAL NOT NULL,
    segment INTEGER,
    offset INTEGER,
    bytes INTEGER,
    arrived_pos INTEGER NOT NULL,
    changed_pos INTEGER NOT NULL,
    arrived_at_s REAL NOT NULL
);
CREATE TABLE batches (
    step INTEGER PRIMARY KEY,
    branch INTEGER NOT NULL,
    learner_version INTEGER NOT NULL,
    groups INTEGER NOT NULL,
    copies TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    staleness_max INTEGER NOT NULL,
    staleness_mean REAL NOT NULL,
    reward_mean REAL NOT NULL,
    summary TEXT NOT NULL,
    trained_pos INTEGER NOT NULL,
    trained_at_s REAL NOT NULL
);
CREATE TABLE publishes (
    version INTEGER NOT NULL,
    branch INTEGER NOT NULL,
    pos INTEGER NOT NULL,
    at_s REAL NOT NULL
);
CREATE TABLE loads (
    worker INTEGER NOT NULL,
    version INTEGER NOT NULL,
    branch INTEGER NOT NULL,
    pos INTEGER NOT NULL,
    at_s REAL NOT NULL
);
CREATE TABLE events (
    event_id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    branch INTEGER NOT NULL,
    lease_id INTEGER,
    prompt_id INTEGER,
    worker INTEGER,
    step INTEGER,
    number INTEGER,
    detail TEXT NOT NULL,
    pos INTEGER NOT NULL,
    at_s REAL NOT NULL
);
{PARTIALS_TABLE}
CREATE INDEX leases_prompt ON leases (prompt_id);
CREATE INDEX groups_prompt ON groups (prompt_id);
CREATE INDEX groups_step ON groups (step);
CREATE INDEX groups_segment ON groups (segment);
"""
UNDONE_TABLES = (
    "".join(f"CREATE TABLE undone_{table} AS SELECT *, 0 AS undone_by FROM {table} WHERE 0;" for table in UNDOABLE)
    + "CREATE INDEX undone_leases_id ON undone_leases (lease_id);"
)
