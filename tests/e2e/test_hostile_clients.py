"""Short versions of the soaks of hostile bodies and slow clients: the same code, fewer, and no timings."""

from __future__ import annotations

import asyncio

from tests.soak import hostile_bodies, slow_clients


def test_hostile_bodies_are_refused_or_served_and_nothing_dies() -> None:
    inside, _ = asyncio.run(hostile_bodies.in_process(1_000, seed=11))
    outside, _, num_dead = hostile_bodies.over_a_socket(200, seed=12)
    assert inside.problems + outside.problems == []
    assert num_dead == 0
    assert sum((inside.statuses + outside.statuses).values()) == 1_200
    assert inside.statuses.keys() >= {200, 400}


def test_slow_senders_stalled_readers_and_idle_connections_are_held_off() -> None:
    with slow_clients.fake_server("--receive-timeout", "2", "--send-timeout", "2") as server:
        senders = asyncio.run(slow_clients.slow_senders(server, 50))
        readers = asyncio.run(slow_clients.stalled_readers(server, 5, 2.0))
        idle = asyncio.run(slow_clients.idle_connections(server, 300))
    assert (senders["refused with 408"], senders["failed"]) == (50, 0)
    assert (readers["cut off"], readers["connections reset"], readers["failed"]) == (5, 5, 0)
    assert (idle["answered"], idle["failed"]) == (300, 0)
