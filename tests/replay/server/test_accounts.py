"""The accounts: what they say of groups while a batch is waited for."""

from __future__ import annotations

from msgspec.structs import replace

from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group, SampledTurn
from asyncdapo.replay.core.events import EndLease, MoveGroup
from asyncdapo.replay.core.recovery import GroupFacts, Recovered
from asyncdapo.replay.server.accounts import EPISODE_MEANS, MAX_SCORED, Accounts


def group(number: int, *accs: float) -> Group:
    completions = [
        Completion(
            contexts=[Context.of_turn([(0, 3)], [(1, 3)], NO_CHECKSUM)],
            finish_reason="stop",
            reward=acc,
            metrics={"acc": acc},
        )
        for acc in accs
    ]
    return Group(
        prompt_id=number,
        lease_id=number,
        branch=0,
        attempt=1,
        worker=0,
        num_prompt_tokens=4,
        completions=completions,
        generate_s=0.1,
    )


def test_what_the_filter_drops_is_said_once_it_is_much() -> None:
    accounts = Accounts({}, Recovered())
    for number, (state, *accs) in enumerate(
        [("filtered", 1.0, 1.0), ("queued", 0.0, 1.0), ("filtered", 0.0, 0.0), ("filtered", 1.0, 1.0)], 1
    ):
        verdict = "kept" if state == "queued" else "constant"
        move = MoveGroup(group_id=number, prompt_id=number, state=state, verdict=verdict)
        accounts.move_group(move, group(number, *accs))
    assert accounts.describe_unkept(4) == ""
    assert accounts.describe_unkept(3) == "3 groups filtered since the last batch: 2 all right, 1 all wrong"


def test_groups_on_which_the_reward_function_raised_are_said_from_the_first_on() -> None:
    accounts = Accounts({}, Recovered())
    move = MoveGroup(group_id=1, prompt_id=1, state="filtered", verdict="constant")
    accounts.move_group(move, group(1, 1.0, 1.0))
    for number in (2, 3):
        accounts.end_lease(EndLease(lease_id=number, prompt_id=number, worker=0, outcome="failed"), 5)
    accounts.end_lease(EndLease(lease_id=4, prompt_id=4, worker=0, outcome="lost"), 5)
    failed = "2 groups failed since the last batch: the reward function raised"
    assert accounts.describe_unkept(2) == failed
    assert accounts.describe_unkept(1) == f"1 groups filtered since the last batch: 1 all right, 0 all wrong; {failed}"


def step_line(accounts: Accounts, step: int, arrived: Group) -> dict[str, float]:
    """Of a step that trains on this group alone."""
    verdicts = {"prompt_id": arrived.prompt_id, "group_id": arrived.lease_id, "verdict": "kept"}
    accounts.move_group(MoveGroup(**verdicts, state="queued"), arrived)
    accounts.move_group(MoveGroup(**verdicts, state="trained", step=step), None)
    facts = GroupFacts(group_id=1, num_tokens=6, num_completions=2, reward_mean=0.5, min_version=0)
    return accounts.trained(step, [facts], 0)


def test_turns_contexts_and_observed_tokens_are_counted_from_the_first_episode_on() -> None:
    accounts = Accounts({}, Recovered())
    assert not set(step_line(accounts, 1, group(1, 0.0, 1.0))) & set(EPISODE_MEANS)
    single = group(2, 0.0, 1.0)
    late = replace(single.completions[1], finish_reason="time")
    [turn] = single.completions[0].contexts
    two_turns = replace(turn, sampled=[(1, 2), (0, 5), (1, 1)], turns=[SampledTurn(0, 2, 7), SampledTurn(1, 1, 7)])
    fork = replace(turn, sampled=[(0, 4), (1, 3)])
    episode = replace(single.completions[0], contexts=[two_turns, fork], finish_reason="turns")
    line = step_line(accounts, 2, replace(single, completions=[episode, late]))
    assert [line[name] for name in EPISODE_MEANS] == [2.0, 1.5, 4.5, 0.5, 0.5]
    assert line["rollout/response_tokens_mean"] == 4.5
    resumed = Accounts(line, Recovered())
    assert [step_line(resumed, 3, group(3, 0.0, 1.0))[name] for name in EPISODE_MEANS] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_each_number_of_the_completions_has_its_mean_over_those_that_have_it() -> None:
    accounts, first = Accounts({}, Recovered()), group(1, 0.0, 1.0)
    called = replace(first.completions[0], metrics={"acc": 0.0, "calls": 3.0})
    line = step_line(accounts, 1, replace(first, completions=[called, first.completions[1]]))
    assert (line["reward/metrics/acc"], line["reward/metrics/calls"]) == (0.5, 3.0)
    resumed = Accounts(line, Recovered())
    assert "reward/metrics/calls" not in step_line(resumed, 2, group(2, 0.0, 1.0))


def test_the_means_stay_as_they_are_in_a_step_in_which_nothing_arrived() -> None:
    accounts = Accounts({}, Recovered())
    line = step_line(accounts, 1, group(1, 0.0, 1.0))
    facts = GroupFacts(group_id=1, num_tokens=6, num_completions=2, reward_mean=0.5, min_version=0)
    again = accounts.trained(2, [facts], 0)
    assert {name for name in line if line[name] != again[name]} == {
        "replay/staleness_max",
        "replay/staleness_mean",
        "replay/train_steps",
        "rollout/arrived_groups",
        "rollout/arrived_tokens",
    }
    assert again["reward/metrics/acc"] == 0.5


def test_names_that_differ_from_one_completion_to_another_do_not_fill_the_line() -> None:
    accounts = Accounts({}, Recovered())
    for number in range(1, 200):
        arrived = group(number, 0.0, 1.0)
        named = [replace(one, metrics={"acc": 1.0, f"n{number}": 1.0}) for one in arrived.completions]
        line = step_line(accounts, number, replace(arrived, completions=named))
        assert line[f"reward/metrics/n{number}"] == 1.0
    many = group(200, 0.0, 1.0)
    named = [replace(one, metrics={f"m{name}": 1.0 for name in range(200)}) for one in many.completions]
    line = step_line(accounts, 200, replace(many, completions=named))
    assert sum(name.startswith("reward/metrics/") for name in line) == MAX_SCORED
