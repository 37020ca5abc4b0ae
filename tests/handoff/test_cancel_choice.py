"""A gateway cancels one choice of a request, in whatever phase: it ends, its blocks are free, the others go on."""

import asyncio

from staffetta.v1 import decode_pb2
from tests.handoff.cluster import Answer, Client, client_of, decode_worker, make_prompt, prefill_worker, until_idle
from tests.handoff.test_choices import CANCELLED, DRAWN, LENGTH, PROMPT, changed, local_answer, until_first_tokens
from tests.rpc.in_loop import in_loop


def cancel_choice(client: Client, answer: Answer, choice_index: int) -> None:
    client.send(cancel=decode_pb2.CancelRequest(request_id=answer.request_id, choice_index=choice_index))


@in_loop
async def test_a_cancelled_choice_ends_alone_with_its_summary() -> None:
    expected = await local_answer()
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = client.start(PROMPT, sampling=DRAWN, credit=3)
        await until_first_tokens(answer)
        cancel_choice(client, answer, 1)
        cancel_choice(client, answer, 7)  # there is none
        await answer.until(lambda answer: 1 in answer.endings)
        assert list(answer.endings) == [1]
        for choice_index in (0, 2):
            client.send(grant=decode_pb2.Grant(request_id=answer.request_id, choice_index=choice_index, tokens=100))
        await answer.ended()
        await until_idle(prefill, decode)
    assert answer.finish_reasons == [LENGTH, CANCELLED, LENGTH]
    assert answer.endings[1].summary.handoff.prefill_worker == "prefill-0"
    for choice_index in (0, 2):
        assert answer.tokens_of[choice_index] == expected.tokens_of[choice_index]
    assert answer.tokens_of[1] == expected.tokens_of[1][: len(answer.tokens_of[1])]


@in_loop
async def test_choices_that_are_cancelled_before_the_prompt_is_whole_end_once_it_is() -> None:
    expected = await local_answer()
    async with decode_worker(local_prefill="auto") as decode, client_of(decode) as client:
        answer = client.start(PROMPT[:50], sampling=DRAWN, num_prompt_tokens=100)
        for choice_index in (1, 1, 7):
            cancel_choice(client, answer, choice_index)
        rest = decode_pb2.AppendPrompt(request_id=answer.request_id, token_ids=PROMPT[50:])
        client.send(append_prompt=rest)
        await answer.ended()
        assert answer.finish_reasons == [LENGTH, CANCELLED, LENGTH]
        assert {index: answer.tokens_of[index] for index in (0, 2)} == {
            index: expected.tokens_of[index] for index in (0, 2)
        }
        all_cancelled = client.start(PROMPT[:50], sampling=DRAWN, num_prompt_tokens=100)
        for choice_index in range(3):
            cancel_choice(client, all_cancelled, choice_index)
        assert (await all_cancelled.ended()).finish_reasons == [CANCELLED] * 3
        await until_idle(decode)


@in_loop
async def test_a_choice_cancelled_at_any_moment_leaks_no_block_and_changes_no_other() -> None:
    sampling = changed(DRAWN, n=4)
    expected = await local_answer(sampling=sampling)
    async with (
        prefill_worker(max_batch_tokens=32) as prefill,
        decode_worker(prefill, num_blocks=24) as decode,
        client_of(decode) as client,
    ):
        answers: list[Answer] = []
        for number in range(24):
            answer = client.start(PROMPT, sampling=sampling)
            for _ in range(number * 4):
                await asyncio.sleep(0)
            cancel_choice(client, answer, number % 4)
            answers.append(answer)
        await asyncio.gather(*(answer.ended() for answer in answers))
        await until_idle(prefill, decode)
    for number, answer in enumerate(answers):
        cut = answer.tokens_of[number % 4]
        assert cut == expected.tokens_of[number % 4][: len(cut)]
        for choice_index in set(range(4)) - {number % 4}:
            assert answer.tokens_of[choice_index] == expected.tokens_of[choice_index]
    assert {answer.finish_reasons[number % 4] for number, answer in enumerate(answers)} <= {CANCELLED, LENGTH}


@in_loop
async def test_more_choices_than_a_worker_ever_holds_are_not_to_be_sent_again() -> None:
    async with decode_worker(local_prefill="auto", max_requests=2) as decode, client_of(decode) as client:
        refused = await client.ask(make_prompt(20), sampling=DRAWN)
        assert (refused.failure.reason, len(refused.endings)) == ("INVALID_REQUEST", 3)
        assert refused.failure.message == "n is 3 and this worker holds at most 2 choices; lower it"
        await until_idle(decode)
