"""Tickets: whom they let in, for which blocks, for how long; and that there are never too many."""

import threading

import pytest

from kvtransfer.ticket import TicketBook, TicketVerdict
from staffetta.errors import ExhaustedError


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_ticket_opens_its_blocks_and_no_others() -> None:
    tickets = TicketBook()
    ticket = tickets.issue("request", {b"session"}, [3, 4], lease_s=10)
    assert tickets.check(ticket, b"session", [4, 3, 3]) is TicketVerdict.VALID
    assert tickets.check(ticket, b"session", []) is TicketVerdict.VALID
    assert tickets.check(ticket, b"session", [4, 5]) is TicketVerdict.OTHER_BLOCKS


def test_a_ticket_is_of_use_to_its_own_peer_by_any_of_its_offers() -> None:
    tickets = TicketBook()
    ticket = tickets.issue("request", {b"by tcp", b"by shm"}, [3], lease_s=10)
    assert tickets.check(ticket, b"by shm", [3]) is TicketVerdict.VALID
    assert tickets.check(ticket, b"by tcp", [3]) is TicketVerdict.VALID
    assert tickets.check(ticket, b"somebody else", [3]) is TicketVerdict.OTHER_SESSION


def test_tickets_are_128_bits_and_all_different() -> None:
    tickets = TicketBook()
    issued = {tickets.issue("request", {b"s"}, [1], lease_s=10) for _ in range(1000)}
    assert {len(ticket) for ticket in issued} == {16}
    assert len(issued) == len(tickets) == 1000


def test_a_ticket_expires_when_its_lease_ends_and_not_before() -> None:
    clock = Clock()
    tickets = TicketBook(clock=clock)
    ticket = tickets.issue("request", {b"s"}, [1], lease_s=10)
    clock.now = 109.999
    assert tickets.check(ticket, b"s", [1]) is TicketVerdict.VALID
    clock.now = 110.0
    assert tickets.check(ticket, b"s", [1]) is TicketVerdict.EXPIRED


def test_extending_adds_blocks_and_starts_the_lease_anew() -> None:
    clock = Clock()
    tickets = TicketBook(clock=clock)
    ticket = tickets.issue("request", {b"s"}, [1], lease_s=10)
    clock.now = 109.0
    tickets.extend(ticket, [2], lease_s=10)
    clock.now = 118.0
    assert tickets.check(ticket, b"s", [1, 2]) is TicketVerdict.VALID
    clock.now = 119.0
    assert tickets.check(ticket, b"s", [1, 2]) is TicketVerdict.EXPIRED


def test_a_revoked_ticket_opens_nothing_and_revoking_twice_is_harmless() -> None:
    tickets = TicketBook()
    ticket = tickets.issue("request", {b"s"}, [1], lease_s=10)
    tickets.revoke(ticket)
    tickets.revoke(ticket)
    assert tickets.check(ticket, b"s", [1]) is TicketVerdict.UNKNOWN
    with pytest.raises(KeyError):
        tickets.extend(ticket, [2], lease_s=10)


def test_renewing_lets_a_lease_start_anew_and_says_when_there_is_none() -> None:
    now = [0.0]
    tickets = TicketBook(clock=lambda: now[0])
    ticket = tickets.issue("r", {b"key"}, {1}, lease_s=1.0)
    now[0] = 0.9
    assert tickets.renew(ticket, lease_s=1.0)
    now[0] = 1.5
    assert tickets.check(ticket, b"key", {1}) is TicketVerdict.VALID
    tickets.revoke(ticket)
    assert not tickets.renew(ticket, lease_s=1.0)


def test_no_more_tickets_are_out_than_the_bound_and_expired_ones_make_room() -> None:
    clock = Clock()
    tickets = TicketBook(max_tickets=2, clock=clock)
    tickets.issue("a", {b"s"}, [1], lease_s=1)
    tickets.issue("b", {b"s"}, [2], lease_s=5)
    with pytest.raises(ExhaustedError, match="2 hand-offs are waiting"):
        tickets.issue("c", {b"s"}, [3], lease_s=5)
    clock.now = 101.0
    tickets.issue("c", {b"s"}, [3], lease_s=5)
    assert len(tickets) == 2


def test_threads_may_issue_check_and_revoke_at_once() -> None:
    tickets = TicketBook(max_tickets=64)
    verdicts: list[TicketVerdict] = []

    def work() -> None:
        for block_id in range(500):
            ticket = tickets.issue("request", {b"s"}, [block_id], lease_s=10)
            tickets.extend(ticket, [block_id + 1], lease_s=10)
            verdicts.append(tickets.check(ticket, b"s", [block_id, block_id + 1]))
            tickets.revoke(ticket)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [TicketVerdict.VALID] * 4000
    assert len(tickets) == 0
