"""Who lives with whom: by rule, and on a Ray that believes in GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from asyncdapo.config.config import Config, load_config
from asyncdapo.config.found import find_config
from asyncdapo.config.run import ControllerConfig
from asyncdapo.controller.fleet.placement import Bundle, Placement, gpus_asked, learner_names, place, worker_names
from asyncdapo.controller.fleet.process import Process
from asyncdapo.controller.fleet.rooms import gpus_of_nodes, reserve
from asyncdapo.controller.process.ray_servers import close_own, start_own
from asyncdapo.controller.roles.base import ProcessSpec
from asyncdapo.errors import ConfigError
from asyncdapo.learner.config import LearnerConfig
from asyncdapo.model.config import ModelConfig
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.transport.keys import RunKeys
from tests.controller.fleet.sighted import Sighted


def config_of(
    mode: str = "auto",
    *,
    ranks: int = 1,
    workers: int = 1,
    tensor_parallel: int = 1,
    shards: int = 1,
    learner: str = "auto",
    rollout: str = "auto",
) -> Config:
    return Config(
        model=ModelConfig(path="none"),
        learner=LearnerConfig(device=learner, ranks=ranks, shards=shards),
        rollout=RolloutConfig(engine="vllm", device=rollout, num_workers=workers, tensor_parallel=tensor_parallel),
        controller=ControllerConfig(placement=mode),
    )


def bundles_on_gpus(placement: Placement) -> list[tuple[tuple[str, ...], int]]:
    return [(bundle.processes, bundle.num_gpus) for bundle in placement.bundles if bundle.num_gpus]


@st.composite
def placements(draw: st.DrawFn) -> tuple[Config, list[int], Placement | None]:
    """Any configuration on any cluster, and its placement where there is one."""
    mode = draw(st.sampled_from(["auto", "separate", "shared"]))
    shared = mode == "shared"
    devices = st.just("auto") if shared else st.sampled_from(["auto", "cpu", "cuda"])
    num_shards = draw(st.integers(1, 5))
    config = config_of(
        mode,
        ranks=num_shards * draw(st.integers(1, 2 if num_shards > 2 else 5)),
        shards=num_shards,
        workers=draw(st.integers(1, 5)),
        tensor_parallel=1 if shared else draw(st.integers(1, 4)),
        learner=draw(devices),
        rollout=draw(devices),
    )
    nodes = draw(st.lists(st.integers(0, 8), max_size=4))
    try:
        return config, nodes, place(config, nodes)
    except ConfigError:
        return config, nodes, None


@given(placements())
def test_every_process_is_in_one_bundle_and_the_bundles_fit_the_nodes(case) -> None:
    config, nodes, placement = case
    assume(placement is not None)
    names = [name for bundle in placement.bundles for name in bundle.processes]
    assert sorted(names) == sorted(["replay", *learner_names(config), *worker_names(config)])
    assert placement.num_processes == len(names)
    assert placement.bundles[0].processes == ("replay",)
    assert placement.bundles[0].num_gpus == 0
    free = sorted(nodes)
    for size in sorted((bundle.num_gpus for bundle in placement.bundles), reverse=True):
        if size:
            node = next(index for index, gpus in enumerate(free) if gpus >= size)  # the fullest that has room
            free[node] -= size
            free.sort()


@given(placements())
def test_all_parts_of_a_bundle_fit_into_it_and_none_takes_more_than_the_others_leave(case) -> None:
    _, _, placement = case
    assume(placement is not None)
    for bundle in placement.bundles:
        fractions = [placement.memory_fraction(name, None) for name in bundle.processes]
        assert len(bundle.processes) * bundle.share <= bundle.num_gpus
        assert bool(bundle.share) == bool(bundle.num_gpus)
        assert sum(fractions) <= 0.9
        assert bundle.share == bundle.num_gpus or len(bundle.processes) > 1


@given(placements())
def test_who_is_on_the_cpu_has_no_gpu_and_who_is_not_has_one_where_there_is_any(case) -> None:
    config, nodes, placement = case
    assume(placement is not None)
    for names, device in (
        (learner_names(config), config.learner.device),
        (worker_names(config), config.rollout.device),
    ):
        for name in names:
            bundle = placement.bundle(name)
            assert bool(bundle.num_gpus) == (device != "cpu" and sum(nodes) > 0)


@given(placements())
def test_only_too_few_gpus_are_refused_and_the_words_name_what_there_is(case) -> None:
    config, nodes, placement = case
    assume(placement is None)
    with pytest.raises(ConfigError) as caught:
        place(config, nodes)
    size = config.rollout.tensor_parallel
    engines = config.rollout.num_workers if config.rollout.device != "cpu" else 0
    assert sum(nodes) < gpus_asked(config) or sum(gpus // size for gpus in nodes) < engines
    if "there is no GPU" in str(caught.value):
        assert sum(nodes) == 0
        assert "cuda" in (config.learner.device, config.rollout.device)
        return
    assert f"asks for {gpus_asked(config)} GPU" in str(caught.value)
    assert "there is none" in str(caught.value) or str(sum(nodes)) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "nodes", "bundles"),
    [
        (config_of(), [0], []),
        (config_of(), [], []),
        (config_of(), [2], [(("learner",), 1), (("rollout-0",), 1)]),
        (config_of(), [1], [(("learner", "rollout-0"), 1)]),
        (config_of(workers=3), [2], [(("learner", "rollout-1"), 1), (("rollout-0", "rollout-2"), 1)]),
        (config_of(workers=2), [2], [(("learner", "rollout-1"), 1), (("rollout-0",), 1)]),
        (config_of(learner="cpu"), [1], [(("rollout-0",), 1)]),
        (config_of(learner="cpu", rollout="cpu"), [8], []),
        (config_of("separate", learner="cpu", rollout="cpu"), [], []),
        (config_of(tensor_parallel=4), [8], [(("learner",), 1), (("rollout-0",), 4)]),
        (
            config_of("separate", workers=2, tensor_parallel=2),
            [2, 3],
            [(("learner",), 1), (("rollout-0",), 2), (("rollout-1",), 2)],
        ),
        (config_of(ranks=2, tensor_parallel=2, rollout="cpu"), [1], [(("learner", "learner-1"), 1)]),
        (config_of("shared"), [8], [(("learner", "rollout-0"), 1)]),
        (
            config_of("shared", ranks=2, workers=2),
            [1, 1],
            [(("learner", "rollout-0"), 1), (("learner-1", "rollout-1"), 1)],
        ),
        (config_of("shared", ranks=1, workers=2), [2], [(("learner", "rollout-0"), 1), (("rollout-1",), 1)]),
        (config_of("shared", ranks=2, workers=1), [2], [(("learner", "rollout-0"), 1), (("learner-1",), 1)]),
    ],
)
def test_the_rule_in_examples(config: Config, nodes: list[int], bundles: list[object]) -> None:
    assert bundles_on_gpus(place(config, nodes)) == bundles


@pytest.mark.parametrize(
    ("num_ranks", "num_shards", "nodes", "sizes"),
    [
        (4, 4, [8], [4]),
        (8, 4, [8, 2], [4, 4]),
        (32, 32, [8, 8, 8, 8, 2], [8, 8, 8, 8]),
        (8, 8, [6, 6], [4, 4]),  # no equal parts of 8 are larger and fit
        (4, 4, [2, 2, 3], [2, 2]),
        (3, 3, [2, 3], [3]),
        (4, 2, [3, 3], [1, 1, 1, 1]),  # the engine leaves 1 + 3
        (4, 1, [8], [1, 1, 1, 1]),
    ],
)
def test_the_shards_of_a_copy_are_kept_on_one_node_as_far_as_engines_and_nodes_allow(
    num_ranks: int, num_shards: int, nodes: list[int], sizes: list[int]
) -> None:
    """Beside one engine of 2 GPUs."""
    placement = place(config_of("separate", ranks=num_ranks, shards=num_shards, tensor_parallel=2), nodes)
    bundles = [bundle for bundle in placement.bundles if "learner" in bundle.processes[0]]
    assert [bundle.num_gpus for bundle in bundles] == sizes
    assert [bundle.share for bundle in bundles] == [1] * len(bundles)
    assert not placement.shares_gpus
    names = [name for bundle in bundles for name in bundle.processes]
    assert names == ["learner", *(f"learner-{rank}" for rank in range(1, num_ranks))]  # consecutive ranks share a copy


@pytest.mark.parametrize(
    ("config", "nodes", "words"),
    [
        (
            config_of("separate", workers=2),
            [2],
            "controller.placement: asks for 3 GPUs (1 learner rank, 2 engines), there are 2, got 'separate'",
        ),
        (config_of("separate"), [0, 0], "asks for 2 GPUs (1 learner rank, 1 engine), there is none, got 'separate'"),
        (config_of("shared", ranks=2), [1], "asks for 2 GPUs (2 learner ranks, 1 engine), there is 1, got 'shared'"),
        (
            config_of(workers=2, tensor_parallel=4),
            [7, 3, 0],
            "asks for 9 GPUs (1 learner rank, 2 engines of 4 GPUs on one node), there are 10 on 2 nodes (7 + 3), got",
        ),
    ],
)
def test_too_few_gpus_are_named_with_what_was_asked(config: Config, nodes: list[int], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        place(config, nodes)
    assert words in str(caught.value)


@pytest.mark.parametrize("section", ["learner", "rollout"])
def test_a_gpu_that_is_demanded_and_is_not_there_is_refused_by_its_key(section: str) -> None:
    config = load_config(find_config("quickstart"), [f"{section}.device=cuda"])
    with pytest.raises(ConfigError, match=f"{section}.device: there is no GPU, got 'cuda'"):
        place(config, [0])


def test_an_engine_takes_most_of_a_gpu_alone_less_than_half_with_the_learner_and_what_the_user_says() -> None:
    alone, shared = place(config_of(), [2]), place(config_of("shared"), [1])
    assert alone.memory_fraction("rollout-0", None) == 0.9
    assert shared.memory_fraction("rollout-0", None) == 0.4
    assert shared.memory_fraction("rollout-0", 0.55) == 0.55


@pytest.mark.parametrize(("engine", "nodes", "num_gpus"), [("auto", [4], 2), ("auto", [0], 0), ("cpu", [4], 0)])
def test_a_worker_beyond_those_placed_asks_for_as_much_as_they_have(engine, nodes, num_gpus) -> None:
    placement = place(config_of(rollout=engine, tensor_parallel=2 if engine == "auto" else 1), nodes)
    assert placement.bundle("rollout-7") == Bundle(("rollout-7",), num_gpus)
    assert placement.memory_fraction("rollout-7", None) == 0.9


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    """Ray takes our word for them."""
    home = start_own(num_gpus=4, logging_level="ERROR", log_to_driver=False)
    yield
    close_own(home)


@pytest.mark.parametrize(
    "config",
    [
        config_of("shared", workers=2),
        pytest.param(config_of("shared", ranks=2, workers=3), marks=pytest.mark.soak),
        pytest.param(config_of("separate", workers=2), marks=pytest.mark.soak),
        pytest.param(config_of(ranks=4), marks=pytest.mark.soak),
        pytest.param(config_of(ranks=5, workers=2), marks=pytest.mark.soak),
        pytest.param(config_of(tensor_parallel=3), marks=pytest.mark.soak),
        pytest.param(config_of(ranks=2, shards=2, tensor_parallel=2), marks=pytest.mark.soak),
    ],
    ids=["shared", "two ranks", "separate", "in parts", "more parts", "tensor parallel", "shards"],
)
@pytest.mark.usefixtures("four_gpus")
def test_ray_gives_the_processes_of_a_bundle_the_same_gpus_and_others_other_ones(config: Config) -> None:
    placement = place(config, gpus_of_nodes())
    seen = asyncio.run(gpus_seen(placement))
    used: set[str] = set()
    for bundle in (part for room in placement.bundles[1:] for part in room.parts):
        (devices,) = {seen[name] for name in bundle.processes}
        gpus = set(filter(None, devices.split(",")))
        assert len(gpus) == bundle.num_gpus
        assert not gpus & used
        used |= gpus


async def gpus_seen(placement: Placement) -> dict[str, str]:
    """The GPUs of each process, when all live at once."""
    rooms = await reserve(placement, 30)
    names = [name for bundle in placement.bundles[1:] for name in bundle.processes]
    parts = (name.partition("-") for name in names)
    config, keys = config_of(), RunKeys.make()
    specs = [ProcessSpec(role=role, index=int(index or 0), config=config, keys=keys) for role, _, index in parts]
    processes = [Process.placed(Sighted, spec, rooms=rooms, threads=1) for spec in specs]
    for process in processes:
        process.spawn()
    answers = await asyncio.gather(*(process.call(lambda sighted: sighted.gpus) for process in processes))
    for process in processes:
        process.end()
    for room in {room.group.id: room for room in rooms.values()}.values():
        room.give_back()
    return dict(zip(names, answers, strict=True))


@pytest.mark.parametrize(
    ("workers", "nodes", "bundles"),
    [
        (2, [2], [(("rollout-0",), 1), (("rollout-1",), 1)]),
        (2, [1], [(("rollout-0", "rollout-1"), 1)]),
        (2, [0], []),
    ],
)
def test_where_nothing_is_trained_all_gpus_are_for_engines(
    workers: int, nodes: list[int], bundles: list[tuple[tuple[str, ...], int]]
) -> None:
    placement = place(config_of(workers=workers, learner="cuda", ranks=4), nodes, ranks=())
    assert bundles_on_gpus(placement) == bundles
    names = [name for bundle in placement.bundles for name in bundle.processes]
    assert sorted(names) == ["replay", "rollout-0", "rollout-1"]
