"""What several gateway processes are made of, each part alone: what travels over the link, sums, shares, ports."""

import asyncio
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import GaugeMetricFamily

from gateway import roster as roster_module
from gateway.metrics import InFlight, Metrics
from gateway.parent import share
from gateway.pulls import Pulls
from gateway.roster import Roster, follow
from gateway.shared_port import hold, listen
from gateway.totals import Totals
from gateway.workers import Workers
from staffetta.address import parse_address
from staffetta.exits import PortError
from staffetta.v1 import common_pb2, gateway_pb2, registry_pb2
from tests.gateway.running import asynchronous

ANY_PORT = parse_address("127.0.0.1:0")


# Membership


def announce(number: int, incarnation: int) -> registry_pb2.WorkerAnnouncement:
    identity = common_pb2.WorkerIdentity(
        worker_id=f"prefill-{number}", incarnation=str(incarnation), role=common_pb2.WORKER_ROLE_PREFILL
    )
    identity.layout.groups.add(block_size=16)
    return registry_pb2.WorkerAnnouncement(identity=identity, address="127.0.0.1:1")


def facts(workers: Any) -> list[tuple[object, ...]]:
    return [
        (w.worker_id, w.announcement.identity.incarnation, w.load, w.links, sorted(w.cached_blocks)) for w in workers
    ]


Change = tuple[str, int, list[int], list[int]]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["join", "leave", "report", "snapshot", "forget"]),
        st.integers(0, 2),
        st.lists(st.integers(0, 9), max_size=4),
        st.lists(st.integers(0, 9), max_size=4),
    ),
    max_size=20,
)


def change(roster: Roster, step: int, one: Change) -> None:
    kind, number, stored, removed = one
    worker = roster.named(f"prefill-{number}")
    if kind == "join":
        roster.join(announce(number, step))
    elif worker is not None and kind == "leave":
        roster.leave(worker)
        roster.leave(worker)
    elif worker is not None and kind == "forget":
        roster.forget_cache(worker)
    elif worker is not None:
        report = registry_pb2.RegisterRequest(
            sequence_number=step,
            announcement=worker.announcement,
            load=registry_pb2.WorkerLoad(num_waiting=step),
            links=[registry_pb2.PeerLink(prefill_worker="p")] * (step % 2),
            stored_blocks=stored,
            removed_blocks=removed,
            is_snapshot=kind == "snapshot",
        )
        roster.report(worker, report)


@given(changes=CHANGES, late=st.integers(0, 20))
@settings(max_examples=80, deadline=None)
def test_a_child_knows_what_the_parent_knows_whenever_it_begins_to_listen(changes: list[Change], late: int) -> None:
    @asynchronous
    async def play() -> None:
        early = Workers(gateway_id="early", heartbeat_s=1)
        newcomer = Workers(gateway_id="late", heartbeat_s=1)
        listeners = [early]

        def tell(message: gateway_pb2.ParentMessage) -> None:
            for one in listeners:
                follow(one, gateway_pb2.ParentMessage.FromString(message.SerializeToString()))

        roster = Roster(tell=tell, is_open_everywhere=lambda worker: False)
        for step, one in enumerate(changes):
            if step == late:
                for message in roster.so_far():
                    follow(newcomer, message)
                listeners.append(newcomer)
            change(roster, step, one)
        assert facts(early) == facts(roster)
        if late < len(changes):
            assert facts(newcomer) == facts(roster)
            views = [sorted(child.snapshot().prefill, key=lambda view: view.worker_id) for child in (early, newcomer)]
            assert views[0] == views[1]

    play()


@asynchronous
async def test_a_cache_larger_than_a_message_is_told_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "BLOCKS_PER_MESSAGE", 3)
    roster = Roster(tell=lambda message: None, is_open_everywhere=lambda worker: False)
    worker = roster.join(announce(0, 1))
    roster.report(
        worker, registry_pb2.RegisterRequest(stored_blocks=range(7), load=registry_pb2.WorkerLoad(num_running=2))
    )
    child = Workers(gateway_id="child", heartbeat_s=1)
    messages = list(roster.so_far())
    assert [len(message.reported.report.stored_blocks) for message in messages] == [0, 3, 3, 1]
    for message in messages:
        follow(child, message)
    assert facts(child) == facts(roster)


@asynchronous
async def test_a_cache_that_the_parent_no_longer_believes_is_forgotten_everywhere() -> None:
    child = Workers(gateway_id="child", heartbeat_s=1)
    roster = Roster(tell=lambda message: follow(child, message), is_open_everywhere=lambda worker: False)
    worker = roster.join(announce(0, 1))
    load = registry_pb2.WorkerLoad(num_running=2)
    roster.report(worker, registry_pb2.RegisterRequest(stored_blocks=range(7), load=load))
    roster.forget_cache(worker)
    (known,) = child
    assert (known.cached_blocks, known.load, worker.wants_snapshot) == (set(), load, True)


@asynchronous
async def test_news_of_a_worker_that_a_child_never_heard_of_are_none() -> None:
    child = Workers(gateway_id="child", heartbeat_s=1)
    follow(child, gateway_pb2.ParentMessage(left="prefill-9"))
    follow(child, gateway_pb2.ParentMessage(reported=gateway_pb2.PassedReport(worker_id="prefill-9")))
    assert list(child) == []


# Sums


def make_metrics(*, num_running: int = 0) -> Metrics:
    metrics = Metrics("demo")
    metrics.watch(lambda: InFlight(num_running, 1), Workers(gateway_id="child", heartbeat_s=1))
    return metrics


@asynchronous
async def test_counters_histograms_and_requests_in_flight_add_up_and_outlive_a_process() -> None:
    first, second = make_metrics(num_running=2), make_metrics(num_running=3)
    first.ended("stop", latency_s=0.3, num_prompt_tokens=5, num_tokens=7)
    second.ended("stop", latency_s=40.0, num_prompt_tokens=1, num_tokens=2)
    second.ended("length", latency_s=0.3, num_prompt_tokens=1, num_tokens=2)
    totals = Totals()
    page = totals.page([first.render(), second.render()], []).decode().splitlines()
    for line in (
        'vllm:prompt_tokens_total{model_name="demo"} 7.0',
        'vllm:generation_tokens_total{model_name="demo"} 11.0',
        'vllm:request_success_total{finished_reason="stop",model_name="demo"} 2.0',
        'vllm:request_success_total{finished_reason="length",model_name="demo"} 1.0',
        'vllm:e2e_request_latency_seconds_bucket{le="0.5",model_name="demo"} 2.0',
        'vllm:e2e_request_latency_seconds_bucket{le="+Inf",model_name="demo"} 3.0',
        'vllm:e2e_request_latency_seconds_count{model_name="demo"} 3.0',
        'vllm:num_requests_running{model_name="demo"} 5.0',
        "# TYPE vllm:prompt_tokens_total counter",
        "# TYPE vllm:e2e_request_latency_seconds histogram",
    ):
        assert line in page
    totals.retire(second.render())
    page = totals.page([first.render(), make_metrics().render()], []).decode().splitlines()
    assert 'vllm:prompt_tokens_total{model_name="demo"} 7.0' in page
    assert 'vllm:e2e_request_latency_seconds_count{model_name="demo"} 3.0' in page
    assert 'vllm:num_requests_running{model_name="demo"} 2.0' in page  # what has ended runs no more


@asynchronous
async def test_one_page_added_up_is_that_page() -> None:
    metrics = make_metrics(num_running=4)
    metrics.ended("stop", latency_s=0.3, num_prompt_tokens=5, num_tokens=7)
    assert sorted(Totals().page([metrics.render()], []).splitlines()) == sorted(metrics.render().splitlines())


def test_what_every_process_reads_of_a_worker_is_not_counted_twice() -> None:
    def page(*, sessions: int, stalled: int, held: int) -> bytes:
        families = []
        for name, value in (
            ("staffetta_sessions", sessions),
            ("staffetta_engine_stalled", stalled),
            ("staffetta_kv_blocks", held),
        ):
            family = GaugeMetricFamily(name, "x", labels=("worker",))
            family.add_metric(("decode-0",), value)
            families.append(family)
        return Totals().page([], families)

    both = Totals().page([page(sessions=1, stalled=0, held=3), page(sessions=0, stalled=1, held=3)], [])
    lines = both.decode().splitlines()
    assert 'staffetta_sessions{worker="decode-0"} 0.0' in lines
    assert 'staffetta_engine_stalled{worker="decode-0"} 1.0' in lines
    assert 'staffetta_kv_blocks{worker="decode-0"} 3.0' in lines


@given(total=st.integers(1, 5000), num_parts=st.integers(1, 64))
def test_shares_add_up_and_differ_by_one_at_most(total: int, num_parts: int) -> None:
    shares = [share(total, num_parts, index) for index in range(num_parts)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


# Questions to all


@asynchronous
async def test_a_question_is_over_when_everybody_has_answered_it_or_is_gone() -> None:
    pulls: Pulls[str] = Pulls()
    number = pulls.ask(["a", "b", "c"])
    other = pulls.ask(["a"])
    waiting = asyncio.create_task(pulls.wait(number, timeout_s=5))
    pulls.answered("a", number)
    pulls.answered("b", number)
    pulls.answered("c", other)
    await asyncio.sleep(0)
    assert not waiting.done()
    pulls.gone("c")
    assert list(await waiting) == []
    assert list(await pulls.wait(other, timeout_s=0)) == ["a"]
    pulls.answered("a", other)  # nobody waits any more
    assert list(await pulls.wait(pulls.ask([]), timeout_s=0)) == []


# Ports


def test_a_held_port_is_shared_with_who_means_to_share_and_refused_to_everybody_else() -> None:
    with hold(ANY_PORT, flag="--http") as holder:
        address = ANY_PORT._replace(port=holder.getsockname()[1])
        with pytest.raises(PortError):
            hold(address, flag="--http")
        with listen(address), listen(address):
            with pytest.raises(PortError):
                hold(address, flag="--http")
            with pytest.raises(OSError, match="in use"):
                socket.create_server(address)


def test_connections_spread_evenly_and_wait_for_who_accepts_them() -> None:
    with hold(ANY_PORT, flag="--http") as holder:
        address = ANY_PORT._replace(port=holder.getsockname()[1])
        listeners = [listen(address) for _ in range(2)]
        clients = [socket.create_connection(address) for _ in range(64)]
        accepted = []
        for listener in listeners:
            listener.setblocking(False)
            sockets: list[socket.socket] = []
            try:
                while True:
                    sockets.append(listener.accept()[0])
            except BlockingIOError:
                accepted.append(sockets)
        assert sum(map(len, accepted)) == len(clients)
        assert min(map(len, accepted)) >= len(clients) // 8
        for one in (*clients, *listeners, *accepted[0], *accepted[1]):
            one.close()
