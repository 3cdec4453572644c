"""siiRL's keys: verl's, with defaults of its own and some that it declares but never reads."""

from __future__ import annotations

from dataclasses import replace

from asyncdapo.convert import data_files
from asyncdapo.convert import meanings as mean
from asyncdapo.convert.peers import verl
from asyncdapo.convert.rules import Differs, Rank

PEER = replace(
    verl.PEER,
    title="siiRL",
    source="sii-research/siiRL af00a771",
    defaults=verl.DEFAULTS | {f"{verl.FILTER}metric": "acc", "trainer.max_actor_ckpt_to_keep": 100},
    without=(
        ("algorithm.workflow_type", "a run always has the steps of DAPO here"),
        ("algorithm.*", "belongs to their pipeline"),
        ("dag.*", "belongs to their pipeline"),
        *verl.WITHOUT,
        ("profiler.*", "no profiler here"),
    ),
    differs=(
        Differs(
            "It declares data.gen_batch_size and algorithm.filter_groups.max_num_gen_batches and reads neither: a step "
            "is what the filter leaves of one batch. Here both work as in verl, so a step is always full",
            Rank.SCHEDULE,
            lambda made: made.get("filter.enabled", True),
        ),
        *mean.SYNCHRONOUS,
        data_files.WHOLE_FILES,
    ),
)
