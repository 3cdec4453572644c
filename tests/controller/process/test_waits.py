"""Waits: who waits for whom, down to the root, on every list of waits; and since when nothing moves."""

from __future__ import annotations

import pickle
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.controller.process.waits import (
    NOBODY,
    REPLAY_WAITS_FOR,
    UNKNOWN,
    Wait,
    Waits,
    chain,
    processes_in,
    render,
    replay_wait,
)
from asyncdapo.replay.core.waits import WAITS


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def wait(who: str, whom: str, waited_s: float = 0.0, what: str = "work") -> Wait:
    return Wait(who=who, whom=whom, what=what, waited_s=waited_s)


# ------------------------------------------------------------------------------------------------------------- registry


def test_a_wait_is_listed_while_it_lasts_with_its_age_and_deadline() -> None:
    clock = Clock()
    waits = Waits("controller", clock)
    with waits.on("learner", "batch 5"):
        clock.now += 30
        with waits.on("rollout-0", "version 4", deadline_s=60):
            clock.now += 4
            assert waits.open() == [
                Wait(who="controller", whom="learner", what="batch 5", waited_s=34),
                Wait(who="controller", whom="rollout-0", what="version 4", waited_s=4, deadline_s=60),
            ]
        assert len(waits.open()) == 1
    assert waits.open() == []


def test_a_wait_that_fails_is_over_too() -> None:
    waits = Waits("learner")
    with pytest.raises(ValueError, match="gone"), waits.on("replay", "batch 5"):
        raise ValueError("gone")
    assert waits.open() == []


def test_a_standing_wait_keeps_its_clock_while_it_is_for_the_same_party() -> None:
    clock = Clock()
    waits = Waits("replay", clock)
    waits.stand("rollout", "17 running, 3 of 16 kept")
    clock.now += 12
    waits.stand("rollout", "9 running, 11 of 16 kept")
    assert waits.open() == [Wait(who="replay", whom="rollout", what="9 running, 11 of 16 kept", waited_s=12)]
    waits.stand("learner", "has not asked for batch 6")
    assert waits.open() == [Wait(who="replay", whom="learner", what="has not asked for batch 6")]


def test_threads_wait_in_one_registry() -> None:
    waits, let_go = Waits("rollout-0"), threading.Event()
    entered = threading.Barrier(9)

    def work(number: int) -> None:
        for _ in range(200):
            with waits.on("learner", f"thread {number}"):
                waits.open()
        with waits.on("learner", f"thread {number}"):
            entered.wait()
            let_go.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    entered.wait()
    assert sorted(one.what for one in waits.open()) == [f"thread {number}" for number in range(8)]
    let_go.set()
    for thread in threads:
        thread.join()
    assert waits.open() == []


def test_waits_travel() -> None:
    one = Wait(who="learner", whom="replay", what="batch 5", waited_s=3, deadline_s=9)
    assert pickle.loads(pickle.dumps(one)) == one


# ---------------------------------------------------------------------------------------------------------------- chain


def test_the_chain_goes_from_the_controller_to_the_root() -> None:
    waits = {
        "controller": [wait("controller", "learner", 34, "batch 5")],
        "learner": [wait("learner", "replay", 33, "batch 5")],
        "replay": [wait("replay", "rollout", 12, "17 running, 3 of 16 kept")],
        "rollout-0": [wait("rollout-0", NOBODY, 0, "17 sequences running, last token 11 s ago")],
    }
    assert render(chain(waits, "controller")).splitlines() == [
        "controller waits for learner since 34 s: batch 5",
        "learner waits for replay since 33 s: batch 5",
        "replay waits for rollout since 12 s: 17 running, 3 of 16 kept",
        "rollout-0: 17 sequences running, last token 11 s ago",
    ]


def test_a_role_stands_for_all_its_processes_in_the_order_of_their_numbers() -> None:
    waits = {
        "replay": [wait("replay", "rollout")],
        **{f"rollout-{index}": [] for index in (10, 9, 0)},
        "rolloutx-1": [],
    }
    assert processes_in(chain(waits, "replay")) == ["replay", "rollout-0", "rollout-9", "rollout-10"]


def test_the_learner_stands_for_all_its_ranks_the_first_of_which_has_its_name() -> None:
    waits = {
        "controller": [wait("controller", "learner")],
        "learner": [wait("learner", NOBODY, what="trains step 5")],
        "learner-1": None,
    }
    assert render(chain(waits, "controller")).splitlines()[1:] == [
        "learner: trains step 5",
        "learner-1: does not answer",
    ]


def test_a_process_that_doesnt_answer_or_doesnt_exist_is_a_root_that_is_named() -> None:
    waits = {"controller": [wait("controller", "learner"), wait("controller", "replay")], "learner": None}
    assert render(chain(waits, "controller")).splitlines()[1::2] == [
        "learner: does not answer",
        "replay: there is no such process",
    ]


def test_a_process_without_a_wait_is_the_root() -> None:
    assert render(chain({"learner": []}, "learner")) == "learner: waits for nobody"


def test_those_who_wait_for_each_other_are_said_to() -> None:
    waits = {
        "controller": [wait("controller", "learner")],
        "learner": [wait("learner", "replay")],
        "replay": [wait("replay", "learner")],
    }
    lines = render(chain(waits, "controller")).splitlines()
    assert lines[-1] == "controller, learner, replay wait for each other: none of them can continue"
    assert len(lines) == 4


def test_a_wait_says_its_deadline() -> None:
    one = Wait(who="learner", whom="rollout-0", what="version 4", waited_s=41.4, deadline_s=60)
    assert render([one]).startswith("learner waits for rollout-0 since 41 s (deadline 60 s): version 4")


NAMES = ["controller", "replay", "learner", "rollout-0", "rollout-1", "rollout-2"]
WHOM = st.sampled_from([*NAMES, "rollout", "stranger", NOBODY, UNKNOWN])


@st.composite
def collected(draw: st.DrawFn) -> dict[str, list[Wait] | None]:
    """Waits as they may come in: circles, several of one process, processes that are silent or left out."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    lists = {name: st.none() | st.lists(WHOM, max_size=3) for name in names}
    drawn = draw(st.fixed_dictionaries(lists))
    return {name: whom and [wait(name, one) for one in whom] for name, whom in drawn.items()}


def reached(waits: dict[str, list[Wait] | None], start: str) -> set[str]:
    """Naive reference: whom one gets to, by repetition until nothing is added."""
    seen, before = {start}, set()
    while seen != before:
        before = set(seen)
        for who in before:
            for one in waits.get(who) or []:
                if one.whom == "rollout":
                    seen |= {name for name in waits if name.startswith("rollout-")} or {"rollout"}
                elif one.whom not in (NOBODY, UNKNOWN):
                    seen.add(one.whom)
    return seen


@given(collected(), st.sampled_from(NAMES))
def test_the_chain_shows_everybody_who_is_waited_for_once_and_all_their_waits(
    waits: dict[str, list[Wait] | None], start: str
) -> None:
    links = chain(waits, start)
    assert links[0].who == start
    assert set(processes_in(links)) == reached(waits, start)
    for who in processes_in(links):
        own = [link for link in links if link.who == who]
        assert own == waits.get(who) if waits.get(who) else len(own) == 1 and own[0].is_root


@given(collected(), st.sampled_from(NAMES))
def test_either_somebody_is_at_the_root_or_they_are_said_to_wait_for_each_other(
    waits: dict[str, list[Wait] | None], start: str
) -> None:
    links = chain(waits, start)
    everybody_waits = all(
        waits.get(who) and all(one.whom not in (NOBODY, UNKNOWN) for one in waits[who]) for who in reached(waits, start)
    )
    text = render(links)
    assert text.endswith("wait for each other: none of them can continue") == everybody_waits
    assert len(text.splitlines()) == len(links) + everybody_waits


def test_every_reason_of_replay_names_somebody() -> None:
    assert set(REPLAY_WAITS_FOR) == set(WAITS)
    assert replay_wait("rollout: 17 running, 3 of 16 kept") == ("rollout", "17 running, 3 of 16 kept")
    assert replay_wait("no live worker") == ("rollout", "no live worker")
    assert replay_wait("run over; 3 evaluation requests are open") == (
        NOBODY,
        "run over; 3 evaluation requests are open",
    )
