"""Prefill here or there: the tokens are the same, and no more bytes move than must."""

from collections.abc import Sequence

import pytest

from staffetta.rpc import session
from staffetta.v1 import common_pb2
from tests.handoff.cluster import (
    Answer,
    RunningWorker,
    client_of,
    decode_worker,
    make_prompt,
    prefill_worker,
    until_idle,
)
from tests.rpc.in_loop import in_loop

BLOCK = 16
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 100, 127, 128, 129, 199, 200)


async def answers_of(decode: RunningWorker, prompts: Sequence[list[int]]) -> list[Answer]:
    """What a decode worker answers to prompts asked all at once."""
    async with client_of(decode) as client:
        asked = [client.start(prompt) for prompt in prompts]
        return [await answer.ended() for answer in asked]


async def local_tokens(prompts: Sequence[list[int]]) -> list[list[int]]:
    """What one worker alone generates, each prompt on its own."""
    tokens: list[list[int]] = []
    async with decode_worker(local_prefill="auto", prefix_caching=False) as decode, client_of(decode) as client:
        for prompt in prompts:
            answer = await client.ask(prompt)
            assert answer.handoff.prefill_worker == ""
            assert answer.handoff.locally_prefilled_tokens == len(prompt)
            tokens.append(answer.token_ids)
    return tokens


@in_loop
async def test_a_hand_off_changes_no_token_for_any_length_of_prompt() -> None:
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    expected = await local_tokens(prompts)
    async with prefill_worker(num_blocks=128) as prefill, decode_worker(prefill, num_blocks=128) as decode:
        answers = await answers_of(decode, prompts)
        await until_idle(prefill, decode)
        assert decode.handoffs() == {("committed", "done"): len(LENGTHS)}
    assert [answer.token_ids for answer in answers] == expected
    page_bytes = decode.host.rank.layout.page_bytes
    for length, answer in zip(LENGTHS, answers, strict=True):
        num_blocks = -(-length // BLOCK)
        assert answer.handoff == common_pb2.HandoffReport(
            prefill_worker="prefill-0",
            decode_worker="decode-0",
            transport="loopback",
            handoff_bytes=num_blocks * page_bytes,
            handoff_blocks=num_blocks,
        )


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_transport_between_processes_changes_no_token(
    transport: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @in_loop
    async def run() -> None:
        settings = {"transports": (transport,), "shm_dir": str(tmp_path_factory.mktemp("shm"))}
        prompts = [make_prompt(length, seed=length) for length in (1, 16, 33, 200)]
        async with prefill_worker(**settings) as prefill, decode_worker(prefill, **settings) as decode:
            answers = await answers_of(decode, prompts)
            assert {answer.handoff.transport for answer in answers} == {transport}
            await until_idle(prefill, decode)
        assert [answer.token_ids for answer in answers] == await local_tokens(prompts)

    run()


@in_loop
async def test_a_prefix_that_is_here_already_does_not_move() -> None:
    common = make_prompt(64, seed=5)
    prompts = [common + make_prompt(20, seed=1), common + make_prompt(30, seed=2)]
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answers = [await client.ask(prompt) for prompt in prompts]
        await until_idle(prefill, decode)
    assert [answer.handoff.handoff_blocks for answer in answers] == [6, 2]
    page_bytes = decode.host.rank.layout.page_bytes
    assert [answer.handoff.handoff_bytes for answer in answers] == [6 * page_bytes, 2 * page_bytes]
    assert [answer.handoff.prefill_cached_tokens for answer in answers] == [0, 64]
    assert [answer.token_ids for answer in answers] == await local_tokens(prompts)


@pytest.mark.parametrize("num_tokens", [16, 64, 65, 79])
def test_a_prompt_asked_twice_moves_only_what_is_not_in_a_full_block(num_tokens: int) -> None:
    @in_loop
    async def run() -> None:
        prompt = make_prompt(num_tokens, seed=3)
        async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
            answers = [await client.ask(prompt) for _ in range(3)]
            await until_idle(prefill, decode)
            assert decode.handoffs() == {("committed", "done"): 3}
        num_rest = 1 if num_tokens % BLOCK else 0
        assert [answer.handoff.handoff_blocks for answer in answers] == [-(-num_tokens // BLOCK), num_rest, num_rest]
        assert [answer.handoff.prefill_worker for answer in answers] == ["prefill-0"] * 3
        assert [answer.token_ids for answer in answers] == await local_tokens([prompt]) * 3

    run()


@in_loop
async def test_a_chat_goes_on_where_its_last_turn_ended() -> None:
    prompt = make_prompt(30, seed=8)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        first = await client.ask(prompt, max_tokens=40)
        turn = prompt + first.token_ids + make_prompt(5, seed=9)
        second = await client.ask(turn)
        await until_idle(prefill, decode)
    # 75 tokens in 5 blocks; the first 4 (30 + 39 computed tokens) are here from the turn before.
    assert second.handoff.handoff_blocks == 1
    assert [second.token_ids] == await local_tokens([turn])


@in_loop
async def test_a_request_of_one_token_needs_no_bytes() -> None:
    prompt = make_prompt(40)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answer = await client.ask(prompt, max_tokens=1)
        await until_idle(prefill, decode)
        assert sum(count for (_, outcome), count in decode.handoffs().items() if outcome == "done") == 1
    assert [answer.token_ids] == [tokens[:1] for tokens in await local_tokens([prompt])]
    assert answer.handoff.prefill_worker == "prefill-0"
    assert answer.last is not None
    assert answer.last.finish_reason == common_pb2.FINISH_REASON_LENGTH


@in_loop
async def test_a_resumed_request_goes_on_with_the_next_index() -> None:
    prompt = make_prompt(37)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        whole = await client.ask(prompt)
        rest = await client.ask(prompt + whole.token_ids[:4], first_token_index=4)
        await until_idle(prefill, decode)
    assert [(t.index, t.token_id) for t in rest.tokens] == list(enumerate(whole.token_ids))[4:]


@in_loop
async def test_tenants_share_no_block() -> None:
    prompt = make_prompt(64)
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        answers = [await client.ask(prompt, cache_salt=salt) for salt in (b"a", b"b", b"a")]
        await until_idle(prefill, decode)
    assert [answer.handoff.handoff_blocks for answer in answers] == [4, 4, 0]
    assert [answer.handoff.prefill_cached_tokens for answer in answers] == [0, 0, 48]
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids


@in_loop
async def test_log_probabilities_of_a_hand_off_are_those_of_one_worker() -> None:
    prompt = make_prompt(50)
    sampling = common_pb2.SamplingParams(
        temperature=0.9, top_p=0.9, top_k=30, seed=11, max_tokens=5, logprobs=4, ignore_eos=True
    )
    async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
        moved = await client.ask(prompt, sampling=sampling)
    async with decode_worker(local_prefill="auto") as decode, client_of(decode) as client:
        local = await client.ask(prompt, sampling=sampling)
    assert moved.tokens == local.tokens
    assert [len(token.top_logprobs) for token in moved.tokens] == [4] * 5


@in_loop
async def test_a_prompt_in_many_parts_is_put_together_on_both_legs() -> None:
    prompt = make_prompt(200, seed=4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session, "TOKEN_IDS_PER_MESSAGE", 7)
        async with prefill_worker() as prefill, decode_worker(prefill) as decode, client_of(decode) as client:
            answer = await client.ask(prompt)
            await until_idle(prefill, decode)
    assert [answer.token_ids] == await local_tokens([prompt])


@in_loop
async def test_many_requests_share_a_pool_that_holds_only_a_few() -> None:
    prompts = [make_prompt(60 + seed, seed=seed) for seed in range(12)]
    async with prefill_worker(num_blocks=12) as prefill, decode_worker(prefill, num_blocks=12) as decode:
        answers = await answers_of(decode, prompts)
        await until_idle(prefill, decode)
    assert [answer.token_ids for answer in answers] == await local_tokens(prompts)


@in_loop
async def test_a_short_prompt_is_computed_here_when_that_is_allowed() -> None:
    prompts = [make_prompt(16, seed=1), make_prompt(17, seed=2)]
    async with prefill_worker() as prefill, decode_worker(prefill, local_prefill="auto") as decode:
        answers = await answers_of(decode, prompts)
        await until_idle(prefill, decode)
    assert [answer.handoff.prefill_worker for answer in answers] == ["", "prefill-0"]
    assert [answer.handoff.locally_prefilled_tokens for answer in answers] == [16, 0]
