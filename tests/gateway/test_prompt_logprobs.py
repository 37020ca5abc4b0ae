"""Log-probabilities of the prompt: the shapes that clients read, `echo`, and that every position comes once."""

import asyncio
import threading
from typing import Any

import grpc.aio
import pytest

from gateway.openai_logprobs import LEAST_LOGPROB, TextLogprobs, prompt_logprobs
from gateway.router import Demand, Refusal, Route, Snapshot, choose
from staffetta.v1 import common_pb2, decode_pb2
from tests.gateway.fakes import make_token
from tests.gateway.running import Running, asynchronous, demo_model, eventually, generate, ids_of, running
from tests.gateway.test_rest import CHAT, HI, PLAIN, client_of, events_of

A, B = (ids_of(letter)[0] for letter in "ab")
TEXT = "one two three"
IDS = ids_of(TEXT)
LENGTH = common_pb2.FINISH_REASON_LENGTH
BOS, EOS = 1, 2


def text_of(token_id: int) -> str:
    return demo_model().text.token_text(token_id)


@asynchronous
async def test_a_completion_has_the_prompts_log_probabilities_on_every_choice() -> None:
    async with running(reply=[A]) as it:
        body = {"prompt": TEXT, "n": 2, "prompt_logprobs": 2}
        answer = (await it.http.post(PLAIN, json=body)).json()
        start = await it.worker.starts.get()
    assert start.sampling.prompt_logprobs == 2
    expected = [
        {
            str(token_id): {"logprob": -0.5, "rank": 1, "decoded_token": text_of(token_id)},
            str(token_id + 1): {"logprob": -1.5, "rank": 2, "decoded_token": text_of(token_id + 1)},
        }
        for token_id in IDS[1:]
    ]
    assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [[None, *expected]] * 2
    assert [choice["text"] for choice in answer["choices"]] == ["a", "a"]
    assert "prompt_logprobs" not in answer


@asynchronous
async def test_a_chat_has_them_beside_its_choices() -> None:
    async with running(reply=[A]) as it, client_of(it) as client:
        answer: Any = await client.chat.completions.create(
            model="demo", messages=HI, n=2, extra_body={"prompt_logprobs": 0, "return_token_ids": True}
        )
        silent = (await it.http.post(CHAT, json={"messages": HI})).json()
    assert answer.prompt_logprobs[0] is None
    assert [list(position) for position in answer.prompt_logprobs[1:]] == [
        [str(token_id)] for token_id in answer.prompt_token_ids[1:]
    ]
    assert answer.prompt_logprobs[1][str(answer.prompt_token_ids[1])]["rank"] is None
    assert "prompt_logprobs" not in silent
    assert "prompt_logprobs" not in silent["choices"][0]


def test_a_token_outside_the_alternatives_comes_first_without_a_rank() -> None:
    token = make_token(1, A, num_logprobs=0)
    token.top_logprobs.add(token_id=B, logprob=-0.25)
    token.top_logprobs.add(token_id=A, logprob=-0.5)
    (first, position) = prompt_logprobs(demo_model().text, [token], num_top=1)
    assert first is None
    assert position is not None
    assert list(position.items()) == [
        (str(A), {"logprob": -0.5, "rank": None, "decoded_token": "a"}),
        (str(B), {"logprob": -0.25, "rank": 1, "decoded_token": "b"}),
    ]
    (_, ranked) = prompt_logprobs(demo_model().text, [token], num_top=2)
    assert ranked is not None
    assert list(ranked) == [str(A), str(B)]
    assert ranked[str(A)] == {"logprob": -0.5, "rank": 2, "decoded_token": "a"}


def test_no_probability_at_all_is_a_number_that_json_has() -> None:
    token = common_pb2.Token(index=1, token_id=A, logprob=float("-inf"))
    (_, position) = prompt_logprobs(demo_model().text, [token], num_top=0)
    assert position == {str(A): {"logprob": LEAST_LOGPROB, "rank": None, "decoded_token": "a"}}


def test_of_alternatives_with_the_same_text_the_likeliest_counts() -> None:
    text = demo_model().text
    halves = [token_id for token_id in range(1024) if text.token_text(token_id) == "\N{REPLACEMENT CHARACTER}"][:2]
    token = common_pb2.Token(index=0, token_id=A, logprob=-3)
    for token_id, logprob in zip(halves, (-0.25, -1.25), strict=True):
        token.top_logprobs.add(token_id=token_id, logprob=logprob)
    assert TextLogprobs(text, num_top=2).take([token])["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -0.25}]


def test_special_tokens_have_a_name_and_take_no_text() -> None:
    tokens = [common_pb2.Token(token_id=BOS), make_token(1, A, num_logprobs=0), make_token(2, EOS, num_logprobs=0)]
    tokens.append(make_token(3, B, num_logprobs=0))
    lists = TextLogprobs(demo_model().text, num_top=0).take(tokens)
    assert lists["tokens"] == [text_of(BOS), "a", text_of(EOS), "b"]
    assert lists["text_offset"] == [0, 0, 1, 1]
    assert lists["token_logprobs"] == [None, -0.5, -0.5, -0.5]


@asynchronous
async def test_echo_puts_the_prompt_before_every_choice() -> None:
    async with running(reply=[A, B]) as it, client_of(it) as client:
        answer = await client.completions.create(model="demo", prompt=TEXT, echo=True, n=2)
        ids = await client.completions.create(model="demo", prompt=IDS, echo=True)
        stream = await client.completions.create(model="demo", prompt=TEXT, echo=True, n=2, stream=True)
        streamed = [chunk.choices[0] async for chunk in stream]
        starts = [await it.worker.starts.get() for _ in range(3)]
    assert [choice.text for choice in answer.choices] == [TEXT + "ab"] * 2
    assert ids.choices[0].text == TEXT + "ab"
    assert [(choice.index, choice.text) for choice in streamed[:2]] == [(0, TEXT), (1, TEXT)]
    for index in range(2):
        assert "".join(choice.text for choice in streamed if choice.index == index) == TEXT + "ab"
    assert not any(start.sampling.HasField("prompt_logprobs") for start in starts)


@asynchronous
async def test_echo_with_logprobs_is_what_evaluation_harnesses_read() -> None:
    async with running(reply=[A]) as it, client_of(it) as client:
        answer = await client.completions.create(
            model="demo", prompt=IDS, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
        )
        stream = await client.completions.create(
            model="demo", prompt=IDS, echo=True, logprobs=1, max_tokens=1, stream=True
        )
        streamed = [chunk.choices[0] async for chunk in stream]
    (choice,) = answer.choices
    lists = choice.logprobs
    assert choice.text == TEXT + "a"
    assert lists is not None
    assert lists.tokens == [text_of(token_id) for token_id in (*IDS, A)]
    assert lists.token_logprobs == [None, *[-0.5] * len(IDS)]
    assert lists.top_logprobs == [None, *[{text_of(token_id): -0.5} for token_id in (*IDS[1:], A)]]
    assert lists.text_offset is not None
    assert lists.tokens is not None
    assert [
        choice.text[offset:][: len(token)] for offset, token in zip(lists.text_offset, lists.tokens, strict=True)
    ] == (lists.tokens)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(IDS), 1)
    pieces = [piece.logprobs for piece in streamed if piece.logprobs]
    assert [offset for piece in pieces for offset in piece.text_offset or []] == lists.text_offset
    assert [logprob for piece in pieces for logprob in piece.token_logprobs or []] == lists.token_logprobs


@asynchronous
async def test_echo_alone_draws_one_token_and_shows_none() -> None:
    async with running(reply=[A, B]) as it:
        body = {"prompt": TEXT, "echo": True, "max_tokens": 0, "logprobs": 0, "n": 2, "return_token_ids": True}
        answer = (await it.http.post(PLAIN, json=body)).json()
        start = await it.worker.starts.get()
        events = events_of((await it.http.post(PLAIN, json=body | {"stream": True})).text)
    assert start.sampling.max_tokens == 1
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (TEXT, "length", None)
        assert choice["logprobs"]["token_logprobs"] == [None, *[-0.5] * (len(IDS) - 1)]
        assert choice["prompt_token_ids"] == IDS
        assert "token_ids" not in choice
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["total_tokens"] == len(IDS)
    shown = [(event["choices"][0]["index"], event["choices"][0]["text"]) for event in events]
    assert shown == [(0, TEXT), (1, TEXT), (0, ""), (1, "")]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length", "length"]


@pytest.mark.parametrize(("logprobs", "scored", "wanted"), [(1, 3, 3), (3, 1, 3), (None, 2, 2), (2, None, 2)])
@asynchronous
async def test_echo_and_prompt_logprobs_have_as_many_alternatives_as_each_asked_for(
    logprobs: int | None, scored: int | None, wanted: int
) -> None:
    async with running(reply=[A]) as it:
        body = {"prompt": TEXT, "echo": True, "logprobs": logprobs, "prompt_logprobs": scored, "max_tokens": 1}
        (choice,) = (await it.http.post(PLAIN, json=body)).json()["choices"]
        start = await it.worker.starts.get()
    assert start.sampling.prompt_logprobs == wanted
    assert (choice["logprobs"] is None) == (logprobs is None)
    if logprobs is not None:
        assert len(choice["logprobs"]["top_logprobs"][1]) == logprobs
    assert ("prompt_logprobs" in choice) == (scored is not None)
    if scored is not None:
        assert len(choice["prompt_logprobs"][1]) == scored


@asynchronous
async def test_a_prompt_of_one_token_has_one_position_without_a_log_probability() -> None:
    async with running(reply=[A]) as it:
        body = {"prompt": IDS[:1], "echo": True, "logprobs": 1, "prompt_logprobs": 1, "max_tokens": 1}
        (choice,) = (await it.http.post(PLAIN, json=body)).json()["choices"]
    assert choice["prompt_logprobs"] == [None]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]


@asynchronous
async def test_a_grpc_client_gets_them_in_parts_before_any_output() -> None:
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        events = aiter(generate(channel, TEXT, n=2, prompt_logprobs=1))
        assert (await anext(events)).WhichOneof("event") == "started"
        request_id = (await it.worker.starts.get()).request_id
        it.worker.score(request_id, range(1, 3), num_logprobs=1)
        assert [token.index for token in (await anext(events)).prompt_logprobs.tokens] == [1, 2]
        # A part that came before is dropped, position by position; an empty rest is not sent.
        it.worker.score(request_id, range(1, 3), num_logprobs=1)
        it.worker.score(request_id, range(2, len(IDS)), num_logprobs=1)
        rest = (await anext(events)).prompt_logprobs.tokens
        assert [(token.index, token.token_id) for token in rest] == [*enumerate(IDS)][3:]
        for choice in range(2):
            it.worker.emit(request_id, [A], choice=choice, finish=LENGTH)
        kinds = [event.WhichOneof("event") async for event in events]
    assert kinds == ["delta", "finished"] * 2


@asynchronous
async def test_they_may_come_with_the_first_token() -> None:
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        call = generate(channel, TEXT, prompt_logprobs=0)
        request_id = (await it.worker.starts.get()).request_id
        event = decode_pb2.SequenceEvent(request_id=request_id, tokens=[make_token(0, A)], finish_reason=LENGTH)
        event.prompt_tokens.extend(make_token(at, IDS[at], num_logprobs=0) for at in range(1, len(IDS)))
        it.worker.send(event)
        kinds = [event.WhichOneof("event") async for event in call]
    assert kinds == ["started", "prompt_logprobs", "delta", "finished"]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (range(2, 4), "the prompt's token 2 came where 1 was due"),
        (range(1, 2), "output came where the prompt's token 2"),
    ],
    ids=["gap", "short"],
)
@asynchronous
async def test_a_gap_in_them_ends_the_request(positions: range, message: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gateway.generate_http")
    async with running(reply=None) as it:
        answer = asyncio.create_task(it.http.post(PLAIN, json={"prompt": TEXT, "prompt_logprobs": 1}))
        request_id = (await it.worker.starts.get()).request_id
        it.worker.score(request_id, positions)
        it.worker.emit(request_id, [A], finish=LENGTH)
        response = await answer
    assert response.status_code == 500
    assert any(message in logged for logged in caplog.messages)


@asynchronous
async def test_the_prefix_cache_is_not_a_reason_to_choose_a_worker_that_must_not_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    demands: list[Demand] = []

    def spy(snapshot: Snapshot, demand: Demand) -> Route | Refusal:
        demands.append(demand)
        return choose(snapshot, demand)

    monkeypatch.setattr("gateway.journey.choose", spy)
    async with running(reply=[A]) as it:
        for body in ({}, {"prompt_logprobs": 0}):
            await it.http.post(PLAIN, json={"prompt": IDS * 10} | body)
    assert [sorted(demand.hashes) for demand in demands] == [[16], []]


async def lose_after_scores(it: Running, channel: grpc.aio.Channel, *, other_digest: str) -> list[str]:
    """The kinds of events, or the reason of failure, when a worker is lost after the client has scores of it."""
    events = aiter(generate(channel, TEXT, prompt_logprobs=0))
    kinds = [(await anext(events)).WhichOneof("event")]
    request_id = (await it.worker.starts.get()).request_id
    it.worker.score(request_id, range(1, 3))
    kinds.append((await anext(events)).WhichOneof("event"))
    other = type(it.worker)(it.worker.digest, worker_id="decode-1", reply=[A])
    other.numerics_digest = other_digest
    it.others.append(other)
    await other.start(it.grpc_address)
    await it.until_open("decode-1")
    await it.worker.stop()
    try:
        async for event in events:
            kinds.append(event.WhichOneof("event"))
            if kinds[-1] == "prompt_logprobs":
                assert [token.index for token in event.prompt_logprobs.tokens] == list(range(3, len(IDS)))
    except grpc.aio.AioRpcError as error:
        kinds.append(error.code().name)
    return kinds


@asynchronous
async def test_a_worker_of_equal_arithmetic_goes_on_where_the_lost_one_ended() -> None:
    async with running(reply=None) as it, grpc.aio.insecure_channel(it.grpc_address) as channel:
        kinds = await lose_after_scores(it, channel, other_digest="numerics")
    assert kinds == ["started", "prompt_logprobs", "prompt_logprobs", "delta", "finished"]


@asynchronous
async def test_a_worker_of_other_arithmetic_does_not() -> None:
    async with (
        running(reply=None, start_timeout_s=0.2) as it,
        grpc.aio.insecure_channel(it.grpc_address) as channel,
    ):
        kinds = await lose_after_scores(it, channel, other_digest="other")
        assert it.others[0].starts.empty()
    assert kinds == ["started", "prompt_logprobs", "UNAVAILABLE"]


@asynchronous
async def test_long_answers_are_written_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def spy(*_: object, **__: object) -> list[None]:
        threads.append(threading.current_thread())
        return []

    monkeypatch.setattr("gateway.openai_response.prompt_logprobs", spy)
    async with running(reply=[A]) as it:
        await it.http.post(PLAIN, json={"prompt": TEXT, "prompt_logprobs": 1})
        await eventually(lambda: it.num_in_flight() == 0)
    assert threads
    assert threading.main_thread() not in threads
