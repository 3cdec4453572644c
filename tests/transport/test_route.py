from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.transport.carrier import Route, route_of

hosts_of_groups = st.lists(st.integers(0, 4), min_size=1, max_size=12)


def routes(hosts: list[int]) -> list[Route]:
    return [route_of(rank, hosts) for rank in range(len(hosts))]


@given(hosts_of_groups)
def test_every_rank_hears_of_a_bucket_once_from_the_rank_that_it_expects(hosts: list[int]) -> None:
    told = [(source, rank) for source, route in enumerate(routes(hosts)) for rank in told_by(route)]
    assert sorted(rank for _, rank in told) == list(range(1, len(hosts)))
    assert all(routes(hosts)[rank].source == source for source, rank in told)
    assert route_of(0, hosts).source is None


def told_by(route: Route) -> list[int]:
    return [*route.readers, *([] if route.next is None else [route.next])]


@given(hosts_of_groups)
def test_bytes_enter_every_host_but_the_first_once_and_leave_it_at_most_once(hosts: list[int]) -> None:
    links = [(hosts[rank], hosts[route.next]) for rank, route in enumerate(routes(hosts)) if route.next is not None]
    assert sorted(to for _, to in links) == sorted(set(hosts) - {hosts[0]})
    assert len({start for start, _ in links}) == len(links)


@given(hosts_of_groups)
def test_memory_is_read_on_its_own_host_only(hosts: list[int]) -> None:
    for rank, route in enumerate(routes(hosts)):
        assert {hosts[reader] for reader in route.readers} <= {hosts[rank]}
        assert route.leads or hosts[route.source or 0] == hosts[rank]


def test_ranks_on_hosts_of_their_own_form_a_chain() -> None:
    assert [route.next for route in routes([0, 1, 2, 3])] == [1, 2, 3, None]
