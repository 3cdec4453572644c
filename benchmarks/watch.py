"""How long `asyncdapo watch` takes on a long run: 2,000 train steps, 1 M completions.

    python benchmarks/watch.py [--dir DIR] [--steps 2000] [--groups 63] [--group-size 8] [--kept-steps 20]
        [--browser CHROMIUM]

The run is made, not trained: every metric of the page has a random number in each line, every group a row in the
ledger, and the groups of the last steps have their tokens, as in a run that frees those that a checkpoint covers. With
`--steps 10000 --kept-steps 10000` the run directory has 10 GB.
Measured is the first reading and the next ones, each answer of the page's server, and with `--browser` (needs
playwright) in headless Chromium: the first paint, the first chart, and the way from a chart to a completion. Printed
are wall time, and processor time of this process alone.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from asyncdapo.config.config import to_yaml
from asyncdapo.controller.watch.charts import CHARTS
from asyncdapo.controller.watch.run_state import RunState
from asyncdapo.controller.watch.site import Site
from asyncdapo.controller.watch.web import Server
from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group
from asyncdapo.metrics.progress import COLUMNS
from asyncdapo.records.record import PAYLOAD_FOLDER, Place
from asyncdapo.replay.ledger.ledger import LEDGER_FILE, open_for_writing
from asyncdapo.replay.ledger.payloads import Segments
from asyncdapo.transport.payload import Payload

TOKENS = 256
"""Of a completion."""
NUM_OTHERS = 150
"""Metrics of a line that no chart shows."""


def make_run(run_dir: Path, steps: int, groups: int, group_size: int, kept_steps: int) -> None:
    """The files of a run that has all its steps, and the tokens of the last `kept_steps`."""
    import asyncdapo

    run_dir.mkdir(parents=True)
    config = asyncdapo.load_config("quickstart", run={"steps": steps}, rollout={"group_size": group_size})
    (run_dir / "config.yaml").write_text(to_yaml(config))
    names = sorted({metric for chart in CHARTS for metric in chart.series} | {column.metric for column in COLUMNS})
    names += [f"reward/metrics/own_{number}" for number in range(NUM_OTHERS)]
    draw = random.Random(0)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {name: step * draw.random() for name in names} | {"step": step, "time/wall_s": 3.0 * step}
            file.write(json.dumps(line) + "\n")
    with closing(open_for_writing(run_dir / LEDGER_FILE)) as ledger:
        ledger.execute("BEGIN")
        rows = _rows(Segments(run_dir / PAYLOAD_FOLDER), steps, groups, group_size, kept_steps)
        ledger.executemany(f"INSERT INTO groups VALUES ({', '.join('?' * 25)})", rows)
        ledger.execute("COMMIT")


def _rows(segments: Segments, steps: int, groups: int, group_size: int, kept_steps: int) -> Iterator[tuple[Any, ...]]:
    """Of the table `groups`, in the order of its columns."""
    for number in range(steps * groups):
        step, at = number // groups + 1, number + 1
        version, tokens = max(0, step - 2), group_size * TOKENS
        place = segments.append(*_group(at, version, group_size)) if step > steps - kept_steps else None
        where = (place.segment, place.offset, place.num_bytes) if isinstance(place, Place) else (None, None, None)
        ends = ("kept", "queued", "trained", step, "", group_size, tokens, 0, 0.5, 0.5, 2.0, *where, at, at, 1e9 + at)
        yield (at, at, at, 0, 1, at % 8, version, version, *ends)


def _group(group_id: int, version: int, group_size: int) -> tuple[Group, Payload]:
    completion = Completion(
        contexts=[Context.of_turn([(version, TOKENS)], [(1, TOKENS)], NO_CHECKSUM)],
        finish_reason="stop",
        reward=1.0,
        metrics={"acc": 1.0},
    )
    group = Group(
        prompt_id=group_id,
        lease_id=group_id,
        branch=0,
        attempt=1,
        worker=0,
        num_prompt_tokens=16,
        completions=[completion] * group_size,
        generate_s=1.0,
    )
    tokens = np.random.default_rng(group_id).integers(3, 20, (group_size + 1) * TOKENS).astype(np.int32)
    logprobs = np.full(group_size * TOKENS, -0.5, np.float32)
    return group, Payload(tokens[:16], tokens[TOKENS:], logprobs)


def timed(what: str, act: Callable[[], Any]) -> Any:
    """Do it, and print how long it took."""
    began, cpu_began = time.perf_counter(), time.process_time()
    done = act()
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    print(f"{what:<48} {wall_s:7.3f} s, processor {cpu_s:7.3f} s", flush=True)
    return done


def measure(run_dir: Path, steps: int) -> None:
    """Reading, and every answer of the server."""
    run = timed("read the run for the first time", lambda: _updated(RunState(run_dir)))
    timed("read it again", run.update)
    site = Site([run_dir])
    timed("load its tokenizer (beside the first paint)", site.warm_up)
    timed("what it does now (read for the first time)", site.runs)
    timed("the numbers of every chart", lambda: site.charts(0))
    groups = timed("the groups of an early step", lambda: site.groups(0, 7))
    groups = timed("the groups of the last step", lambda: site.groups(0, steps))
    group_id = groups[0]["group_id"]
    timed("a group", lambda: site.group(0, group_id))
    timed("a completion, token by token", lambda: site.completion(0, group_id, 0))


def _updated(run: RunState) -> RunState:
    run.update()
    return run


def measure_in_browser(run_dir: Path, steps: int, chromium: str) -> None:
    """What a person waits for."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    site = Site([run_dir])
    site.warm_up()
    with Server(site, 0) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})

        def open_page() -> None:
            page.goto(server.address)
            page.wait_for_selector("figure .main-svg")

        timed("in the browser: until the first chart", open_page)
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        print(f"{'    of it until the first paint':<48} {paint / 1000:7.3f} s")

        def open_step() -> None:
            page.fill("#step", str(steps))
            page.press("#step", "Enter")
            page.wait_for_selector("#groups tbody tr")

        def open_group() -> None:
            page.click("#groups tbody tr >> nth=0")
            page.wait_for_selector("#group pre span")

        timed("in the browser: the groups of a step", open_step)
        timed("in the browser: a group with a completion", open_group)
        browser.close()
        server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="run directory to make, or one that was made before")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=63, help="of a batch")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--kept-steps", type=int, default=20, help="the last steps, whose groups have their tokens")
    parser.add_argument("--browser", metavar="CHROMIUM", help="path of the browser")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = args.dir or Path(folder) / "run"
        if not run_dir.exists():
            sizes = args.steps, args.groups, args.group_size, args.kept_steps
            timed("make the run", lambda: make_run(run_dir, *sizes))
        measure(run_dir, args.steps)
        if args.browser:
            measure_in_browser(run_dir, args.steps, args.browser)


if __name__ == "__main__":
    main()
