"""The store of a process group keeps nothing for strangers, and they hold nobody up."""

from __future__ import annotations

import gc
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from asyncdapo.learner.step.ranks import GradientGroup
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.keys import RunKeys
from asyncdapo.transport.store import DistantStore, HostedStore, join_address, split_address
from tests.ports import listening, strangers

TIMEOUT_S = 20.0


def port_of(address: str) -> int:
    return int(split_address(address)[0].rpartition(":")[2])


def test_values_of_one_rank_are_at_the_other_once_they_are_there():
    store = HostedStore("127.0.0.1", TIMEOUT_S)
    distant = DistantStore(store.address, TIMEOUT_S, Deadline(TIMEOUT_S))
    distant.set("near", b"")
    assert store.get("near") == b""
    assert not distant.check(["near", "far"])
    assert distant.look(["near", "far"], Deadline(TIMEOUT_S)) == [b"", None]
    with pytest.raises(dist.DistStoreError, match="far isn't there after 0.1 s"):
        distant.wait(["far"], timedelta(seconds=0.1))
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(distant.get, "far")
        store.set("far", b"value")
        assert waiting.result() == b"value"
    distant.close()
    store.close()


def test_an_end_that_was_dropped_while_open_is_collected():
    """As with a traceback that holds one."""
    store = HostedStore("127.0.0.1", TIMEOUT_S)
    circle = [DistantStore(store.address, TIMEOUT_S, Deadline(TIMEOUT_S))]
    circle.append(circle)
    collected = weakref.ref(circle[0])
    del circle
    gc.collect()
    assert collected() is None
    store.close()


def test_an_end_whose_rank_0_has_left_fails_at_once():
    store = HostedStore("127.0.0.1", TIMEOUT_S)
    distant = DistantStore(store.address, TIMEOUT_S, Deadline(TIMEOUT_S))
    store.close()
    began = time.monotonic()
    with pytest.raises(dist.DistStoreError, match="rank 0, which keeps the store, is gone"):
        distant.get("never")
    assert time.monotonic() - began < TIMEOUT_S / 2
    with pytest.raises(dist.DistStoreError, match="closed"):
        store.get("never")


def test_without_the_keys_of_this_group_nothing_is_stored_or_told():
    store = HostedStore("127.0.0.1", TIMEOUT_S)
    store.set("here", b"value")
    mine = split_address(store.address)[1]
    other = RunKeys.make().client
    for keys in (other, replace(mine, secret=other.secret), replace(mine, server=other.server)):
        with pytest.raises(dist.DistStoreError, match="rank 0, which keeps the store,"):
            DistantStore(join_address("127.0.0.1", port_of(store.address), keys), 1.0, Deadline(1.0))
    assert store.look(["here"], Deadline(1.0)) == [b"value"]
    store.close()


def test_a_group_forms_and_sums_among_strangers_at_all_its_ports_and_none_is_open_to_other_machines():
    before, resident = set(listening([os.getpid()])), psutil.Process().memory_info().rss
    host = GradientGroup.create_master("127.0.0.1", 2, "gloo", TIMEOUT_S)
    with strangers([port_of(host.address)], rounds=20), ThreadPoolExecutor(1) as other:
        joining = other.submit(GradientGroup.join, host.address, 1, 2, "gloo", TIMEOUT_S)
        host.connect()
        joined = joining.result()
        ports = set(listening([os.getpid()])) - before
        assert len(ports) == 3, "the store, and Gloo at both ends"
        assert all(port.on_loopback for port in ports)
        with strangers((port.number for port in ports), rounds=20):
            sums = [torch.ones(1 << 16), torch.ones(1 << 16)]
            summing = other.submit(joined.all_reduce, sums[1], Deadline(TIMEOUT_S))
            host.all_reduce(sums[0], Deadline(TIMEOUT_S))
            summing.result()
    assert all(torch.equal(each, torch.full((1 << 16,), 2.0)) for each in sums)
    assert psutil.Process().memory_info().rss - resident < 64 << 20
    host.close()
    joined.close()
