"""A run of a few groups of episodes, driven by hand."""

from __future__ import annotations

from pathlib import Path

from asyncdapo.replay.server.arrivals import arrival
from tests.episodes import Episodes
from tests.replay.small_run import GROUP_SIZE, SmallRun, end


def run_of_episodes(run_dir: Path, change=lambda episodes: None, rewrite=lambda group: group) -> Path:
    """Two trained steps. `change` may harm the first group before it is sent, and `rewrite` every header."""
    run = SmallRun(run_dir, keep_payloads=True)
    run.join(0)
    for step in (1, 2):
        run.ready(0, 4)
        for lease_id in run.running(0)[:2]:
            prompt_id = run.leases[lease_id].prompt.prompt_id
            group, payload = Episodes(lease_id, versions=(step - 1, step - 1)).group(
                prompt_id, group_size=GROUP_SIZE, change=change if lease_id == 1 else list, lease_id=lease_id
            )
            run.dispatch.apply(arrival(group), arrived=(rewrite(group), payload))
            run.messages()
        run.train(step)
    return end(run, run_dir)
