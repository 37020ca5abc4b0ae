"""Membership: who may join, what reports change, when a snapshot is asked for, and that the end of a stream is a
leave."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from gateway import workers
from gateway.registry import RegistryServicer
from gateway.session import run_session
from staffetta.hashing import key_fingerprint
from staffetta.v1 import common_pb2, registry_pb2, registry_pb2_grpc
from tests.gateway.fakes import CLUSTER_KEY
from tests.gateway.running import Running, asynchronous, demo_model, eventually, ids_of, running


def make_announcement(worker_id: str = "prefill-0", **identity: Any) -> registry_pb2.WorkerAnnouncement:
    values: dict[str, Any] = {
        "worker_id": worker_id,
        "incarnation": "1",
        "role": common_pb2.WORKER_ROLE_PREFILL,
        "model_digest": demo_model().digest,
        "numerics_digest": "numerics",
        "layout": common_pb2.KVLayout(groups=[common_pb2.KVGroup(block_size=16)]),
        "key_fingerprint": key_fingerprint(bytes.fromhex(CLUSTER_KEY)),
    }
    worker = common_pb2.WorkerIdentity(**(values | identity))
    return registry_pb2.WorkerAnnouncement(identity=worker, address="127.0.0.1:1", num_blocks=8)


def make_report(number: int, **fields: Any) -> registry_pb2.RegisterRequest:
    return registry_pb2.RegisterRequest(sequence_number=number, **fields)


@asynccontextmanager
async def registering(it: Running) -> AsyncIterator[Any]:
    """An open registration stream on which the test writes."""
    async with grpc.aio.insecure_channel(it.grpc_address) as channel:
        call = registry_pb2_grpc.RegistryServiceStub(channel).Register()
        try:
            yield call
        finally:
            call.cancel()


def cached(it: Running, worker_id: str) -> set[int]:
    return next((worker.cached_blocks for worker in it.gateway.workers if worker.worker_id == worker_id), set())


@pytest.mark.parametrize(
    ("announcement", "code", "words"),
    [
        (make_announcement(model_digest="other"), "FAILED_PRECONDITION", "'other' at the worker and '"),
        (make_announcement("bad/name"), "INVALID_ARGUMENT", "is not a name"),
        (make_announcement(role=common_pb2.WORKER_ROLE_UNSPECIFIED), "INVALID_ARGUMENT", "role is unset"),
        (make_announcement(layout=common_pb2.KVLayout()), "INVALID_ARGUMENT", "layout has no group"),
        (None, "FAILED_PRECONDITION", "lacks the announcement"),
    ],
    ids=["digest", "name", "role", "layout", "none"],
)
@asynchronous
async def test_a_worker_that_does_not_fit_is_refused_with_both_values(
    announcement: registry_pb2.WorkerAnnouncement | None, code: str, words: str
) -> None:
    async with running(has_worker=False) as it, registering(it) as call:
        await call.write(make_report(1, announcement=announcement))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call.read()
        assert refusal.value.code().name == code
        assert words in (refusal.value.details() or "")
        assert list(it.gateway.workers) == []


@asynchronous
async def test_reports_keep_the_index_and_a_gap_asks_for_a_snapshot() -> None:
    async with running(has_worker=False) as it, registering(it) as call:
        await call.write(make_report(1, announcement=make_announcement(), is_snapshot=True, stored_blocks=[1, 2, 3]))
        await call.write(make_report(2, stored_blocks=[4], removed_blocks=[1]))
        await eventually(lambda: cached(it, "prefill-0") == {2, 3, 4})
        await call.write(make_report(4, stored_blocks=[9]))
        assert (await call.read()).wants_snapshot
        assert cached(it, "prefill-0") == {9}
        await call.write(make_report(5, is_snapshot=True, stored_blocks=[7, 8]))
        await eventually(lambda: cached(it, "prefill-0") == {7, 8})


@asynchronous
async def test_the_end_of_a_stream_is_a_leave() -> None:
    async with running(has_worker=False) as it:
        async with registering(it) as call:
            await call.write(make_report(1, announcement=make_announcement()))
            await eventually(lambda: len(list(it.gateway.workers)) == 1)
        await eventually(lambda: not list(it.gateway.workers))


@asynchronous
async def test_silence_is_a_leave() -> None:
    async with running(has_worker=False, heartbeat_s=0.05) as it, registering(it) as call:
        await call.write(make_report(1, announcement=make_announcement()))
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await call.read()
        assert lost.value.details() == "no report for 0.15 s"
        assert list(it.gateway.workers) == []


@asynchronous
async def test_decode_workers_are_told_the_prefill_workers_whenever_they_change() -> None:
    async with running() as it:
        assert it.worker.peers == []
        async with registering(it) as first, registering(it) as second:
            await first.write(make_report(1, announcement=make_announcement("prefill-0")))
            await eventually(lambda: it.worker.peers == ["prefill-0"])
            await second.write(make_report(1, announcement=make_announcement("prefill-1")))
            await eventually(lambda: it.worker.peers == ["prefill-0", "prefill-1"])
            first.cancel()
            await eventually(lambda: it.worker.peers == ["prefill-1"])


@asynchronous
async def test_a_linked_prefill_worker_is_named_to_the_decode_worker() -> None:
    async with running(reply=ids_of("a")) as it, registering(it) as call:
        it.worker.links = [registry_pb2.PeerLink(prefill_worker="prefill-0", transport="shm")]
        await call.write(make_report(1, announcement=make_announcement()))
        await eventually(lambda: any(worker.links for worker in it.gateway.workers) and len(it.worker.peers) == 1)
        await it.http.post("/v1/completions", json={"prompt": "x"})
        assert (await it.worker.starts.get()).prefill_worker == "prefill-0"


@asynchronous
async def test_a_link_to_a_prefill_worker_that_came_back_with_another_build_is_not_used() -> None:
    async with running(reply=ids_of("a")) as it, registering(it) as call:
        it.worker.links = [registry_pb2.PeerLink(prefill_worker="prefill-0", transport="shm")]
        await call.write(make_report(1, announcement=make_announcement(numerics_digest="other")))
        await eventually(lambda: any(worker.links for worker in it.gateway.workers) and len(it.worker.peers) == 1)
        await it.http.post("/v1/completions", json={"prompt": "x"})
        assert (await it.worker.starts.get()).prefill_worker == ""


@asynchronous
async def test_routed_tokens_count_until_the_next_report() -> None:
    async with running(has_worker=False) as it, registering(it) as call:
        await call.write(make_report(1, announcement=make_announcement()))
        await eventually(lambda: len(list(it.gateway.workers)) == 1)
        (worker,) = it.gateway.workers
        worker.num_routed_tokens = 100
        assert it.gateway.workers.snapshot().prefill[0].num_pending_tokens == 100
        await call.write(make_report(2, load=registry_pb2.WorkerLoad(num_pending_tokens=60)))
        await eventually(lambda: it.gateway.workers.snapshot().prefill[0].num_pending_tokens == 60)


@asynchronous
async def test_the_list_says_who_is_there_and_has_a_session() -> None:
    async with running() as it, registering(it) as call, grpc.aio.insecure_channel(it.grpc_address) as channel:
        await call.write(make_report(1, announcement=make_announcement()))
        await eventually(lambda: len(list(it.gateway.workers)) == 2)
        answer = await registry_pb2_grpc.RegistryServiceStub(channel).ListWorkers(registry_pb2.ListWorkersRequest())
    listed = [(worker.announcement.identity.worker_id, worker.has_session) for worker in answer.workers]
    assert listed == [("decode-0", True), ("prefill-0", False)]


@asynchronous
async def test_a_newer_registration_of_a_name_replaces_the_older() -> None:
    async with running(has_worker=False) as it, registering(it) as older, registering(it) as newer:
        await older.write(make_report(1, announcement=make_announcement()))
        await eventually(lambda: len(list(it.gateway.workers)) == 1)
        await newer.write(make_report(1, announcement=make_announcement(incarnation="2")))

        def incarnations() -> list[str]:
            return [worker.announcement.identity.incarnation for worker in it.gateway.workers]

        await eventually(lambda: incarnations() == ["2"])
        await older.write(make_report(2))
        assert await older.read() is grpc.aio.EOF
        assert incarnations() == ["2"]


@asynchronous
async def test_requests_outlive_the_registration_of_their_worker() -> None:
    async with running(reply=None) as it:
        task = asyncio.create_task(it.http.post("/v1/completions", json={"prompt": "x"}))
        start = await it.worker.starts.get()
        (worker,) = it.gateway.workers
        it.gateway.workers.leave(worker)
        assert it.gateway.workers.snapshot().decode == []
        it.worker.emit(start.request_id, ids_of("a"), finish=common_pb2.FINISH_REASON_STOP)
        assert (await task).status_code == 200


@pytest.mark.parametrize("name", ["worker_id", "incarnation", "model_digest", "numerics_digest"])
@asynchronous
async def test_a_session_that_opens_with_another_identity_is_not_used(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(has_worker=False) as it:
        real: Callable[..., Any] = type(it.worker).identity.fget  # type: ignore[attr-defined]
        calls: list[int] = []

        def changing(worker: Any) -> common_pb2.WorkerIdentity:
            identity: common_pb2.WorkerIdentity = real(worker)
            calls.append(1)
            # The first is announced, and must be let in.
            if len(calls) > 1:
                setattr(identity, name, f"other-{len(calls)}")
            return identity

        monkeypatch.setattr(type(it.worker), "identity", property(changing))
        await it.worker.start(it.grpc_address)
        await eventually(lambda: len(calls) >= 3)
        assert it.gateway.workers.max_model_len() is None


def fail_once(real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but its first call raises what nobody expects."""
    calls: list[int] = []

    async def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a secret of this process")
        return await real(*args, **kwargs)

    return failing


@asynchronous
async def test_a_session_that_ends_unexpectedly_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "run_session", fail_once(run_session))
    async with running(reply=ids_of("a")) as it:
        assert (await it.http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == "the session with decode-0 ended unexpectedly"


@pytest.mark.parametrize("direction", ["_follow", "_answer"])
@asynchronous
async def test_a_registration_that_fails_unexpectedly_is_a_leave_and_reveals_nothing(
    direction: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RegistryServicer, direction, fail_once(getattr(RegistryServicer, direction)))
    async with running(has_worker=False) as it, registering(it) as call:
        await call.write(make_report(1, announcement=make_announcement()))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        assert "the request failed on our side" in (failure.value.details() or "")
        assert "secret" not in str(failure.value)
        assert list(it.gateway.workers) == []
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == "prefill-0: its registration ended unexpectedly"
