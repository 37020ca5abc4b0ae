"""Children that cannot be started, or not any more, and what the parent does about them and their metrics."""

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import psutil
import pytest
from prometheus_client.core import Metric

from gateway import child, child_ends, children
from gateway.app import GatewayReady
from gateway.child import ChildGateway, ParentLink
from gateway.child_ends import ChildEndedError, ChildNotStartedError
from gateway.children import ChildLink
from gateway.main import Ends, serve_until_told
from gateway.scrapes import Scrapes
from staffetta.errors import UnavailableError
from staffetta.exits import ExitCode, OperatorError
from staffetta.v1 import gateway_pb2
from tests.gateway.processes import NUM_CHILDREN, SEVERAL, ask, make_parent
from tests.gateway.running import asynchronous, demo_model, eventually

NO_MEMORY = OSError(errno.ENOMEM, "Cannot allocate memory")


def refuse(*args: object, **settings: object) -> None:
    raise NO_MEMORY


def own_processes(before: Iterable[psutil.Process] = ()) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child not in before]


# Starts


@pytest.mark.parametrize(("module", "name"), [(subprocess, "Popen"), (os, "pidfd_open"), (socket, "socketpair")])
@asynchronous
async def test_a_system_without_room_for_a_process_is_the_failure_of_the_start(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    before = own_processes()
    monkeypatch.setattr(module, name, refuse)
    with pytest.raises(ChildNotStartedError) as refusal:
        await make_parent().start()
    assert "Cannot allocate memory" in refusal.value.what
    assert own_processes() == before


@asynchronous
async def test_a_child_that_cannot_start_is_the_gateways_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    before = own_processes()
    with pytest.raises(ChildEndedError) as refusal:
        await make_parent().start()
    assert refusal.value.exit_code is ExitCode.FAILURE
    assert own_processes() == before


@asynchronous
async def test_room_that_is_missing_for_a_while_costs_a_gateway_that_serves_nothing_but_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[OperatorError] = []
    before = own_processes()
    parent = make_parent(failures=failures)
    try:
        ready = await parent.start()
        popen, num_refusals = subprocess.Popen, 0

        def refuse_twice(*args: object, **settings: object) -> "subprocess.Popen[bytes]":
            nonlocal num_refusals
            num_refusals += 1
            if num_refusals <= 2:
                raise NO_MEMORY
            return popen(*args, **settings)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(subprocess, "Popen", refuse_twice)
        own_processes(before)[0].kill()
        await eventually(lambda: num_refusals == 3)
        page = ""
        while f"staffetta_gateway_processes {NUM_CHILDREN}.0" not in page:
            page = await ask(ready.http, "/metrics")
        assert 'staffetta_gateway_process_ends_total{by="ENOMEM"} 2.0' in page
        assert 'staffetta_gateway_process_ends_total{by="SIGKILL"} 1.0' in page
        assert failures == []
    finally:
        await parent.close()


@asynchronous
async def test_a_process_that_never_comes_back_ends_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_ends, "MAX_EARLY_ENDS_LATER", 4)
    failures: list[OperatorError] = []
    before = own_processes()
    parent = make_parent(failures=failures)
    try:
        await parent.start()
        monkeypatch.setattr(sys, "executable", "/bin/false")
        own_processes(before)[0].kill()
        await eventually(lambda: failures != [])
        assert [(type(failure), failure.exit_code) for failure in failures] == [(ChildEndedError, ExitCode.FAILURE)]
    finally:
        await parent.close()
    assert own_processes() == before


@asynchronous
async def test_what_is_no_process_is_neither_late_nor_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(children, "PULL_S", 0.02)
    before = own_processes()
    parent = make_parent()
    try:
        await parent.start()
        monkeypatch.setattr(children, "START_S", 0.0)
        monkeypatch.setattr(subprocess, "Popen", refuse)
        own_processes(before)[0].kill()
        refusals = "cannot be started"
        await eventually(lambda: sum(refusals in message for message in caplog.messages) >= 4)
        assert not any("is killed" in message for message in caplog.messages)
    finally:
        await parent.close()


# Ends


@asynchronous
async def test_what_ends_a_gateway_before_its_doors_are_open_ends_it_in_good_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    never_serves = tmp_path / "python"
    never_serves.write_text("#!/bin/sh\nexec sleep 60\n")
    never_serves.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(never_serves))
    before = own_processes()
    ends = Ends()
    ready: list[GatewayReady] = []
    serving = asyncio.create_task(serve_until_told(make_parent(), ends, drain_s=60, on_ready=ready.append))
    await eventually(lambda: len(own_processes(before)) == NUM_CHILDREN)
    ends.put_nowait("SIGTERM")
    await serving
    assert own_processes() == before
    assert ready == []


@asynchronous
async def test_an_error_that_ends_a_gateway_is_raised_when_it_has_drained() -> None:
    said: list[str] = []

    class Fake:
        async def start(self) -> GatewayReady:
            return GatewayReady("", "", "")

        async def drain(self, *, timeout_s: float) -> None:
            said.append(f"drain for {timeout_s:g} s")

        async def close(self) -> None:
            said.append("close")

    error = ChildEndedError(1, 1)
    ends = Ends()
    with pytest.raises(ChildEndedError) as raised:
        await serve_until_told(Fake(), ends, drain_s=3, on_ready=lambda ready: ends.put_nowait(error))
    assert raised.value is error
    assert said == ["drain for 3 s", "close"]


# Metrics


def count_nothing() -> list[Metric]:
    return []


@asynchronous
async def test_who_asks_for_metrics_meanwhile_gets_the_sum_that_is_under_way() -> None:
    told: list[gateway_pb2.ParentMessage] = []
    scrapes = Scrapes(serving=lambda: [0], tell=told.append, own=count_nothing)
    waiting = [asyncio.create_task(scrapes.page()) for _ in range(50)]
    await eventually(lambda: told != [])
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    scrapes.answered(0, gateway_pb2.MetricsPage(number=1, text=b"# TYPE x counter\nx_total 3.0\n"))
    pages = await asyncio.gather(*waiting[1:])
    assert len(told) == 1
    assert all(b"x_total 3.0" in page for page in pages)


@asynchronous
async def test_metrics_that_cannot_be_added_up_are_an_empty_page_and_cost_no_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scrapes = Scrapes(serving=list, tell=lambda message: None, own=count_nothing)
    scrapes.answered(0, gateway_pb2.MetricsPage(number=1, text=b"\xff"))
    assert await scrapes.page() == b""
    scrapes.gone(0)
    assert caplog.messages == [
        "the metrics of the processes cannot be added up",
        "what process 0 has counted is lost",
    ]
    scrapes.answered(1, gateway_pb2.MetricsPage(number=1, text=b"# TYPE x counter\nx_total 3.0\n"))
    assert b"x_total 3.0" in await scrapes.page()


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[ChildGateway, ChildLink, Ends]]:
    """A child that follows its parent and has no doors open, the parent's end of its link, and what ends it."""
    ours, theirs = socket.socketpair()
    parent = await ChildLink.open(ours, gateway_pb2.ChildMessage)
    link = await ParentLink.open(theirs, gateway_pb2.ParentMessage)
    ends = Ends()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gateway = ChildGateway(SEVERAL, demo_model(), link=link, listener=listener)
        following = asyncio.create_task(gateway.follow_parent(ends))
        try:
            yield gateway, parent, ends
        finally:
            parent.close()
            await following
            link.close()
            await gateway.close()


@asynchronous
async def test_a_process_asks_once_for_all_who_want_metrics_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async with linked() as (gateway, parent, _):
        waiting = [asyncio.create_task(gateway.scrape()) for _ in range(50)]
        asked = await parent.receive()
        assert asked is not None
        assert asked.scrape.number == 1
        parent.send(gateway_pb2.ParentMessage(page=gateway_pb2.MetricsPage(number=1, text=b"x 1.0\n")))
        assert await asyncio.gather(*waiting) == [b"x 1.0\n"] * 50
        refused = asyncio.create_task(gateway.scrape())
        asked = await parent.receive()
        assert asked is not None
        assert asked.scrape.number == 2  # not the second of fifty-one
        parent.send(gateway_pb2.ParentMessage(page=gateway_pb2.MetricsPage(number=2)))
        with pytest.raises(UnavailableError, match="cannot be told"):
            await refused
        monkeypatch.setattr(child, "SCRAPE_S", 0.01)
        with pytest.raises(UnavailableError, match="cannot be told"):
            await gateway.scrape()


@asynchronous
async def test_a_process_that_cannot_follow_its_parent_ends_and_tells_who_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_off(workers: object, message: object) -> None:
        raise KeyError(message)

    monkeypatch.setattr(child, "follow", break_off)
    monkeypatch.setattr(child, "SCRAPE_S", 60.0)
    async with linked() as (gateway, parent, ends):
        waiting = asyncio.create_task(gateway.scrape())
        await parent.receive()
        parent.send(gateway_pb2.ParentMessage(left="decode-0"))
        assert await ends.get() == "the parent is gone"
        with pytest.raises(UnavailableError, match="about to end"):
            await waiting
        assert caplog.messages == ["the parent cannot be followed"]
