"""One attempt, move by move: what is reported in which state, and when the blocks are free again."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest

from decode_svc import handoff as handoff_module
from decode_svc.handoff import Handoff, HandoffState
from engine.cache.source import AttemptId, KVFailed, KVFirstTokens, KVLanded, KVQuiesced, KVReady
from engine.request import SampledToken
from kvtransfer.layout import BlockId
from staffetta import failpoint
from staffetta.errors import HandoffFailedError
from staffetta.v1 import common_pb2
from tests.decode_svc.scripted import ATTEMPT, LOCAL_IDS, PROMPT, STOP, Script, ended
from tests.rpc.in_loop import in_loop, until

TOKENS = (SampledToken(0, 42),)


async def landed(script: Script, num_tokens: int) -> None:
    await until(lambda: any(each.num_tokens == num_tokens for each in script.events(KVLanded)))


def state_of(handoff: Handoff) -> HandoffState:
    """Its state now: it changes in other turns of the loop."""
    return handoff.state


@in_loop
async def test_the_ordinary_course() -> None:
    script = Script()
    await script.begin()
    (start,) = (message.start for message in script.pipe.sent)
    assert (start.num_prompt_tokens, tuple(start.token_ids), start.num_held_tokens) == (7, PROMPT, 0)
    script.chunk(0)
    assert script.log == [KVReady(ATTEMPT)]
    script.grant()
    await landed(script, 4)
    script.first_tokens()
    script.chunk(1)
    await ended(script)
    assert script.log == [
        KVReady(ATTEMPT),
        KVLanded(ATTEMPT, 4, is_last=False),
        TOKENS,
        KVFirstTokens(ATTEMPT, TOKENS),
        KVLanded(ATTEMPT, 7, is_last=True),
    ]
    script.check(is_abandoned=False)
    record = script.route.record
    assert (record.prefill_worker, record.transport) == ("prefill-0", "loopback")
    assert (record.num_bytes, record.num_blocks, record.num_failed) == (512, 2, 0)
    assert [(c.state, c.outcome, c.count) for c in script.source.counts()] == [("committed", "done", 1)]


@in_loop
async def test_what_is_here_already_is_not_read() -> None:
    script = Script(num_held_tokens=4)
    await script.begin()
    script.chunk(1)
    script.grant()
    script.first_tokens()
    await ended(script)
    assert script.kinds() == ["ready", "emit", "firsttokens", "landed 7 last"]
    assert script.local.block(LOCAL_IDS[0]) == bytes(len(script.local.block(LOCAL_IDS[0])))
    assert script.route.record.num_blocks == 1


@in_loop
async def test_both_blocks_in_one_chunk() -> None:
    script = Script()
    await script.begin()
    script.chunk(0, 1)
    script.first_tokens()
    script.grant()
    await ended(script)
    assert script.kinds() == ["ready", "emit", "firsttokens", "landed 7 last"]


@in_loop
async def test_the_last_landing_waits_for_the_first_token() -> None:
    script = Script()
    await script.begin()
    script.grant()
    script.chunk(0, 1)
    await until(lambda: script.route.record.landed_at is not None)
    await script.settle()
    assert script.kinds() == ["ready"]
    script.first_tokens()
    await ended(script)
    assert script.kinds() == ["ready", "emit", "firsttokens", "landed 7 last"]


@in_loop
async def test_a_first_token_that_ends_the_request_needs_no_landing() -> None:
    script = Script()
    await script.begin()
    script.first_tokens(STOP)
    stop = (SampledToken(0, STOP),)
    assert script.log == [stop, KVFirstTokens(ATTEMPT, stop)]
    script.abandon()  # as the engine does
    await ended(script)
    assert [(c.state, c.outcome) for c in script.source.counts()] == [("open", "done")]
    assert script.route.record.prefill_worker == "prefill-0"


@in_loop
async def test_a_second_attempt_sends_no_second_token_and_tells_the_engine_again() -> None:
    script = Script()
    await script.begin()
    script.first_tokens()
    script.fail()
    await ended(script)
    second = AttemptId(2)
    await script.begin(second)
    script.chunk(0, 1)
    script.grant(second)
    await until(lambda: script.route.record.landed_at is not None)
    await script.settle()
    assert KVLanded(second, 7, is_last=True) not in script.log  # the engine may have missed the first attempt's token
    script.first_tokens()
    await ended(script)
    assert script.events(tuple) == [TOKENS]
    assert script.events(KVFirstTokens) == [KVFirstTokens(ATTEMPT, TOKENS), KVFirstTokens(second, TOKENS)]
    assert script.log[-1] == KVLanded(second, 7, is_last=True)
    assert script.route.record.num_failed == 1


@in_loop
async def test_the_first_token_is_sent_even_when_the_engine_gives_up_at_that_moment() -> None:
    script = Script()
    await script.begin()
    script.abandon()
    script.first_tokens()
    await ended(script)
    assert script.kinds() == ["emit", "firsttokens"]


# Bytes


BAD = {
    "checksum": ({"head_checksums": (1, 2)}, "block 0, KV head 0: checksum announced 0000000000000001"),
    "hash": ({"chain_hash": b"\x01" * 16}, "block 0: chain hash expected"),
    "index": ({"block_index": 1}, "block 0: index expected 0, got 1"),
    "count": ({"num_tokens": 3}, "block 0: token count expected 4, got 3"),
    "heads": ({"head_checksums": (1,)}, "block 0: number of head checksums expected 2, got 1"),
    "no such block": ({"block_id": BlockId(4)}, "block 4 is not in the peer's pool of 4 blocks"),
}


@pytest.mark.parametrize(("change", "told"), BAD.values(), ids=BAD)
def test_a_block_that_is_not_the_one_announced_never_lands(
    change: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    @in_loop
    async def run() -> None:
        script = Script(may_recover=False)
        await script.begin()
        script.grant()
        script.chunk(entries=[replace(script.entry(0), **change), script.entry(1)])
        await ended(script)
        assert script.kinds() == ["ready", "failed", "quiesced"]
        (failed,) = script.events(KVFailed)
        assert isinstance(failed.error, HandoffFailedError)
        assert told in failed.error.message
        assert [(c.state, c.outcome) for c in script.source.counts()] == [("pulling", "failed")]

    run()
    (record,) = [record for record in caplog.records if record.name == "decode_svc.handoff"]
    assert "failed while pulling" in record.getMessage()
    assert ("corrupt block; " in record.getMessage()) is ("no such block" not in told and "peer's pool" not in told)


@in_loop
async def test_a_bit_that_flips_on_its_way_is_seen() -> None:
    script = Script()
    script.exporter.faults.flips.append((1, 1023))
    await script.begin()
    script.grant()
    script.chunk(0, 1)
    await ended(script)
    assert script.log == [KVReady(ATTEMPT), KVFailed(ATTEMPT, None), KVQuiesced(ATTEMPT)]
    assert script.route.record.num_blocks == 0


@in_loop
async def test_a_chunk_of_more_blocks_than_were_granted_is_refused_before_any_read() -> None:
    script = Script(may_recover=False)
    await script.begin()
    script.grant()
    script.chunk(entries=[script.entry(0), script.entry(1), script.entry(1)])
    await ended(script)
    (failed,) = script.events(KVFailed)
    assert failed.error.message == (
        "the hand-off failed: a chunk of 3 blocks at index 0 does not fit the granted blocks"
    )
    assert bytes(script.local.buffer) == bytes(len(script.local.buffer))


@in_loop
async def test_empty_chunks_bring_nothing_and_do_no_harm() -> None:
    script = Script()
    await script.begin()
    script.grant()
    for _ in range(3):
        script.chunk()
    script.chunk(0, 1)
    script.first_tokens()
    await ended(script)
    assert script.log[-1] == KVLanded(ATTEMPT, 7, is_last=True)


@in_loop
async def test_a_test_can_spoil_what_was_verified() -> None:
    failpoint.arm(("handoff.zero_pulled_kv:on:2",))
    try:
        script = Script()
        await script.begin()
        script.grant()
        script.chunk(0)
        await landed(script, 4)
        script.chunk(1)
        script.first_tokens()
        await ended(script)
    finally:
        failpoint.arm(())
    assert script.has_bytes(4)
    assert bytes(script.local.block(LOCAL_IDS[1])) == bytes(script.local.page_bytes)


@in_loop
async def test_a_defect_of_ours_fails_the_attempt_and_not_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    failpoint.arm(("handoff.pulling:raise:1",))
    try:
        script = Script(may_recover=False)
        await script.begin()
        script.grant()
        script.chunk(0)
        await ended(script)
    finally:
        failpoint.arm(())
    (failed,) = script.events(KVFailed)
    assert failed.error.message == "the hand-off failed: the hand-off failed on our side"
    assert script.kinds() == ["ready", "failed", "quiesced"]
    assert "unexpected failure" in caplog.text


# Quarantine


@pytest.mark.parametrize("end", ["fail", "abandon"])
def test_blocks_are_quiet_only_when_their_read_has_ended(end: str) -> None:
    @in_loop
    async def run() -> None:
        script = Script()
        script.exporter.faults.hold()
        await script.begin()
        script.grant()
        script.chunk(0)
        await script.settle()
        handoff = script.handoff()
        assert handoff is not None
        assert state_of(handoff) is HandoffState.PULLING
        getattr(script, end)()
        await script.settle()
        assert state_of(handoff) is HandoffState.QUARANTINED
        assert script.events(KVQuiesced) == []
        assert script.pipe.commands() == ["start", "release"]  # the peer's blocks are free already
        script.release_reads()
        await ended(script)
        assert state_of(handoff) is HandoffState.FREED
        assert script.kinds() == ["ready", *["failed"] * (end == "fail"), "quiesced"]
        assert script.pipe.failure is None

    run()


@in_loop
async def test_a_read_that_never_ends_is_cut_and_the_session_with_it() -> None:
    script = Script(timeout_s=0.05)
    script.exporter.faults.hold()
    await script.begin()
    script.grant()
    script.chunk(0)
    await ended(script)
    assert script.kinds() == ["ready", "failed", "quiesced"]
    assert script.pipe.failure is not None
    assert script.pipe.failure.message == "the loopback transport of prefill-0 was stuck and has been cut"
    script.release_reads()
    assert bytes(script.local.buffer) == bytes(len(script.local.buffer))


@in_loop
async def test_a_grant_that_comes_after_the_end_is_answered() -> None:
    script = Script()
    await script.begin()
    script.chunk(0)
    script.fail()
    await ended(script)
    assert script.kinds() == ["ready", "failed"]
    script.grant()
    await script.settle()
    assert script.kinds() == ["ready", "failed", "quiesced"]
    script.abandon()
    await script.settle()
    assert script.kinds() == ["ready", "failed", "quiesced"]


@pytest.mark.parametrize("num_times", [1, 3])
def test_giving_up_is_idempotent(num_times: int) -> None:
    @in_loop
    async def run() -> None:
        script = Script()
        await script.begin()
        script.chunk(0)
        script.grant()
        for _ in range(num_times):
            script.abandon()
        await ended(script)
        script.abandon()
        await script.settle()
        script.check(is_abandoned=True)

    run()


# Time


@in_loop
async def test_the_clock_is_the_peers_progress_and_not_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff_module, "PROGRESS_CHECK_S", 0.005)
    script = Script(timeout_s=0.1, may_recover=False)
    await script.begin()
    for engine_turns in range(15):
        script.session.on_heartbeat(common_pb2.Heartbeat(engine_turns=engine_turns))
        await asyncio.sleep(0.02)
    assert script.log == []
    for _ in range(200):  # a heart that beats over an engine that stands still
        script.session.on_heartbeat(common_pb2.Heartbeat(engine_turns=14))
        await asyncio.sleep(0.005)
        if script.log:
            break
    (failed,) = script.events(KVFailed)
    assert failed.error.message.startswith("the hand-off failed: prefill-0 made no progress for 0.1 s, the limit is")
    await ended(script)


@in_loop
async def test_waiting_for_our_own_blocks_is_not_the_peers_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff_module, "PROGRESS_CHECK_S", 0.005)
    script = Script(timeout_s=0.05)
    await script.begin()
    script.chunk(0, 1)
    script.first_tokens()
    await asyncio.sleep(0.15)
    assert script.kinds() == ["ready", "emit", "firsttokens"]
    script.grant()
    await ended(script)
    assert script.log[-1] == KVLanded(ATTEMPT, 7, is_last=True)


# The source around the attempts


@in_loop
async def test_closing_the_source_gives_everything_up_and_waits_for_the_reads() -> None:
    script = Script()
    script.exporter.faults.hold()
    await script.begin()
    script.grant()
    script.chunk(0)
    await script.settle()
    closing = asyncio.create_task(script.source.close())
    await script.settle()
    assert not closing.done()
    script.release_reads()
    await closing
    script.check(is_abandoned=True)


@pytest.mark.parametrize("may_recover", [True, False])
def test_a_worker_that_is_gone_when_it_is_asked_is_a_failed_attempt(may_recover: bool) -> None:
    @in_loop
    async def run() -> None:
        script = Script(may_recover=may_recover)
        assert script.source.lookup(script.request, num_cached_tokens=0, num_known_tokens=7) is not None
        script.peers.sessions.clear()
        script.source.begin(ATTEMPT, script.request, num_cached_tokens=0)
        await script.settle()
        (failed,) = script.events(KVFailed)
        told = None if failed.error is None else failed.error.message
        assert told == (None if may_recover else "the hand-off failed: prefill-0 is gone")
        assert [(c.state, c.outcome, c.count) for c in script.source.counts()] == [("open", "failed", 1)]
        assert script.route.record.num_failed == 1

    run()


@in_loop
async def test_a_request_that_ended_meanwhile_is_not_asked_for() -> None:
    script = Script()
    script.source.drop_route(script.request.request_id)
    assert script.source.lookup(script.request, num_cached_tokens=0, num_known_tokens=7) is None
    script.source.begin(ATTEMPT, script.request, num_cached_tokens=0)
    script.abandon()
    await script.settle()
    assert (script.log, script.pipe.sent) == ([], [])


@in_loop
async def test_late_events_of_an_ended_attempt_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    script = Script()
    await script.begin()
    (handoff_id,) = script.session.handoffs
    script.abandon()
    await ended(script)
    script.session.handoffs.clear()
    script.chunk(0)
    script.first_tokens()
    assert script.log == []
    script.session.release(handoff_id)
    assert script.pipe.commands() == ["start", "release"]
