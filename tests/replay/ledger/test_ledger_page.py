"""docs/ledger.md shows the ledger as it is."""

import re
from pathlib import Path
from typing import get_args

from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.schema import UNDOABLE
from tests.replay.small_run import finished_run, resumed_run, rows

PAGE = (Path(__file__).parents[3] / "docs" / "ledger.md").read_text()


def test_the_page_on_the_ledger_names_every_table_and_column(tmp_path):
    Journal(tmp_path).close()
    for table in rows(tmp_path, "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'undone_%'"):
        [section] = [part for part in PAGE.split("\n**")[1:] if part.startswith(f"`{table['name']}`**")]
        columns = rows(tmp_path, f"SELECT name FROM pragma_table_info('{table['name']}')")
        assert [column["name"] for column in columns if f"`{column['name']}`" not in section] == []


def test_every_table_that_a_rollback_touches_has_an_undone_one_of_the_same_columns(tmp_path):
    Journal(tmp_path).close()
    tables = {row["name"] for row in rows(tmp_path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {name for name in tables if not name.startswith("undone_")} == {*UNDOABLE, "meta", "branches", "partials"}
    for table in UNDOABLE:
        assert f"`undone_{table}`" in PAGE
        [columns, undone] = [
            [row["name"] for row in rows(tmp_path, f"SELECT name FROM pragma_table_info('{name}')")]
            for name in (table, f"undone_{table}")
        ]
        assert undone == [*columns, "undone_by"]


def test_the_query_on_the_page_shows_what_a_rollback_undid(tmp_path):
    resumed_run(tmp_path)
    [query] = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    [first, *_] = rows(tmp_path, query)
    [undone] = rows(tmp_path, "SELECT COUNT(*) AS groups, SUM(tokens) AS tokens FROM undone_groups WHERE undone_by = 1")
    assert first == {"branch": 1, "step": 1, "reason": "the learner died"} | undone
    assert undone["tokens"] > 0


def test_the_page_on_the_ledger_names_every_state_and_event(tmp_path):
    kinds = {row["kind"] for row in rows(finished_run(tmp_path), "SELECT kind FROM events")}
    states = {*get_args(core.PromptState), *get_args(core.GroupState)}
    assert [word for word in kinds | states if not re.search(rf"\b{word}\b", PAGE)] == []
