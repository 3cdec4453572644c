"""Kept samples: the payloads of a few groups of each batch, to look at when the segments are freed.

    RUN_DIR/samples/000012.bin            of step 12: {group_id: [offset, bytes]} as a line of JSON, then records
                    000012.learner.npz    their log-probs under the weights that trained on them, as a rank wrote them

In: a step that was trained, while its payloads are there. Out: one file for it, replaced if the step is trained again.
Invariant: nothing depends on these files, so they aren't synced, and any of them may be deleted. Does not own: the
format of the records (`records/record`), which groups a batch has (`ledger`), the log-probs (`learner/storage`).
"""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from zipfile import BadZipFile

import msgspec
import numpy as np

from asyncdapo.disk import disk_errors
from asyncdapo.messages import Group
from asyncdapo.records.record import PAYLOAD_FOLDER, BadRecord, Place, read_bytes, read_record, segment_path
from asyncdapo.replay.ledger.ledger import open_ledger, read_group
from asyncdapo.transport.payload import Payload

FOLDER = "samples"
MEMBERS = """
SELECT group_id, segment, offset, bytes FROM groups WHERE step = ? AND segment IS NOT NULL ORDER BY prompt_id LIMIT ?
"""
FREED = "SELECT step FROM groups WHERE group_id = ? AND segment IS NULL AND step IS NOT NULL"

log = logging.getLogger("replay")
_index = msgspec.json.Decoder(dict[int, tuple[int, int]])


def keep_samples(run_dir: Path, step: int, num_groups: int) -> None:
    """Keep the first groups of the batch of `step`, in the order of their prompts, without those that can't be read.
    Raises DiskError."""
    with closing(open_ledger(run_dir)) as ledger:
        members = ledger.execute(MEMBERS, (step, num_groups)).fetchall()
    index: dict[int, tuple[int, int]] = {}
    records = b""
    for group_id, *place in members:
        try:
            record = read_bytes(run_dir / PAYLOAD_FOLDER, Place(*place))
        except BadRecord as bad:
            log.warning("not kept as a sample of step %d: %s", step, bad)
            continue
        index[group_id] = (len(records), len(record))
        records += record
    path = segment_path(run_dir / FOLDER, step)
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".new")
        unfinished.write_bytes(msgspec.json.encode(index) + b"\n" + records)
        unfinished.replace(path)


def places_of(run_dir: Path, step: int) -> dict[int, Place]:
    """Of the groups that are kept of a step. Raises BadRecord."""
    path = segment_path(run_dir / FOLDER, step)
    if not path.exists():
        return {}
    with path.open("rb") as file:
        line = file.readline()
    try:
        index = _index.decode(line)
    except msgspec.DecodeError as error:
        raise BadRecord(f"{FOLDER}/{path.name}: its index can't be read: {error}") from error
    return {group_id: Place(step, len(line) + offset, num_bytes) for group_id, (offset, num_bytes) in index.items()}


def step_of(run_dir: Path, group_id: int) -> int | None:
    """The step whose batch has the group; None of another group."""
    with closing(open_ledger(run_dir)) as ledger:
        row = ledger.execute("SELECT step FROM groups WHERE group_id = ?", (group_id,)).fetchone()
    return row["step"] if row else None


def learned_logprobs(run_dir: Path, step: int | None) -> dict[str, np.ndarray]:
    """By "GROUP.SAMPLE.CONTEXT" float32 [R], NaN where a token bears no loss; of all ranks. Raises BadRecord."""
    found: dict[str, np.ndarray] = {}
    for path in (run_dir / FOLDER).glob(f"{step:06d}.*.npz") if step else ():
        try:
            with np.load(path) as arrays:
                found |= {name: arrays[name] for name in arrays.files}
        except (ValueError, OSError, BadZipFile) as error:
            raise BadRecord(f"{FOLDER}/{path.name}: {error}") from error
    return found


def read_kept(run_dir: Path, group_id: int) -> tuple[Group, Payload]:
    """A group with its tokens and log-probs, as long as they are in a segment or among the samples. Raises LookupError
    if they are in neither, BadRecord if they can't be read."""
    with closing(open_ledger(run_dir)) as ledger:
        row = ledger.execute(FREED, (group_id,)).fetchone()
    place = places_of(run_dir, row["step"]).get(group_id) if row else None
    return read_record(run_dir / FOLDER, group_id, place) if place else read_group(run_dir, group_id)
