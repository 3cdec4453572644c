"""One launch with W&B offline, in a process of its own, and what its datastore holds, as JSON.

    python -m tests.metrics.sinks.offline_run RUN_DIR FIRST_STEP

In: a run directory. It logs two steps of every documented metric, a table of samples, and two undone steps. Out, in the
last line: `config`, `history` (a list of rows), as W&B will upload them. The datastore has the log format of LevelDB
behind a header of 7 bytes; its records are W&B's protobuf messages.
"""

from __future__ import annotations

import json
import logging
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.samples import Sample
from asyncdapo.metrics.sinks.wandb_sink import WandbSink
from tests.metrics.documented import EVERY

HEADER, BLOCK = 7, 32768
FULL, LAST = 1, 4
SAMPLE = Sample(
    step=2,
    prompt_id=7,
    prompt="Q: 47*86",
    parts=[(1, "<b>"), (0, "4042")],
    reward=1.0,
    acc=1.0,
    turns=2,
    tokens=9,
    finish_reason="stop",
    versions=(1, 2),
)


def log(run_dir: Path, first: int) -> None:
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("metrics").setLevel(logging.INFO)
    sink = WandbSink(run_dir, MetricsConfig(), "offline", "name", {"run": {"seed": 3, "steps": first + 2}})
    for step in (first, first + 1):
        sink.log({"step": step} | dict.fromkeys(EVERY, step / 2))
    sink.show_samples([SAMPLE, SAMPLE])
    sink.mark_undone([first, first + 1], undone_by=5)
    sink.close()


def records(path: Path) -> Iterator[bytes]:
    """The whole records of a datastore."""
    data, at, record = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
        length, kind = struct.unpack_from("<4xHB", data, at)
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield record
            record = b""


def read(path: Path) -> dict[str, Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    config, history = {}, []
    for text in records(path):
        record = Record.FromString(text)
        for item in (*record.run.config.update, *record.config.update):
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
        if items := record.history.item:
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return {"config": config, "history": history}


if __name__ == "__main__":
    run_dir = Path(sys.argv[1])
    log(run_dir, int(sys.argv[2]))
    print(json.dumps(read(max(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns))))
