"""`filter.mode: replace`: a batch is the first B groups with a verdict, copies stand in the places of the others."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.batch import HeldGroup, cut_with_copies, draw_copies, num_barren
from asyncdapo.replay.core.waits import gauges
from asyncdapo.shares import Batch, CutWanted
from tests.replay.scenario import Scenario, stop_of
from tests.replay.small_run import SmallRun


def replacing(size: int = 3, *, replay: dict | None = None, num_prompts: int | None = None, **filter) -> Scenario:
    """One worker with credits without end; the learner waits for batch 1."""
    config = ReplayConfig(prompts_per_step=size, **({"run_ahead": 1, "max_staleness": 1} | (replay or {})))
    scenario = Scenario(config, FilterConfig(mode="replace", **filter), num_prompts=num_prompts)
    scenario.join(credits=99)
    scenario.tell(core.BatchWanted(step=1))
    return scenario


def cuts_of(scenario: Scenario) -> list[core.CutBatch]:
    return [action for action in scenario.actions if isinstance(action, core.CutBatch)]


# ----------------------------------------------------------------------------------------------------------- the batch


def test_the_first_groups_make_the_batch_and_copies_stand_for_those_that_are_not_kept() -> None:
    scenario = replacing(4)
    scenario.finish(0)
    scenario.finish(1, verdict="constant")
    scenario.finish(3, verdict="masked")
    assert scenario.batches == []
    assert [scenario.state_of(prompt_id) for prompt_id in (0, 1, 3)] == ["queued", "spare", "spare"]
    scenario.finish(2)
    assert scenario.batches == [[0, 2]]
    [cut] = cuts_of(scenario)
    assert len(cut.copies) == 2
    assert sum(cut.copies) == 2
    assert scenario.reasons(1)[-1] == ("filtered", "constant")
    assert scenario.reasons(3)[-1] == ("filtered", "masked")


def test_a_batch_of_kept_groups_has_no_copies() -> None:
    scenario = replacing(3)
    scenario.finish(0, 1, 2)
    assert [cut.copies for cut in cuts_of(scenario)] == [()]
    assert scenario.state.cut_batches.copies == {}


def test_a_group_that_is_not_kept_gives_its_place_in_the_batch_that_it_would_have_had() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=2, run_ahead=1, max_staleness=1), FilterConfig(mode="replace"))
    scenario.join(credits=9)
    scenario.finish(0, 1, 3)
    scenario.finish(2, verdict="constant")
    scenario.tell(core.BatchWanted(step=1))
    assert scenario.batches == [[0, 1]]
    assert scenario.state_of(2) == "spare"
    scenario.tell(core.BatchWanted(step=2))
    assert scenario.batches == [[0, 1], [3]]
    assert [cut.copies for cut in cuts_of(scenario)] == [(), (1,)]
    assert scenario.state_of(2) == "filtered"


def test_with_the_filter_off_there_is_nothing_to_replace() -> None:
    scenario = replacing(2, enabled=False)
    scenario.finish(0, 1, verdict="constant")
    assert scenario.batches == [[0, 1]]
    assert [cut.copies for cut in cuts_of(scenario)] == [()]


@pytest.mark.parametrize("on_stale", ["drop", "requeue"])
@pytest.mark.parametrize("verdict", ["kept", "constant", "masked"])
def test_a_group_too_many_misses_the_bound_whatever_its_verdict(verdict: str, on_stale: str) -> None:
    """Six groups of version 0, of which batches 1 and 2 take four: the others are too old for batch 3."""
    scenario = replacing(2, replay={"on_stale": on_stale})
    scenario.finish(0, 1)
    scenario.finish(2, 3)
    scenario.train(1)
    scenario.finish(4, 5, verdict=verdict)
    assert {scenario.state_of(prompt_id) for prompt_id in (4, 5)} == {"queued" if verdict == "kept" else "spare"}
    scenario.tell(core.BatchWanted(step=2))
    assert scenario.batches == [[0, 1], [2, 3]]
    for prompt_id in (4, 5):
        assert scenario.reasons(prompt_id)[2] == (("expired" if on_stale == "drop" else "waiting"), "stale")


# -------------------------------------------------------------------------------------------------- nothing is to copy


def test_a_batch_of_groups_of_which_none_is_kept_ends_filtered_and_sampling_continues() -> None:
    scenario = replacing(2, replay={"run_ahead": 0, "max_staleness": 0})
    assert scenario.running == [0, 1]
    scenario.finish(0, 1, verdict="constant")
    assert scenario.batches == []
    assert [scenario.state_of(prompt_id) for prompt_id in (0, 1)] == ["filtered", "filtered"]
    assert scenario.running == [2, 3]
    scenario.finish(3, verdict="constant")
    scenario.finish(2)
    assert scenario.batches == [[2]]


@pytest.mark.parametrize(
    ("on_limit", "state", "batches"),
    [("raise", "spare", []), ("partial", "spare", []), ("unfiltered", "trained", [[0, 1]])],
)
def test_at_the_limit_a_batch_without_a_kept_group_is_a_case_for_on_limit(
    on_limit: str, state: str, batches: list[list[int]]
) -> None:
    scenario = replacing(2, max_gen_batches=2, on_limit=on_limit)
    scenario.finish(0, 1, verdict="constant")
    assert [scenario.state_of(prompt_id) for prompt_id in (0, 1)] == ["spare", "spare"], "on_limit may need them"
    scenario.finish(2, 3, verdict="constant")
    assert scenario.batches == batches
    stop = stop_of(scenario.actions)
    if batches:
        assert stop is None
        assert [cut.copies for cut in cuts_of(scenario)] == [()]
        scenario.train(1)
    else:
        assert stop.error
        assert stop.reason.startswith(
            "filter.max_gen_batches: 2 generation batches gave 0 of the 2 groups that step 1 needs"
        )
    assert scenario.state_of(0) == state


@pytest.mark.parametrize(("on_limit", "members"), [("partial", [7]), ("unfiltered", [4, 7])])
def test_at_the_limit_no_place_is_copied(on_limit: str, members: list[int]) -> None:
    """4 and 6 are barren, and of the next two groups there is one: 5 was too old for batch 3."""
    scenario = replacing(2, max_gen_batches=1, on_limit=on_limit)
    scenario.finish(0, 1)
    scenario.finish(2, 3)
    scenario.train(1)
    scenario.tell(core.WeightsLoaded(worker=0, version=1))
    scenario.finish(4, verdict="constant", version=1)
    scenario.finish(5)
    scenario.tell(core.BatchWanted(step=2))
    scenario.train(2)
    scenario.finish(6, verdict="constant", version=1)
    assert scenario.batches == [[0, 1], [2, 3]]
    scenario.finish(7, version=1)
    assert scenario.batches == [[0, 1], [2, 3], members]
    assert [cut.copies for cut in cuts_of(scenario)] == [(), (), ()]
    assert scenario.state_of(6) == "filtered"


# ---------------------------------------------------------------------------------------------------- the data's end


@pytest.mark.parametrize(("on_limit", "batches"), [("raise", []), ("partial", [[1]])])
def test_when_the_data_ends_a_short_batch_has_no_copies(on_limit: str, batches: list[list[int]]) -> None:
    scenario = replacing(3, num_prompts=2, on_limit=on_limit)
    scenario.finish(0, verdict="constant")
    scenario.finish(1)
    assert scenario.batches == batches
    assert all(cut.copies == () for cut in cuts_of(scenario))
    if not batches:
        assert stop_of(scenario.actions).reason == "the data is used up: 1 kept groups are left"


# ------------------------------------------------------------------------------------------------------------ admission


def test_every_group_has_its_place_so_none_more_is_leased_than_the_batch_takes() -> None:
    scenario = replacing(4, replay={"run_ahead": 0, "max_staleness": 0})
    scenario.finish(0, 1, 2, verdict="constant")
    assert scenario.running == [3]
    assert gauges(scenario.state)["keep_rate"] == 1


def test_copies_count_as_groups_in_training() -> None:
    scenario = replacing(2)
    scenario.finish(0, verdict="constant")
    scenario.finish(1)
    assert scenario.batches == [[1]]
    assert gauges(scenario.state)["in_training"] == 2
    assert scenario.running == [2, 3], "one batch ahead of the one in training"
    scenario.train(1)
    assert scenario.running == [2, 3, 4, 5]


# ------------------------------------------------------------------------------------------------------------- the draw


def test_the_draw_is_part_of_the_ledger_and_stays_as_it_is() -> None:
    assert draw_copies(1, [3, 5, 8], 0) == ()
    assert draw_copies(1, [3], 4) == (4,)
    assert draw_copies(1, [3, 5, 8], 5) == (1, 1, 3)
    assert draw_copies(2, [3, 5, 8], 5) == (2, 3, 0)
    assert draw_copies(2, [3, 5, 9], 5) == (1, 3, 1)


def test_every_member_is_drawn_with_equal_chance() -> None:
    counts = Counter()
    for step in range(3000):
        for place, num in enumerate(draw_copies(step, [step, step + 2, step + 3, step + 7], 2)):
            counts[place] += num
    assert sum(counts.values()) == 6000
    assert all(abs(count - 1500) < 5 * (6000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


def test_a_cut_depends_on_the_groups_and_not_on_their_order() -> None:
    groups = [
        HeldGroup(min_version=version, prompt_id=prompt_id, group_id=10 + prompt_id, verdict=verdict)
        for prompt_id, (version, verdict) in enumerate(
            [(1, "kept"), (0, "constant"), (1, "masked"), (0, "kept"), (1, "kept")]
        )
    ]
    cuts = []
    for order in permutations(groups):
        kept = [group for group in order if group.verdict == "kept"]
        spare = [group for group in order if group.verdict != "kept"]
        cuts.append(cut_with_copies(7, kept, spare, 3))
    assert all(cut == cuts[0] for cut in cuts)
    assert [group.prompt_id for group in cuts[0].members] == [0, 3]
    assert [group.prompt_id for group in cuts[0].filtered] == [1]
    assert [group.prompt_id for group in cuts[0].queued] == [4]
    assert [group.prompt_id for group in cuts[0].spare] == [2]


@pytest.mark.parametrize(
    ("verdicts", "barren"),
    [("", 0), ("c", 0), ("cc", 2), ("ccc", 2), ("cccc", 4), ("kc", 0), ("ck", 0), ("cck", 2), ("cckcc", 2)],
)
def test_barren_are_whole_batches_before_the_first_kept_group(verdicts: str, barren: int) -> None:
    groups = [
        HeldGroup(min_version=0, prompt_id=i, group_id=i, verdict="kept" if letter == "k" else "constant")
        for i, letter in enumerate(verdicts)
    ]
    kept = [group for group in groups if group.verdict == "kept"]
    spare = [group for group in groups if group.verdict != "kept"]
    assert num_barren(kept, spare, 2) == barren


# --------------------------------------------------------------------------------------------- ledger, learner, restart


def batch_sent(run: SmallRun, step: int) -> Batch:
    run.dispatch.want_batch(b"learner", CutWanted(step=step))
    [batch] = run.answers()
    assert isinstance(batch, Batch)
    return batch


def cut_run(run_dir, *, size: int = 5) -> SmallRun:
    """Batch 1 is cut from two kept groups of `size`."""
    run = SmallRun(run_dir, filter=FilterConfig(mode="replace"), prompts_per_step=size)
    run.join(0)
    for number, lease_id in enumerate(run.ready(0, size)):
        run.answer(lease_id, accs=(1.0, 0.0) if number in (1, 2) else (1.0, 1.0))
    return run


def test_the_learner_gets_the_groups_once_and_the_number_of_their_copies(tmp_path) -> None:
    run = cut_run(tmp_path)
    batch = batch_sent(run, 1)
    assert [group.prompt_id for group in batch.groups] == [1, 2]
    assert tuple(batch.copies) == draw_copies(1, [1, 2], 3)
    assert batch_sent(run, 1) == batch


def test_a_batch_without_copies_says_so_by_an_empty_list(tmp_path) -> None:
    run = SmallRun(tmp_path, filter=FilterConfig(mode="replace"))
    run.join(0)
    run.fill(0)
    assert batch_sent(run, 1).copies == []


def test_a_batch_has_the_same_copies_after_a_restart_of_the_server_and_after_a_rollback(tmp_path) -> None:
    run = cut_run(tmp_path)
    before = batch_sent(run, 1)
    run.journal.close()
    again = SmallRun(tmp_path, filter=FilterConfig(mode="replace"), prompts_per_step=5)
    assert batch_sent(again, 1).copies == before.copies
    assert again.state.cut_batches.in_training == {1: 5}
    again.dispatch.trained(1, {})
    again.dispatch.roll_back(0, "test")
    assert batch_sent(again, 1).copies == before.copies
    assert again.state.cut_batches.in_training == {1: 5}


@pytest.mark.parametrize("is_cut", [False, True])
def test_groups_of_the_batch_after_the_restored_one_have_their_places_again_whatever_their_verdict(
    tmp_path, is_cut
) -> None:
    """Of four groups of version 0 two make batch 1, which is restored, and two are for batch 2, cut or not: else it
    would be made of the kept one and of newer groups, so that difficult prompts came in more often."""
    run = SmallRun(tmp_path, filter=FilterConfig(mode="replace"), run_ahead=2.0, max_staleness=2)
    run.join(0)
    groups = run.ready(0, 4)
    for group_id, accs in zip(groups, [(1.0, 0.0), (1.0, 0.0), (1.0, 1.0), (1.0, 0.0)], strict=True):
        run.answer(group_id, accs=accs)
    run.train(1)
    if is_cut:
        cut = batch_sent(run, 2)
        assert [group.lease_id for group in cut.groups] == groups[3:]
    run.roll_back(0)
    assert [group.group_id for group in run.state.cut_batches.untrained[1]] == groups[:2]
    assert [group.group_id for group in run.state.held.spare] == groups[2:3]
    assert [group.group_id for group in run.state.held.queued] == groups[3:]
    run.train(1)
    again = batch_sent(run, 2)
    assert [group.lease_id for group in again.groups] == groups[3:]
    assert again.copies == [1]


def test_a_group_that_ended_with_a_batch_cut_at_the_limit_before_the_checkpoint_has_its_place_again(tmp_path) -> None:
    """Batches 2 and 3 are cut while 1 is trained on; back at the checkpoint of 1, batch 2 stands and 3 does not. Twice,
    since the second time its cut is one of an earlier branch."""
    limited = FilterConfig(mode="replace", max_gen_batches=1, on_limit="unfiltered")
    run = SmallRun(tmp_path, filter=limited, run_ahead=2.0, max_staleness=2)
    run.join(0)
    groups = run.ready(0, 6)
    for group_id in groups[:2]:
        run.answer(group_id)
    batch_sent(run, 1)
    for constant, masked in (groups[2:4], groups[4:6]):
        run.answer(constant, accs=(1.0, 1.0))
        run.answer(masked, loss=0)
    assert {
        step: [group.group_id for group in members] for step, members in run.state.cut_batches.untrained.items()
    } == {
        1: groups[:2],
        2: groups[2:3],
        3: groups[4:5],
    }
    run.train(1)
    for _ in range(2):
        run.roll_back(1)
        assert [group.group_id for group in run.state.cut_batches.untrained[2]] == groups[2:3]
        assert {group.group_id for group in run.state.held.spare} == set(groups[4:])
        assert run.state.prompts.unended[5] == ("spare", 0)


def test_metrics_count_groups_and_copies_apart(tmp_path) -> None:
    run = cut_run(tmp_path)
    run.train(1)
    [line] = run.lines
    assert (line["replay/trained_groups"], line["replay/copies"]) == (2, 3)
    assert line["filter/kept_ratio"] == 2 / 5
    assert line["replay/tokens_filtered"] == 3 * 8
