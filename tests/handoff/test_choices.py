"""Several choices of one request: one prompt, one hand-off, and each goes on, pauses and ends on its own.

What a decode worker computes alone is the reference, bit for bit, log-probabilities included.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from decode_svc.main import DecodeService
from engine.request import RequestId, SampledToken, SequenceOutput, StepOutput
from staffetta.v1 import common_pb2, decode_pb2
from tests.handoff.cluster import (
    VOCAB_SIZE,
    Answer,
    Client,
    client_of,
    decode_worker,
    make_prompt,
    make_sampling,
    prefill_worker,
    until_counts,
    until_idle,
)
from tests.handoff.test_failures import outcomes
from tests.rpc.in_loop import in_loop, until

PROMPT = make_prompt(100, seed=1)
DRAWN = make_sampling(
    n=3,
    temperature=1.0,
    top_p=0.95,
    seed=11,
    max_tokens=12,
    logprobs=2,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=0.25,
)
FAIL = common_pb2.PREFILL_FAILURE_POLICY_FAIL
CANCELLED, LENGTH, STOP = (
    common_pb2.FINISH_REASON_CANCELLED,
    common_pb2.FINISH_REASON_LENGTH,
    common_pb2.FINISH_REASON_STOP,
)


def changed(sampling: common_pb2.SamplingParams, **fields: Any) -> common_pb2.SamplingParams:
    """`sampling` with other values in some fields."""
    other = common_pb2.SamplingParams(**fields)
    values = common_pb2.SamplingParams()
    values.CopyFrom(sampling)
    for name in fields:
        values.ClearField(name)  # type: ignore[arg-type]
    values.MergeFrom(other)
    return values


async def local_answer(
    prompt: Sequence[int] = PROMPT, sampling: common_pb2.SamplingParams = DRAWN, **fields: Any
) -> Answer:
    """What one worker alone answers."""
    async with decode_worker(local_prefill="auto") as decode, client_of(decode) as client:
        answer = await client.ask(prompt, sampling=sampling, **fields)
        await until_idle(decode)
    return answer


async def until_first_tokens(answer: Answer) -> None:
    await answer.until(lambda answer: all(answer.tokens_of.values()))


# The same tokens


@pytest.mark.parametrize("transport", ["loopback", "shm", "tcp"])
def test_a_hand_off_changes_no_bit_of_any_choice(transport: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @in_loop
    async def run() -> None:
        settings = {"transports": (transport,), "shm_dir": str(tmp_path_factory.mktemp("shm"))}
        async with (
            prefill_worker(**settings) as prefill,
            decode_worker(prefill, **settings) as decode,
            client_of(decode) as client,
        ):
            moved = [await client.ask(PROMPT[:length], sampling=DRAWN) for length in (1, 16, 37, 100)]
            assert {answer.handoff.transport for answer in moved} == {transport}
            await until_idle(prefill, decode)
        for length, answer in zip((1, 16, 37, 100), moved, strict=True):
            local = await local_answer(PROMPT[:length])
            assert answer.tokens_of == local.tokens_of
            assert [len(tokens) for tokens in answer.tokens_of.values()] == [12, 12, 12]
            assert len({tuple(ids) for ids in answer.all_token_ids}) == 3, "the choices are different ones"
            assert answer.finish_reasons == [LENGTH] * 3

    run()


@in_loop
async def test_a_choice_does_not_depend_on_how_many_others_there_are() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answers = [await client.ask(PROMPT, sampling=changed(DRAWN, n=n)) for n in (1, 2, 5, 16)]
        await until_idle(prefill, decode)
    for answer in answers[:-1]:
        assert answer.tokens_of.items() <= answers[-1].tokens_of.items()


@in_loop
async def test_penalties_change_tokens_and_a_hand_off_does_not() -> None:
    plain = make_sampling(max_tokens=20)
    penalised = changed(plain, repetition_penalty=2.0, frequency_penalty=2.0)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        moved = [await client.ask(PROMPT, sampling=sampling) for sampling in (plain, penalised)]
        await until_idle(prefill, decode)
    assert moved[0].token_ids != moved[1].token_ids
    assert moved[1].token_ids == (await local_answer(sampling=penalised)).token_ids


@in_loop
async def test_the_prompt_moves_once_for_all_choices() -> None:
    reports: list[common_pb2.HandoffReport] = []
    for n in (1, 4):
        async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
            answer = await client.ask(PROMPT, sampling=changed(DRAWN, n=n))
            await until_idle(prefill, decode)
            assert decode.handoffs() == {("committed", "done"): 1}
            page_bytes = decode.host.rank.layout.page_bytes
            assert len({event.summary.handoff.SerializeToString() for event in answer.endings.values()}) == 1
            reports.append(answer.handoff)
    assert reports[0] == reports[1]
    assert (reports[1].handoff_blocks, reports[1].handoff_bytes) == (7, 7 * page_bytes)
    assert (reports[1].prefill_worker, reports[1].locally_prefilled_tokens) == ("prefill-0", 0)


@in_loop
async def test_choices_that_preempt_each_other_keep_their_tokens() -> None:
    sampling = changed(DRAWN, max_tokens=60, n=4)
    expected = await local_answer(sampling=sampling)
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill, num_blocks=16) as decode,
        client_of(decode) as client,
    ):
        answer = await client.ask(PROMPT, sampling=sampling)
        await until_idle(prefill, decode)
    assert sum(event.summary.num_preemptions for event in answer.endings.values()) > 0
    assert answer.tokens_of == expected.tokens_of


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_restarted_choice_goes_on_with_the_same_tokens(num_tokens: int) -> None:
    @in_loop
    async def run() -> None:
        async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
            whole = await client.ask(PROMPT, sampling=DRAWN)
            for choice_index in (0, 2):
                tokens = whole.tokens_of[choice_index]
                rest = await client.ask(
                    [*PROMPT, *(token.token_id for token in tokens[:num_tokens])],
                    sampling=changed(DRAWN, n=1),
                    first_token_index=num_tokens,
                    choice_index=choice_index,
                )
                assert rest.tokens_of == {choice_index: tokens[num_tokens:]}
            await until_idle(prefill, decode)
            assert decode.handoffs() == {("committed", "done"): 3}

    run()


# Endings


@in_loop
async def test_a_choice_that_ends_with_its_first_token_ends_alone() -> None:
    free = await local_answer()
    first = free.all_token_ids[1][0]
    assert [ids[0] == first for ids in free.all_token_ids] == [False, True, False]
    sampling = changed(DRAWN, stop_token_ids=[first])
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        prefill.faults.hold()
        answer = client.start(PROMPT, sampling=sampling)
        await answer.until(lambda answer: 1 in answer.endings)  # while the others wait for their KV
        assert answer.endings[1].finish_reason == STOP
        assert answer.endings[1].summary.handoff.prefill_worker == "prefill-0"
        assert answer.endings.keys() == {1}
        prefill.faults.release()
        await answer.ended()
        await until_idle(prefill, decode)
    local = await local_answer(sampling=sampling)
    assert answer.tokens_of == local.tokens_of
    assert answer.finish_reasons == local.finish_reasons
    assert answer.all_token_ids[1] == [first]


@in_loop
async def test_choices_of_one_token_need_no_bytes() -> None:
    sampling = changed(DRAWN, max_tokens=1)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = await client.ask(PROMPT, sampling=sampling)
        await until_idle(prefill, decode)
        assert sum(count for (_, outcome), count in decode.handoffs().items() if outcome == "done") == 1
    assert answer.tokens_of == (await local_answer(sampling=sampling)).tokens_of
    assert answer.finish_reasons == [LENGTH] * 3
    assert answer.handoff.prefill_worker == "prefill-0"


@in_loop
async def test_a_request_that_is_refused_ends_every_choice() -> None:
    async with decode_worker() as decode, client_of(decode) as client:
        nobody = await client.ask(PROMPT, sampling=DRAWN)
        unknown = await client.ask((), sampling=DRAWN, token_ids=[10**6], num_prompt_tokens=1)
        await until_idle(decode)
    assert {event.failure.reason for event in nobody.endings.values()} == {"HANDOFF_FAILED"}
    assert {event.failure.reason for event in unknown.endings.values()} == {"INVALID_REQUEST"}
    assert sorted(nobody.endings) == sorted(unknown.endings) == [0, 1, 2]


@in_loop
async def test_a_restart_of_several_choices_is_refused() -> None:
    async with decode_worker(local_prefill="auto") as decode, client_of(decode) as client:
        answer = await client.ask(PROMPT, sampling=DRAWN, first_token_index=2, choice_index=1)
        assert (answer.failure.reason, sorted(answer.endings)) == ("INVALID_REQUEST", [1])
        assert answer.failure.message.startswith("n is 3; allowed: 1 where first_token_index is not 0")
        await until_idle(decode)


@in_loop
async def test_a_worker_is_full_by_choices() -> None:
    async with (
        decode_worker(local_prefill="auto", max_requests=4) as decode,
        client_of(decode) as client,
    ):
        held = client.start(PROMPT, sampling=changed(DRAWN, max_tokens=900))
        refused = await client.ask(PROMPT, sampling=changed(DRAWN, n=2))
        assert {event.failure.reason for event in refused.endings.values()} == {"QUEUE_FULL"}
        assert len(refused.endings) == 2
        await client.ask(PROMPT)
        client.cancel(held)
        await held.ended()
        await client.ask(PROMPT, sampling=changed(DRAWN, n=4))
        await until_idle(decode)


@in_loop
async def test_choices_whose_prompt_is_not_whole_count_as_well() -> None:
    async with decode_worker(local_prefill="auto", max_requests=4) as decode, client_of(decode) as client:
        held = client.start(PROMPT[:50], sampling=DRAWN, num_prompt_tokens=100)
        refused = await client.ask(PROMPT[:50], sampling=changed(DRAWN, n=2), num_prompt_tokens=100)
        assert refused.failure.message == "5 choices would be held here, 4 may be; retry later"
        client.cancel(held)
        await held.ended()
        await until_idle(decode)


# Credit


@in_loop
async def test_credit_is_each_choices_own() -> None:
    expected = await local_answer()
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = client.start(PROMPT, sampling=DRAWN, credit=3)
        await answer.until(lambda answer: all(len(tokens) == 3 for tokens in answer.tokens_of.values()))
        client.send(grant=decode_pb2.Grant(request_id=answer.request_id, choice_index=1, tokens=4))
        client.send(grant=decode_pb2.Grant(request_id=answer.request_id, choice_index=7, tokens=4))  # there is none
        await answer.until(lambda answer: len(answer.tokens_of[1]) == 7)
        await client.ask(make_prompt(20, seed=9))  # many steps later
        assert [len(tokens) for tokens in answer.tokens_of.values()] == [3, 7, 3]
        for choice_index in range(3):
            client.send(grant=decode_pb2.Grant(request_id=answer.request_id, choice_index=choice_index, tokens=100))
        await answer.ended()
        await until_idle(prefill, decode)
    assert answer.tokens_of == expected.tokens_of


# Failures


@in_loop
async def test_a_hand_off_that_fails_before_the_first_tokens_changes_none() -> None:
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill, local_prefill="auto") as decode,
        client_of(decode) as client,
    ):
        prefill.service.begin_drain()
        answer = await client.ask(PROMPT, sampling=DRAWN)
        await until_idle(prefill, decode)
        assert decode.handoffs() == {("open", "failed"): 1}
    assert answer.tokens_of == (await local_answer()).tokens_of
    assert {event.summary.handoff.failed_handoffs for event in answer.endings.values()} == {1}
    assert {event.summary.handoff.prefill_worker for event in answer.endings.values()} == {""}


@in_loop
async def test_a_hand_off_that_fails_after_the_first_tokens_sends_none_twice() -> None:
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill, local_prefill="auto") as decode,
        client_of(decode) as client,
    ):
        prefill.faults.hold()
        answer = client.start(PROMPT, sampling=DRAWN)
        await until_first_tokens(answer)
        await prefill.server.stop(grace_s=0)
        await answer.ended()
        prefill.faults.release()
        await until_idle(prefill, decode)
        assert outcomes(decode) == {"failed": 1}
    assert answer.tokens_of == (await local_answer()).tokens_of
    assert answer.handoff.locally_prefilled_tokens == 100


@in_loop
async def test_a_corrupt_block_and_a_second_worker_change_no_choice() -> None:
    async with (
        prefill_worker() as first,
        prefill_worker(worker_id="prefill-1") as second,
        decode_worker(first, second) as decode,
        client_of(decode) as client,
    ):
        first.faults.flips.append((3, 12345))
        answer = await client.ask(PROMPT, sampling=DRAWN, prefill_worker="prefill-0")
        await until_idle(first, second, decode)
    assert answer.tokens_of == (await local_answer()).tokens_of
    assert (answer.handoff.prefill_worker, answer.handoff.failed_handoffs) == ("prefill-1", 1)


@in_loop
async def test_a_choice_that_had_ended_stays_so_when_the_hand_off_fails() -> None:
    first = (await local_answer()).all_token_ids[1][0]
    sampling = changed(DRAWN, stop_token_ids=[first])
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill, local_prefill="auto") as decode,
        client_of(decode) as client,
    ):
        prefill.faults.hold()
        answer = client.start(PROMPT, sampling=sampling)
        await answer.until(lambda answer: 1 in answer.endings)
        await prefill.server.stop(grace_s=0)
        await answer.ended()
        prefill.faults.release()
        await until_idle(prefill, decode)
    assert answer.tokens_of == (await local_answer(sampling=sampling)).tokens_of


@in_loop
async def test_a_failed_hand_off_ends_every_choice_when_none_may_recover() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        prefill.faults.num_failures = 1
        answer = await client.ask(PROMPT, sampling=DRAWN, on_prefill_failure=FAIL)
        await until_idle(prefill, decode)
    assert {event.failure.reason for event in answer.endings.values()} == {"HANDOFF_FAILED"}
    assert sorted(answer.endings) == [0, 1, 2]


@in_loop
async def test_another_first_token_than_the_hand_off_brought_ends_every_choice_and_frees_every_block() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        prefill.faults.hold()
        answer = client.start(PROMPT, sampling=DRAWN, credit=2)  # not cancelled, it would wait for more for ever
        await until_first_tokens(answer)
        drawn = SampledToken(0, (answer.tokens_of[1][0].token_id + 1) % VOCAB_SIZE)
        news = SequenceOutput(RequestId(answer.request_id), 1, tokens=(drawn,))
        cast(DecodeService, decode.service)._servicer.on_output(StepOutput(1, (news,)))
        await answer.ended()
        prefill.faults.release()
        await until_idle(prefill, decode)
    assert [event.failure.reason for event in answer.endings.values()] == ["HANDOFF_FAILED"] * 3
    assert [len(tokens) for tokens in answer.tokens_of.values()] == [1, 1, 1]


# Cancels


async def cancelled(client: Client, answer: Answer) -> None:
    """Cancels a request and sees every choice end by it."""
    client.cancel(answer)
    await answer.ended()
    assert set(answer.finish_reasons) == {CANCELLED}


@in_loop
async def test_a_cancel_at_each_stage_ends_every_choice_and_frees_every_block() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        in_parts = client.start(PROMPT[:50], sampling=DRAWN, num_prompt_tokens=100)
        await cancelled(client, in_parts)
        await cancelled(client, client.start(PROMPT, sampling=DRAWN))  # the prefill worker has hardly heard of it
        prefill.faults.hold()
        moving = client.start(PROMPT, sampling=DRAWN)
        await until_counts(decode, lambda counts: counts.held_blocks == 7)
        await until_first_tokens(moving)
        await cancelled(client, moving)
        prefill.faults.release()
        await until_idle(prefill, decode)
        running = client.start(PROMPT, sampling=changed(DRAWN, max_tokens=900))
        await running.until(lambda answer: all(len(tokens) >= 3 for tokens in answer.tokens_of.values()))
        await cancelled(client, running)
        client.cancel(running)  # too late: nothing happens
        await until_idle(prefill, decode)


@in_loop
async def test_a_cancel_after_one_choice_has_ended_ends_the_others() -> None:
    first = (await local_answer()).all_token_ids[1][0]
    sampling = changed(DRAWN, stop_token_ids=[first], max_tokens=900)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = client.start(PROMPT, sampling=sampling)
        await answer.until(lambda answer: len(answer.tokens_of[0]) > 3 and 1 in answer.endings)
        client.cancel(answer)
        await answer.ended()
        await until_idle(prefill, decode)
    assert answer.endings[1].finish_reason == STOP
    assert answer.endings[0].finish_reason == CANCELLED


@in_loop
async def test_cancels_at_any_moment_leak_no_block() -> None:
    async with (
        prefill_worker(max_batch_tokens=32) as prefill,
        decode_worker(prefill, num_blocks=24) as decode,
        client_of(decode) as client,
    ):
        for number in range(24):
            prompt = make_prompt(40 + number, seed=number)
            answer = client.start(prompt, sampling=changed(DRAWN, n=1 + number % 4, max_tokens=50))
            for _ in range(number * 4):
                await asyncio.sleep(0)
            client.cancel(answer)
        await asyncio.gather(*(answer.ended() for answer in client.answers.values()))
        await until_idle(prefill, decode)


@in_loop
async def test_a_gateway_that_goes_away_takes_every_choice_with_it() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode:
        async with client_of(decode) as client:
            answer = client.start(PROMPT, sampling=changed(DRAWN, max_tokens=900))
            await until_first_tokens(answer)
        await until(lambda: decode.service.num_requests() == 0)
        await until_idle(prefill, decode)
