"""Whatever breaks between the two workers: the same tokens, each once, or a typed error; and every block comes back."""

import asyncio

from staffetta.errors import Code
from staffetta.v1 import common_pb2, decode_pb2
from tests.handoff.cluster import (
    Answer,
    RunningWorker,
    client_of,
    decode_worker,
    make_prompt,
    prefill_worker,
    until_counts,
    until_idle,
    until_linked,
)
from tests.handoff.test_tokens import local_tokens
from tests.rpc.in_loop import in_loop, until

FAIL = common_pb2.PREFILL_FAILURE_POLICY_FAIL
PROMPT = make_prompt(100, seed=1)


async def until_first_token(answer: Answer) -> None:
    await answer.until(lambda answer: bool(answer.tokens))


def outcomes(decode: RunningWorker) -> dict[str, int]:
    """How attempts ended, in whatever state they were."""
    counts: dict[str, int] = {}
    for (_, outcome), count in decode.handoffs().items():
        counts[outcome] = counts.get(outcome, 0) + count
    return counts


# Bytes


@in_loop
async def test_a_corrupt_block_is_never_served() -> None:
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill, local_prefill="auto") as decode,
        client_of(decode) as client,
    ):
        prefill.faults.flips.append((3, 12345))
        answer = await client.ask(PROMPT)
        await until_idle(prefill, decode)
        assert decode.handoffs() == {("pulling", "failed"): 1}
    assert [answer.token_ids] == await local_tokens([PROMPT])
    assert (answer.handoff.failed_handoffs, answer.handoff.locally_prefilled_tokens) == (1, 100)


@in_loop
async def test_a_corrupt_block_ends_a_request_that_wants_no_recomputing() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        prefill.faults.flips.append((0, 0))
        answer = await client.ask(PROMPT, on_prefill_failure=FAIL)
        await until_idle(prefill, decode)
    assert answer.failure.reason == "HANDOFF_FAILED"
    assert (answer.failure.code, answer.failure.is_retryable) == (Code.UNAVAILABLE, True)
    assert "block 0, KV head 0: checksum announced" in answer.failure.message


@in_loop
async def test_a_broken_read_is_tried_again_with_the_same_worker_when_there_is_no_other() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        prefill.faults.num_failures = 2
        answer = await client.ask(PROMPT)
        await until_idle(prefill, decode)
        assert outcomes(decode) == {"failed": 2, "done": 1}
    assert answer.handoff.failed_handoffs == 2
    assert [answer.token_ids] == await local_tokens([PROMPT])


@in_loop
async def test_the_attempts_are_bounded() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        prefill.faults.num_failures = 10
        answer = await client.ask(PROMPT)
        await until_idle(prefill, decode)
        assert prefill.faults.num_failures == 7
    assert (answer.failure.reason, answer.failure.is_retryable) == ("HANDOFF_FAILED", True)
    assert answer.failure.message.startswith("3 hand-offs of this request failed, 1 prefill workers are reachable")


@in_loop
async def test_what_landed_before_a_failure_does_not_move_again() -> None:
    prompt = make_prompt(128, seed=6)
    async with (
        prefill_worker(max_batch_tokens=64) as prefill,
        decode_worker(prefill) as decode,
        client_of(decode) as client,
    ):
        # The first chunk is whole, the second corrupt.
        prefill.faults.hold()
        answer = client.start(prompt)
        await until_first_token(answer)
        prefill.faults.flips.extend([(0, 0)])
        prefill.faults.release()
        await answer.ended()
        await until_idle(prefill, decode)
    assert [answer.token_ids] == await local_tokens([prompt])
    assert answer.handoff.failed_handoffs == 1


# Time


@in_loop
async def test_a_stuck_read_keeps_its_blocks_in_quarantine_while_the_request_goes_on() -> None:
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill, local_prefill="auto", handoff_timeout_s=0.3) as decode,
        client_of(decode) as client,
    ):
        prefill.faults.hold()
        answer = client.start(PROMPT)
        await until_counts(decode, lambda counts: counts.quarantined_blocks == 7)
        await answer.ended()
        assert [answer.token_ids] == await local_tokens([PROMPT])
        # Nobody lets the read go on: the deadline cuts the transport, and the blocks come back.
        await until_idle(prefill, decode)
        assert decode.handoffs() == {("pulling", "failed"): 1}


@in_loop
async def test_after_a_cut_the_pair_is_made_anew() -> None:
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill, handoff_timeout_s=0.2, max_handoff_attempts=1) as decode,
        client_of(decode) as client,
    ):
        prefill.faults.hold()
        failed = await client.ask(PROMPT)
        assert failed.failure.reason == "HANDOFF_FAILED"
        await until_linked(decode, 0)
        prefill.faults.release()
        await until_linked(decode, 1)
        answer = await client.ask(PROMPT)
        await until_idle(prefill, decode)
    assert answer.handoff.prefill_worker == "prefill-0"
    assert [answer.token_ids] == await local_tokens([PROMPT])


@in_loop
async def test_a_lease_that_runs_out_fails_the_hand_off_and_the_prompt_is_computed_here() -> None:
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill, local_prefill="auto", lease_s=0.05) as decode,
        client_of(decode) as client,
    ):
        prefill.faults.hold()
        answer = client.start(PROMPT)
        await answer.ended()
        await until_idle(prefill)
        assert (await decode.counts()).quarantined_blocks == 7
        prefill.faults.release()  # the late read is refused: its ticket went with the lease
        await until_idle(decode)
        assert decode.handoffs() == {("pulling", "failed"): 1}
    assert [answer.token_ids] == await local_tokens([PROMPT])


# Peers


@in_loop
async def test_without_any_prefill_worker_a_request_is_refused_when_it_may_not_be_computed_here() -> None:
    async with decode_worker() as decode, client_of(decode) as client:
        answer = await client.ask(PROMPT)
        await until_idle(decode)
    assert answer.failure.reason == "HANDOFF_FAILED"
    assert (answer.failure.code, answer.failure.is_retryable) == (Code.UNAVAILABLE, True)
    assert answer.failure.message == (
        "0 hand-offs of this request failed, 0 prefill workers are reachable, and this decode worker may not prefill "
        "(local_prefill is never); retry later"
    )


@in_loop
async def test_a_draining_prefill_worker_sends_its_requests_elsewhere() -> None:
    async with (
        prefill_worker() as first,
        prefill_worker(worker_id="prefill-1") as second,
        decode_worker(first, second) as decode,
        client_of(decode) as client,
    ):
        first.service.begin_drain()
        answer = await client.ask(PROMPT, prefill_worker="prefill-0")
        assert (answer.handoff.prefill_worker, answer.handoff.failed_handoffs) == ("prefill-1", 1)
        second.service.begin_drain()
        refused = await client.ask(PROMPT, prefill_worker="prefill-1", on_prefill_failure=FAIL)
        await until_idle(first, second, decode)
    assert refused.failure.message == "the hand-off failed: prefill-1 is draining; use another prefill worker"
    assert [answer.token_ids] == await local_tokens([PROMPT])


@in_loop
async def test_a_full_prefill_worker_sends_its_requests_elsewhere() -> None:
    async with (
        prefill_worker(max_requests=1) as first,
        prefill_worker(worker_id="prefill-1") as second,
        decode_worker(first, second) as decode,
        client_of(decode) as client,
    ):
        first.faults.hold()
        held = client.start(PROMPT, prefill_worker="prefill-0")
        await until_first_token(held)
        other = await client.ask(make_prompt(50), prefill_worker="prefill-0")
        assert (other.handoff.prefill_worker, other.handoff.failed_handoffs) == ("prefill-1", 1)
        first.faults.release()
        await held.ended()
        await until_idle(first, second, decode)
    assert (held.handoff.prefill_worker, held.handoff.failed_handoffs) == ("prefill-0", 0)


@in_loop
async def test_a_prefill_worker_that_leaves_with_kv_in_flight_costs_no_token() -> None:
    async with (
        prefill_worker() as leaver,
        decode_worker(leaver, local_prefill="auto") as decode,
        client_of(decode) as client,
    ):
        leaver.faults.hold()
        answer = client.start(PROMPT)
        await until_first_token(answer)
        await leaver.server.stop(grace_s=0)
        await answer.ended()
        leaver.faults.release()
        await until_idle(leaver, decode)
    assert [answer.token_ids] == await local_tokens([PROMPT])
    assert answer.handoff.failed_handoffs == 1


# Cancels


@in_loop
async def test_a_cancel_before_the_prompt_is_whole_ends_the_request() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = client.start(PROMPT[:50], num_prompt_tokens=100)
        client.cancel(answer)
        client.send(append_prompt=decode_pb2.AppendPrompt(request_id=answer.request_id, token_ids=PROMPT[50:]))
        await answer.ended()
        await until_idle(prefill, decode)
        assert decode.handoffs() == {}
    assert answer.last is not None
    assert answer.last.finish_reason == common_pb2.FINISH_REASON_CANCELLED


@in_loop
async def test_a_cancel_while_the_prefill_worker_has_not_begun_frees_everything() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = client.start(PROMPT)
        client.cancel(answer)
        await answer.ended()
        await until_idle(prefill, decode)
    assert answer.token_ids == []


@in_loop
async def test_a_cancel_while_bytes_are_moving_quarantines_until_they_have_stopped() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        prefill.faults.hold()
        answer = client.start(PROMPT)
        await until_counts(decode, lambda counts: counts.held_blocks == 7)
        await until_first_token(answer)
        client.cancel(answer)
        await answer.ended()
        counts = await decode.counts()
        assert (counts.held_blocks, counts.quarantined_blocks) == (0, 7)
        await until_idle(prefill)
        prefill.faults.release()
        await until_idle(decode)
        assert decode.handoffs() == {("pulling", "abandoned"): 1}


@in_loop
async def test_a_cancel_while_waiting_for_blocks_holds_nothing() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill, num_blocks=8) as decode, client_of(decode) as client:
        prefill.faults.hold()
        first = client.start(PROMPT)
        await until_counts(decode, lambda counts: counts.held_blocks == 7)
        second = client.start(make_prompt(90, seed=2))
        await until_first_token(second)
        client.cancel(second)
        await second.ended()
        prefill.faults.release()
        await first.ended()
        await until_idle(prefill, decode)
        assert decode.handoffs() == {("committed", "done"): 1, ("open", "abandoned"): 1}


@in_loop
async def test_a_cancel_while_generating_ends_the_stream() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = client.start(PROMPT, max_tokens=900)
        await answer.until(lambda answer: len(answer.tokens) >= 3)
        client.cancel(answer)
        await answer.ended()
        client.cancel(answer)  # too late: nothing happens
        await until_idle(prefill, decode)
    assert answer.last is not None
    assert answer.last.finish_reason == common_pb2.FINISH_REASON_CANCELLED


@in_loop
async def test_cancels_at_any_moment_leak_no_block() -> None:
    prompts = [make_prompt(40 + seed, seed=seed) for seed in range(30)]
    async with (
        prefill_worker(max_batch_tokens=32) as prefill,
        decode_worker(prefill, num_blocks=24) as decode,
        client_of(decode) as client,
    ):
        for number, prompt in enumerate(prompts):
            answer = client.start(prompt, max_tokens=50)
            for _ in range(number * 4):
                await asyncio.sleep(0)
            client.cancel(answer)
        await asyncio.gather(*(answer.ended() for answer in client.answers.values()))
        await until_idle(prefill, decode)


@in_loop
async def test_a_gateway_that_goes_away_takes_its_requests_with_it() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode:
        prefill.faults.hold()
        async with client_of(decode) as client:
            first = client.start(PROMPT)
            await until_first_token(first)
            client.start(make_prompt(10), num_prompt_tokens=50)
        await until_idle(prefill)
        prefill.faults.release()
        await until_idle(decode)
        assert decode.service.num_sessions() == 1  # the one to the prefill worker


@in_loop
async def test_a_decode_worker_that_goes_away_frees_its_blocks_at_the_prefill_worker() -> None:
    async with prefill_worker() as prefill:
        async with decode_worker(prefill, handoff_timeout_s=0.1) as decode, client_of(decode) as client:
            prefill.faults.hold()
            answer = client.start(PROMPT)
            await until_first_token(answer)
            assert (await prefill.counts()).held_blocks == 7
        await until_idle(prefill)
        await until(lambda: prefill.service.num_sessions() == 0)
