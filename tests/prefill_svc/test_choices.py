"""What a prefill worker sends of several choices and of a scored prompt, and what it refuses of them."""

from typing import Any

import pytest

from staffetta.v1 import common_pb2, prefill_pb2
from tests.handoff.cluster import make_prompt, make_sampling, prefill_worker, until_counts, until_idle
from tests.prefill_svc.test_servicer import blocks_of, reader_of
from tests.rpc.in_loop import in_loop
from worker import codec

PROMPT = make_prompt(40)


def drawn(**fields: Any) -> common_pb2.SamplingParams:
    return make_sampling(temperature=1.0, seed=5, logprobs=2, **fields)


def first_tokens_of(events: list[prefill_pb2.PrefillEvent]) -> list[common_pb2.Token]:
    (first_tokens,) = [event.first_tokens for event in events if event.HasField("first_tokens")]
    return list(first_tokens.tokens)


def positions_of(events: list[prefill_pb2.PrefillEvent]) -> list[int]:
    return [token.index for event in events for token in event.prompt_logprobs.tokens]


@in_loop
async def test_one_prefill_draws_the_first_token_of_every_choice() -> None:
    async with prefill_worker() as worker, reader_of(worker) as reader:
        handoff_id = await reader.start(PROMPT, sampling=drawn(n=16))
        events = await reader.until(handoff_id, "last", "first_tokens")
        tokens = first_tokens_of(events)
        assert [token.index for token in tokens] == [0] * 16
        assert len({token.token_id for token in tokens}) > 1
        assert len(blocks_of(events)) == 3
        counts = await worker.counts()
        assert (counts.held_blocks, counts.num_held) == (3, 1)
        await reader.release(handoff_id)
        await until_idle(worker)


@in_loop
async def test_a_restart_draws_for_its_own_choice() -> None:
    async with prefill_worker() as worker, reader_of(worker) as reader:
        tokens = [
            first_tokens_of(await reader.until(handoff_id, "first_tokens"))
            for handoff_id in [
                await reader.start(PROMPT, sampling=drawn(), first_token_index=2, choice_index=choice_index)
                for choice_index in (0, 1, 2, 3, 4, 5, 5)
            ]
        ]
        assert [token.index for (token,) in tokens] == [2] * 7
        assert len({token.token_id for (token,) in tokens}) > 1
        assert tokens[5] == tokens[6]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many": ({"sampling": drawn(n=17)}, "n is 17; allowed: 1 to 16"),
    "several at a restart": (
        {"sampling": drawn(n=2), "first_token_index": 2},
        "n is 2; allowed: 1 where first_token_index is not 0: a restart goes on with one choice",
    ),
    "one of several": ({"choice_index": 1}, "choice_index is 1; allowed: 0 where first_token_index is 0"),
}


@in_loop
async def test_choices_that_make_no_sense_are_refused_with_the_fix() -> None:
    async with prefill_worker() as worker, reader_of(worker) as reader:
        for fields, told in REFUSED.values():
            handoff_id = await reader.start(PROMPT, **fields)
            (event,) = await reader.until(handoff_id, "failed")
            assert (event.failed.reason, event.failed.message) == ("INVALID_REQUEST", told)
        await until_idle(worker)


@in_loop
async def test_a_worker_is_full_by_prompts_whatever_their_choices() -> None:
    async with prefill_worker(max_requests=2) as worker, reader_of(worker) as reader:
        held = [await reader.start(PROMPT, sampling=drawn(n=n)) for n in (16, 3)]
        for handoff_id in held:
            events = await reader.until(handoff_id, "last", "first_tokens")
        assert len(first_tokens_of(events)) == 3
        (event,) = await reader.until(await reader.start(PROMPT), "failed")
        assert (event.failed.reason, event.failed.is_retryable) == ("QUEUE_FULL", True)
        await reader.release(held[0])
        await until_counts(worker, lambda counts: counts.num_held == 1)
        await reader.until(await reader.start(PROMPT, sampling=drawn(n=2)), "last", "first_tokens")


@in_loop
async def test_a_prompt_that_is_not_whole_counts_as_well() -> None:
    async with prefill_worker(max_requests=1) as worker, reader_of(worker) as reader:
        await reader.start(PROMPT[:20], sampling=drawn(n=3), num_prompt_tokens=40)
        refused = await reader.start(PROMPT[:20], sampling=drawn(n=2), num_prompt_tokens=40)
        (event,) = await reader.until(refused, "failed")
        assert event.failed.message == "2 prompts would be held here, 1 may be; retry later"


# Log-probabilities of the prompt


@pytest.mark.parametrize("is_cached", [False, True], ids=["cold", "cached"])
def test_the_whole_prompt_is_scored_in_parts_before_the_first_tokens(
    is_cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    @in_loop
    async def run() -> None:
        async with prefill_worker(max_batch_tokens=16) as worker, reader_of(worker) as reader:
            if is_cached:
                first = await reader.start(PROMPT)
                await reader.until(first, "last", "first_tokens")
                await reader.release(first)
            handoff_id = await reader.start(PROMPT, sampling=make_sampling(prompt_logprobs=2))
            events = await reader.until(handoff_id, "last", "first_tokens")
            assert positions_of(events) == list(range(1, 40))
            tokens = [token for event in events for token in event.prompt_logprobs.tokens]
            assert [token.token_id for token in tokens] == PROMPT[1:]
            assert {len(token.top_logprobs) for token in tokens} == {2}
            kinds = [event.WhichOneof("event") for event in events]
            assert "prompt_logprobs" not in kinds[kinds.index("first_tokens") :]
            sizes = [len(event.prompt_logprobs.tokens) for event in events if event.HasField("prompt_logprobs")]
            assert sizes == [5, 5, 5, 1, 5, 5, 5, 1, 5, 2]  # steps of 16, 16 and 7, in parts of 5
            assert [block.block_index for block in blocks_of(events)] == [0, 1, 2]

    monkeypatch.setattr(codec, "PROMPT_TOKENS_PER_MESSAGE", 5)
    run()


@in_loop
async def test_a_prompt_is_not_scored_unless_that_is_asked_for() -> None:
    async with prefill_worker() as worker, reader_of(worker) as reader:
        events = await reader.until(await reader.start(PROMPT), "last", "first_tokens")
        assert positions_of(events) == []


@in_loop
async def test_a_scored_prompt_that_the_reader_holds_whole_moves_no_block() -> None:
    prompt = make_prompt(32)
    async with prefill_worker() as worker, reader_of(worker) as reader:
        handoff_id = await reader.start(prompt, num_held_tokens=32, sampling=make_sampling(prompt_logprobs=0))
        events = await reader.until(handoff_id, "last", "first_tokens")
        assert blocks_of(events) == []
        assert positions_of(events) == list(range(1, 32))
