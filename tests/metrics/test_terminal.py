from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from asyncdapo.metrics.terminal import NUM_RECENT_STEPS, LiveTable


@pytest.fixture
def terminal() -> StringIO:
    return StringIO()


def live_table(terminal: StringIO, times_s: list[float], width: int = 140) -> LiveTable:
    console = Console(file=terminal, force_terminal=True, width=width, height=40, color_system=None)
    return LiveTable(console, "quickstart", 36, now=lambda: times_s[0])


def last_picture(terminal: StringIO) -> str:
    return terminal.getvalue().rpartition("quickstart")[2]


def test_the_last_steps_stand_in_a_table_above_what_the_run_waits_for_and_how_long(terminal: StringIO):
    times_s = [100.0]
    live = live_table(terminal, times_s)
    for step in range(1, NUM_RECENT_STEPS + 3):
        live.log({"step": step, "reward/mean": step / 1000})
    live.status("learner waits for batch 15: rollout")
    times_s[0] += 42
    live.status("learner waits for batch 15: rollout")
    live.close()
    picture = last_picture(terminal)
    assert "0.002" not in picture
    assert "0.003" in picture
    assert "0.014" in picture
    assert picture.index("0.014") < picture.index("learner waits for batch 15: rollout  42 s")


def test_a_status_is_over_with_the_next_step(terminal: StringIO):
    live = live_table(terminal, [0.0])
    live.status("learner waits")
    live.log({"step": 1})
    live.close()
    assert "learner waits" not in last_picture(terminal)


def test_a_note_scrolls_by_above_the_table(terminal: StringIO):
    live = live_table(terminal, [0.0])
    live.note("weights: [gloo] travels")
    live.close()
    assert "weights: [gloo] travels" in terminal.getvalue()
    assert "gloo" not in last_picture(terminal)


def test_on_80_columns_every_number_is_whole(terminal: StringIO):
    live = live_table(terminal, [0.0], width=80)
    line = {
        "step": 36,
        "reward/mean": -0.924,
        "eval/accuracy": 0.953,
        "rollout/tokens_per_s": 12938,
        "learner/tokens_per_s": 105059,
        "replay/staleness_mean": 0.75,
        "replay/staleness_max": 12,
        "replay/queued": 1024,
        "learner/waiting_ratio": 0.25,
        "time/wall_s": 12345.6,
        "eval/greedy_accuracy": 0.988,
    }
    live.log(line)
    live.close()
    for number in ("36", "-0.924", "0.953", "12,938", "105,059", "0.75", "12", "1,024", "25%", "12,345.6 s", "0.988"):
        assert number in last_picture(terminal).split("\n", 3)[3]
