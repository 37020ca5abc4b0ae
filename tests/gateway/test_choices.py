"""Several choices of one request as clients of both doors read them: order, shapes, counts, and why each ended."""

import dataclasses
from typing import Any

import grpc.aio
import openai
import pytest

from gateway.model import SamplingDefaults
from gateway.prepare import prepare
from gateway.request import JourneyRequest, TextPrompt
from staffetta.v1 import common_pb2
from staffetta.validate import Sampling
from tests.gateway.running import asynchronous, demo_model, generate, ids_of, play, running
from tests.gateway.test_rest import CHAT, HI, PLAIN, client_of, events_of

A, B, C = (ids_of(letter)[0] for letter in "abc")
LENGTH, STOP = common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_STOP


@asynchronous
async def test_the_real_client_reads_three_choices_whole() -> None:
    async with running() as it, client_of(it) as client:
        play(it.worker, "one", "two two", "three")
        chat = await client.chat.completions.create(model="demo", messages=HI, n=3, seed=4)
        plain = await client.completions.create(model="demo", prompt="x", n=3, max_tokens=50)
        starts = [await it.worker.starts.get() for _ in range(2)]
    assert [(choice.index, choice.message.content) for choice in chat.choices] == [
        (0, "one"),
        (1, "two two"),
        (2, "three"),
    ]
    assert [choice.text for choice in plain.choices] == ["one", "two two", "three"]
    assert [choice.finish_reason for choice in chat.choices] == ["stop"] * 3
    assert [choice.finish_reason for choice in plain.choices] == ["stop"] * 3
    num_tokens = sum(len(ids_of(text)) for text in ("one", "two two", "three"))
    for usage, start in zip((chat.usage, plain.usage), starts, strict=True):
        assert usage is not None
        assert usage.prompt_tokens == start.num_prompt_tokens
        assert usage.completion_tokens == num_tokens
        assert usage.total_tokens == start.num_prompt_tokens + num_tokens
        assert start.sampling.n == 3
    assert starts[0].sampling.seed == 4


@asynchronous
async def test_the_real_client_streams_three_choices_that_come_by_turns() -> None:
    texts = ("one two", "three", "four five six")
    async with running() as it, client_of(it) as client:
        play(it.worker, *texts)
        options: Any = {"stream_options": {"include_usage": True}}
        stream = await client.chat.completions.create(model="demo", messages=HI, n=3, stream=True, **options)
        chat = [chunk async for chunk in stream]
        plain_stream = await client.completions.create(model="demo", prompt="x", n=3, max_tokens=50, stream=True)
        plain = [chunk async for chunk in plain_stream]
    assert [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chat[:3]] == [
        (0, "assistant"),
        (1, "assistant"),
        (2, "assistant"),
    ]
    choices = [chunk.choices[0] for chunk in chat[:-1]]
    for index, text in enumerate(texts):
        mine = [choice for choice in choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == text
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert "".join(chunk.choices[0].text for chunk in plain if chunk.choices[0].index == index) == text
    assert [choice.index for choice in choices[3:6]] == [0, 1, 2]
    assert chat[-1].choices == []
    assert chat[-1].usage is not None
    assert chat[-1].usage.completion_tokens == sum(len(ids_of(text)) for text in texts)


@asynchronous
async def test_a_grpc_client_gets_deltas_and_one_ending_of_each_choice() -> None:
    async with running() as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        play(it.worker, "ab", "c")
        events = [event async for event in generate(channel, n=2, seed=1)]
    told = [
        (event.delta.choice_index, event.delta.text)
        if event.WhichOneof("event") == "delta"
        else (event.finished.choice_index, event.finished.usage.completion_tokens)
        for event in events[1:]
    ]
    assert told == [(0, "a"), (1, "c"), (0, "b"), (1, 1), (0, 2)]
    assert {event.finished.usage.prompt_tokens for event in events[-2:]} == {1}
    assert {event.finished.handoff.transport for event in events[-2:]} == {"shm"}
    assert {event.finished.usage.cached_tokens for event in events[-2:]} == {2}


@asynchronous
async def test_logprobs_and_offsets_are_each_choices_own() -> None:
    async with running() as it, client_of(it) as client:
        play(it.worker, "one two", "three")
        plain = await client.completions.create(model="demo", prompt="x", n=2, max_tokens=9, logprobs=1)
        chat = await client.chat.completions.create(model="demo", messages=HI, n=2, logprobs=True)
        stream = await client.completions.create(model="demo", prompt="x", n=2, max_tokens=9, logprobs=1, stream=True)
        streamed = [chunk.choices[0] async for chunk in stream]
    for index, text in enumerate(("one two", "three")):
        lists = plain.choices[index].logprobs
        assert lists is not None
        assert lists.tokens is not None
        assert "".join(lists.tokens) == text
        lengths = [len(token) for token in lists.tokens]
        offsets = [sum(lengths[:rank]) for rank in range(len(lengths))]
        assert lists.text_offset == offsets
        pieces = [choice.logprobs for choice in streamed if choice.index == index and choice.logprobs]
        assert [offset for piece in pieces for offset in piece.text_offset or []] == offsets
        content = chat.choices[index].logprobs
        assert content is not None
        assert content.content is not None
        assert "".join(entry.token for entry in content.content) == text


@asynchronous
async def test_penalties_and_n_reach_the_worker_resolved_through_the_real_client() -> None:
    async with running(reply=[A]) as it, client_of(it) as client:
        await client.completions.create(
            model="demo",
            prompt="x",
            n=2,
            presence_penalty=0.5,
            frequency_penalty=-1,
            extra_body={"repetition_penalty": 1.25, "best_of": 2},
        )
        asked = (await it.worker.starts.get()).sampling
        await client.chat.completions.create(model="demo", messages=HI)
        silent = (await it.worker.starts.get()).sampling
    assert (asked.n, asked.presence_penalty, asked.frequency_penalty, asked.repetition_penalty) == (2, 0.5, -1.0, 1.25)
    assert (silent.n, silent.presence_penalty, silent.frequency_penalty, silent.repetition_penalty) == (1, 0, 0, 1)
    assert silent.HasField("repetition_penalty")
    assert not silent.HasField("prompt_logprobs")


def test_the_models_own_repetition_penalty_applies_where_the_request_is_silent() -> None:
    defaults = SamplingDefaults(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.5)
    model = dataclasses.replace(demo_model(), defaults=defaults)

    def penalty(asked: float | None) -> float:
        sampling = Sampling(repetition_penalty=asked)
        request = JourneyRequest(id="x", model="", prompt=TextPrompt("x"), sampling=sampling, arrival=0.0)
        prepared = prepare(request, model, max_model_len=2048, cluster_key=bytes(16), block_sizes=())
        return prepared.sampling.repetition_penalty

    assert (penalty(None), penalty(1.25)) == (1.5, 1.25)


@asynchronous
async def test_the_fingerprint_names_the_arithmetic_of_the_worker_that_serves() -> None:
    async with running(has_worker=False, reply=[A]) as it:
        it.worker.numerics_digest = "0123456789abcdef"
        await it.worker.start(it.grpc_address)
        whole = [await it.http.post(path, json={"messages": HI, "prompt": "x"}) for path in (CHAT, PLAIN)]
        stream = await it.http.post(CHAT, json={"messages": HI, "stream": True})
    fingerprints = [answer.json()["system_fingerprint"] for answer in whole]
    fingerprints += [event["system_fingerprint"] for event in events_of(stream.text)]
    assert set(fingerprints) == {"0123456789ab"}


@asynchronous
async def test_a_token_that_the_request_stops_at_is_told_and_an_end_of_sequence_is_not() -> None:
    async with running() as it:
        it.worker.replies = {0: [A, B], 1: [A, C], 2: [A, 2]}
        body = {"messages": HI, "n": 3, "stop_token_ids": [B, C], "max_tokens": 9}
        named = (await it.http.post(CHAT, json=body)).json()
        it.worker.finish_reason = LENGTH
        full = (await it.http.post(CHAT, json=body)).json()
    assert [choice["stop_reason"] for choice in named["choices"]] == [B, C, None]
    assert [choice["stop_reason"] for choice in full["choices"]] == [None] * 3


@asynchronous
async def test_refusals_of_the_real_client_are_bad_requests() -> None:
    async with running() as it, client_of(it) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="demo", messages=HI, n=17)
        assert it.gateway.journeys.in_flight() == (0, 0)
    assert refused.value.param == "n"
    assert "n is 17; allowed: 1 to 16" in refused.value.message
