"""Log-probabilities of a prompt: each position once and in order, with the same bits whoever computes it."""

from collections.abc import Sequence

import pytest

from staffetta.v1 import common_pb2
from tests.handoff.cluster import (
    Answer,
    client_of,
    decode_worker,
    make_prompt,
    make_sampling,
    prefill_worker,
    until_idle,
)
from tests.rpc.in_loop import in_loop
from worker import codec

PROMPT = make_prompt(100, seed=1)
SCORED = make_sampling(prompt_logprobs=3)
LENGTHS = (2, 16, 17, 33, 100)


async def local_answer(prompt: Sequence[int] = PROMPT, sampling: common_pb2.SamplingParams = SCORED) -> Answer:
    """What one worker alone answers, in one piece."""
    async with decode_worker(local_prefill="auto") as decode, client_of(decode) as client:
        answer = await client.ask(prompt, sampling=sampling)
        await until_idle(decode)
    assert [token.token_id for token in answer.prompt_tokens] == list(prompt[1:])
    assert all(len(token.top_logprobs) == sampling.prompt_logprobs for token in answer.prompt_tokens)
    return answer


def assert_equal(answer: Answer, expected: Answer) -> None:
    """Every position, alternative and generated token, bit for bit; none missing and none twice."""
    assert answer.prompt_tokens == expected.prompt_tokens
    assert answer.tokens_of == expected.tokens_of


@pytest.mark.parametrize("transport", ["loopback", "shm", "tcp"])
def test_a_hand_off_changes_no_bit(transport: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @in_loop
    async def run() -> None:
        settings = {"transports": (transport,), "shm_dir": str(tmp_path_factory.mktemp("shm"))}
        async with (
            prefill_worker(max_batch_tokens=24, **settings) as prefill,
            decode_worker(prefill, **settings) as decode,
            client_of(decode) as client,
        ):
            answers = [await client.ask(PROMPT[:length], sampling=SCORED) for length in LENGTHS]
            await until_idle(prefill, decode)
            assert decode.handoffs() == {("committed", "done"): len(LENGTHS)}
        for length, answer in zip(LENGTHS, answers, strict=True):
            assert_equal(answer, await local_answer(PROMPT[:length]))
            assert answer.handoff.locally_prefilled_tokens == 0

    run()


@in_loop
async def test_scoring_a_prompt_changes_no_generated_token() -> None:
    plain = make_sampling(logprobs=2)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        unscored = await client.ask(PROMPT, sampling=plain)
        scored = await client.ask(PROMPT, sampling=make_sampling(logprobs=2, prompt_logprobs=0))
        await until_idle(prefill, decode)
    assert scored.tokens_of == unscored.tokens_of
    assert unscored.prompt_tokens == []


@in_loop
async def test_a_prompt_of_one_token_has_none() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = await client.ask([7], sampling=SCORED)
        await until_idle(prefill, decode)
    assert answer.prompt_tokens == []
    assert_equal(answer, await local_answer([7]))


@in_loop
async def test_they_are_computed_though_both_sides_hold_the_prefix() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        await client.ask(PROMPT)
        answer = await client.ask(PROMPT, sampling=SCORED)
        again = await client.ask(PROMPT)
        await until_idle(prefill, decode)
        assert decode.handoffs() == {("committed", "done"): 3}
    expected = await local_answer()
    assert_equal(answer, expected)
    assert answer.handoff.prefill_cached_tokens == 0  # the prompt was computed from its first token on
    assert (again.handoff.prefill_cached_tokens, again.token_ids) == (96, expected.token_ids)


@in_loop
async def test_they_are_sent_once_for_all_choices() -> None:
    sampling = make_sampling(n=3, temperature=1.0, prompt_logprobs=1)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = await client.ask(PROMPT, sampling=sampling)
        await until_idle(prefill, decode)
    assert_equal(answer, await local_answer(sampling=sampling))
    assert len(answer.prompt_tokens) == 99


@in_loop
async def test_a_long_prompt_comes_in_many_parts_on_both_legs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "PROMPT_TOKENS_PER_MESSAGE", 7)
    prompt = make_prompt(200, seed=4)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = await client.ask(prompt, sampling=SCORED)
        await until_idle(prefill, decode)
    monkeypatch.undo()
    assert_equal(answer, await local_answer(prompt))


@in_loop
async def test_a_thousand_positions_with_all_alternatives_stay_below_the_bound_of_a_message() -> None:
    prompt = make_prompt(1000, seed=2)
    sampling = make_sampling(prompt_logprobs=20, max_tokens=1)
    async with (
        prefill_worker(max_batch_tokens=1024) as prefill,
        decode_worker(prefill) as decode,
        client_of(decode) as client,
    ):
        answer = await client.ask(prompt, sampling=sampling)
        await until_idle(prefill, decode)
    assert [token.index for token in answer.prompt_tokens] == list(range(1, 1000))
    assert {len(token.top_logprobs) for token in answer.prompt_tokens} == {20}


# Failures


@pytest.mark.parametrize("num_scored", [1, 99], ids=["in the middle", "all scored"])
def test_a_hand_off_that_dies_costs_no_position_and_repeats_none(num_scored: int) -> None:
    @in_loop
    async def run() -> None:
        async with (
            prefill_worker(max_batch_tokens=16) as prefill,
            decode_worker(prefill, local_prefill="auto") as decode,
            client_of(decode) as client,
        ):
            prefill.faults.hold()
            answer = client.start(PROMPT, sampling=SCORED)
            await answer.until(lambda answer: len(answer.prompt_tokens) >= num_scored)
            await prefill.server.stop(grace_s=0)
            await answer.ended()
            prefill.faults.release()
            await until_idle(prefill, decode)
        assert answer.handoff.failed_handoffs == 1
        assert answer.handoff.locally_prefilled_tokens == 100
        assert_equal(answer, await local_answer())

    run()


@in_loop
async def test_a_second_prefill_worker_goes_on_where_the_client_is() -> None:
    async with (
        prefill_worker() as first,
        prefill_worker(worker_id="prefill-1", max_batch_tokens=16) as second,
        decode_worker(first, second) as decode,
        client_of(decode) as client,
    ):
        first.faults.num_failures = 1
        answer = await client.ask(PROMPT, sampling=SCORED, prefill_worker="prefill-0")
        await until_idle(first, second, decode)
    assert_equal(answer, await local_answer())
    assert (answer.handoff.prefill_worker, answer.handoff.failed_handoffs) == ("prefill-1", 1)


@in_loop
async def test_preemption_repeats_no_position() -> None:
    sampling = make_sampling(prompt_logprobs=1, max_tokens=60)
    prompts = [make_prompt(60, seed=seed) for seed in range(3)]
    async with (
        prefill_worker() as prefill,
        decode_worker(prefill, num_blocks=12) as decode,
        client_of(decode) as client,
    ):
        answers = [client.start(prompt, sampling=sampling) for prompt in prompts]
        for answer in answers:
            await answer.ended()
        await until_idle(prefill, decode)
    assert sum(answer.endings[0].summary.num_preemptions for answer in answers) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_equal(answer, await local_answer(prompt, sampling))


@in_loop
async def test_a_cancel_while_the_prompt_is_scored_frees_everything() -> None:
    async with (
        prefill_worker(max_batch_tokens=16) as prefill,
        decode_worker(prefill) as decode,
        client_of(decode) as client,
    ):
        answer = client.start(PROMPT, sampling=make_sampling(prompt_logprobs=0, n=2))
        await answer.until(lambda answer: len(answer.prompt_tokens) > 0)
        client.cancel(answer)
        await answer.ended()
        await until_idle(prefill, decode)


@in_loop
async def test_what_was_generated_before_a_restart_is_not_scored() -> None:
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        whole = await client.ask(PROMPT, sampling=SCORED)
        rest = await client.ask(PROMPT + whole.token_ids[:4], sampling=SCORED, first_token_index=4)
        await until_idle(prefill, decode)
    assert rest.prompt_tokens == whole.prompt_tokens
    assert rest.tokens == whole.tokens[4:]
